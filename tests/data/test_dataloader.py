"""The loader from files to batches: sources, fusion, workers, ranks, and what is skipped on the way."""

from __future__ import annotations

import gzip
import json
import pickle
import random
import tarfile
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet, Recording, RecordingSet
from lhotse.shar import SharWriter
from nemo.collections.asr.data.audio_to_text_lhotse import LhotseSpeechToTextBpeDataset
from nemo.collections.common.data.fallback import FallbackDataset
from nemo.collections.common.data.lhotse.dataloader import get_lhotse_dataloader_from_config
from nemo.collections.common.data.lhotse.nemo_adapters import LazyNeMoIterator
from nemo.collections.speechlm2.data.salm_dataset import SALMDataset
from omegaconf import OmegaConf

from nemo_emmett.data import MultimodalDataLoader, SpeechTextDataset, get_multimodal_dataloader
from nemo_emmett.errors import ConfigError, DataError, TooManyBadRecords
from nemo_emmett.prompts.seq2seq import Seq2SeqPrompt

LOCATOR = "<|audio|>"
SETTINGS = {
    "prompt_format": "emmett_t5",
    "audio_locator_tag": LOCATOR,
    "batch_size": 2,
    "seed": 0,
    "shard_seed": 0,
    "shuffle": False,
    "shuffle_buffer_size": 16,
}


@pytest.fixture
def load(tokenizer):
    """Build a loader for our dataset, or another."""

    def build(
        config: dict, dataset=None, rank: int = 0, world_size: int = 1, settings=SETTINGS
    ) -> MultimodalDataLoader:
        dataset = SpeechTextDataset(tokenizer) if dataset is None else dataset
        return get_multimodal_dataloader({**settings, **config}, rank, world_size, dataset, tokenizer)

    return build


def examples_of(batches) -> list[tuple]:
    described = [e for batch in batches for part in batch.values() for e in part["examples"]]
    return [(e["modality"], e["source_lang"], e["target_lang"], e["target_text"]) for e in described]


def ids_of(batches) -> list[str]:
    return [e["id"] for batch in batches for part in batch.values() for e in part["examples"]]


# Sources


def nemo(speech, pairs, tmp_path) -> dict:
    return {"type": "nemo", "manifest_filepath": str(speech(3)), "target_lang": "de"}


def nemo_tarred(speech, pairs, tmp_path) -> dict:
    records = [json.loads(line) for line in speech(3).read_text().splitlines()]
    with tarfile.open(tmp_path / "audio_0.tar", "w") as tar:
        for record in records:
            tar.add(record["audio_filepath"], arcname=Path(record["audio_filepath"]).name)
    lines = [json.dumps({**r, "audio_filepath": Path(r["audio_filepath"]).name, "shard_id": 0}) for r in records]
    (tmp_path / "manifest_0.json").write_text("\n".join(lines))
    return {
        "type": "nemo_tarred",
        "manifest_filepath": str(tmp_path / "manifest_0.json"),
        "tarred_audio_filepaths": str(tmp_path / "audio_0.tar"),
        "tags": {"target_lang": "de"},
    }


def lhotse(speech, pairs, tmp_path) -> dict:
    CutSet(list(LazyNeMoIterator(str(speech(3))))).to_file(tmp_path / "cuts.jsonl.gz")
    return {"type": "lhotse", "cuts_path": str(tmp_path / "cuts.jsonl.gz"), "target_lang": ["de"]}


def lhotse_shar(speech, pairs, tmp_path) -> dict:
    (tmp_path / "shar").mkdir()
    with SharWriter(str(tmp_path / "shar"), fields={"recording": "wav"}, shard_size=2) as writer:
        for cut in LazyNeMoIterator(str(speech(3))):
            writer.write(cut)
    return {"type": "lhotse_shar", "shar_path": str(tmp_path / "shar"), "target_lang": "de"}


def conversation(speech, pairs, tmp_path) -> dict:
    source = nemo(speech, pairs, tmp_path)
    return {**source, "type": "lhotse_as_conversation", "tags": {"target_lang": "de"}}


def txt_pair(speech, pairs, tmp_path) -> dict:
    paths = pairs(3)
    languages = {"source_language": paths.pop("source_lang"), "target_language": paths.pop("target_lang")}
    return {"type": "txt_pair", **paths, **languages}


def parallel_text(speech, pairs, tmp_path) -> dict:
    return {"type": "parallel_text", **pairs(3)}


