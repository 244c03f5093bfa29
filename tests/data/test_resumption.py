"""A run that is killed and resumed trains on the batches of one that was never interrupted."""

from __future__ import annotations

import hashlib
import io
import json
import random
from itertools import chain, islice, product
from pathlib import Path

import pytest
import torch

from nemo_emmett.data import SpeechTextDataset, get_multimodal_dataloader

from .corpora import SPEECH_SIZES, TEXT_SIZES, Corpus, ids_of
from .fitting import Run, complete, run_ranks

SPEECH_BUCKETS = {"bucket_duration_bins": [0.2, 0.3, 0.5], "bucket_batch_size": [4, 3, 2]}
TEXT_BUCKETS = {"bucket_duration_bins": [8, 16, 30], "bucket_batch_size": [5, 4, 3]}
STATES = Path(__file__).parent / "states.json"
FUSIONS = ("zip", "round_robin", "randomized_round_robin", "mux")


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, tuple[list, list]]:
    """The speech and text sources of the corpora, plain and with tarred speech."""
    made = {}
    for kind in ("plain", "tarred"):
        corpus = Corpus(tmp_path_factory.mktemp(kind), tarred=kind == "tarred")
        speech = [corpus.source(name, size, weight=size) for name, size in SPEECH_SIZES.items()]
        text = [corpus.source(name, size, weight=size) for name, size in TEXT_SIZES.items()]
        made[kind] = speech, text
    return made


@pytest.fixture
def train_ds(sources):
    """A shuffled, bucketed blend of speech and text."""

    def make(fusion: str = "zip", kind: str = "plain", **keys) -> dict:
        speech, text = sources[kind]
        common = {
            "prompt_format": "emmett_t5",
            "audio_locator_tag": "<|audio|>",
            "token_equivalent_duration": 0.08,
            "seed": 1,
            "shard_seed": 1,
            "shuffle": True,
            **keys,
        }
        if fusion == "packed":
            rows = {"packing": True, "row_tokens": 40, "batch_size": 2}
            groups = {"speech": {"input_cfg": speech, **rows}, "text": {"input_cfg": text, **rows}}
            return {**common, "multi_config": True, "sampler_fusion": "zip", **groups}
        if fusion == "mux":
            blend = [
                {"type": "group", "input_cfg": speech, "weight": 0.4},
                {"type": "group", "input_cfg": text, "weight": 0.6},
            ]
            return {**common, "input_cfg": blend, "use_multimodal_sampling": True, **TEXT_BUCKETS}
        if fusion == "randomized_round_robin":
            common["sampler_weights"] = {"speech": 0.4, "text": 0.6}
        return {
            **common,
            "multi_config": True,
            "sampler_fusion": fusion,
            "speech": {"input_cfg": speech, "shuffle_buffer_size": 20, **SPEECH_BUCKETS},
            "text": {"input_cfg": text, "use_multimodal_sampling": True, "shuffle_buffer_size": 100, **TEXT_BUCKETS},
        }

    return make


@pytest.fixture
def run(tmp_path, tokenizer):
    """A training run in the test's folder."""

    def make(config: dict, folder: str = "whole", **keys) -> Run:
        return Run(tmp_path / folder, config, Path(tokenizer.tokenizer.name_or_path), **keys)

    return make


def sequence(records: list[dict]) -> list[list[str]]:
    return [record["ids"] for record in records]


def sha256(steps: list[list[str]]) -> str:
    return hashlib.sha256(json.dumps(steps).encode()).hexdigest()


# Killed in the middle of training


# Any three of a fusion, a number of workers, a number of ranks and a kind of files meet in one of these.
KILLED = [
    (fusion, workers, ranks, "tarred" if (fusion == "zip") ^ (workers == 2) ^ (ranks == 2) else "plain")
    for fusion, workers, ranks in product(("zip", "randomized_round_robin"), (0, 2), (1, 2))
]
KILLED += [("packed", 0, 1, "plain"), ("packed", 2, 2, "tarred")]


