"""What an evaluation reads of a recipe: its own keys as a dataclass, and the section of the test sets."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_emmett.config import check_keys, load_yaml
from nemo_emmett.early_checks import check_dataset_files, refuse_empty_paths
from nemo_emmett.errors import ConfigError, DataError
from nemo_emmett.evaluation.comet import CometConfig
from nemo_emmett.evaluation.metrics import DEFAULT_METRICS, check_metrics
from nemo_emmett.evaluation.results import FILE_NAME, Evaluation, from_json
from nemo_emmett.files import check_writable
from nemo_emmett.models.card import check_card
from nemo_emmett.models.exported import check_exported
from nemo_emmett.models.exported_files import CONFIG_FILE
from nemo_emmett.typed_config import Count, FilePath, PositiveWhole, Switch, Text, parse_section, parse_value


@dataclass(frozen=True)
class EvaluationConfig:
    """How models are evaluated, the same for all that are compared: the arguments of ``evaluate``."""

    data: DictConfig  # holds test_ds
    metrics: tuple[str, ...]
    comet: CometConfig | None
    name: Text | None = None
    output: FilePath | None = None
    num_beams: PositiveWhole = 1
    max_new_tokens: PositiveWhole | None = None
    baselines: tuple[FilePath, ...] = ()
    log_dir: FilePath | None = None
    examples: Count = 10
    trust_remote_code: Switch = False
    update_card: Switch = False

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


def evaluation_arguments(
    config: DictConfig | str | os.PathLike[str],
    model: str | os.PathLike[str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[str | os.PathLike[str], DictConfig, dict[str, Any]]:
    """The model's folder, the recipe, and the arguments of ``evaluate`` that they and the options give.

    Args:
        config: a recipe, or its YAML file; ``baseline`` is one or a list of them.
        model: folder of the model; None takes the recipe's.
        options: arguments of ``evaluate``; those that are None or empty are the recipe's.

    Raises:
        ConfigError: if neither names a model, or the recipe has a key that there is not.
    """
    recipe = config if isinstance(config, DictConfig) else read_yaml(Path(config))
    refuse_empty_paths(recipe)
    keys = {field.name for field in fields(EvaluationConfig)} - {"data", "baselines"}
    if "test_ds" in recipe:  # otherwise it is the recipe of a training, which has more keys
        check_keys(recipe, (*sorted(keys), "model", "baseline", "test_ds"), "recipe")
    model = resolved_value(recipe, "model") if model is None else model
    if not isinstance(model, (str, os.PathLike)) or not str(model):
        raise ConfigError("model: the recipe names no exported model; give the folder of one.")
    arguments = {key: value for key, value in (options or {}).items() if value not in (None, ())}
    if "baselines" not in arguments:
        kinds = FilePath | list[FilePath] | None
        baseline = parse_value(kinds, resolved_value(recipe, "baseline"), "baseline")
        arguments["baselines"] = baseline if isinstance(baseline, list) else [baseline] if baseline else []
    arguments |= {key: resolved_value(recipe, key) for key in keys - arguments.keys()}
    return model, recipe, {key: value for key, value in arguments.items() if value is not None}


def check_evaluation(
    config: DictConfig | str | os.PathLike[str],
    model: str | os.PathLike[str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Check what can be wrong with an evaluation without importing NeMo; the arguments are as above.

    Raises:
        ConfigError: for a key or value of the recipe.
        DataError: for a baseline, log folder or test set that is missing.
        ModelError: if the model is no exported one.
    """
    model, recipe, arguments = evaluation_arguments(config, model, options)
    settings = EvaluationConfig.parse(recipe, arguments)
    check_exported(model)
    if settings.update_card:
        check_card(model)
    for baseline in settings.baselines:
        read_baseline(baseline)
    if settings.log_dir is not None and not settings.log_dir.is_dir():
        raise DataError(
            f"log_dir: there is no folder '{settings.log_dir}'; name that of the training's TensorBoard logs."
        )
    if settings.output is not None:
        check_writable(settings.output, "output")
    place = f"{settings.data._get_full_key(None)}.test_ds".lstrip(".")
    check_dataset_files(settings.data.test_ds, place, in_dataset=True)


def read_baseline(path: Path) -> Evaluation | Path:
    """A saved evaluation, or the folder of a model that is still to be evaluated.

    Raises:
        DataError: if it is neither.
    """
    if (path / FILE_NAME).is_file():
        return from_json(path / FILE_NAME)
    if not path.is_dir():
        return from_json(path)
    if not (path / CONFIG_FILE).is_file():
        raise DataError(
            f"The baseline '{path}' holds neither an {FILE_NAME} nor an exported model; give the folder of one of them."
        )
    return path


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
        form = "test_ds: {datasets: {NAME: {batch_size: 16, input_cfg: [...]}}}"
        copied = _is_section(recipe, "data") and _is_section(recipe.data, "validation_ds")
        validation = " (or copy its data.validation_ds under the name test_ds)" if copied else ""
        raise ConfigError(
            f"data.test_ds.datasets is missing in {origin}, or holds no keys: an evaluation translates test sets, "
            f"which a recipe names as `{form}`{validation}; docs/evaluation.md begins with a whole one."
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
