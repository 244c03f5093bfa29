"""Transcripts in batches of speech: the same under all samplers, and nothing else changes."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nemo_emmett.data import MultimodalDataModule, SpeechTextDataset, get_multimodal_dataloader
from nemo_emmett.data.checks import check_data_config
from nemo_emmett.data.config.dataset_config import parse_dataset
from nemo_emmett.data.lengths.building import open_length_indexes
from nemo_emmett.data.readers.examples import ExampleKind
from nemo_emmett.errors import ConfigError, DataError

SETTINGS = {
    "prompt_format": "emmett_nllb",
    "audio_locator_tag": "<|audio|>",
    "batch_size": 2,
    "seed": 0,
    "shard_seed": 0,
    "shuffle_buffer_size": 16,
    "force_finite": True,
    "source_lang": "en",
}
NEW_KEYS = {"transcript_ids", "transcript_lens", "text_context_ids", "text_context_lens", "is_transcription"}
SENTENCES = ["one", "one two", None, "two one two", "  two  "]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """NLLB's, whose contexts name the source language, and whose answers name the target language."""
    from nemo.collections.common.tokenizers import AutoTokenizer
    from transformers import AddedToken

    from tests.prompts.tiny_tokenizers import nllb_tokenizer

    folder = tmp_path_factory.mktemp("nllb")
    nllb_tokenizer(folder, ["one two", "eins zwei"]).save_pretrained(folder)
    tokenizer = AutoTokenizer(str(folder), use_fast=True)
    locator = AddedToken("<|audio|>", special=True, normalized=False)
    tokenizer.tokenizer.add_tokens([locator], special_tokens=True)
    return tokenizer


@pytest.fixture
def batches(tokenizer) -> Callable[..., list[dict]]:
    def load(config: dict, **settings) -> list[dict]:
        section = {**SETTINGS, **config, **settings}
        return list(get_multimodal_dataloader(section, 0, 1, SpeechTextDataset(tokenizer), tokenizer))

    return load


@pytest.fixture
def recordings(write_tone, write_manifest) -> Callable[..., Path]:
    """``recordings(field, **fields)``: five recordings, with their sentence in a field, one of them without."""

    def make(field: str = "source_text", name: str = "speech.json", **fields) -> Path:
        records = []
        for number, sentence in enumerate(SENTENCES):
            path = str(write_tone(f"{number}.wav", 0.5))
            record = {"audio_filepath": path, "duration": 0.5, "sampling_rate": 16000, "text": "eins", **fields}
            records.append({**record, **({} if sentence is None else {field: sentence})})
        return write_manifest(name, records)

    return make


@pytest.fixture
def text_contexts(batches, write_lines) -> dict[str, list[int]]:
    """The context of each sentence as an example of ``parallel_text``."""
    sentences = [sentence for sentence in SENTENCES if sentence]
    lines = write_lines("text.tsv", [f"{sentence}\teins" for sentence in sentences])
    source = {"type": "parallel_text", "paths": str(lines), "source_column": 0, "target_column": 1}
    found = {}
    for batch in batches({"input_cfg": [source], "target_lang": "de"}):
        for row, example in enumerate(batch["text"]["examples"]):
            context = batch["text"]["context_ids"][row, : batch["text"]["context_lens"][row]]
            found[example["source_text"]] = context.tolist()
    return found


def rows(batches: list[dict], key: str) -> dict[str, list[int]]:
    """The unpadded rows of a key, by the file of their recording."""
    found = {}
    for audio in (batch["audio"] for batch in batches):
        for ids, length, example in zip(audio[f"{key}_ids"], audio[f"{key}_lens"], audio["examples"], strict=True):
            found[Path(example["audio_path"]).name] = ids[:length].tolist()
    return found