@pytest.mark.parametrize(("fusion", "workers", "world_size", "kind"), KILLED)
def test_a_killed_run_continues_as_if_nothing_had_happened(run, train_ds, fusion, workers, world_size, kind) -> None:
    whole = run(train_ds(fusion, kind, num_workers=workers), steps=14, world_size=world_size)
    complete(whole)
    step = random.Random(f"{fusion} {workers} {world_size} {kind}").randrange(4, 13)
    killed = whole.with_changes("killed", checkpoint_every=3, kill_in_step=step)
    assert run_ranks(killed) == [-9] * world_size
    trained, checkpoint = max(killed.checkpoints().items())
    resumed = complete(whole.with_changes("resumed", checkpoint=checkpoint))

    assert trained == step // 3 * 3, "the last checkpoint before the kill"
    for rank in range(world_size):
        expected = sequence(whole.records(rank))
        assert len(expected) == 14
        assert len({json.dumps(ids) for ids in expected}) == 14, "no two steps can be mistaken for one another"
        assert resumed.records(rank)[0]["step"] == trained
        assert resumed.records(rank)[0]["ids"] == expected[trained], "not the batch that was fetched ahead"
        joined = sequence(killed.records(rank)[:trained]) + sequence(resumed.records(rank))
        assert sha256(joined) == sha256(expected)


def test_endless_data_in_epochs_of_a_given_length(run, train_ds) -> None:
    """Lightning begins a new pass over the loader in the middle of the data; the data continues."""
    whole = complete(run(train_ds("zip"), steps=14, batches_per_epoch=5, checkpoint_every=1))
    expected = sequence(whole.records())
    assert [record["epoch"] for record in whole.records()] == [0] * 5 + [1] * 5 + [2] * 4
    assert len({json.dumps(ids) for ids in expected}) == 14
    for trained in (4, 5, 6):
        resumed = whole.with_changes(f"after{trained}", checkpoint=whole.checkpoints()[trained], checkpoint_every=None)
        assert sequence(complete(resumed).records()) == expected[trained:]


@pytest.mark.parametrize("workers", [0, 2])
def test_finite_data_across_the_end_of_an_epoch(run, sources, train_ds, workers) -> None:
    _, text = sources["plain"]
    config = {key: value for key, value in train_ds("mux").items() if not key.startswith("bucket")}
    config |= {"input_cfg": text[2:], "batch_size": 2, "force_finite": True, "num_workers": workers}  # 17 lines
    whole = complete(run(config, epochs=3, checkpoint_every=1))
    of_epoch = [[record for record in whole.records() if record["epoch"] == epoch] for epoch in range(3)]
    lines = [sorted(chain(*sequence(records))) for records in of_epoch]
    assert lines[0] == lines[1] == lines[2] == sorted(f"text_fr.en:{number}" for number in range(1, 18))
    assert sequence(of_epoch[0]) != sequence(of_epoch[1]) != sequence(of_epoch[2])

    end = len(of_epoch[0])
    for trained in (end - 1, end, end + 1, 2 * end):
        limits = {"epochs": None, "steps": 3 * end}  # after an epoch's last step Lightning counts on in that epoch
        checkpoint = whole.checkpoints()[trained]
        resumed = whole.with_changes(f"after{trained}", checkpoint=checkpoint, checkpoint_every=None, **limits)
        assert sequence(complete(resumed).records()) == sequence(whole.records())[trained:]


def test_workers_do_not_wait_for_threads_that_a_fork_has_left_behind(run, train_ds) -> None:
    """With this variable set, Hugging Face's tokenizers keep their threads even where a fork has taken them away."""
    threads = {"TOKENIZERS_PARALLELISM": "true"}
    complete(run(train_ds("zip", num_workers=2), steps=4, environment=threads))


# The state of a loader, without a trainer


@pytest.fixture
def load(tokenizer):
    def build(config: dict, rank: int = 0, world_size: int = 1):
        return get_multimodal_dataloader(config, rank, world_size, SpeechTextDataset(tokenizer), tokenizer)

    return build