SPEECH_EXAMPLES = [("audio", "en", "de", "eins zwei")] * 3
TEXT_EXAMPLES = [("text", "en", "de", " ".join(["eins"] * n)) for n in (1, 2, 3)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (nemo, SPEECH_EXAMPLES),
        (nemo_tarred, SPEECH_EXAMPLES),
        (lhotse, SPEECH_EXAMPLES),
        (lhotse_shar, SPEECH_EXAMPLES),
        (conversation, [("audio", None, "de", "one two")] * 3),
        (txt_pair, TEXT_EXAMPLES),
        (parallel_text, TEXT_EXAMPLES),
    ],
)
def test_every_source_type_as_an_evaluation_set(load, speech, pairs, tmp_path, source, expected, workers) -> None:
    entry = source(speech, pairs, tmp_path)
    config = {"input_cfg": [entry], "force_finite": True, "force_map_dataset": True, "num_workers": workers}
    assert sorted(examples_of(load(config)), key=str) == sorted(expected, key=str)


def test_without_input_cfg(load, speech) -> None:
    loader = load({"manifest_filepath": str(speech(3)), "target_lang": "de"})
    assert examples_of(loader) == SPEECH_EXAMPLES
    assert loader.skipped_records.read_count == 3


def test_groups_weights_and_tags_keep_nemos_meaning(load, speech, pairs) -> None:
    text = [
        {"type": "parallel_text", **pairs(4, name), "weight": weight}
        for name, weight in (("often", 0.9), ("rare", 0.1))
    ]
    group = {"type": "group", "input_cfg": text, "weight": 1.0, "tags": {"domain": "news"}}
    batches = list(islice(load({"input_cfg": [group]}), 200))
    counts = Counter(Path(i).stem for i in ids_of(batches))
    assert counts["often"] / counts.total() == pytest.approx(0.9, abs=0.05)


def test_input_cfg_from_a_file(load, pairs, tmp_path) -> None:
    path = tmp_path / "input_cfg.yaml"
    OmegaConf.save(OmegaConf.create([{"type": "parallel_text", **pairs(3)}]), path)
    assert examples_of(load({"input_cfg": str(path), "force_finite": True})) == TEXT_EXAMPLES


def test_tags_of_a_group_overrule_its_members_and_their_records(load, speech) -> None:
    member = {"type": "nemo", "manifest_filepath": str(speech(1, target_lang="fr")), "tags": {"target_lang": "en"}}
    group = {"type": "group", "input_cfg": [member], "tags": {"target_lang": "de"}}
    assert examples_of(load({"input_cfg": [group]})) == SPEECH_EXAMPLES[:1]


def test_speech_and_text_in_one_sampler(load, speech, pairs) -> None:
    sources = [
        {"type": "nemo", "manifest_filepath": str(speech(4)), "weight": 0.5},
        {"type": "parallel_text", **pairs(4), "weight": 0.5},
    ]
    loader = load(
        {
            "input_cfg": sources,
            "use_multimodal_sampling": True,
            "token_equivalent_duration": 0.08,
            "batch_size": None,
            "batch_tokens": 100,
        }
    )
    counts = Counter(modality for modality, *_ in examples_of(islice(loader, 50)))
    assert counts["audio"] / counts.total() == pytest.approx(0.5, abs=0.1)


# Fusion


def fused(speech_path, text: dict, fusion: str, **settings) -> dict:
    return {
        "multi_config": True,
        "sampler_fusion": fusion,
        "speech": {"manifest_filepath": str(speech_path), "target_lang": "de", "batch_size": 2},
        "pairs": {"input_cfg": [{"type": "parallel_text", **text}], "batch_size": 3},
        **settings,
    }


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("fusion", "expected"),
    [("zip", {("audio", "text"): 40}), ("round_robin", {("audio",): 20, ("text",): 20})],
)
def test_zip_and_round_robin_are_exact(load, speech, pairs, fusion, expected, workers) -> None:
    loader = load(fused(speech(4), pairs(7), fusion, num_workers=workers))
    batches = list(islice(loader, 40))  # far beyond one pass of either: neither modality runs dry
    assert Counter(tuple(batch) for batch in batches) == expected
    assert {len(b["audio"]["examples"]) for b in batches if "audio" in b} == {2}


@pytest.mark.parametrize(("workers", "gzipped"), [(0, False), (2, False), (2, True)])
def test_zip_with_a_group_in_every_nth_step(load, speech, pairs, workers, gzipped) -> None:
    text = pairs(7)
    if gzipped:  # such text is streamed
        for key, path in text.items():
            if key.endswith("paths"):
                text[key] = f"{path}.gz"
                with gzip.open(text[key], "wb") as file:
                    file.write(Path(path).read_bytes())
    config = fused(speech(4), text, "zip", num_workers=workers)
    config["pairs"]["every_n_steps"] = 3
    batches = list(islice(load(config), 30))
    assert [tuple(batch) for batch in batches] == [("audio", "text"), ("audio",), ("audio",)] * 10


def test_zip_with_a_ratio(load, speech, pairs) -> None:
    config = fused(speech(4), pairs(7), "zip")
    config["speech"]["batch_size"], config["pairs"] = 4, {**config["pairs"], "batch_size": 6, "batch_ratio": 0.5}
    sizes = [[len(part["examples"]) for part in batch.values()] for batch in islice(load(config), 10)]
    assert sizes == [[4, 2]] * 10
    config["pairs"]["batch_ratio"] = 2.0
    batch = next(iter(load(config)))
    assert len(batch["text"]["examples"]) == 6, "no more than its own size"


