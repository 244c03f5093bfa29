"""``transcription``: a share of the examples of speech sources is transcribed instead of translated."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from nemo_emmett.data import SpeechTextDataset, get_multimodal_dataloader
from nemo_emmett.data.blending.weights import blend_of
from nemo_emmett.data.checks import check_data_config
from nemo_emmett.data.config.dataset_config import parse_dataset
from nemo_emmett.data.lengths.building import open_length_indexes
from nemo_emmett.data.readers.examples import ExampleKind
from nemo_emmett.errors import ConfigError, DataError

SETTINGS = {
    "prompt_format": "emmett_t5",
    "audio_locator_tag": "<|audio|>",
    "batch_size": 2,
    "seed": 0,
    "shard_seed": 0,
    "shuffle_buffer_size": 16,
}
RECORDS = 12
WORDS = ["one", "two", "three", "four"]


@pytest.fixture
def manifest(write_tone, write_manifest):
    """``manifest(name, **fields)``: twelve short recordings in English with translations, or with these fields."""

    def make(name: str = "speech.json", **fields) -> str:
        records = []
        for number in range(RECORDS):
            path = write_tone(f"{name}.{number}.wav", 0.1)
            record = {"audio_filepath": str(path), "duration": 0.1, "sampling_rate": 16000, "lang": "en"}
            spoken = {"text": " ".join(WORDS[: number % 4 + 1]), "translations": {"de": "eins zwei"}}
            records.append({**record, **(fields or spoken)})
        return str(write_manifest(name, records))

    return make


@pytest.fixture
def load(tokenizer):
    def build(config: dict, **settings):
        return get_multimodal_dataloader(
            {**SETTINGS, **config, **settings}, 0, 1, SpeechTextDataset(tokenizer), tokenizer
        )

    return build


def speech_of(batches) -> list[dict]:
    return [example for batch in batches for example in batch["audio"]["examples"]]


def directions(examples: list[dict]) -> Counter:
    return Counter((example["source_lang"], example["target_lang"]) for example in examples)


@pytest.mark.parametrize("how", ["schedule", "streaming", "nemo"])
def test_the_share_holds_at_every_moment(load, manifest, how) -> None:
    path = manifest()
    if how == "streaming":
        Path(f"{path}.gz").write_bytes(gzip.compress(Path(path).read_bytes()))
        path += ".gz"
    # A list of manifests is endless.
    source = {"type": "nemo", "manifest_filepath": [path], "target_lang": "de", "transcription": 0.25}
    text = {"input_cfg": [source], "shuffle": how != "streaming", "sampling": "nemo" if how == "nemo" else "emmett"}
    examples = speech_of(islice(load(text), 48))
    assert len(examples) == 96
    if how == "nemo":  # draws at random
        assert 10 < directions(examples)["en", "en"] < 40
    else:
        for count in (16, 40, 96):
            assert abs(directions(examples[:count])["en", "en"] - count / 4) <= 2  # but for the batch that is open
    for example in examples:
        is_transcription = example["target_lang"] == "en"
        assert example["target_text"] == (example["source_text"] if is_transcription else "eins zwei")
    assert {example["source_text"] for example in examples} == {" ".join(WORDS[: n + 1]) for n in range(4)}


def test_the_answer_is_source_text_where_text_is_the_translation(load, manifest, tokenizer) -> None:
    path = manifest(text="eins", source_text=" one two ", target_lang="de", context="Say it in German:")
    section = {"manifest_filepath": path, "transcription": 0.5, "transcripts": True, "prompt_format": "emmett_t5"}
    (batch, *_) = islice(load(section, batch_size=8), 1)
    audio = batch["audio"]
    assert sorted(audio["is_transcription"].tolist()) == [False] * 4 + [True] * 4
    for row, is_transcription in enumerate(audio["is_transcription"].tolist()):
        language, answer = ("<en>", "one two") if is_transcription else ("<de>", "eins")
        assert audio["answer_ids"][row, : audio["answer_lens"][row] - 1].tolist() == tokenizer.text_to_ids(answer)
        assert audio["context_ids"][row, 0] == tokenizer.token_to_id(language)
        assert audio["examples"][row]["target_text"] == answer


def test_an_instruction_to_translate_is_not_given_for_transcription(load, manifest) -> None:
    """Neither that of a record nor that of a source's tags."""
    from nemo_emmett.data.config.sources import parse_source
    from nemo_emmett.data.io.skipped_records import SkippedRecords
    from nemo_emmett.data.readers.examples import Examples
    from nemo_emmett.data.readers.registry import defaults_of, open_source

    path = manifest(text="eins", source_text="one two", target_lang="de", context="Say it in German:")
    entry = {
        "type": "nemo",
        "manifest_filepath": path,
        "tags": {"context": "In German:"},
        "audio_locator_tag": "<|audio|>",
    }
    source = parse_source({**entry, "is_transcription": True}, "train_ds")
    for kind in (ExampleKind.TRANSLATION, ExampleKind.CONVERSATION):
        cuts, _ = open_source(source, SkippedRecords(), kind)
        example, *_ = Examples(cuts, kind, defaults_of(source), SkippedRecords())
        if kind is ExampleKind.TRANSLATION:
            assert "context" not in example.custom
        else:
            assert [turn.value for turn in example.turns if hasattr(turn, "value")] == [
                "Transcribe in English:",
                "one two",
            ]


