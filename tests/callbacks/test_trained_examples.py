"""Counts of what was trained on: over batches, ranks and resumed runs."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from omegaconf import OmegaConf

from nemo_emmett.callbacks.trained_examples import TrainedExamples, counts_of
from nemo_emmett.training_record import record_of_checkpoint, record_of_trainer


def examples(modality: str, *directions: tuple[str | None, str]) -> dict:
    described = [{"modality": modality, "source_lang": source, "target_lang": target} for source, target in directions]
    return {"examples": described, "context_ids": None}


BATCHES = [
    {"audio": examples("audio", ("en", "de"), ("en", "de")), "text": examples("text", ("de", "en"))},
    {"text": examples("text", ("de", "en"), (None, "fr"))},
    {},  # a rank whose examples were all skipped
    None,
    {"audios": None, "input_ids": [1]},  # NeMo's
]


@pytest.fixture
def callback() -> TrainedExamples:
    callback = TrainedExamples()
    for number, batch in enumerate(BATCHES):
        callback.on_train_batch_end(None, None, None, batch, number)
    return callback


def test_batches_are_counted_by_modality_and_direction(callback: TrainedExamples) -> None:
    assert callback.counts == {("audio", "en", "de"): 2, ("text", "de", "en"): 2, ("text", None, "fr"): 1}


def test_a_resumed_run_continues_the_counts(callback: TrainedExamples) -> None:
    resumed = TrainedExamples()
    resumed.load_state_dict(callback.state_dict())
    resumed.on_train_batch_end(None, None, None, BATCHES[0], 0)
    state = resumed.state_dict()
    assert counts_of(state) == callback.counts + Counter({("audio", "en", "de"): 2, ("text", "de", "en"): 1})
    older = TrainedExamples()
    older.load_state_dict({"counts": state["counts"]})
    assert counts_of(older.state_dict()) == counts_of(state)
    assert counts_of({}) == Counter()


def test_counts_of_all_ranks_are_added_up(callback: TrainedExamples, monkeypatch: pytest.MonkeyPatch) -> None:
    other = TrainedExamples()
    other.counts = Counter({("audio", "fr", "de"): 7, ("text", "de", "en"): 1})

    def gather(objects: list, own: Counter) -> None:
        objects[:] = [own, other.counts]

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    callback.on_train_end(None, None)
    assert callback.of_all_ranks["text", "de", "en"] == 3
    assert callback.of_all_ranks["audio", "fr", "de"] == 7
    assert sum(callback.of_all_ranks.values()) == 13
    resumed, state = TrainedExamples(), callback.state_dict()
    for of_rank in (resumed, other := TrainedExamples()):
        of_rank.load_state_dict(state)
        of_rank.on_train_batch_end(None, None, None, BATCHES[1], 0)
    resumed.on_train_end(None, None)
    assert resumed.of_all_ranks == callback.of_all_ranks + Counter({("text", "de", "en"): 2, ("text", None, "fr"): 2})
    trainer = SimpleNamespace(callbacks=[callback], global_step=4, world_size=2)
    record = record_of_trainer(trainer, OmegaConf.create({}))
    assert (record["examples"], record["processes"]) == ({"audio": 9, "text": 4}, 2)
    assert (
        record_of_checkpoint({"callbacks": {"TrainedExamples": state}, "global_step": 4}, OmegaConf.create({}))
        == record
    )


def test_the_record_of_a_checkpoint(callback: TrainedExamples) -> None:
    source = {"type": "nemo", "manifest_filepath": [["/data/private/a.json", 2.0], "/data/private/b.json"]}
    shards = {"type": "nemo_tarred", "tarred_audio_filepaths": "/x/audio__OP_0..7_CL_.tar"}
    train_ds = {
        "audio": {"input_cfg": [{"type": "group", "input_cfg": [source, shards]}]},
        "text": {"input_cfg": [{"paths": {"en": "/y/t.en", "de": "/y/t.de"}}], "batch_size": 3},
    }
    cfg = OmegaConf.create(
        {"data": {"train_ds": train_ds}, "trainer": {"precision": "bf16-mixed"}, "model": {"optimizer": {"lr": 0.1}}}
    )
    checkpoint = {"callbacks": {"TrainedExamples": callback.state_dict()}, "global_step": 3}
    record = record_of_checkpoint(checkpoint, cfg)
    assert record["directions"] == {"audio": [["en", "de"]], "text": [[None, "fr"], ["de", "en"]]}
    assert record["examples"] == {"audio": 2, "text": 3}
    assert record["data"] == {"audio": ["a.json", "b.json", "audio__OP_0..7_CL_.tar"], "text": ["t.en", "t.de"]}
    assert (record["steps"], record["precision"]) == (3, "bf16-mixed")
    assert "/" not in str(record)
    assert record_of_checkpoint({}, OmegaConf.create({}))["directions"] == {}


def test_counts_of_a_checkpoint_add_up_over_the_codes_of_a_language() -> None:
    state = {"counts": [["text", "eng", "deu_Latn", 2], ["text", "en", "de", 3], ["text", None, "mdw", 1]]}
    assert counts_of(state) == Counter({("text", "en", "de"): 5, ("text", None, "mdw"): 1})


@pytest.mark.parametrize(
    ("train_ds", "seconds"),
    [
        ({"input_cfg": [], "max_duration": 20}, 20.0),
        ({"audio": {"input_cfg": [], "max_duration": 40.0}, "text": {"input_cfg": []}}, 40.0),
        ({"audio": {"input_cfg": []}, "text": {"input_cfg": [], "max_duration": 5.0}, "max_duration": 30.0}, 30.0),
        ({"input_cfg": [], "max_duration": float("inf")}, None),
        ({"input_cfg": [], "max_duration": "${gone}"}, None),
        ({"input_cfg": []}, None),
    ],
)
def test_the_record_has_the_longest_recordings(train_ds: dict, seconds: float | None) -> None:
    record = record_of_checkpoint({}, OmegaConf.create({"data": {"train_ds": train_ds}}))
    assert record.get("max_duration") == seconds