def zipped(path: Path) -> Path:
    """Compressed, a manifest can only be streamed."""
    packed = path.with_suffix(".json.gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    return packed


@pytest.mark.parametrize("how", ["schedule", "streaming", "nemo"])
def test_the_context_of_a_transcript_is_that_of_its_text_example(
    batches, recordings, text_contexts, tokenizer, how
) -> None:
    path = recordings()
    path = zipped(path) if how == "streaming" else path
    source = {"type": "nemo", "manifest_filepath": str(path), "target_lang": "de"}
    settings = {"input_cfg": [source], "sampling": "nemo" if how == "nemo" else "emmett"}
    with_transcripts, without = batches(settings, transcripts=True), batches(settings)
    stripped = [sentence and sentence.strip() for sentence in SENTENCES]
    assert rows(with_transcripts, "text_context") == {
        f"{number}.wav": text_contexts[sentence] if sentence else [] for number, sentence in enumerate(stripped)
    }
    assert rows(with_transcripts, "transcript") == {
        f"{number}.wav": tokenizer.text_to_ids(sentence) if sentence else [] for number, sentence in enumerate(stripped)
    }
    assert len(with_transcripts) == len(without) == 3
    for batch, plain in zip(with_transcripts, without, strict=True):
        audio = batch["audio"]
        assert audio.keys() - plain["audio"].keys() == NEW_KEYS
        assert {audio[key].dtype for key in NEW_KEYS} == {torch.int64, torch.bool}
        assert audio["is_transcription"].tolist() == [False] * len(audio["examples"])
        for key, value in plain["audio"].items():
            assert torch.equal(audio[key], value) if isinstance(value, torch.Tensor) else audio[key] == value


def test_both_conventions_and_tsv_files(batches, recordings, text_contexts, tokenizer, write_lines) -> None:
    """Of a record with translations, the text is the transcript; of a TSV file, the source column is."""
    translated = recordings("ignored", "translated.json", text="one two", translations={"de": "eins"}, lang="en")
    table = write_lines("speech.tsv", ["audio\ttranscript\ttarget", "0.wav\tone two\teins", "1.wav\t\teins"])
    entries = [
        {"type": "nemo", "manifest_filepath": str(translated), "target_lang": ["de", "en"]},
        {"type": "speech_tsv", "paths": str(table), "source_column": "transcript", "target_lang": "de"},
    ]
    of_manifest, of_table = (batches({"input_cfg": [entry], "transcripts": True}) for entry in entries)
    kinds = [kind for batch in of_manifest for kind in batch["audio"]["is_transcription"].tolist()]
    assert sorted(kinds) == [False] * 5 + [True] * 5
    contexts = [row for batch in of_manifest for row in batch["audio"]["text_context_ids"].tolist()]
    assert contexts == [text_contexts["one two"]] * 10  # NLLB's names the source language only
    assert rows(of_table, "text_context") == {"0.wav": text_contexts["one two"], "1.wav": []}


def test_sources_and_groups_may_say_otherwise(batches, recordings, write_lines) -> None:
    lines = write_lines("text.tsv", ["one\teins"] * 4)
    text = {"type": "parallel_text", "paths": str(lines), "source_column": 0, "target_column": 1, "target_lang": "de"}
    speech = {"type": "nemo", "manifest_filepath": str(recordings()), "target_lang": "de"}
    groups = {"text": {"input_cfg": [text]}, "speech": {"input_cfg": [speech]}, "plain": {"input_cfg": [speech]}}
    for group in groups.values():
        group |= {"batch_size": 2, "prompt_format": "emmett_nllb", "audio_locator_tag": "<|audio|>"}
    groups["plain"]["transcripts"] = False
    section = {"multi_config": True, "sampler_fusion": "zip", "force_finite": True, "transcripts": True, **groups}
    dataset = parse_dataset(section, "data.train_ds")
    assert [source.transcripts for source in dataset.sources] == [True, True, False]
    del section["plain"]
    section["speech"]["input_cfg"] = [speech, {**speech, "transcripts": False}]
    lens = [n for batch in batches(section) for n in batch["audio"]["transcript_lens"].tolist()]
    assert 0 < sum(n > 0 for n in lens) < len(lens)  # batches of both sources have the keys, one has transcripts
    assert all(NEW_KEYS.isdisjoint(batch["text"]) for batch in batches(section))


def test_a_length_index_is_that_without_transcripts(recordings, tokenizer) -> None:
    source = {"type": "nemo", "manifest_filepath": str(recordings()), "target_lang": "de"}
    made = []
    for keys in ({}, {"transcripts": True}):
        dataset = parse_dataset({**SETTINGS, **keys, "input_cfg": [source]}, "data.train_ds")
        (index,) = open_length_indexes(dataset.groups, tokenizer, ExampleKind.TRANSLATION).values()
        made.append(Path(index.sidecar.places[0]).stat().st_mtime_ns)
    assert made[0] == made[1]  # it was not built again


def test_a_source_without_transcripts_is_named(recordings, tokenizer) -> None:
    source = {"type": "nemo", "manifest_filepath": str(recordings("other")), "target_lang": "de"}
    section = {**SETTINGS, "input_cfg": [source], "transcripts": True}
    sentence = (
        r"^data.train_ds.input_cfg.0: none of the first 5 examples has a transcript \(.*speech.json\), but "
        r"transcripts: true asks for them; write what is spoken into the field 'source_text' of each record .*, or set "
        r"transcripts: false for this source.$"
    )
    with pytest.raises(DataError, match=sentence):
        check_data_config(section)
    with pytest.raises(DataError, match=sentence):
        get_multimodal_dataloader(section, 0, 1, SpeechTextDataset(tokenizer), tokenizer)
    check_data_config({**section, "input_cfg": [{**source, "transcripts": False}]})
    talk = {**source, "type": "lhotse_as_conversation"}
    with pytest.raises(DataError, match=r"conversations have no transcripts \(.*speech.json\)"):
        check_data_config({**section, "input_cfg": [talk]})


def test_a_transcript_is_looked_for_in_the_first_records_only(monkeypatch, recordings) -> None:
    monkeypatch.setattr("nemo_emmett.data.checks.MOST_WITHOUT_TRANSCRIPT", 2)
    path = recordings()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(record) + "\n" for record in [records[2]] * 2 + records))
    source = {"type": "nemo", "manifest_filepath": str(path), "target_lang": "de"}
    with pytest.raises(DataError, match="none of the first 2 examples has a transcript"):
        check_data_config({**SETTINGS, "input_cfg": [source], "transcripts": True})