@pytest.mark.parametrize("compressed", [False, True])
def test_a_pass_has_each_recording_once_as_translation_and_the_share_of_transcriptions(
    load, manifest, compressed
) -> None:
    path = manifest()
    if compressed:
        Path(f"{path}.gz").write_bytes(gzip.compress(Path(path).read_bytes()))
        path += ".gz"
    loader = load({"manifest_filepath": path, "target_lang": "de", "transcription": 0.25}, shuffle=True)
    passes = [speech_of(loader) for _ in range(3)]
    of_passes = []
    for examples in passes:
        assert directions(examples) == {("en", "de"): RECORDS, ("en", "en"): RECORDS / 3}
        translated = [example["audio_path"] for example in examples if example["target_lang"] == "de"]
        assert len(set(translated)) == RECORDS
        of_passes.append({example["audio_path"] for example in examples if example["target_lang"] == "en"})
    assert len(set(map(frozenset, of_passes))) > 1  # others in each pass
    if not compressed:
        assert len(loader) == RECORDS * 4 / 3 / 2


def test_weights_follow_what_sources_hold_once(manifest, write_lines, tokenizer) -> None:
    lines = write_lines("text.tsv", ["one two\teins"] * 5)
    text = {"type": "parallel_text", "paths": str(lines), "source_column": 0, "target_column": 1}
    speech = [{"type": "nemo", "manifest_filepath": manifest(name)} for name in ("a.json", "b.json")]
    speech[1]["transcription"] = 0.25
    nested = {"type": "group", "input_cfg": [text]}
    section = {**SETTINGS, "input_cfg": [*speech, nested], "weights": "auto", "source_lang": "en", "target_lang": "de"}
    section |= {"token_equivalent_duration": 0.05, "reweight_temperature": [0.5, 0.5]}
    shares = {}
    for share in (0.25, None):
        section["input_cfg"][1]["transcription"] = share
        root = blend_of(parse_dataset(section, "train_ds").groups[0], tokenizer=tokenizer, count_all=True)
        shares[share] = [leaf.share for leaf in root.leaves()]
        assert root.size.seconds == pytest.approx(2 * RECORDS * 0.1)
        assert [child.size.examples for child in root.children] == [RECORDS, RECORDS, 5]
    first, second, third = shares[None]
    assert first == second != third
    assert shares[0.25] == pytest.approx([first, 0.75 * second, 0.25 * second, third])  # not tempered


def test_nemos_samplers_take_the_temperatures_of_the_recipe(load, manifest) -> None:
    sources = [{"type": "nemo", "manifest_filepath": manifest(name), "weight": 1} for name in ("a.json", "b.json")]
    sources[0]["transcription"] = 0.5
    for temperature in (0.5, [0.5]):
        section = {"input_cfg": sources, "target_lang": "de", "sampling": "nemo", "reweight_temperature": temperature}
        assert {e["target_lang"] for e in speech_of(islice(load(section), 40))} == {"de", "en"}


def test_the_index_of_what_is_translated_is_that_without_the_key(manifest, tokenizer) -> None:
    source = {"type": "nemo", "manifest_filepath": manifest(), "target_lang": "de"}
    text = {"type": "parallel_text", "paths": source["manifest_filepath"], "target_lang": "de"}
    found = []
    for share in (None, 0.5, 0.1):
        section = {**SETTINGS, "input_cfg": [source, text], "transcription": share}
        group = parse_dataset(section, "train_ds").groups[0]
        of_group = open_length_indexes(
            [group],
            tokenizer,
            ExampleKind.TRANSLATION,
            places={"train_ds.input_cfg.0", "train_ds.input_cfg.0.transcription"},
        )
        found.append([index.sidecar.places[0] for index in of_group.values()])
        assert all("transcription" not in of.keys for of in group.sources)
    assert found[0] == found[1][:1] == found[2][:1]
    assert found[1] == found[2]
    assert len(set(found[1])) == 2
    assert [index.size.examples for index in of_group.values()] == [RECORDS, RECORDS]