@pytest.mark.parametrize("workers", [0, 2])
def test_randomized_round_robin_keeps_its_weights(load, pairs, workers) -> None:
    groups = {
        name: {"input_cfg": [{"type": "parallel_text", **pairs(4, name)}], "batch_size": 1} for name in ("a", "b", "c")
    }
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    config = {"multi_config": True, "sampler_fusion": "randomized_round_robin", "sampler_weights": weights, **groups}
    drawn = [Path(ids_of([batch])[0]).stem for batch in islice(load({**config, "num_workers": workers}), 500)]
    counts = Counter(drawn)
    assert {name: count / 500 for name, count in counts.items()} == pytest.approx(weights, abs=0.03)
    repeats = sum(a == b for a, b in pairwise(drawn))
    assert 50 < repeats < 250, "drawn at random, not in turns"
    for start in range(0, 450, 50):  # stationary: any stretch holds the shares, give or take the groups of each reader
        stretch = Counter(drawn[start : start + 50])
        assert all(abs(stretch[name] - 50 * weight) <= 3 * max(workers, 1) for name, weight in weights.items())


def test_speech_in_tar_files_and_text(load, speech, pairs, tmp_path) -> None:
    tarred = nemo_tarred(speech, pairs, tmp_path)
    config = fused("", pairs(4), "zip")
    loader = load({**config, "speech": {"input_cfg": [tarred], "batch_size": 1}})
    assert loader.progress is not None, "no sampler of NeMo's"
    assert [sorted(batch) for batch in islice(loader, 8)] == [["audio", "text"]] * 8


def test_finite_groups_end(load, speech, pairs) -> None:
    loader = load(fused(speech(4), pairs(6), "round_robin", force_finite=True, force_map_dataset=True))
    assert Counter(tuple(batch) for batch in loader) == {("audio",): 2, ("text",): 2}


def test_what_groups_inherit(load, speech, pairs) -> None:
    config = fused(speech(4), pairs(4), "zip")
    del config["speech"]["target_lang"]
    batch = next(iter(load({**config, "target_lang": "es"})))
    assert {e["target_lang"] for e in batch["audio"]["examples"]} == {"es"}
    assert {e["target_lang"] for e in batch["text"]["examples"]} == {"de"}


# Ranks


def test_two_ranks_share_out_a_map_style_dataset(load, speech) -> None:
    config = {"manifest_filepath": str(speech(8)), "target_lang": "de", "shuffle": True, "shard_seed": "trng"}
    of_rank = [set(ids_of(load(config, rank=rank, world_size=2))) for rank in (0, 1)]
    assert [len(ids) for ids in of_rank] == [4, 4]
    assert not of_rank[0] & of_rank[1]


def test_ranks_take_the_same_modality_at_each_step(load, speech, pairs) -> None:
    config = fused(speech(8), pairs(8), "randomized_round_robin", sampler_weights={"speech": 0.4, "pairs": 0.6})
    first, second = ([tuple(b) for b in islice(load(config, rank=r, world_size=2), 30)] for r in (0, 1))
    assert first == second


# Bad records


@pytest.fixture
def speech_with_faults(speech, tmp_path) -> Path:
    """Six records, of which two are good."""
    manifest = speech(6)
    records = manifest.read_text().splitlines()
    records[1] = "{not json"
    Path(json.loads(records[2])["audio_filepath"]).unlink()
    Path(json.loads(records[3])["audio_filepath"]).write_bytes(b"")
    path = Path(json.loads(records[4])["audio_filepath"])
    path.write_bytes(path.read_bytes()[:16000])
    manifest.write_text("\n".join(records))
    return manifest


FAULTS = {"not JSON": 1, "missing audio": 1, "empty audio": 1, "truncated audio": 1}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("flavour", ["force_map_dataset", "force_iterable_dataset"])
def test_bad_records_are_counted_and_the_good_ones_arrive(load, speech_with_faults, flavour, workers) -> None:
    config = {
        "manifest_filepath": str(speech_with_faults),
        "target_lang": "de",
        "num_workers": workers,
        "batch_size": 1,
        "max_bad_records": None,
        flavour: True,
    }
    loader = load(config)
    batches = list(loader)
    assert len(batches) == 2, "batches of which nothing is left do not reach the trainer"
    assert {Path(i).name for i in ids_of(batches)} == {"speech.json-0.wav", "speech.json-5.wav"}
    assert loader.skipped_records.causes() == FAULTS
    assert loader.skipped_records.read_count == 6
    assert set(batches[0]["audio"]) == {
        *("context_ids", "context_lens", "answer_ids", "answer_lens", "audios", "audio_lens", "examples")
    }
    list(loader)
    assert loader.skipped_records.causes() == FAULTS, "the same records, met again"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("flavour", ["force_map_dataset", "force_iterable_dataset"])
