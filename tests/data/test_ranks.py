"""Several ranks: in step with one another, no example twice, and none waits for one whose data has ended."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from nemo_emmett.data import SpeechTextDataset, get_multimodal_dataloader

from .corpora import SAMPLING_RATE, Corpus, dataset_of, ids_of
from .fitting import Run, complete

SETTINGS = {
    "prompt_format": "emmett_t5",
    "audio_locator_tag": "<|audio|>",
    "token_equivalent_duration": 0.08,
    "seed": 5,
    "shard_seed": 5,
    "shuffle": True,
}
SPEECH_BINS, SPEECH_SIZES = [0.2, 0.3, 0.5], [4, 3, 2]
TEXT_BINS, TEXT_SIZES = [8, 16, 30], [5, 4, 3]


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    (tmp_path / "corpus").mkdir()
    return Corpus(tmp_path / "corpus")


@pytest.fixture
def load(tokenizer):
    def build(config: dict, rank: int = 0, world_size: int = 2):
        config = {**SETTINGS, **config}
        return get_multimodal_dataloader(config, rank, world_size, SpeechTextDataset(tokenizer), tokenizer)

    return build


@pytest.fixture
def run(tmp_path, tokenizer):
    def make(config: dict, folder: str = "run", **keys) -> Run:
        folder = tmp_path / folder
        return Run(folder, {**SETTINGS, **config}, Path(tokenizer.tokenizer.name_or_path), world_size=2, **keys)

    return make


def fused(speech: list, text: list, fusion: str, buckets: bool = True, **keys) -> dict:
    """A group of speech and one of text, with buckets or two examples a batch."""
    of_speech = {"bucket_duration_bins": SPEECH_BINS, "bucket_batch_size": SPEECH_SIZES}
    of_text = {"bucket_duration_bins": TEXT_BINS, "bucket_batch_size": TEXT_SIZES}
    if not buckets:
        of_speech = of_text = {"batch_size": 2}
    return {
        "multi_config": True,
        "sampler_fusion": fusion,
        "speech": {"input_cfg": speech, **of_speech},
        "text": {"input_cfg": text, "use_multimodal_sampling": True, **of_text},
        **keys,
    }


def ids_of_steps(records: list[dict]) -> list[str]:
    return [example_id for record in records for example_id in record["ids"]]


# Data that ends


def left_out(log: str) -> int:
    """The number of examples that the log says were left out when the data ended."""
    return sum(
        int(count) for count in re.findall(r"(\d+) examples (?:of \w+ )?did not fill a batch for each rank", log)
    )


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fusion", ["round_robin", "randomized_round_robin", "mux"])
def test_finite_data_of_unequal_size_is_shared_out(run, corpus, fusion, workers) -> None:
    """20 + 48 records of four sources in batches of two or by buckets: odd totals, for two ranks and two workers."""
    sizes = {"speech_de": 13, "speech_fr": 7, "text_de": 37, "text_es": 11}
    speech = [corpus.source(name, size, weight=size) for name, size in sizes.items() if "speech" in name]
    text = [corpus.source(name, size, weight=size) for name, size in sizes.items() if "text" in name]
    config = fused(speech, text, fusion, num_workers=workers, force_finite=True)
    if fusion == "mux":
        config = {"input_cfg": speech + text, "batch_size": 3, "use_multimodal_sampling": True}
        config |= {"num_workers": workers, "force_finite": True}
    done = complete(run(config, epochs=1))

    first, second = done.records(0), done.records(1)
    assert len(first) == len(second) > 0
    assert [record["modalities"] for record in first] == [record["modalities"] for record in second] or fusion == "mux"
    seen = Counter(ids_of_steps(first) + ids_of_steps(second))
    assert set(seen.values()) == {1}, "each example once"
    assert {dataset_of(example) for example in seen} == set(sizes)
    assert len(seen) + left_out(done.log(0)) == sum(sizes.values())
    assert left_out(done.log(0)) == left_out(done.log(1))
    assert left_out(done.log(0)) <= 3 * 2 * max(workers, 1), "at most one batch short of all ranks, bucket and worker"


@pytest.mark.parametrize("workers", [0, 2])
def test_zip_ends_on_all_ranks_with_the_shortest_group(run, corpus, workers) -> None:
    """13 recordings by twos for two ranks; text would last for longer, and the log says so."""
    config = fused([corpus.source("speech_de", 13)], [corpus.source("text_de", 101)], "zip", buckets=False)
    done = complete(run({**config, "num_workers": workers, "force_finite": True}, epochs=1))
    first, second = done.records(0), done.records(1)
    assert len(first) == len(second) > 0
    assert all(record["modalities"] == ["audio", "text"] for record in first + second)
    seen = Counter(ids_of_steps(first) + ids_of_steps(second))
    assert set(seen.values()) == {1}
    speech = [example for example in seen if example.startswith("speech")]
    assert 13 - max(workers, 1) <= len(speech) <= 13
    assert "zip ended with speech" in done.log(0)
    assert "zip ended with speech" in done.log(1)


def test_a_source_smaller_than_the_number_of_ranks(run, corpus) -> None:
    """One recording for two ranks fits into no step; the log says so, and the text is trained on."""
    config = fused([corpus.source("speech_fr", 1)], [corpus.source("text_de", 8)], "round_robin", buckets=False)
    done = complete(run({**config, "force_finite": True}, epochs=1))
    seen = [sorted(ids_of_steps(done.records(rank))) for rank in (0, 1)]
    assert [len(ids) for ids in seen] == [4, 4]
    assert not set(seen[0]) & set(seen[1])
    assert left_out(done.log(0)) == left_out(done.log(1)) == 1


def test_ranks_validate_in_step_where_a_batch_cannot_be_read(load, corpus) -> None:
    """4 recordings one by one, the first of which is empty: its rank gets an empty batch in its place."""
    source = corpus.source("speech_fr", 4)
    corpus.audio_path("speech_fr", 0).write_bytes(b"")
    validation = {"input_cfg": [source], "batch_size": 1, "force_finite": True, "force_map_dataset": True}
    batches = [list(load({**validation, "shuffle": False, "max_bad_records": None}, rank)) for rank in (0, 1)]
    assert [len(of_rank) for of_rank in batches] == [2, 2]
    assert sorted(len(batch) == 0 for of_rank in batches for batch in of_rank) == [False, False, False, True]


def test_two_epochs_of_finite_data(run, corpus) -> None:
    sources = [corpus.source("text_de", 9, weight=1), corpus.source("text_es", 8, weight=1)]
    config = {"input_cfg": sources, "batch_size": 2, "use_multimodal_sampling": True, "force_finite": True}
    done = complete(run(config, epochs=2))
    both = done.records(0) + done.records(1)
    for epoch in (0, 1):
        seen = Counter(ids_of_steps([record for record in both if record["epoch"] == epoch]))
        assert set(seen.values()) == {1}
        assert len(seen) >= 16


# Data without end


@pytest.mark.parametrize("workers", [0, 2])
def test_modality_and_bucket_are_the_same_on_all_ranks_in_every_step(load, corpus, workers) -> None:
    speech = [corpus.source("speech_de", 40, weight=3), corpus.source("speech_fr", 5, weight=1)]
    text = [corpus.source("text_de", 200, weight=3), corpus.source("text_es", 30, weight=1)]
    config = fused(speech, text, "randomized_round_robin", sampler_weights={"speech": 0.3, "text": 0.7})
    loaders = [load({**config, "num_workers": workers}, rank) for rank in (0, 1)]
    steps = list(islice(zip(*loaders, strict=True), 100))
    kinds = [{_modality_and_bucket(batch) for batch in step} for step in steps]
    assert all(len(kind) == 1 for kind in kinds)
    assert len({kind for (kind,) in kinds}) == 6, "three buckets of each modality"


def _modality_and_bucket(batch: dict) -> tuple[str, int, int]:
    """Modality, bucket and number of examples; all examples of a batch must be from that bucket."""
    ((modality, part),) = batch.items()
    if modality == "audio":
        lengths, bins = [samples / SAMPLING_RATE for samples in part["audio_lens"].tolist()], SPEECH_BINS
    else:
        lengths, bins = (part["context_lens"] + part["answer_lens"]).tolist(), TEXT_BINS
    (bucket,) = {sum(length > limit for limit in bins) for length in lengths}
    return modality, bucket, len(lengths)


def in_order(loaders: list, steps: int) -> Iterator[str]:
    """The ids of all ranks' examples, step by step."""
    for step in islice(zip(*loaders, strict=True), steps):
        for batch in step:
            yield from ids_of(batch)


