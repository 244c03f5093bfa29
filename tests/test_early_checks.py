"""Checks of a recipe before NeMo is imported: its sections, and the paths in it."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from nemo.collections.common.data.lhotse.dataloader import LhotseDataLoadingConfig
from nemo.utils.exp_manager import CallbackParams, ExpManagerConfig
from omegaconf import OmegaConf

from nemo_emmett.callbacks import OOMptimizer
from nemo_emmett.data.config import schema
from nemo_emmett.early_checks import (
    RECIPE_KEYS,
    SOURCE_PATHS,
    check_dataset_files,
    check_sections,
    is_path_key,
    refuse_empty_paths,
)
from nemo_emmett.errors import ConfigError, DataError
from nemo_emmett.evaluation.recipe import EvaluationConfig
from nemo_emmett.models.config import ModelConfig

NO_PATHS = {
    *("activation_checkpointing", "enable_checkpointing", "create_checkpoint_callback", "checkpoint_callback_params"),
    *("resume_ignore_no_checkpoint", "skip_missing_manifest_entries"),
    *("directions", "pad_direction", "filename", "output_roles", "pretrained_weights", "profiler"),
}
"""Keys of recipes whose names look like those of paths."""


def keys_of_recipes() -> set[str]:
    """Every key that a recipe may have, by the dataclasses, tables and signatures that define them."""
    classes = (LhotseDataLoadingConfig, ExpManagerConfig, CallbackParams, ModelConfig, EvaluationConfig)
    keys = {field.name for cls in classes for field in fields(cls)} | {*RECIPE_KEYS, *schema.OUR_TYPES}
    for function in (Trainer, OOMptimizer):
        keys |= {*inspect.signature(function).parameters}
    for table in (value for name, value in vars(schema).items() if not name.startswith("__")):
        if isinstance(table, dict):
            keys |= {key for key in table if isinstance(key, str)}
            keys |= {key for value in table.values() if isinstance(value, frozenset) for key in value}
    return keys


def test_every_key_of_a_recipe_that_names_a_file_is_known() -> None:
    keys = keys_of_recipes()
    looks_like_one = {
        key for key in keys if re.search("path|dir|folder|file|checkpoint|pretrained|manifest|output", key)
    }
    assert looks_like_one - NO_PATHS == {key for key in looks_like_one if is_path_key(key)}
    assert {key for key in keys if is_path_key(key)} - looks_like_one == {"input_cfg"}
    assert keys >= NO_PATHS


@pytest.mark.parametrize("key", sorted({key for key in keys_of_recipes() if is_path_key(key)} | {"baseline"}))
@pytest.mark.parametrize("text", ["", "  "])
def test_an_empty_path_is_refused_wherever_it_is(key: str, text: str) -> None:
    for place, recipe in (
        (key, {key: text}),
        (f"a.b.{key}", {"a": {"b": {key: text}}}),
        (f"a.{key}.1", {"a": {key: ["x", text]}}),
        (f"a.0.{key}", {"a": [{key: "${t}"}], "t": text}),
    ):
        with pytest.raises(
            ConfigError, match=rf"^{re.escape(place)}: {text!r} cannot be used; give the path of a file"
        ):
            refuse_empty_paths(OmegaConf.create(recipe))
    refuse_empty_paths(OmegaConf.create({key: None, "a": {key: "???"}, "b": {key: "${nowhere}"}, "c": {key: "x"}}))


@pytest.mark.parametrize("key", sorted(SOURCE_PATHS))
def test_an_empty_path_by_language_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^data\.train_ds\.input_cfg\.0\.{key}\.de: '' cannot be used"):
        refuse_empty_paths(OmegaConf.create({"data": {"train_ds": {"input_cfg": [{key: {"en": "x", "de": ""}}]}}}))


def test_other_empty_texts_are_not_paths() -> None:
    refuse_empty_paths(OmegaConf.create({"model": {"freeze_params": [""], "name": ""}, "wandb": {"name": ""}}))


class TestFiles:
    def recipe(self, **source: object) -> OmegaConf:
        return OmegaConf.create({"data": {"train_ds": {"audio": {"input_cfg": [{"type": "x", **source}]}}}})

    @pytest.mark.parametrize("key", sorted(SOURCE_PATHS))
    def test_the_first_missing_one_is_named(self, key: str, tmp_path: Path) -> None:
        (tmp_path / "there").touch()
        there = str(tmp_path / "there")
        place = f"data.train_ds.audio.input_cfg.0.{key}"
        for value, where in (("gone", place), ([there, "gone"], f"{place}.1"), ({"de": "gone"}, f"{place}.de")):
            with pytest.raises(DataError, match=rf"^{re.escape(where)}: there is no file 'gone'"):
                check_dataset_files(self.recipe(**{key: value}))
        check_dataset_files(self.recipe(**{key: [[there, 2.0]]}))

    @pytest.mark.parametrize("path", ["a__OP_0..3_CL_.json", "a_{0..3}.json", "s3://b/c", "pipe:cat x", "ais://b/c"])
    def test_patterns_and_what_is_elsewhere_are_left_to_the_reader(self, path: str) -> None:
        check_dataset_files(self.recipe(manifest_filepath=path))

    def test_a_list_of_sources_in_a_file_of_its_own(self) -> None:
        recipe = OmegaConf.create({"data": {"validation_ds": {"input_cfg": "gone.yaml"}, "other": {"paths": "gone"}}})
        with pytest.raises(DataError, match=r"^data\.validation_ds\.input_cfg: there is no file 'gone\.yaml'"):
            check_dataset_files(recipe)


def test_sections() -> None:
    check_sections(OmegaConf.create({"model": {}, "trainer": {}, "data": {}, "corpus": "mine"}))
    with pytest.raises(ConfigError, match="the recipe has no section 'trainer'"):
        check_sections(OmegaConf.create({"model": {}, "data": {}}))
    with pytest.raises(ConfigError, match=r"recipe\.exp_manger: there is no such key; did you mean 'exp_manager'"):
        check_sections(OmegaConf.create({"exp_manger": {}}))