def test_a_bad_record_behind_the_last_batch_is_counted_too(load, speech, flavour, workers) -> None:
    manifest = speech(2)
    with manifest.open("a") as file:
        file.write("{not json\n")
    loader = load(
        {
            "manifest_filepath": str(manifest),
            "target_lang": "de",
            "num_workers": workers,
            flavour: True,
            "max_bad_records": 1,
        }
    )
    assert len(list(loader)) == 1
    assert loader.skipped_records.causes() == {"not JSON": 1}
    assert loader.bad_records is loader.skipped_records, "the older name, which scripts read"


def test_a_pass_after_one_that_was_resumed_counts_its_bad_records_too(load, speech) -> None:
    manifest = speech(4)
    with manifest.open("a") as file:
        file.write("{not json\n")
    config = {"manifest_filepath": str(manifest), "target_lang": "de", "batch_size": 1, "max_bad_records": None}
    first = load({**config, "sampling": "emmett"})
    next(iter(first))
    resumed = load({**config, "sampling": "emmett"})
    resumed.load_state_dict(first.state_dict())
    for passes in (1, 2, 3):
        assert len(list(resumed)) == (3 if passes == 1 else 4) == len(resumed) - (passes == 1)
        assert resumed.skipped_records.read_count == 5 * passes


def test_notes_survive_the_way_into_a_spawned_worker(load, speech) -> None:
    """There, sources and dataset arrive as one pickle and must still share their skipped records."""
    manifest = speech(2)
    gone = json.loads(manifest.read_text().splitlines()[0]) | {"audio_filepath": "gone.wav"}
    manifest.write_text(json.dumps(gone) + "\n" + manifest.read_text())
    loader = load({"manifest_filepath": str(manifest), "target_lang": "de", "force_finite": True, "batch_size": 3})
    (addresses,) = loader.sampler
    sent = pickle.dumps(loader.dataset)
    assert len(sent) < 100_000, "without what is mapped from files"
    delivered = pickle.loads(sent)[pickle.loads(pickle.dumps(addresses))]
    assert len(ids_of([delivered.batch])) == 2
    assert [record.cause for record in delivered.records.skipped] == ["missing audio"]


def test_bad_records_are_named_by_line_and_reported(load, speech_with_faults, monkeypatch) -> None:
    from nemo.utils import logging

    warnings = []
    monkeypatch.setattr(logging, "warning", lambda message, *args, **kwargs: warnings.append(message))
    loader = load({"manifest_filepath": str(speech_with_faults), "target_lang": "de", "max_bad_records": None})
    for _ in range(2):  # the second epoch has the same bad records, which are not reported again
        list(loader)
    named = sorted(str(record).split(": ")[0].rpartition("speech.json, ")[2] for record in loader.skipped_records.first)
    assert [name.split(" (")[0] for name in named] == ["line 2", "line 3", "line 4", "line 5"]
    assert sum("Skipped a bad record" in w for w in warnings) == 4
    assert sum("Bad records skipped so far" in w and "truncated audio" in w for w in warnings) == 1


def test_the_run_stops_past_the_limit(load, speech_with_faults) -> None:
    config = {"manifest_filepath": str(speech_with_faults), "target_lang": "de", "num_workers": 2}
    with pytest.raises(TooManyBadRecords, match=r"max_bad_records: [34] bad records .* more than allowed \(2\)"):
        list(load({**config, "max_bad_records": 2}))
    with pytest.raises(TooManyBadRecords, match=r"more than allowed \(0.5 of the records read\)") as stopped:
        list(load({**config, "max_bad_records": 0.5}))
    assert str(stopped.value).count("speech.json, line") == 4
    assert len(list(load({**config, "max_bad_records": 4}))) == 2


def test_data_of_which_nothing_can_be_read_does_not_spin(load, speech) -> None:
    manifest = speech(2)
    for record in manifest.read_text().splitlines():
        Path(json.loads(record)["audio_filepath"]).unlink()
    sources = [{"type": "nemo", "manifest_filepath": str(manifest), "weight": 1}] * 2
    with pytest.raises(DataError, match=r"nothing could be read of the last 100 batches(.|\n)*missing audio"):
        next(iter(load({"input_cfg": sources, "target_lang": "de", "max_bad_records": None})))


@pytest.mark.parametrize(
    ("sampling", "sentence"),
    [("nemo", "train.de ends after 1 lines"), ("emmett", "train.de: has changed since it was indexed")],
)
def test_a_file_that_changes_stops_the_run_with_its_sentence(load, pairs, sampling, sentence) -> None:
    text = pairs(4)
    loader = load({"input_cfg": [{"type": "parallel_text", **text}], "num_workers": 1, "sampling": sampling})
    Path(text["target_paths"]).write_text("eins\n")
    with pytest.raises(DataError) as stopped:
        list(loader)
    assert sentence in str(stopped.value)
    assert "Traceback" not in str(stopped.value)