def test_no_example_comes_again_before_its_source_is_exhausted(load, corpus) -> None:
    sizes = {"text_de": 61, "text_es": 23, "text_fr": 7}
    sources = [corpus.source(name, size, weight=size) for name, size in sizes.items()]
    loaders = [load({"input_cfg": sources, "batch_size": 4}, rank) for rank in (0, 1)]
    of_source = defaultdict(list)
    for example in in_order(loaders, 50):
        of_source[dataset_of(example)].append(example)
    for name, size in sizes.items():
        passes = [of_source[name][start : start + size] for start in range(0, len(of_source[name]), size)]
        assert len(passes) >= 3
        assert all(len(set(ids)) == len(ids) for ids in passes)


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_share_out_each_source(load, corpus, workers) -> None:
    """While one worker begins its next pass, another may have a step of the last one left, but no more."""
    size, in_a_step = 97, 2 * 4
    config = {"input_cfg": [corpus.source("text_de", size)], "batch_size": 4, "num_workers": workers}
    loaders = [load(config, rank) for rank in (0, 1)]
    seen: Counter[str] = Counter()
    for example in in_order(loaders, 60):
        seen[example] += 1
        behind = size - sum(count >= seen[example] - 1 for count in seen.values())
        assert seen[example] == 1 or behind <= workers * in_a_step
    assert len(seen) == size
    assert max(seen.values()) - min(seen.values()) <= 1


