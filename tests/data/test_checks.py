"""What is known to be wrong before training: one sentence each, naming key, value and remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lhotse import CutSet
from nemo.collections.common.data.lhotse.nemo_adapters import LazyNeMoIterator
from nemo.collections.common.tokenizers import AutoTokenizer
from omegaconf import OmegaConf
from transformers import AddedToken

from nemo_emmett.data import SpeechTextDataset, check_data_config, get_multimodal_dataloader
from nemo_emmett.data.config.dataset_config import parse_dataset
from nemo_emmett.data.readers.examples import ExampleKind
from nemo_emmett.errors import ConfigError, DataError

from ..prompts.tiny_tokenizers import BUILDERS

LOCATOR = "<|audio|>"


@pytest.fixture
def good(speech, pairs) -> dict:
    """A config of both modalities in which nothing is wrong."""
    return {
        "multi_config": True,
        "sampler_fusion": "zip",
        "prompt_format": "emmett_t5",
        "audio_locator_tag": LOCATOR,
        "seed": 0,
        "speech": {"input_cfg": [{"type": "nemo", "manifest_filepath": str(speech(3))}], "batch_size": 2},
        "pairs": {"input_cfg": [{"type": "parallel_text", **pairs(3)}], "batch_size": 2},
    }


def refused(config, error=ConfigError, tokenizer=None, **kwargs) -> str:
    """The sentence with which a config is refused; it must be one line."""
    with pytest.raises(error) as caught:
        check_data_config(config, tokenizer, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def speech_source(good: dict) -> dict:
    return good["speech"]["input_cfg"][0]


def text_source(good: dict) -> dict:
    return good["pairs"]["input_cfg"][0]


def test_nothing_wrong(good, tokenizer) -> None:
    check_data_config(good)
    check_data_config(OmegaConf.create(good), tokenizer)


def test_interpolations_are_resolved(good) -> None:
    recipe = OmegaConf.create({"tag": LOCATOR, "data": {"train_ds": {**good, "audio_locator_tag": "${tag}"}}})
    check_data_config(recipe.data.train_ds)


# Files


@pytest.mark.parametrize("key", ["manifest_filepath", "tarred_audio_filepaths"])
def test_a_missing_speech_file(good, key) -> None:
    speech_source(good)[key] = "/nowhere/audio_0.json"
    message = refused(good, DataError)
    assert message.startswith(f"data.train_ds.speech.input_cfg.0.{key}: there is no file '/nowhere/audio_0.json'")


def test_a_missing_text_file_among_shards(good, tmp_path, write_lines) -> None:
    write_lines("a_0.en", ["one"])
    text_source(good)["source_paths"] = f"{tmp_path}/a__OP_0..1_CL_.en"
    assert f"pairs.input_cfg.0.source_paths: there is no file '{tmp_path}/a_1.en'" in refused(good, DataError)


def test_a_missing_classic_manifest() -> None:
    message = refused({"manifest_filepath": "nowhere.json", "batch_size": 1}, DataError, place="data.validation_ds")
    assert message.startswith("data.validation_ds.manifest_filepath: there is no file 'nowhere.json'; correct the path")


@pytest.mark.parametrize("noise", ["nowhere.json", {"manifest_filepath": "nowhere.json"}])
def test_a_missing_file_of_noise(good, noise) -> None:
    good["speech"]["noise_path"] = noise
    sentence = "data.train_ds.speech.noise_path.manifest_filepath: there is no file 'nowhere.json'; correct the path"
    assert refused(good, DataError).startswith(sentence)


def test_a_missing_input_cfg_file(good) -> None:
    good["pairs"]["input_cfg"] = "nowhere.yaml"
    assert "pairs.input_cfg: the file 'nowhere.yaml' cannot be read" in refused(good, DataError)


def test_files_elsewhere_are_not_looked_for() -> None:
    config = {"shar_path": "s3://bucket/shar", "batch_size": 1}
    check_data_config(config, examples=ExampleKind.AS_READ)


def test_parallel_files_of_unequal_length(good, write_lines) -> None:
    text_source(good)["target_paths"] = str(write_lines("short.de", ["eins", "zwei"]))
    message = refused(good, DataError)
    source, target = text_source(good)["source_paths"], text_source(good)["target_paths"]
    assert message == (
        "data.train_ds.pairs.input_cfg.0: parallel files must have the same number of lines, "
        f"but {source} has 3, {target} has 2."
    )


def test_a_last_line_without_newline_counts(good, tmp_path) -> None:
    (tmp_path / "a.de").write_text("eins\nzwei\ndrei")
    text_source(good)["target_paths"] = str(tmp_path / "a.de")
    check_data_config(good)


def test_no_data_at_all() -> None:
    assert "data.train_ds: names no data; give input_cfg" in refused({"batch_size": 1})
    assert "data.train_ds.input_cfg: is empty or not a list" in refused({"batch_size": 1, "input_cfg": []})


# Languages


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"target_lang": "dee"}, "input_cfg.0.target_lang: 'dee' is the code of Dewoin; if German is meant"),
        ({"target_lang": ["de", "xx"]}, "input_cfg.0.target_lang: 'xx' is not a known language"),
        ({"tags": {"target_lang": "xx"}}, "input_cfg.0.target_lang: 'xx' is not a known language"),
        ({"source_lang": "xx"}, "input_cfg.0.source_lang: 'xx' is not a known language"),
    ],
)
def test_unknown_languages_of_speech(good, change, sentence) -> None:
    speech_source(good).update(change)
    assert sentence in refused(good)


def test_one_language_under_two_codes(good) -> None:
    speech_source(good)["target_lang"] = ["de", "fr", "deu_Latn"]
    assert "speech.input_cfg.0.target_lang: names one language twice, as de, fr, de; name each once" in refused(good)
    speech_source(good)["target_lang"] = ["deu", "fr"]
    check_data_config(good)


def test_a_language_that_the_family_has_no_token_for(good, tmp_path) -> None:
    good["prompt_format"] = "emmett_nllb"
    BUILDERS["nllb"](tmp_path).save_pretrained(tmp_path / "nllb")
    nllb = AutoTokenizer(str(tmp_path / "nllb"), use_fast=True)
    nllb.tokenizer.add_tokens([AddedToken(LOCATOR, special=True, normalized=False)], special_tokens=True)
    check_data_config(good, nllb)
    text_source(good)["source_lang"] = "mdw"
    assert (
        "pairs.input_cfg.0.source_lang: NLLB has no token for the language 'mdw' (Mbosi); leave out the data in that "
    ) in refused(good, tokenizer=nllb)
    text_source(good)["source_lang"] = "en"
    manifest = Path(speech_source(good)["manifest_filepath"])
    manifest.write_text(manifest.read_text().replace('"lang": "en"', '"lang": "mdw"'))
    assert "(3 x NLLB has no token for the language 'mdw' (Mbosi))" in refused(good, DataError, nllb)
    good["prompt_format"] = "emmett_t5"
    check_data_config(good, nllb)


def test_languages_of_text(good) -> None:
    source = text_source(good)
    del source["target_lang"]
    assert "input_cfg.0.target_lang: missing; name the language" in refused(good)
    source["target_lang"] = ["de", "fr"]
    assert "a text has one target language" in refused(good)
    source["target_lang"] = "xx"
    assert "'xx' is not a known language" in refused(good)
    files = {"en": source.pop("source_paths"), "xx": source.pop("target_paths")}
    del source["target_lang"]
    source["paths"] = files
    assert "input_cfg.0.paths: 'xx' is not a known language" in refused(good)
    source["paths"] = {"en": files["en"], "de": files["xx"]}
    source["directions"] = ["en-fr"]
    assert "input_cfg.0.directions: 'en-fr' is not a pair of two languages" in refused(good)


def test_speech_that_never_names_its_target_language(write_tone, write_manifest) -> None:
    record = {"audio_filepath": str(write_tone("a.wav")), "duration": 1.0, "text": "eins"}
    path = write_manifest("m.json", [record] * 3)
    message = refused({"manifest_filepath": str(path), "batch_size": 1}, DataError)
    assert (
        f"none of the 3 records of {path} can be used (3 x no target language); give the source a target_lang"
        in message
    )
    check_data_config({"manifest_filepath": str(path), "batch_size": 1, "target_lang": "de"})


# Keys


@pytest.mark.parametrize(
    ("place", "key", "known"),
    [
        ([], "sampler_fusoin", "sampler_fusion"),
        ([], "max_bad_record", "max_bad_records"),
        (["speech"], "batch_szie", "batch_size"),
        (["speech", "input_cfg", 0], "manifest_filepaht", "manifest_filepath"),
        (["pairs", "input_cfg", 0], "target_langs", "target_lang"),
        (["pairs", "input_cfg", 0], "traget_paths", "target_paths"),
    ],
)
def test_misspelt_keys(good, place, key, known) -> None:
    node = good
    for step in place:
        node = node[step]
    node[key] = 1
    assert f"{key}: there is no such key; did you mean '{known}'?" in refused(good)


def test_misspelt_keys_of_a_group(good) -> None:
    group = {"type": "group", "wieght": 0.5, "input_cfg": good["speech"]["input_cfg"]}
    good["speech"]["input_cfg"] = [group]
    assert "data.train_ds.speech.input_cfg.0.wieght: there is no such key; did you mean 'weight'?" in refused(good)


def test_legacy_keys_of_nemo_pass(good) -> None:
    legacy = {"labels": ["a"], "trim_silence": False, "is_tarred": False, "tarred_shard_strategy": "scatter"}
    check_data_config(
        {**good, **legacy, "max_utts": 0, "normalize_transcripts": False, "parser": "en", "use_lhotse": True}
    )
    good["speech"]["use_start_end_token"] = True
    check_data_config(good)


def test_unknown_types(good) -> None:
    text_source(good)["type"] = "paralel_text"
    assert "input_cfg.0.type: there is no data type 'paralel_text'; did you mean 'parallel_text'?" in refused(good)
    del text_source(good)["type"]
    assert "data.train_ds.pairs.input_cfg.0.type: missing" in refused(good)


@pytest.mark.parametrize("name", ["audio", "text"])
def test_datasets_must_not_be_called_as_modalities(speech, name) -> None:
    datasets = {name: {"manifest_filepath": str(speech(2))}}
    message = refused({"batch_size": 1, "datasets": datasets}, place="data.validation_ds")
    assert message.startswith(f"data.validation_ds.datasets.{name}: a dataset cannot be called '{name}'")


def test_each_dataset_is_checked_with_what_it_inherits(speech) -> None:
    config = {"batch_size": 1, "datasets": {"dev": {"manifest_filepath": str(speech(2))}, "other": {"shar_path": "no"}}}
    message = refused(config, DataError, place="data.validation_ds")
    assert message.startswith("data.validation_ds.datasets.other.shar_path: there is no file 'no'")


# Sampling


def test_fusion(good) -> None:
    good["sampler_fusion"] = "zipp"
    assert "data.train_ds.sampler_fusion: 'zipp' is unknown; did you mean 'zip'?" in refused(good)
    good["sampler_fusion"] = "randomized_round_robin"
    good["sampler_weights"] = {"speech": 1.0}
    assert "sampler_weights: the group 'pairs' has none" in refused(good)
    good["sampler_weights"] = {"speech": 1.0, "pairs": 1.0, "more": 1.0}
    assert "sampler_weights: there is no group 'more'; the groups are speech, pairs." in refused(good)
    good["sampler_weights"] = {"speech": 0, "pairs": 1.0}
    assert "sampler_weights.speech: 0 cannot be used; give a number above 0" in refused(good)


def test_how_much_of_a_group_a_step_of_zip_holds(good, tokenizer) -> None:
    good["sampler_fusion"], good["pairs"]["every_n_steps"] = "round_robin", 2
    assert refused(good).startswith(
        "data.train_ds.pairs.every_n_steps: has a meaning under sampler_fusion: zip alone, where a step holds a batch "
        "of every group, and here it is round_robin; leave the key out, or set data.train_ds.sampler_fusion: zip."
    )
    good["sampler_fusion"] = "zip"
    check_data_config(good)
    good["batch_ratio"] = 0.5
    assert refused(good).startswith("data.train_ds.batch_ratio: is a key of a group of a multi_config")
    del good["batch_ratio"]
    good["speech"]["every_n_steps"] = 3
    assert "data.train_ds.speech.every_n_steps: no group gives a batch to every step" in refused(good)
    del good["speech"]["every_n_steps"]
    good["pairs"] |= {"every_n_steps": 1, "batch_ratio": 0.25}
    check_data_config(good)
    good["speech"]["every_n_steps"] = 2
    assert "data.train_ds.speech.every_n_steps: 2 cannot be combined with data.train_ds.pairs.batch_ratio" in refused(
        good
    )
    del good["speech"]["every_n_steps"]
    good["speech"]["batch_ratio"] = 1.0
    assert "data.train_ds.speech.batch_ratio: all groups have one" in refused(good)
    del good["speech"]["batch_ratio"]
    good["sampling"] = "nemo"
    with pytest.raises(ConfigError, match=r"pairs\.batch_ratio: NeMo's samplers do not have it; set sampling: emmett"):
        get_multimodal_dataloader(good, 0, 1, SpeechTextDataset(tokenizer), tokenizer, place="data.train_ds")
    del good["sampling"]
    good["pairs"] |= {"use_multimodal_sampling": True, "batch_tokens": 100}
    assert "data.train_ds.pairs.batch_tokens: cannot be combined with batch_ratio" in refused(good)
    for value in (0, -1, "a"):
        good["pairs"]["batch_ratio"] = value
        assert f"data.train_ds.pairs.batch_ratio: {value}" in refused(good).replace("'", "")


def test_batch_sizes(good, tokenizer) -> None:
    del good["pairs"]["batch_size"]
    check_data_config(good)  # before there is a model, the OOMptimizer may yet set them
    assert "data.train_ds.pairs.batch_size: missing" in refused(good, tokenizer=tokenizer)
    good["pairs"]["batch_duration"] = 20
    assert "data.train_ds.pairs.batch_duration: measures seconds of speech" in refused(good)


@pytest.mark.parametrize(
    ("kind", "type_", "reason"),
    [
        (ExampleKind.TRANSLATION, "lhotse_as_conversation", "read as conversations (type: lhotse_as_conversation)"),
        (ExampleKind.CONVERSATION, "nemo", "read as conversations (NeMo's SALM takes no others)"),
    ],
)
def test_conversations_have_no_seconds_to_make_batches_by(good, kind: ExampleKind, type_: str, reason: str) -> None:
    source = {**good["speech"]["input_cfg"][0], "type": type_}
    said = refused({"input_cfg": [source], "use_bucketing": True}, examples=kind)
    assert said.startswith("data.train_ds.use_bucketing: measures seconds of speech, but ")
    assert said.endswith(
        f"{reason}, whose length is in tokens; set use_multimodal_sampling: true to measure in tokens."
    )


def test_sizes_of_buckets_need_bins(good, tokenizer) -> None:
    good["pairs"] |= {"use_multimodal_sampling": True, "bucket_batch_size": [4, 2]}
    sentence = "data.train_ds.pairs.bucket_duration_bins: missing; bucket_batch_size needs a bin for each of its sizes."
    assert refused(good, tokenizer=tokenizer) == sentence


@pytest.mark.parametrize("limit", [-1, 1.5, "many", True])
def test_impossible_limits_of_bad_records(limit) -> None:
    message = refused({"manifest_filepath": "a.json", "max_bad_records": limit})
    assert message == (
        f"data.train_ds.max_bad_records: {limit!r} cannot be used; give a whole number from 0, or a number above 0 to "
        "below 1, or null."
    )


@pytest.mark.parametrize("limit", [0, 12, 0.0001, None])
def test_limits_of_bad_records(limit) -> None:
    section = {"manifest_filepath": "a.json", "max_bad_records": limit}
    assert parse_dataset(section, "data.train_ds").max_bad_records == limit


def test_the_limit_holds_for_the_dataset_not_for_a_group(good) -> None:
    good["speech"]["max_bad_records"] = 3
    assert "data.train_ds.speech.max_bad_records: holds for all groups together" in refused(good)


# With a tokenizer


def test_prompt_format(good, tokenizer) -> None:
    good["prompt_format"] = "emmet_t5"
    assert "prompt_format: there is no prompt format 'emmet_t5'; did you mean 'emmett_t5'?" in refused(good)
    del good["prompt_format"]
    check_data_config(good)  # a model may yet say it
    assert "data.train_ds.speech.prompt_format: missing" in refused(good, tokenizer=tokenizer)


def test_the_locator_token(good, tokenizer) -> None:
    good["audio_locator_tag"] = "<|speech|>"
    message = refused(good, tokenizer=tokenizer)
    assert message.startswith(
        "data.train_ds.speech.audio_locator_tag: the tokenizer has no token '<|speech|>'; add it "
        "(tokenizer.add_special_tokens({'additional_special_tokens': ['<|speech|>']}))"
    )
    del good["audio_locator_tag"]
    assert "data.train_ds.speech.audio_locator_tag: missing" in refused(good, tokenizer=tokenizer)
    del good["speech"]
    check_data_config(good, tokenizer)  # text needs none


def test_speech_in_tokens_needs_its_measure(good, tokenizer) -> None:
    good["speech"]["use_multimodal_sampling"] = True
    assert "speech.token_equivalent_duration: missing" in refused(good, tokenizer=tokenizer)


# Filtered to nothing


def test_speech_filtered_to_nothing(good, tokenizer) -> None:
    good["speech"] |= {"min_duration": 40, "max_duration": 50}
    manifest = speech_source(good)["manifest_filepath"]
    message = refused(good, DataError)
    assert message == (
        f"data.train_ds.speech.input_cfg.0: nothing of {manifest} is left of 3 records after filtering by "
        "min_duration: 40, max_duration: 50; relax these keys, or drop the source."
    )
    assert refused(good, DataError, tokenizer) == message


def test_one_of_several_sources_filtered_to_nothing(good, speech) -> None:
    good["speech"]["input_cfg"].append({"type": "nemo", "manifest_filepath": str(speech(8, "longer.json"))})
    good["speech"]["min_duration"] = 1.5
    assert "speech.input_cfg.0: nothing of" in refused(good, DataError)


def test_text_filtered_to_nothing(good, tokenizer) -> None:
    good["pairs"]["max_tokens"] = 2
    assert "after filtering by max_tokens: 2" in refused(good, DataError, tokenizer)
    check_data_config(good)  # without a tokenizer nobody knows


def test_buckets_that_hold_nothing(good, tokenizer) -> None:
    good["pairs"] |= {"use_multimodal_sampling": True, "bucket_duration_bins": [1, 2], "bucket_batch_size": [4, 2]}
    assert "after filtering by bucket_duration_bins: [1, 2]" in refused(good, DataError, tokenizer)
    good["pairs"]["bucket_duration_bins"] = [1, 200]
    check_data_config(good, tokenizer)


@pytest.mark.parametrize("sampling_rate", [16000, None])
def test_audio_is_not_opened_to_see_what_filters_leave(write_manifest, sampling_rate) -> None:
    record = {"audio_filepath": "gone.wav", "duration": 1.0, "text": "eins", "sampling_rate": sampling_rate}
    path = write_manifest("m.json", [{k: v for k, v in record.items() if v is not None}])
    check_data_config({"manifest_filepath": str(path), "batch_size": 1, "target_lang": "de"})


def test_empty_and_broken_sources(good, write_lines, tmp_path) -> None:
    speech_source(good)["manifest_filepath"] = str(write_lines("m.json", []))
    assert f"{tmp_path}/m.json is empty" in refused(good, DataError)
    speech_source(good)["manifest_filepath"] = str(write_lines("m.json", ["x", '{"duration": 1}']))
    assert "none of the 2 records of" in refused(good, DataError)
    assert "(1 x not JSON, 1 x no audio_filepath)" in refused(good, DataError)


def test_lhotse_cuts_filtered_to_nothing(speech, tmp_path) -> None:
    CutSet(list(LazyNeMoIterator(str(speech(3))))).to_file(tmp_path / "cuts.jsonl")
    config = {"cuts_path": str(tmp_path / "cuts.jsonl"), "batch_size": 1, "max_duration": 0.5}
    assert "is left of 3 records after filtering by max_duration: 0.5" in refused(config, DataError)


def test_asr_configs_are_not_asked_for_languages(write_tone, write_manifest) -> None:
    record = json.dumps({"audio_filepath": str(write_tone("a.wav")), "duration": 1.0, "text": "one"})
    config = {"manifest_filepath": str(write_manifest("m.json", [record])), "batch_size": 1}
    check_data_config(config, examples=ExampleKind.AS_READ)
    config["min_duration"] = 2
    assert "is left of 1 records" in refused(config, DataError, examples=ExampleKind.AS_READ)


def test_a_dataset_set_to_null_is_none() -> None:
    check_data_config(None, place="data.validation_ds")


# Keys without effect


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    """What is logged as a warning, counted as NeMo's log counts it."""
    from nemo.utils import logging, logging_mode

    logged: list[str] = []

    def warning(message: str, *args, mode=logging_mode.EACH, **kwargs) -> None:
        if mode is not logging_mode.ONCE or message not in logged:
            logged.append(message)

    monkeypatch.setattr(logging, "warning", warning)
    return logged