# What NeMo and lhotse do to an example


def faulty_noise(tmp_path, write_manifest, write_tone) -> tuple[dict, Counter]:
    noises = [write_tone("noise.wav", 3.0, rate=8000), tmp_path / "gone.wav", tmp_path / "words.wav"]
    noises[2].write_bytes(b"words" * 99)
    records = [{"audio_filepath": str(path), "duration": 3.0} for path in noises]
    return {"noise_path": str(write_manifest("noise.json", records)), "noise_mix_prob": 1.0}, Counter()


def noise_without_numbers(tmp_path, write_manifest, write_tone) -> tuple[dict, Counter]:
    soundfile.write(tmp_path / "noise.wav", np.full(48000, np.nan), 16000, subtype="FLOAT")
    record = {"audio_filepath": str(tmp_path / "noise.wav"), "duration": 3.0}
    keys = {"noise_path": str(write_manifest("noise.json", [record])), "noise_mix_prob": 1.0}
    return keys, Counter({"audio holds values that are not numbers": 2})


def room_of_another_rate(tmp_path, write_manifest, write_tone) -> tuple[dict, Counter]:
    room = Recording.from_file(write_tone("room.wav", 0.5, rate=8000))
    RecordingSet.from_recordings([room]).to_file(tmp_path / "rooms.jsonl")
    keys = {"rir_enabled": True, "rir_prob": 1.0, "rir_path": str(tmp_path / "rooms.jsonl")}
    return keys, Counter({"rir_path: AssertionError": 2})


def room_that_is_gone(tmp_path, write_manifest, write_tone) -> tuple[dict, Counter]:
    path = write_tone("room.wav", 0.5)
    RecordingSet.from_recordings([Recording.from_file(path)]).to_file(tmp_path / "rooms.jsonl")
    path.unlink()
    keys = {"rir_enabled": True, "rir_prob": 1.0, "rir_path": str(tmp_path / "rooms.jsonl")}
    return keys, Counter({"augmentation failed": 2})


def alternatives_of_missing_audio(tmp_path, write_manifest, write_tone) -> tuple[dict, Counter]:
    bad = {"audio_filepath": str(tmp_path / "gone.wav"), "alt_text": {"fr": {"text": "un", "lang": "fr"}}}
    return {"more": [bad]}, Counter({"missing audio": 1})


def answers_that_cannot_be_prompted(tmp_path, write_manifest, write_tone) -> tuple[dict, Counter]:
    paths = [str(write_tone(name)) for name in ("c.wav", "d.wav")]
    bad = [{"audio_filepath": path, "text": text} for path, text in zip(paths, ("vier", "drei"), strict=True)]
    return {"more": bad}, Counter({"vier is no answer": 1, "prompt_format: KeyError": 1})


@pytest.mark.parametrize("sampling", ["nemo", "emmett"])
@pytest.mark.parametrize(
    "make",
    [
        faulty_noise,
        noise_without_numbers,
        room_of_another_rate,
        room_that_is_gone,
        alternatives_of_missing_audio,
        answers_that_cannot_be_prompted,
    ],
)
def test_what_raises_upon_an_example_costs_that_example(
    load, tmp_path, write_manifest, write_tone, sampling, make, monkeypatch
) -> None:
    def encode(self, requests, encode=Seq2SeqPrompt.encode_requests):
        for request in requests:
            if request.answer == "vier":
                raise DataError(f"example {request.example_id}: vier is no answer; mend it.")
            {"eins": 1}[request.answer]
        return encode(self, requests)

    monkeypatch.setattr(Seq2SeqPrompt, "encode_requests", encode)
    keys, causes = make(tmp_path, write_manifest, write_tone)
    common = {"duration": 1.0, "text": "eins", "sampling_rate": 16000, "target_lang": "de"}
    more = [{**common, **record} for record in keys.pop("more", ())]
    records = [{**common, "audio_filepath": str(write_tone(name))} for name in ("a.wav", "b.wav")]
    manifest = str(write_manifest("m.json", [records[0], *more, records[1]]))
    how = {"force_finite": True, "sampling": sampling, "max_bad_records": None, "seed": 0, "shard_seed": 0}
    loader = load({"manifest_filepath": manifest, "batch_size": 2, **how, **keys})
    ids = ids_of(loader)
    # NeMo's samplers read noise in the loader, which counts what is left out; ours read it before, and log it.
    of_noise = {"missing audio": 1, "unreadable audio": 1} if make is faulty_noise and sampling == "nemo" else {}
    lost = causes.total()
    # Our length index has noted the alternative text already, which lacks a locator, before the audio is looked for.
    if make is alternatives_of_missing_audio and sampling == "emmett":
        causes["there is no token to mark the place of its audio"] = 1
    assert loader.skipped_records.causes() == dict(causes) | of_noise
    assert len(ids) == len(records) + len(more) - lost


