"""The tree that a dataset's section is parsed to: inheritance, tags, places, and the mistakes that it reveals."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from nemo_emmett.data import DatasetConfig, parse_dataset
from nemo_emmett.data.config.nemo_config import sampler_config, unwrap
from nemo_emmett.data.config.sources import Source, SourceGroup
from nemo_emmett.errors import ConfigError, DataError

PLACE = "data.train_ds"


def parsed(**section: Any) -> DatasetConfig:
    return parse_dataset(section, PLACE)


def nemo(name: str = "a", **keys: Any) -> dict:
    return {"type": "nemo", "manifest_filepath": f"{name}.json", **keys}


def group(*members: dict, **keys: Any) -> dict:
    return {"type": "group", "input_cfg": list(members), **keys}


# Inheritance


def test_a_source_inherits_from_the_groups_around_it_and_the_dataset() -> None:
    inner = group(nemo("a"), nemo("b", target_lang="es", text_field="own"), target_lang="fr", text_field="inner")
    dataset = parsed(
        source_lang="en",
        target_lang="de",
        channel_selector=1,
        audio_locator_tag="<|audio|>",
        token_equivalent_duration=0.08,
        input_cfg=[group(inner, source_lang="it"), nemo("c")],
    )
    a, b, c = dataset.sources
    assert [(s.source_lang, s.target_lang) for s in (a, b, c)] == [("it", "fr"), ("it", "es"), ("en", "de")]
    assert [s.text_field for s in (a, b, c)] == ["inner", "own", None]
    for source in (a, b, c):
        assert (source.channel_selector, source.audio_locator_tag) == (1, "<|audio|>")
        assert source.token_equivalent_duration == 0.08


def test_the_outer_tags_win_as_in_nemo_and_name_the_languages() -> None:
    inner = group(nemo(tags={"task": "asr", "domain": "news"}), tags={"target_lang": "es"})
    (source,) = parsed(input_cfg=[group(inner, tags={"task": "ast"})], target_lang="de").sources
    assert source.tags == {"task": "ast", "domain": "news", "target_lang": "es"}
    assert source.target_lang == "es"


def test_the_languages_of_nemos_texts() -> None:
    entry = {"type": "txt_pair", "source_paths": "a.en", "target_paths": "a.de"}
    entry |= {"source_language": "en", "target_language": "de"}
    (source,) = parsed(input_cfg=[entry]).sources
    assert (source.source_lang, source.target_lang, source.is_text) == ("en", "de", True)
    (source,) = parsed(input_cfg=[{**entry, "target_lang": "fr"}]).sources
    assert source.target_lang == "fr"


def test_groups_inherit_what_holds_for_all_and_share_what_is_shared() -> None:
    dataset = parsed(
        multi_config=True,
        seed=3,
        shuffle=True,
        prompt_format="emmett_t5",
        target_lang="de",
        index_dir="here",
        weights="auto",
        speech={"input_cfg": [nemo()], "seed": 5, "num_workers": 2, "weights": None},
        text={"input_cfg": [nemo("b")], "prompt_format": "plain", "index_dir": "there"},
    )
    speech, text = dataset.groups
    assert (speech.name, speech.place, text.place) == ("speech", f"{PLACE}.speech", f"{PLACE}.text")
    assert (speech.prompt_format, text.prompt_format) == ("emmett_t5", "plain")
    assert (speech.index_dir, text.index_dir) == ("here", "there")
    assert (speech.root.is_auto, text.root.is_auto) == (False, True)
    for found in (speech, text):
        assert (found.keys["seed"], found.keys["shuffle"], found.keys["num_workers"]) == (3, True, 0)
        assert [source.target_lang for source in found.sources] == ["de"]


# Places


def test_places_are_those_of_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text(yaml.safe_dump([nemo("c"), group(nemo("d"))]))
    dataset = parsed(input_cfg=[group(nemo("a"), nemo("b")), group(input_cfg=str(tmp_path / "list.yaml"))])
    assert [source.place for source in dataset.sources] == [
        f"{PLACE}.input_cfg.0.input_cfg.0",
        f"{PLACE}.input_cfg.0.input_cfg.1",
        f"{PLACE}.input_cfg.1.input_cfg.0",
        f"{PLACE}.input_cfg.1.input_cfg.1.input_cfg.0",
    ]
    assert [source.name for source in dataset.sources] == ["a.json", "b.json", "c.json", "d.json"]
    assert [member.place for member in dataset.groups[0].root.members] == [
        f"{PLACE}.input_cfg.0",
        f"{PLACE}.input_cfg.1",
    ]


def test_the_one_source_of_classic_keys_has_the_place_of_its_dataset() -> None:
    for keys, kind in (
        ({"manifest_filepath": "a.json", "tarred_audio_filepaths": "a.tar"}, "nemo"),
        ({"cuts_path": "a.jsonl"}, "lhotse"),
        ({"shar_path": "a"}, "lhotse"),
    ):
        (source,) = parsed(**keys, source_lang="en").sources
        assert (source.type, source.place, source.source_lang) == (kind, PLACE, "en")
        assert {key: getattr(source, key) for key in keys} == keys


def test_groups_mixed_into_one_keep_their_places_and_weights() -> None:
    dataset = parsed(
        multi_config=True,
        sampler_fusion="mux",
        sampler_weights={"speech": 3, "text": 1},
        batch_size=4,
        source_lang="en",
        speech={"input_cfg": [nemo("a")], "source_lang": "es"},
        text={"input_cfg": [nemo("b")]},
    )
    (mixed,) = dataset.groups
    assert (mixed.name, mixed.place, mixed.batch_size, dataset.is_mux) == ("", PLACE, 4, True)
    assert [(part.place, part.weight) for part in mixed.root.members] == [(f"{PLACE}.speech", 3), (f"{PLACE}.text", 1)]
    assert [(source.place, source.source_lang) for source in mixed.sources] == [
        (f"{PLACE}.speech.input_cfg.0", "es"),
        (f"{PLACE}.text.input_cfg.0", "en"),
    ]


def test_temperatures_are_one_for_each_level() -> None:
    entries = [group(nemo("a"), nemo("b"), reweight_temperature=[0.5]), nemo("c")]
    dataset = parsed(input_cfg=entries, reweight_temperature=0.3).groups[0]
    assert (dataset.root.depth, dataset.temperatures) == (2, (0.3, 0.3))
    assert [m.temperatures for m in dataset.root.members if isinstance(m, SourceGroup)] == [(0.5,)]


# Values


def test_numbers_may_be_texts_as_the_environment_gives_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCH", "16")
    section = OmegaConf.create({"manifest_filepath": "a.json", "batch_size": "${oc.env:BATCH}", "max_duration": "20"})
    (found,) = parse_dataset(section, PLACE).groups
    assert (found.batch_size, found.keys["max_duration"]) == (16, 20.0)


def test_nemo_is_given_the_same_tree(tmp_path: Path) -> None:
    entries = [group(nemo("a", weight=2), nemo("b", weight=1), tags={"task": "ast"}, target_lang="de"), nemo("c")]
    section = {"input_cfg": entries, "shuffle": True, "batch_size": 4, "noise_path": "noise.json"}
    (found,) = parse_dataset(deepcopy(section), PLACE).groups
    config = sampler_config(found, batch_size=1)
    assert (config.shuffle, config.batch_size) == (True, 1)
    first = config.input_cfg[0]
    assert (first.type, [member.weight for member in first.input_cfg]) == ("group", [2, 1])
    wrapped = [*first.input_cfg, config.input_cfg[1]]
    assert [unwrap(source) for source in wrapped] == found.sources
    assert "noise.json" in config.noise_path.input_cfg


def test_a_source_with_other_keys_differs_in_those_alone() -> None:
    (source,) = parsed(manifest_filepath="a.json").sources
    other = source.with_keys(shuffle=True, force_map_dataset=False)
    assert isinstance(other, Source)
    assert (other.shuffle, other.keys) == (True, {**source.keys, "shuffle": True, "force_map_dataset": False})
    assert (source.shuffle, other.place, other.name) == (None, source.place, source.name)


# Mistakes


def refused(section: dict, error: type[Exception] = ConfigError) -> str:
    with pytest.raises(error) as caught:
        parse_dataset(section, PLACE)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def good() -> dict:
    """A section in which nothing is wrong, and into which one fault is planted at a time."""
    return {
        "batch_size": 4,
        "num_workers": 1,
        "shuffle": True,
        "seed": 0,
        "input_cfg": [
            group(nemo("a", weight=1.0), nemo("b", weight=2.0), weight=1),
            {"type": "parallel_text", "source_paths": "a.en", "target_paths": "a.de", "target_lang": "de", "weight": 2},
        ],
    }


def test_nothing_is_wrong_with_it(good: dict) -> None:
    assert len(parse_dataset(good, PLACE).sources) == 3


NUMBER = "a number above 0"
NAME = "a text that is not empty"
BINS = f"a list, each item {NUMBER}, or a list, each item a list (2 items), each item {NUMBER}, or 'auto', or null"


@pytest.mark.parametrize(
    ("key", "value", "accepted"),
    [
        ("batch_size", 0, "a whole number from 1, or null"),
        ("batch_size", -1, "a whole number from 1, or null"),
        ("batch_size", 2.5, "a whole number from 1, or null"),
        ("batch_size", "many", "a whole number from 1, or null"),
        ("batch_size", True, "a whole number from 1, or null"),
        ("batch_size", [4], "a whole number from 1, or null"),
        ("batch_size", {"a": 1}, "a whole number from 1, or null"),
        ("batch_duration", 0, f"{NUMBER}, or null"),
        ("batch_duration", float("nan"), f"{NUMBER}, or null"),
        ("batch_tokens", -5, "a whole number from 1, or null"),
        ("quadratic_duration", float("inf"), f"{NUMBER}, or null"),
        ("token_equivalent_duration", 0, f"{NUMBER}, or null"),
        ("num_workers", -1, "a whole number from 0 to 10000"),
        ("num_workers", None, "a whole number from 0 to 10000"),
        ("num_buckets", 0, "a whole number from 1 to 100000"),
        ("num_sub_buckets", 0, "a whole number from 1, or null"),
        ("shuffle", "false", "true or false"),
        ("shuffle", 1, "true or false"),
        ("use_bucketing", "yes", "true or false"),
        ("force_finite", 0, "true or false"),
        ("allow_commands", "false", "true or false"),
        ("use_emmett", "true", "true or false"),
        ("multi_config", "true", "true or false"),
        ("seed", "random", "a whole number from 0, or 'trng' or 'randomized'"),
        ("seed", -1, "a whole number from 0, or 'trng' or 'randomized'"),
        ("shard_seed", 1.5, "a whole number from 0, or 'trng' or 'randomized'"),
        ("sample_rate", 0, "a whole number from 1"),
        ("min_duration", "short", "a number, or null"),
        ("max_duration", float("nan"), "a number, or null"),
        ("min_tokens", [], "a whole number, or null"),
        ("max_tps", "fast", "a number, or a list, each item a number"),
        ("bucket_duration_bins", 7, BINS),
        ("bucket_duration_bins", "automatic", BINS),
        ("bucket_duration_bins", [0, 5], BINS),
        ("bucket_duration_bins", [float("nan"), 5], BINS),
        ("bucket_duration_bins", [[5, 1], [6]], BINS),
        ("bucket_duration_bins", [[5, 1], 7], BINS),
        ("reweight_temperature", -1, "a number from 0, or a list, each item a number from 0, or null"),
        ("noise_snr", [10], "a list (2 items), each item a number"),
        ("noise_mix_prob", 1.5, "a number from 0 to 1"),
        ("pad_direction", "up", "'left' or 'right' or 'both' or 'random'"),
        ("prompt_format", 5, "a text, or null"),
        ("audio_locator_tag", ["<|audio|>"], "a text, or null"),
        ("sampling", "lhotse", "'auto' or 'emmett' or 'nemo'"),
        ("weights", "hours", "'auto', or null"),
        ("index_dir", 5, "a text that is not empty, or null"),
        ("source_lang", False, "a text that is not empty, or null"),
        ("target_lang", [], f"{NAME}, or a list that is not empty, each item {NAME}, or null"),
    ],
)
def test_values_of_a_dataset(good: dict, key: str, value: Any, accepted: str) -> None:
    message = refused({**good, key: value})
    assert message.startswith(f"{PLACE}.{key}: ")
    assert message.endswith(f" cannot be used; give {accepted}.")


def test_the_item_at_fault_is_named(good: dict) -> None:
    bins = {"bucket_duration_bins": [5, 10], "bucket_batch_size": [4, 0]}
    said = refused({**good, **bins})
    assert said == f"{PLACE}.bucket_batch_size.1: 0 cannot be used; give a whole number from 1 to 1000000."


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"bucket_duration_bins": [10, 5]}, "bucket_duration_bins: [10, 5] is not in ascending order; sort the bins."),
        ({"bucket_duration_bins": []}, "bucket_duration_bins: [] is not in ascending order; sort the bins."),
        ({"bucket_duration_bins": [[5, 9], [5, 2]]}, "bucket_duration_bins: [[5, 9], [5, 2]] is not in ascending"),
        (
            {"bucket_duration_bins": [5, 10], "bucket_batch_size": [4]},
            "bucket_batch_size: has 1 sizes for 2 bins; give one for each.",
        ),
        (
            {"bucket_duration_bins": [5, 10], "bucket_batch_size": [4, 2], "max_tpt": [1.0]},
            "max_tpt: has 1 values for 2 bins; give one for each.",
        ),
        ({"min_duration": 5, "max_duration": 1}, "min_duration: 5 is above max_duration, which is 1"),
        ({"min_tps": 5, "max_tps": 1.5}, "min_tps: 5 is above max_tps, which is 1.5"),
        (
            {"force_map_dataset": True, "force_iterable_dataset": True},
            "force_map_dataset: excludes force_iterable_dataset; set one of them.",
        ),
        ({"reweight_temperature": [0.5]}, "reweight_temperature: has 1 values, but the groups are 2 levels deep"),
    ],
)
def test_values_that_do_not_fit_one_another(good: dict, keys: dict, sentence: str) -> None:
    assert refused({**good, **keys}).startswith(f"{PLACE}.{sentence}")


@pytest.mark.parametrize(
    ("place", "change", "sentence"),
    [
        ("0.input_cfg.1", {"weight": 0}, "weight: 0 cannot be used; give a number above 0, or null."),
        ("0.input_cfg.1", {"weight": None}, "weight: missing, while others in its group have one"),
        ("0", {"weight": "heavy"}, "weight: 'heavy' cannot be used; give a number above 0, or null."),
        ("0", {"weights": "hours"}, "weights: 'hours' cannot be used; give 'auto', or null."),
        ("0", {"tags": ["a"]}, "tags: ['a'] is not a mapping; write each tag as 'name: value'."),
        ("0", {"input_cfg": []}, "input_cfg: is empty or not a list"),
        ("0", {"input_cfg": 5}, "input_cfg: is empty or not a list"),
        ("0", {"reweight_temperature": 0.5}, "reweight_temperature: 0.5 cannot be used; give a list"),
        ("0", {"manifest_filepath": "a.json"}, "manifest_filepath: is no key of the type 'group', but of nemo, "),
        ("0.input_cfg.0", {"cuts_path": "a.jsonl"}, "cuts_path: is no key of the type 'nemo', but of lhotse, "),
        ("0.input_cfg.0", {"source_paths": "a.en"}, "source_paths: is no key of the type 'nemo', but of txt_pair, "),
        ("1", {"manifest_filepath": "a.json"}, "manifest_filepath: is no key of the type 'parallel_text', but of nemo"),
        ("1", {"traget_paths": "a"}, "traget_paths: there is no such key; did you mean 'target_paths'?"),
        ("0.input_cfg.0", {"type": "nemoo"}, "type: there is no data type 'nemoo'; did you mean 'nemo'?"),
        ("0.input_cfg.0", {"type": 5}, "type: there is no data type '5'; known are "),
        (
            "0.input_cfg.0",
            {"manifest_filepath": 5},
            f"manifest_filepath: 5 cannot be used; give {NAME}, or a list",
        ),
        ("0.input_cfg.0", {"tags": {"target_lang": False}}, "target_lang: False cannot be used; give a text"),
        ("0.input_cfg.0", {"shuffle": "false"}, "shuffle: 'false' cannot be used; give true or false, or null."),
        ("0.input_cfg.0", {"shard_seed": "any"}, "shard_seed: 'any' cannot be used; give a whole number"),
        ("0.input_cfg.0", {"manifest_filepath": "pipe:cat a"}, "manifest_filepath: 'pipe:cat a' would run a command"),
    ],
)
def test_mistakes_in_sources_and_groups(good: dict, place: str, change: dict, sentence: str) -> None:
    entry: Any = good["input_cfg"]
    for step in place.split("."):
        entry = entry[int(step) if step.isdigit() else step]
    entry |= change
    assert refused(good).startswith(f"{PLACE}.input_cfg.{place}.{sentence}")


@pytest.mark.parametrize("entry", [5, "nemo", ["nemo"], {}, None])
def test_an_entry_that_is_no_source(entry: Any) -> None:
    sentence = f"{PLACE}.input_cfg.1.type: missing; name the kind of source (nemo, lhotse, parallel_text, ...)."
    assert refused({"input_cfg": [nemo(), entry]}) == sentence


def test_null_for_a_key_of_another_type_is_no_mistake() -> None:
    (source,) = parsed(input_cfg=[nemo(cuts_path=None)]).sources
    assert source.manifest_filepath == "a.json"


@pytest.mark.parametrize("key", ["max_bad_records", "sampling", "use_emmett"])
def test_keys_that_hold_for_all_groups_together(key: str) -> None:
    section = {"multi_config": True, "speech": {"input_cfg": [nemo()], key: None}}
    assert refused(section).startswith(f"{PLACE}.speech.{key}: holds for all groups together; set {PLACE}.{key}")


def test_what_cannot_be_resolved_is_named() -> None:
    section = OmegaConf.create({"data": {"train_ds": {"manifest_filepath": "${nowhere}"}}}).data.train_ds
    message = refused(section)
    assert message.startswith("data.train_ds.manifest_filepath: cannot be resolved (")


@pytest.mark.parametrize(
    ("content", "error", "sentence"),
    [
        (None, DataError, "cannot be read (No such file or directory)."),
        ("- {type: nemo", DataError, "is not YAML: "),
        ("type: nemo", ConfigError, "input_cfg: is empty or not a list"),
        ("- {type: nemo, manifest_filepath: '${gone}'}", ConfigError, "cannot be resolved"),
    ],
)
def test_files_of_sources(tmp_path: Path, content: str | None, error: type[Exception], sentence: str) -> None:
    path = tmp_path / "list.yaml"
    if content is not None:
        path.write_text(content)
    assert sentence in refused({"input_cfg": str(path)}, error)


@pytest.mark.parametrize("planted", [lambda d: d, lambda d: {**d, "batch_size": "4"}])
def test_a_section_is_not_changed(good: dict, planted: Callable[[dict], dict]) -> None:
    section = planted(good)
    before = deepcopy(section)
    parse_dataset(section, PLACE)
    assert section == before


@pytest.mark.parametrize("allowed", [False, True])
def test_a_command_in_the_file_of_a_conversation_is_refused_with_its_place(tmp_path: Path, allowed: bool) -> None:
    inner = tmp_path / "inner.yaml"
    inner.write_text(yaml.safe_dump([nemo() | {"manifest_filepath": "pipe:cat a"}]))
    section = {"input_cfg": [{"type": "lhotse_as_conversation", "input_cfg": str(inner)}], "allow_commands": allowed}
    if allowed:
        assert [s.manifest_filepath for s in parsed(**section).sources[0].members] == ["pipe:cat a"]
        return
    with pytest.raises(
        ConfigError, match=r"^data\.train_ds\.input_cfg\.0\.input_cfg\.0\.manifest_filepath: 'pipe:cat a'"
    ):
        parsed(**section)
