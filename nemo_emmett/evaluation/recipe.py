"""What an evaluation reads of a recipe: its own keys as a dataclass, and the section of the test sets."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_emmett.config import load_yaml
from nemo_emmett.errors import ConfigError
from nemo_emmett.evaluation.comet import CometConfig
from nemo_emmett.evaluation.metrics import DEFAULT_METRICS, check_metrics
from nemo_emmett.typed_config import Count, PositiveWhole, Switch, Text, parse_section, parse_value


@dataclass(frozen=True)
class EvaluationConfig:
    """How models are evaluated, the same for all that are compared: the arguments of ``evaluate``."""

    data: DictConfig  # holds test_ds
    metrics: tuple[str, ...]
    comet: CometConfig | None
    name: Text | None = None
    output: Path | None = None
    num_beams: PositiveWhole = 1
    max_new_tokens: PositiveWhole | None = None
    baselines: tuple[Path, ...] = ()
    log_dir: Path | None = None
    examples: Count = 10
    trust_remote_code: Switch = False

    @classmethod
    def parse(
        cls, config: DictConfig | Mapping | str | os.PathLike[str], arguments: Mapping[str, Any]
    ) -> EvaluationConfig:
        """Parse the test sets' section of a recipe and the arguments of ``evaluate``; None is an argument's default.

        Raises:
            ConfigError: naming the key whose value has the wrong type or is out of range.
        """
        given = {key: value for key, value in arguments.items() if value is not None}
        metrics = check_metrics(parse_value(list, given.get("metrics", DEFAULT_METRICS), "metrics"))
        comet = CometConfig.parse(given.get("comet")) if "COMET" in metrics else None
        return parse_section(cls, given, "", data=data_section(config), metrics=metrics, comet=comet)

    @property
    def loading(self) -> dict[str, bool]:
        """Options of loading a model."""
        return {"trust_remote_code": True} if self.trust_remote_code else {}


def data_section(config: DictConfig | Mapping | str | os.PathLike[str]) -> DictConfig:
    """A copy of the section that holds ``test_ds``, interpolations into the rest of the recipe intact.

    Raises:
        ConfigError: if it names no test set, or the file cannot be read.
    """
    origin = "the config"
    if isinstance(config, (str, os.PathLike)):
        origin = f"'{os.fspath(config)}'"
        config = read_yaml(Path(config))
    recipe = copy.deepcopy(config) if isinstance(config, DictConfig) else OmegaConf.create(dict(config))
    data = recipe.data if _is_section(recipe, "data") and "test_ds" in recipe.data else recipe
    if not (_is_section(data, "test_ds") and _is_section(data.test_ds, "datasets")):
        raise ConfigError(
            f"data.test_ds.datasets is missing in {origin}, or holds no keys: name the test sets there, each with its "
            "input_cfg."
        )
    resolved_value(data, "test_ds")  # an interpolation that cannot be resolved is refused before the translating
    return data


def _is_section(config: DictConfig, key: str) -> bool:
    return isinstance(section := _value(config, key), DictConfig) and len(section) > 0


def resolved_value(config: DictConfig, key: str) -> Any:
    """The value of a key in plain containers, interpolations resolved; None if it is absent.

    Raises:
        ConfigError: if an interpolation cannot be resolved, or the value is ``???``.
    """
    if OmegaConf.is_missing(config, key):
        raise ConfigError(f"{key}: ??? has to be replaced by a value.")
    return _value(config, key, resolve=True)


def _value(config: DictConfig, key: str, resolve: bool = False) -> Any:
    try:
        value = config.get(key)
        return OmegaConf.to_container(value, resolve=True) if resolve and OmegaConf.is_config(value) else value
    except OmegaConfBaseException as error:
        raise ConfigError(f"{key}: {str(error).splitlines()[0].rstrip('.')}.") from error


def read_yaml(path: Path) -> DictConfig:
    """A recipe from its file.

    Raises:
        ConfigError: if the file does not exist or holds no keys.
    """
    config = load_yaml(path)
    if not isinstance(config, DictConfig):
        raise ConfigError(f"The config '{path}' holds a list; it must hold keys, among them data.test_ds.")
    return config