def test_noise_of_which_nothing_can_be_used_is_an_error(load, speech, tmp_path, write_manifest) -> None:
    noise = str(write_manifest("noise.json", [{"audio_filepath": "gone.wav", "duration": 3.0}]))
    for sampling in ("nemo", "emmett"):
        with pytest.raises(DataError, match="noise_path: none of its recordings can be used"):
            load({"manifest_filepath": str(speech(2)), "target_lang": "de", "noise_path": noise, "sampling": sampling})


# Other datasets


class Forgetful(torch.utils.data.Dataset):
    """Returns its batch every other time, and None in between."""

    def __init__(self) -> None:
        self.calls = 0

    def __getitem__(self, cuts: CutSet) -> dict | None:
        self.calls += 1
        return {"ids": [cut.id for cut in cuts]} if self.calls % 2 else None


def test_a_batch_that_failed_is_counted_and_never_replaced(load, speech) -> None:
    """NeMo's FallbackDataset would hand out the one before it."""
    config = {"manifest_filepath": str(speech(4)), "batch_size": 1, "max_bad_records": None}
    loader = load(config, FallbackDataset(Forgetful()), settings={})
    names = [Path(batch["ids"][0]).name for batch in loader]
    assert names == ["speech.json-0.wav", "speech.json-2.wav"]
    assert loader.skipped_records.causes() == {"refused by the dataset": 2}


class Lengths(torch.utils.data.Dataset):
    """How many samples each cut has."""

    def __getitem__(self, cuts: CutSet) -> dict:
        return {Path(cut.id).name: cut.load_audio().shape[1] for cut in cuts}


@pytest.mark.parametrize("sampling", ["nemo", "emmett"])
def test_other_datasets_get_recordings_as_they_are(load, write_tone, write_manifest, sampling) -> None:
    """One has another rate than declared, one is longer, one ends a little too early, one is not there."""
    write_tone("rate.wav", 1.0, rate=8000)
    write_tone("long.wav", 2.0)
    write_tone("short.wav", 0.95)
    names = ("rate.wav", "long.wav", "short.wav", "gone.wav")
    records = [{"audio_filepath": name, "duration": 1.0, "sampling_rate": 16000} for name in names]
    config = {"manifest_filepath": str(write_manifest("m.json", records)), "batch_size": 4, "force_finite": True}
    loader = load({**config, "max_bad_records": None, "sampling": sampling}, Lengths(), settings={})
    assert list(loader) == [{"rate.wav": 16000, "long.wav": 16000, "short.wav": 15200}]
    assert loader.skipped_records.causes() == {"missing audio": 1}


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("kind", ["nemo", "nemo_tarred", "lhotse", "buckets"])
def test_asr_batches_equal_those_of_nemo(tokenizer, speech, pairs, tmp_path, kind, shuffle) -> None:
    source = nemo if kind == "buckets" else globals()[kind]
    files = {k: v for k, v in source(speech, pairs, tmp_path).items() if k.endswith(("path", "paths"))}
    config = {"batch_size": 2, "shuffle": shuffle, "seed": 3, "shard_seed": "randomized", "force_finite": True, **files}
    if kind == "buckets":
        config |= {
            "batch_size": None,
            "batch_duration": 2.0,
            "use_bucketing": True,
            "num_buckets": 2,
            "max_duration": 3,
        }
        config |= {"concurrent_bucketing": False}
    dataset = LhotseSpeechToTextBpeDataset(tokenizer)
    nemos = get_lhotse_dataloader_from_config(OmegaConf.create(config), 0, 1, dataset, tokenizer)
    ours = get_multimodal_dataloader(OmegaConf.create({**config, "use_emmett": True}), 0, 1, dataset, tokenizer)
    expected, batches = list(nemos), list(ours)
    assert len(batches) == len(expected) >= 2
    for batch, wanted in zip(batches, expected, strict=True):
        assert type(batch) is type(wanted)
        assert all(torch.equal(a, b) for a, b in zip(batch, wanted, strict=True))


@pytest.fixture
def salm_settings(tokenizer) -> dict:
    from nemo.collections.common.prompts.formatter import Modality, PromptFormatter

    if "words" not in PromptFormatter._REGISTERED_FORMATTERS:

        class WordsPromptFormatter(PromptFormatter):
            """One turn each, nothing around them."""

            NAME, OUTPUT_ROLE = "words", "assistant"
            TEMPLATE = {  # noqa: RUF012
                role: {"template": "|message|", "slots": {"message": Modality.Text}} for role in ("user", "assistant")
            }

    return {**SETTINGS, "prompt_format": "words", "token_equivalent_duration": 0.08}