def test_groups_and_datasets_pass_it_on_to_their_speech(load, manifest, write_lines) -> None:
    lines = write_lines("text.tsv", ["one\teins"] * 4)
    text = {"type": "parallel_text", "paths": str(lines), "source_column": 0, "target_column": 1}
    speech = {"type": "nemo", "manifest_filepath": manifest()}
    nested = {"type": "group", "transcription": 0.5, "input_cfg": [speech, {**speech, "transcription": None}, text]}
    section = {"input_cfg": [nested, speech], "source_lang": "en", "target_lang": "de"}
    sources = parse_dataset(section, "train_ds").sources
    assert [source.is_transcription for source in sources] == [False, True, False, False, False]
    groups = {"text": {"input_cfg": [text], "batch_size": 2}, "speech": {"input_cfg": [speech], "batch_size": 2}}
    for fusion in ("zip", "mux"):
        group = {"input_cfg": [speech], **({"batch_size": 2} if fusion == "zip" else {}), "transcription": 0.1}
        both = {name: dict(group) for name, group in groups.items()}
        if fusion == "mux":
            both = {name: {"input_cfg": group["input_cfg"]} for name, group in groups.items()}
        dataset = parse_dataset(
            {"multi_config": True, "sampler_fusion": fusion, "transcription": 0.2, **both, "third": group}, "train_ds"
        )
        assert [source.weight for source in dataset.sources if source.is_transcription] == [0.2, 0.1]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"transcription": 0},
            r"train_ds.input_cfg.0.transcription: 0 cannot be used; give a number above 0 to below 1",
        ),
        ({"transcription": 1.0}, "train_ds.input_cfg.0.transcription: 1.0 cannot be used"),
        ({"transcription": True}, "train_ds.input_cfg.0.transcription: True cannot be used"),
        (
            {"type": "parallel_text", "manifest_filepath": None, "paths": "a.tsv", "transcription": 0.5},
            "train_ds.input_cfg.0.transcription: a source of the type 'parallel_text' holds no speech; remove the key.",
        ),
        (
            {"type": "lhotse_as_conversation", "transcription": 0.5},
            "train_ds.input_cfg.0.transcription: a source of the type 'lhotse_as_conversation' has the answers of its "
            "conversations; set transcription: null for it.",
        ),
    ],
)
def test_what_cannot_be_transcribed_is_refused(keys, message) -> None:
    section = {"input_cfg": [{"type": "nemo", "manifest_filepath": "a.json", "target_lang": "de", **keys}]}
    with pytest.raises(ConfigError, match=message):
        parse_dataset(section, "train_ds")


def test_a_dataset_without_speech_is_refused() -> None:
    text = {"type": "parallel_text", "paths": "a.tsv", "target_lang": "de"}
    group = {"type": "group", "input_cfg": [text], "transcription": 0.5}
    for section, place in (
        ({"input_cfg": [text], "transcription": 0.5}, "train_ds"),
        ({"input_cfg": [group]}, "train_ds.input_cfg.0"),
    ):
        with pytest.raises(
            ConfigError, match=f"^{place}.transcription: there is no speech to transcribe; remove the key"
        ):
            parse_dataset(section, "train_ds")


def test_records_without_transcripts_or_language_are_refused_early(manifest) -> None:
    source = {"type": "nemo", "manifest_filepath": manifest(text="eins"), "target_lang": "de", "transcription": 0.5}
    with pytest.raises(
        DataError, match=r"input_cfg.0.transcription: none of the first 12 examples has a transcript \(.*"
    ):
        check_data_config({**SETTINGS, "input_cfg": [source]})
    source["manifest_filepath"] = manifest("b.json", text="eins", source_text="one", lang=None)
    with pytest.raises(DataError, match=r"input_cfg.0.transcription: the spoken language of .* is not known"):
        check_data_config({**SETTINGS, "input_cfg": [source]})
    check_data_config({**SETTINGS, "input_cfg": [source], "source_lang": "en"})
    with pytest.raises(ConfigError, match="its dataset takes examples as NeMo reads them"):
        check_data_config({**SETTINGS, "input_cfg": [source]}, examples=ExampleKind.AS_READ)


def test_a_record_without_a_transcript_or_its_language_is_translated_and_counted(load, manifest) -> None:
    path = Path(manifest(text="eins", source_text="one", target_lang="de"))
    records = [json.loads(line) for line in path.read_text().splitlines()]
    del records[3]["source_text"], records[5]["lang"]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    loader = load({"manifest_filepath": str(path), "transcription": 0.5}, force_finite=True)
    expected = {("en", "de"): RECORDS - 1, (None, "de"): 1, ("en", "en"): RECORDS - 2}
    assert directions(speech_of(loader)) == expected
    assert loader.skipped_records.causes() == {"no transcript": 1, "no source language": 1}


def test_a_transcript_in_another_code_of_the_same_language_is_one(load, manifest) -> None:
    path = manifest(text="one", lang="en", target_lang="eng")
    loader = load({"manifest_filepath": path, "transcription": 0.5}, force_finite=True)
    assert directions(speech_of(loader)) == {("en", "en"): 2 * RECORDS}


def test_nemos_samplers_give_finite_recordings_twice(load, manifest) -> None:
    section = {"manifest_filepath": manifest(), "target_lang": "de", "transcription": 0.25, "sampling": "nemo"}
    assert directions(speech_of(load(section, force_finite=True))) == {("en", "de"): RECORDS, ("en", "en"): RECORDS}
