"""Which files a path in a config names."""

from __future__ import annotations

from pathlib import Path

import pytest
from nemo.collections.common.data.lhotse.nemo_adapters import expand_sharded_filepaths
from omegaconf import OmegaConf

from nemo_emmett.data.checks import check_data_config
from nemo_emmett.data.config.dataset_config import parse_dataset
from nemo_emmett.data.config.nemo_config import sampler_config
from nemo_emmett.data.config.section import config_of, place_of, plain
from nemo_emmett.data.config.sources import parse_source
from nemo_emmett.data.io.files import count_lines, expand_paths
from nemo_emmett.errors import DataError

PATTERNS = [
    "a__OP_0..3_CL_.tar",
    "a_{0..3}.json",
    "a_(0..3).json",
    "a_[0..3].json",
    "a_<0..3>.json",
    "a_{08..11}.json",
    "a_{0..6..2}.json",
    "a_{c..a}",
    "a_{de,en}",
    "a_{,b}.txt",
    "a_{{x,y},z}_{0..1}",
    "a_{0..1}/b_{0..1}",
    "s3://bucket/a__OP_0..3_CL_.tar",
    "plain.json",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_are_those_of_nemo(pattern) -> None:
    assert expand_paths(pattern) == expand_sharded_filepaths(pattern)


AS_THEY_ARE = [
    "corpus (v1)/train.json",
    "set[1]/train.json",
    "x<y>.json",
    "{only one}.json",
    "unbalanced (a.json",
    "unbalanced }.json",
    "_OP_0..3.json",
    "0..3.json",
    "a,b.json",
    "-x *?~$%#\\ä '\".json",
    "pipe:(cat a; cat b)",
    "s3://bucket/x(1).json",
]


@pytest.mark.parametrize("path", AS_THEY_ARE)
def test_all_else_stays_as_it_is_written(path) -> None:
    assert expand_paths(path) == [path]


@pytest.mark.parametrize("name", ["a_{0..3}", "a_(1,2)", "_OP_0..1_CL_", "[0..9]", "{", "a (1)"])
def test_what_exists_is_no_pattern(tmp_path, monkeypatch, name) -> None:
    (tmp_path / name).touch()
    assert expand_paths(tmp_path / name) == [str(tmp_path / name)]
    monkeypatch.chdir(tmp_path)
    assert expand_paths([name]) == [name]
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    assert expand_paths(f"{name}/shard_{{0..1}}.json") == [f"{name}/shard_0.json", f"{name}/shard_1.json"]


def test_a_folder_may_be_a_pattern_beside_one_that_is_none(tmp_path) -> None:
    for part in (1, 2):
        (tmp_path / f"part_{part}" / "[0..9] (a,b)").mkdir(parents=True)
    assert expand_paths(f"{tmp_path}/part_(1..2)/[0..9] (a,b)/x_<0..1>") == [
        f"{tmp_path}/part_{part}/[0..9] (a,b)/x_{shard}" for part in (1, 2) for shard in (0, 1)
    ]


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("corpus (v1)/t.json", r"there is no file '{0}/corpus \(v1\)/t\.json'; correct"),
        ("corpus [1", r"there is no file '{0}/corpus \[1'; correct"),
        ("t (a,b).json", r"there is no file '{0}/t a\.json' \(of '{0}/t \(a,b\)\.json'\); correct"),
        ("t__OP_0..1_CL_.json", r"there is no file '{0}/t_0\.json' \(of '{0}/t__OP_0\.\.1_CL_\.json'\); correct"),
    ],
)
def test_messages_name_what_was_written(tmp_path, written, said) -> None:
    with pytest.raises(DataError, match=said.format(tmp_path)):
        check_data_config({"input_cfg": [{"type": "nemo", "manifest_filepath": f"{tmp_path}/{written}"}]})


def test_cuts_and_folders_are_never_patterns() -> None:
    config = {"type": "lhotse", "cuts_path": "cuts_{0..1}.jsonl", "shar_path": ["shar_{0..1}"]}
    assert [path for _, path in parse_source(config, "train_ds").files()] == ["cuts_{0..1}.jsonl", "shar_{0..1}"]
    shards = {"type": "lhotse_shar", "shar_path": {"cuts": "cuts_{0..1}.jsonl"}}
    assert [path for _, path in parse_source(shards, "train_ds").files()] == ["cuts_0.jsonl", "cuts_1.jsonl"]


def test_a_folder_that_is_called_like_a_tar_file(tmp_path) -> None:
    (tmp_path / "corpus.tar").mkdir()
    (tmp_path / "corpus.tar" / "a.txt").write_text("one\ntwo\n")
    assert count_lines(str(tmp_path / "corpus.tar" / "a.txt")) == 2


@pytest.mark.parametrize("path", ["/a/${b}", r"/a/\${b}", "/a/$b", r"/a\\${b}/${c}", "/a/}{$"])
def test_dollar_signs_in_a_path_are_no_interpolations(path) -> None:
    config = {"input_cfg": [{"type": "nemo", "manifest_filepath": path}], "noise_path": path}
    assert plain(config_of(config)) == config
    structured = plain(sampler_config(parse_dataset(config_of(config), "train_ds").groups[0]))
    assert structured["input_cfg"][0]["source"]["manifest_filepath"] == path


def test_a_path_object_is_the_path_as_text(tmp_path: Path) -> None:
    written = {"input_cfg": [{"type": "lhotse", "cuts_path": tmp_path, "shar_path": {"cuts": [tmp_path]}}], "n": 1}
    folder = str(tmp_path)
    as_text = {"input_cfg": [{"type": "lhotse", "cuts_path": folder, "shar_path": {"cuts": [folder]}}], "n": 1}
    assert plain(written) == plain(OmegaConf.create(written)) == as_text


def test_an_input_cfg_that_is_not_yaml_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("- {type: nemo")
    with pytest.raises(DataError, match=r"train_ds\.input_cfg: the file '.*a\.yaml' is not YAML: "):
        check_data_config({"input_cfg": str(tmp_path / "a.yaml")}, place="train_ds")


@pytest.mark.parametrize(
    ("key", "section", "place"),
    [
        ("data.train_ds", "data", "data.train_ds"),
        ("model.validation_ds", "model", "model.validation_ds"),
        ("data.validation_ds.datasets.dev", "data", "data.validation_ds.datasets.dev"),
        ("train_ds", "model", "model.train_ds"),  # the recipe of a NeMo model, which holds its section alone
    ],
)
def test_the_place_of_a_config_in_its_recipe(key: str, section: str, place: str) -> None:
    recipe = OmegaConf.create()
    OmegaConf.update(recipe, key, {"batch_size": 2}, force_add=True)
    assert place_of(OmegaConf.select(recipe, key), section) == place


@pytest.mark.parametrize("config", [{"batch_size": 2}, OmegaConf.create({"batch_size": 2})])
def test_the_place_of_a_config_in_no_recipe(config) -> None:
    assert place_of(config, "model") == "data.train_ds"