@pytest.mark.parametrize("workers", [0, 2])
def test_nemos_salm_dataset_gets_text_and_speech(load, tokenizer, speech, pairs, salm_settings, workers) -> None:
    config = fused(speech(4), pairs(4), "zip", num_workers=workers)
    loader = load(config, FallbackDataset(SALMDataset(tokenizer)), settings=salm_settings)
    for batch in islice(loader, 4):
        assert batch["audios"].shape[0] == 2
        assert batch["input_ids"].shape[0] == batch["loss_mask"].shape[0] == 5
        locator = tokenizer.token_to_id(LOCATOR)
        assert (batch["input_ids"] == locator).sum(dim=1).tolist() == [1, 1, 0, 0, 0]
    text = [c for c in batch["conversations"] if not c.has_audio_turns]
    assert text[0].turns[0].value == "Translate from English to German:"


def test_nemos_salm_refuses_batches_of_text_before_training(load, tokenizer, speech, pairs, salm_settings) -> None:
    with pytest.raises(
        ConfigError, match=r"train_ds\.pairs: holds text, so with sampler_fusion: round_robin a batch may"
    ):
        load(fused(speech(4), pairs(4), "round_robin"), SALMDataset(tokenizer), settings=salm_settings)


@pytest.mark.parametrize("workers", [0, 1])
def test_nemos_salm_refuses_conversations_without_speech_in_one_sentence(
    load, tokenizer, tmp_path, salm_settings, workers
) -> None:
    """Only the records tell whether a conversation holds speech."""
    turns = [{"from": role, "value": word, "type": "text"} for role, word in (("User", "one"), ("Assistant", "eins"))]
    path = tmp_path / "conversations.jsonl"
    path.write_text("".join(json.dumps({"id": f"c{i}", "conversations": turns}) + "\n" for i in range(4)))
    source = {"type": "multimodal_conversation", "manifest_filepath": str(path), "audio_locator_tag": LOCATOR}
    config = {"input_cfg": [source], "batch_size": 2, "num_workers": workers, "use_multimodal_sampling": True}
    with pytest.raises(ConfigError) as refused:
        list(islice(load(config, SALMDataset(tokenizer), settings=salm_settings), 2))
    assert str(refused.value).startswith("NeMo's SALM cannot take a batch without speech; train nemo_emmett's SALMGPT")


@pytest.mark.parametrize("sampling", ["nemo", "emmett"])
def test_nemos_salm_hears_each_recording_in_its_place(
    load, tokenizer, tmp_path, write_tone, write_manifest, salm_settings, sampling
) -> None:
    """Files of one name share an id, by which NeMo finds their audio; one of them has another rate, one no numbers."""
    for number in range(4):
        (tmp_path / str(number)).mkdir()
    rates = (16000, 16000, 8000)
    paths = [write_tone(f"{i}/a.wav", 1.0, rate=rate, hertz=200 + 100 * i) for i, rate in enumerate(rates)]
    paths.append(tmp_path / "3" / "a.wav")
    soundfile.write(paths[3], np.full(16000, np.nan), 16000, subtype="FLOAT")
    records = [{"audio_filepath": str(path), "duration": 1.0, "text": "eins"} for path in paths]
    records[2]["sampling_rate"] = 16000
    keys = {"target_lang": "de", "max_bad_records": None, "sampling": sampling, "shuffle": False, "force_finite": True}
    config = {"manifest_filepath": str(write_manifest("m.json", records)), "batch_size": 4, **keys}
    loader = load(config, SALMDataset(tokenizer), settings=salm_settings)
    (batch,) = list(loader)
    assert batch["audio_lens"].tolist() == [16000] * 3
    assert [int(torch.fft.rfft(audio).abs().argmax()) for audio in batch["audios"]] == [200, 300, 400]
    assert loader.skipped_records.causes() == {"audio holds values that are not numbers": 1}


def test_nemos_salm_counts_what_it_drops(load, tokenizer, speech_with_faults, salm_settings) -> None:
    config = {"manifest_filepath": str(speech_with_faults), "target_lang": "de", "max_bad_records": None}
    loader = load(config, SALMDataset(tokenizer), settings=salm_settings)
    batches = list(loader)
    assert sum(len(batch["input_ids"]) for batch in batches) == 2
    assert loader.skipped_records.causes() == FAULTS


def test_parallel_text_in_a_recipe_without_us(tokenizer, pairs) -> None:
    """Registered with NeMo, the type is there for NeMo's own loader as well."""
    config = {**SETTINGS, "input_cfg": [{"type": "parallel_text", **pairs(3)}], "force_finite": True}
    loader = get_lhotse_dataloader_from_config(OmegaConf.create(config), 0, 1, SpeechTextDataset(tokenizer), tokenizer)
    assert examples_of(loader) == TEXT_EXAMPLES


# The share of bad records


def test_a_modality_that_cannot_be_read_is_not_hidden_by_the_other(load, speech, pairs) -> None:
    manifest = speech(4)
    for record in manifest.read_text().splitlines():
        Path(json.loads(record)["audio_filepath"]).unlink()
    loader = load(fused(manifest, pairs(60), "round_robin", force_finite=True, force_map_dataset=True))
    with pytest.raises(TooManyBadRecords) as stopped:
        list(loader)
    assert f"4 bad records were skipped in 4 records of data.train_ds.speech ({manifest}) read" in str(stopped.value)
    assert "missing audio" in str(stopped.value)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("flavour", ["force_map_dataset", "force_iterable_dataset"])