@pytest.mark.parametrize("kind", [ExampleKind.CONVERSATION, ExampleKind.AS_READ])
def test_other_datasets_have_no_transcripts(recordings, kind) -> None:
    source = {"type": "nemo", "manifest_filepath": str(recordings()), "target_lang": "de"}
    with pytest.raises(ConfigError, match=r"data\.train_ds\.transcripts: true needs nemo_emmett's SpeechTextDataset"):
        check_data_config({**SETTINGS, "input_cfg": [source], "transcripts": True}, examples=kind)


def test_by_default_only_training_data_gets_them(recordings, tokenizer) -> None:
    source = {"type": "nemo", "manifest_filepath": str(recordings()), "target_lang": "de"}
    section = {**SETTINGS, "input_cfg": [source]}
    sets = {"plain": {}, "asked": {"transcripts": True}}
    data = {"train_ds": dict(section), "validation_ds": {**section, "datasets": sets}}
    module = MultimodalDataModule(data, tokenizer, SpeechTextDataset(tokenizer), {"transcripts": True})
    assert module.cfg.train_ds.transcripts is True
    batch, *_ = next(iter(module.val_dataloader()))
    assert NEW_KEYS.isdisjoint(batch["plain"]["audio"])
    assert batch["asked"]["audio"].keys() >= NEW_KEYS


def test_a_batch_of_a_source_that_opts_out_has_empty_transcripts(batches, recordings) -> None:
    """Objectives find their keys in every batch."""
    sources = [
        {"type": "nemo", "manifest_filepath": str(recordings(target_lang="de"))},
        {"type": "nemo", "manifest_filepath": str(recordings(name="b.json", target_lang="de")), "transcripts": False},
    ]
    found = [batch["audio"] for batch in batches({"input_cfg": sources}, transcripts=True, batch_size=1)]
    assert len(found) == 2 * len(SENTENCES)
    assert all(batch.keys() >= NEW_KEYS for batch in found)
    assert sum(int(batch["transcript_lens"].sum() > 0) for batch in found) == sum(map(bool, SENTENCES))
    assert {batch["transcript_ids"].shape for batch in found if not batch["transcript_lens"].any()} == {(1, 0)}


@pytest.mark.parametrize("place", ["dataset", "source"])
def test_a_model_that_needs_transcripts_refuses_data_that_has_none(tokenizer, recordings, place) -> None:
    source = {"type": "nemo", "manifest_filepath": str(recordings(target_lang="de"))}
    train_ds = {**SETTINGS, "input_cfg": [source]}
    (train_ds if place == "dataset" else source)["transcripts"] = False
    data = MultimodalDataModule({"train_ds": train_ds}, tokenizer, SpeechTextDataset(tokenizer), {"transcripts": True})
    with pytest.raises(ConfigError, match=r"data.train_ds.transcripts: is false, but model.objectives"):
        data.train_dataloader()
