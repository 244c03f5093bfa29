"""The same global batches for any number of ranks and workers, also over kills and resumptions with other numbers."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from nemo_emmett.data import SpeechTextDataset, get_multimodal_dataloader

from .corpora import SPEECH_SIZES, TEXT_SIZES, Corpus, ids_of
from .fitting import Run, complete, run_ranks

SETTINGS = {
    "prompt_format": "emmett_t5",
    "audio_locator_tag": "<|audio|>",
    "token_equivalent_duration": 0.08,
    "seed": 4,
    "shard_seed": 4,
    "shuffle": True,
    "sampling": "emmett",
}
SPEECH = {"bucket_duration_bins": [0.2, 0.3, 0.5], "bucket_batch_size": [32, 16, 16]}
PACKED = {
    "speech": {"packing": True, "row_tokens": [14, 30], "batch_size": 8},
    "text": {"packing": True, "row_tokens": 24, "batch_size": 8},
}
TEXT = {"bucket_duration_bins": [8, 16, 60], "bucket_batch_size": [48, 32, 16], "use_multimodal_sampling": True}
OTHERS = [(1, 3), (2, 1), (4, 0)]
"""Numbers of ranks and workers that are compared with one rank without workers."""


class Ids(SpeechTextDataset):
    """Examples to their ids; no audio is read."""

    def __getitem__(self, examples) -> dict:
        return {"examples": [str(getattr(e, "id", None) or e.custom["id"]) for e in examples]}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> dict[str, dict[str, list]]:
    made = {}
    for kind in ("plain", "tarred"):
        corpus = Corpus(tmp_path_factory.mktemp(kind), tarred=kind == "tarred")
        made[kind] = {
            "speech": [corpus.source(name, size, weight=size) for name, size in SPEECH_SIZES.items()],
            "text": [corpus.source(name, size // 5 + 1, weight=size) for name, size in TEXT_SIZES.items()],
        }
    return made


def config_of(sources: dict[str, list], fusion: str, world_size: int, **keys) -> dict:
    """A dataset whose batches are, times the ranks, always the same."""

    if fusion == "packed":
        groups = {
            name: {"input_cfg": sources[name], **group, "batch_size": group["batch_size"] // world_size}
            for name, group in PACKED.items()
        }
        return {**SETTINGS, "multi_config": True, "sampler_fusion": "round_robin", **groups, **keys}

    def divided(group: dict) -> dict:
        sizes = [size // world_size for size in group["bucket_batch_size"]]
        return {**group, "bucket_batch_size": sizes}

    if fusion == "mux":
        groups = {name: {"input_cfg": of_group} for name, of_group in sources.items()}
        batches = divided({**TEXT, "bucket_duration_bins": [4, 8, 60]})
        mixed = {**groups, "sampler_weights": {"speech": 0.3, "text": 0.7}, **batches}
        return {**SETTINGS, "multi_config": True, "sampler_fusion": "mux", **mixed, **keys}
    groups = {
        "speech": {"input_cfg": sources["speech"], **divided(SPEECH)},
        "text": {"input_cfg": sources["text"], **divided(TEXT)},
    }
    weights = {"sampler_weights": {"speech": 0.4, "text": 0.6}} if fusion == "randomized_round_robin" else {}
    return {**SETTINGS, "multi_config": True, "sampler_fusion": fusion, **groups, **weights, **keys}


def digest(ids: list[str]) -> str:
    return hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()


@pytest.mark.parametrize(
    ("fusion", "kind"),
    [
        ("zip", "plain"),
        ("zip", "tarred"),
        ("mux", "tarred"),
        ("round_robin", "plain"),
        ("randomized_round_robin", "plain"),
        ("packed", "tarred"),
    ],
)
def test_global_batches_are_the_same_for_any_number_of_ranks_and_workers(corpora, tokenizer, fusion, kind) -> None:
    sources = corpora[kind]

    def digests(world_size: int, workers: int) -> list[str]:
        config = config_of(sources, fusion, world_size, num_workers=workers, force_finite=True)
        loaders = [
            get_multimodal_dataloader(config, rank, world_size, Ids(tokenizer), tokenizer) for rank in range(world_size)
        ]
        steps = zip(*(islice(loader, 40) for loader in loaders), strict=True)
        return [digest([example for batch in step for example in batch["examples"]]) for step in steps]

    reference = digests(1, 0)
    assert len(set(reference)) == len(reference) > 7
    for world_size, workers in OTHERS:
        assert digests(world_size, workers) == reference, (world_size, workers)


@pytest.mark.parametrize(("fusion", "kind"), [("round_robin", "plain"), ("mux", "tarred"), ("packed", "plain")])
def test_a_pass_over_three_sizes_of_cluster_has_every_example_once(corpora, tokenizer, tmp_path, fusion, kind) -> None:
    """Killed by SIGKILL on 4 ranks, continued on 2 and killed again, continued on 8 to the end of the pass."""
    sources = corpora[kind]
    config = config_of(sources, fusion, 1, force_finite=True)
    whole = [
        ids_of(batch) for batch in get_multimodal_dataloader(config, 0, 1, SpeechTextDataset(tokenizer), tokenizer)
    ]
    steps = len(whole)
    kills = sorted(random.Random(fusion).sample(range(3, steps - 3), 2))
    trained: list[str] = []
    checkpoint = None
    for world_size, kill in ((4, kills[0]), (2, kills[1]), (8, None)):
        run = Run(
            tmp_path / f"{world_size} ranks",
            config_of(sources, fusion, world_size, num_workers=world_size % 4, force_finite=True),
            Path(tokenizer.tokenizer.name_or_path),
            epochs=1,
            world_size=world_size,
            checkpoint_every=2,
            kill_in_step=kill,
            checkpoint=checkpoint,
        )
        if kill is None:
            complete(run)
            last = steps
        else:
            assert run_ranks(run) == [-9] * world_size
            last, checkpoint = max(run.checkpoints().items())
        for rank in range(world_size):
            for record in run.records(rank):
                trained += record["ids"] if record["step"] < last else []
    assert max(Counter(trained).values()) == 1, "none repeated"
    assert sorted(trained) == sorted(example for step in whole for example in step), "none lost"