# A rank that cannot read its audio


def test_a_rank_without_readable_audio_stays_in_step(run, corpus, load) -> None:
    """All recordings of one rank's third speech batch are damaged; it continues, and loses nothing else."""
    speech, text = [corpus.source("speech_de", 40)], [corpus.source("text_de", 50)]
    config = fused(speech, text, "randomized_round_robin", max_bad_records=None)
    intact = [[ids_of(batch) for batch in islice(load(config, rank), 12)] for rank in (0, 1)]
    damaged = [ids for ids in intact[1] if ids[0].startswith("speech")][2]
    for name in damaged:
        (corpus.folder / name).write_bytes(b"this is no sound")
    done = complete(run(config, steps=12))
    expected = [[example for example in ids if example not in damaged] for ids in intact[1]]
    assert [record["ids"] for record in done.records(1)] == expected
    assert [record["ids"] for record in done.records(0)] == intact[0]
    assert [] in expected
    assert "unreadable audio" in done.log(1)


def test_all_ranks_agree_where_a_whole_source_cannot_be_read(run, corpus) -> None:
    """Every third recording is damaged, on either rank; steps stay the same on both."""
    speech, text = [corpus.source("speech_de", 30)], [corpus.source("text_de", 30)]
    for number in range(0, 30, 3):
        corpus.audio_path("speech_de", number).write_bytes(b"")
    config = fused(speech, text, "round_robin", buckets=False, max_bad_records=None, num_workers=2)
    done = complete(run(config, steps=40))
    pairs = zip(done.records(0), done.records(1), strict=True)
    modalities = [{modality for record in pair for modality in record["modalities"]} for pair in pairs]
    assert len(modalities) == 40
    assert all(len(of_step) <= 1 for of_step in modalities)
