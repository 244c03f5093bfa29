"""What an evaluation reads of a recipe."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from nemo_emmett.config import load_yaml
from nemo_emmett.errors import ConfigError


def config_of_test_sets(config: DictConfig | Mapping | str | os.PathLike[str]) -> DictConfig:
    """A copy of the section that holds ``test_ds``, interpolations into the rest of the recipe intact.

    Raises:
        ConfigError: if it names no test set, or the file cannot be read.
    """
    where = "the config"
    if isinstance(config, (str, os.PathLike)):
        where = f"'{os.fspath(config)}'"
        config = read_yaml(Path(config))
    recipe = copy.deepcopy(config) if isinstance(config, DictConfig) else OmegaConf.create(dict(config))
    data = recipe.data if _has(recipe, "data") and "test_ds" in recipe.data else recipe
    if not (_has(data, "test_ds") and _has(data.test_ds, "datasets")):
        raise ConfigError(
            f"data.test_ds.datasets is missing in {where}, or holds no keys: name the test sets there, each with its "
            "input_cfg."
        )
    return data


def _has(config: DictConfig, key: str) -> bool:
    """Whether ``key`` holds keys itself."""
    return key in config and isinstance(config[key], DictConfig) and len(config[key]) > 0


def read_yaml(path: Path) -> DictConfig:
    """A recipe from its file.

    Raises:
        ConfigError: if there is none, or it holds no keys.
    """
    config = load_yaml(path)
    if not isinstance(config, DictConfig):
        raise ConfigError(f"The config '{path}' holds a list; it must hold keys, among them data.test_ds.")
    return config