def through_a_file(state: dict) -> dict:
    """As Lightning's checkpoints are loaded where weights only are allowed."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_continues(load, config: dict, stop_after: int, steps: int = 24, **rank) -> None:
    expected = [ids_of(batch) for batch in islice(load(config, **rank), steps)]
    interrupted = load(config, **rank)
    before = [ids_of(batch) for batch in islice(interrupted, stop_after)]
    resumed = load(config, **rank)
    resumed.load_state_dict(through_a_file(interrupted.state_dict()))
    after = [ids_of(batch) for batch in islice(resumed, steps - stop_after)]
    assert before + after == expected
    assert len({json.dumps(ids) for ids in expected}) == steps


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_fusion_resumes_after_the_last_batch_that_was_yielded(load, train_ds, fusion, workers) -> None:
    assert_continues(load, train_ds(fusion, num_workers=workers), stop_after=7)


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("stop_after", [1, 2, 3, 4])
def test_workers_that_are_at_different_points_resume_in_turn(load, train_ds, workers, stop_after) -> None:
    assert_continues(load, train_ds("randomized_round_robin", num_workers=workers), stop_after, steps=12)


@pytest.mark.parametrize("kind", ["plain", "tarred"])
@pytest.mark.parametrize("rank", [0, 1])
def test_one_state_serves_all_ranks(load, train_ds, rank, kind) -> None:
    """Lightning keeps that of rank 0 alone."""
    config = train_ds("randomized_round_robin", kind, num_workers=2)
    expected = [ids_of(batch) for batch in islice(load(config, rank, 2), 15)]
    first = load(config, 0, 2)
    list(islice(first, 6))
    resumed = load(config, rank, 2)
    resumed.load_state_dict(through_a_file(first.state_dict()))
    assert [ids_of(batch) for batch in islice(resumed, 9)] == expected[6:]


@pytest.mark.parametrize("fusion", ["zip", "mux"])
def test_data_seen_many_times_over_resumes_in_a_later_pass(load, train_ds, sources, fusion) -> None:
    """150 steps: all sources have started over, the smallest of them dozens of times."""
    config = train_ds(fusion)
    loader = load(config)
    seen = [ids_of(batch) for batch in islice(loader, 150)]
    assert list(chain(*seen)).count("speech_fr_00000.wav") > 1
    resumed = load(config)
    interrupted = load(config)
    list(islice(interrupted, 140))
    resumed.load_state_dict(through_a_file(interrupted.state_dict()))
    assert [ids_of(batch) for batch in islice(resumed, 10)] == seen[140:]


def test_resuming_twice(load, train_ds) -> None:
    config = train_ds("zip", num_workers=2)
    expected = [ids_of(batch) for batch in islice(load(config), 12)]
    state, seen = None, []
    for steps in (5, 1, 6):
        loader = load(config)
        if state is not None:
            loader.load_state_dict(state)
        seen += [ids_of(batch) for batch in islice(loader, steps)]
        state = through_a_file(loader.state_dict())
    assert seen == expected


def test_a_state_taken_before_the_first_batch(load, train_ds) -> None:
    config = train_ds("zip")
    expected = [ids_of(batch) for batch in islice(load(config), 4)]
    resumed = load(config)
    resumed.load_state_dict(through_a_file(load(config).state_dict()))
    assert [ids_of(batch) for batch in islice(resumed, 4)] == expected


@pytest.mark.parametrize("fusion", ["randomized_round_robin", "mux"])
def test_a_state_of_an_earlier_version_continues(load, train_ds, sources, fusion) -> None:
    """``states.json`` was written by commit e203360: states after 7 batches, with the ids of the next 8."""
    speech, _ = sources["plain"]
    folder = str(Path(speech[0]["manifest_filepath"]).parent)
    written = json.loads(STATES.read_text().replace("FOLDER", folder))[fusion]
    loader = load(train_ds(fusion, num_workers=2))
    loader.load_state_dict(written["state"])
    assert [ids_of(batch) for batch in islice(loader, 8)] == written["next"]