def test_the_share_is_one_of_records_not_of_their_translations(load, speech, flavour, workers) -> None:
    manifest = speech(8)
    lines = manifest.read_text().splitlines()
    for record in lines[:2]:
        Path(json.loads(record)["audio_filepath"]).unlink()
    config = {"manifest_filepath": str(manifest), "target_lang": ["de", "es"], flavour: True, "num_workers": workers}
    loader = load({**config, "max_bad_records": 0.25})
    for _ in range(2):
        assert len(ids_of(loader)) == 2 * 6
        assert loader.skipped_records.shares() == {f"data.train_ds ({manifest})": 0.25}
    assert loader.skipped_records.count() == 2


def test_shards_of_a_source_are_judged_together(load, write_manifest, speech, tmp_path) -> None:
    records = speech(4).read_text().splitlines()
    write_manifest("shard_0.json", ["{not json", records[0]])
    write_manifest("shard_1.json", records[1:])
    manifest = f"{tmp_path}/shard__OP_0..1_CL_.json"
    loader = load({"manifest_filepath": manifest, "target_lang": "de", "max_bad_records": 0.25})
    assert len(ids_of(loader)) == 4
    assert loader.skipped_records.shares() == {f"data.train_ds ({manifest})": 0.2}


@pytest.mark.parametrize("kind", ["lhotse_shar", "lhotse_as_conversation"])
def test_records_that_nemo_reads_are_counted_too(load, speech, tmp_path, kind) -> None:
    if kind == "lhotse_shar":
        cuts = list(LazyNeMoIterator(str(speech(4))))
        del cuts[1].translations["de"]
        (tmp_path / "shar").mkdir()
        with SharWriter(str(tmp_path / "shar"), fields={"recording": "wav"}, shard_size=2) as writer:
            for cut in cuts:
                writer.write(cut)
        source = {"shar_path": str(tmp_path / "shar"), "target_lang": "de"}
    else:
        source = {"manifest_filepath": str(speech(4)), "tags": {"target_lang": "de"}}
        Path(json.loads(Path(source["manifest_filepath"]).read_text().splitlines()[1])["audio_filepath"]).unlink()
    config = {"input_cfg": [{"type": kind, **source}], "force_finite": True, "force_map_dataset": True}
    loader = load({**config, "max_bad_records": 0.25})
    assert len(ids_of(loader)) == 3
    assert loader.skipped_records.read_count == 4
    assert list(loader.skipped_records.shares().values()) == [0.25]
    assert all(source.startswith("data.train_ds.input_cfg.0 (") for source in loader.skipped_records.shares())


# Epochs and random states


def shuffled(speech, pairs, kind: str) -> dict:
    """A map-style dataset that ends, in another order at each pass."""
    ends = {"force_finite": True, "force_map_dataset": True, "shuffle": True}
    if kind == "zip":
        return {**fused(speech(12), pairs(18), "zip"), **ends}
    return {"manifest_filepath": str(speech(12)), "target_lang": "de", **ends}


@pytest.mark.parametrize("kind", ["single", "zip"])
def test_each_pass_has_an_order_of_its_own(load, speech, pairs, kind) -> None:
    config = shuffled(speech, pairs, kind)
    loader = load(config)
    first, second, third = ids_of(loader), ids_of(loader), ids_of(loader)
    assert sorted(first) == sorted(second) == sorted(third)
    assert first != second != third != first
    again = load(config)
    assert [ids_of(again) for _ in range(3)] == [first, second, third]


@pytest.mark.parametrize("kind", ["single", "zip"])
def test_building_a_loader_leaves_the_random_states_alone(load, speech, pairs, kind) -> None:
    config = shuffled(speech, pairs, kind)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = random.random(), np.random.rand(), torch.rand(()).item()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    load(config)
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected


@pytest.mark.parametrize("section", ["data", "model"])
def test_messages_of_a_nemo_recipe_name_its_section(section) -> None:
    """NeMo's own factory, with the config as NeMo's data module (``data``) and its ASR models (``model``) hold it."""
    broken = {"use_emmett": True, "manifest_filepath": "/nowhere.json", "batch_size": 2}
    recipe = OmegaConf.create({section: {"validation_ds": broken}})
    dataset = torch.utils.data.Dataset()
    for config in (recipe[section].validation_ds, OmegaConf.create({"validation_ds": broken}).validation_ds):
        place = section if config._get_full_key(None).startswith(section) else "model"
        with pytest.raises(DataError, match=rf"^{place}\.validation_ds\.manifest_filepath: there is no file"):
            get_lhotse_dataloader_from_config(config, 0, 1, dataset)