def test_keys_of_groups_beside_multi_config_are_warned_of(good, warnings) -> None:
    for key, value in {"max_duration": 20.0, "batch_size": 4, "min_tokens": 1}.items():
        good[key] = value
    check_data_config(good)
    check_data_config(good)  # again, as when the loader is built
    assert warnings == [
        f"data.train_ds.{key}: has no effect next to multi_config; set it in the groups (speech, pairs)."
        for key in ("max_duration", "batch_size", "min_tokens")
    ]


def test_shared_keys_inside_a_group_are_warned_of(good, warnings) -> None:
    good["num_workers"] = 1
    good["speech"] |= {"shuffle": True, "num_workers": 2, "seed": 0}
    check_data_config(good)
    assert warnings == [  # the seed is the same as above
        "data.train_ds.speech.num_workers: has no effect, since all groups share data.train_ds.num_workers, "
        "which is 1; set it there.",
        "data.train_ds.speech.shuffle: has no effect, since all groups share data.train_ds.shuffle, "
        "which is False; set it there.",
    ]


def test_what_has_an_effect_is_not_warned_of(good, warnings) -> None:
    good |= {"shuffle": True, "num_workers": 0, "token_equivalent_duration": 0.08, "source_lang": "en"}
    good["speech"] |= {"max_duration": 20.0, "shuffle": True}
    check_data_config(good)
    check_data_config({**good["pairs"], "shuffle": True, "max_tokens": 10, "num_workers": 1})
    assert warnings == []


# Counting lines


def test_lines_are_counted_once_as_long_as_the_files_stay(good, write_lines, monkeypatch) -> None:
    from nemo_emmett.data.io import files

    opened = []
    open_bytes = files.open_bytes
    monkeypatch.setattr(files, "open_bytes", lambda path: opened.append(path) or open_bytes(path))
    counted = files.count_lines_of
    source, target = text_source(good)["source_paths"], text_source(good)["target_paths"]
    assert counted([source, target]) == {source: 3, target: 3}
    assert opened == [source, target]
    assert counted([source, target]) == {source: 3, target: 3}
    assert opened == [source, target]
    write_lines("train.de", ["eins", "zwei"])
    assert "train.de has 2" in refused(good, DataError)
    assert opened.count(source) == 1
    assert opened.count(target) == 2


def test_counting_for_long_shows_a_bar(write_lines, monkeypatch, capfd) -> None:
    from nemo_emmett.data.io import files

    path = str(write_lines("a.de", ["eins"] * 1000))
    files.count_lines_of([path])
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(files, "SECONDS_WITHOUT_A_BAR", 0)
    files.count_lines_of([str(write_lines("b.de", ["eins"] * 1000))])
    assert "Counting lines: 100%" in capfd.readouterr().err
