"""What planning needs of a recipe: its mandatory values must be there, others may be missing.

Neither NeMo nor torch is imported here, so that a missing value is reported at once.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from nemo_emmett.data.config.section import plain
from nemo_emmett.early_checks import SOURCE_PATHS
from nemo_emmett.errors import ConfigError, Help

SECTIONS = ("model", "trainer", "seed", "num_threads")
"""Sections of a recipe that planning needs, apart from the training data."""

PLACES_OF_DATA = ("data.train_ds", "model.train_ds")
"""Where NeMo's speechlm2 recipes and its ASR recipes have the training data."""

DATASETS_OF_MODEL = ("train_ds", "validation_ds", "test_ds")
"""Keys of an ASR recipe's ``model`` section that are datasets."""

TRAINING_DATA = ("data.train_ds", "model.train_ds", "train_ds")
"""Where NeMo's recipes have the data that they train on."""

DATA_KEYS = frozenset({"input_cfg", "multi_config", "manifest_filepath", "cuts_path", "shar_path", "datasets"})
"""A config with one of these is that of a dataset."""

NOT_GIVEN = "not_given"
"""Placeholder of a missing path in the recipe that is planned."""


def needed_for_planning(cfg: DictConfig, *, reads_data: bool) -> DictConfig:
    """The sections of a recipe that planning needs, resolved.

    The datasets of a NeMo ASR recipe are moved from ``model`` to ``data``.

    Args:
        cfg: a composed recipe; mandatory values (``???``) may be missing.
        reads_data: files of the training data will be opened; they are as well where bins are to be found
            (``bucket_duration_bins: auto``).

    Raises:
        ConfigError: if a value that is needed is missing, or refers to one that is, or there is no training data.
    """
    place = next((p for p in PLACES_OF_DATA if isinstance(OmegaConf.select(cfg, p), DictConfig)), None)
    if place is None:
        raise ConfigError("data.train_ds: the recipe has none, so there are no buckets to find batch sizes for.")
    cfg = cfg.copy()
    OmegaConf.set_struct(cfg, False)
    train_ds = OmegaConf.select(cfg, place)
    groups = [train_ds, *(node for key in train_ds if isinstance(node := train_ds._get_node(key), DictConfig))]
    has_auto_bins = any(group._get_node("bucket_duration_bins") == "auto" for group in groups)
    if not reads_data and not has_auto_bins:
        _forget_missing_paths(train_ds)
    if isinstance(cfg.get("trainer"), DictConfig):
        cfg.trainer.pop("callbacks", None)
    of_data = _resolved(train_ds, place)
    if isinstance(cfg.get("model"), DictConfig):
        for name in DATASETS_OF_MODEL:
            cfg.model.pop(name, None)
    needed = {
        name: _resolved(cfg._get_node(name), name)
        for name in SECTIONS
        if name in cfg and cfg._get_node(name) is not None
    }
    return OmegaConf.create({**needed, "data": {"train_ds": of_data}})


_STRATEGIES = Path(__file__).parents[1] / "conf" / "emmett_strategy"
"""Of the shipped recipes."""


def on_devices(cfg: DictConfig, devices: int | None, strategy: str | None) -> DictConfig:
    """A recipe for other devices.

    Args:
        cfg: a composed recipe; mandatory values (``???``) may be missing.
        devices: how many, of all nodes together; None: as in the recipe.
        strategy: one of the shipped recipes (``emmett_strategy``), with the recipe's own keys if it is of this class;
            None: the recipe's.
    """
    if devices is None and strategy is None:
        return cfg
    cfg = cfg.copy()
    OmegaConf.set_struct(cfg, False)
    if not isinstance(cfg._get_node("trainer"), DictConfig):
        return cfg  # refused where the trainer is read
    if strategy is not None:
        shipped = OmegaConf.load(_STRATEGIES / f"{strategy}.yaml")  # of the whole recipe, or of its trainer
        own, chosen = cfg.trainer._get_node("strategy"), shipped.get("trainer", shipped).strategy
        is_the_same = isinstance(own, DictConfig) and own.get("_target_") == chosen.get("_target_")
        cfg.trainer.strategy = OmegaConf.merge(chosen, own) if is_the_same else chosen
    if devices is not None:
        cfg.trainer.update(devices=devices, num_nodes=1)
    own = cfg.trainer._get_node("strategy")
    # Mandatory in the shipped recipe; here it follows from the number of devices.
    if isinstance(own, DictConfig) and own._get_node("data_parallel_size") is not None:
        own.data_parallel_size = "auto"
    return cfg


def check_new_profile(profile: str | Path) -> None:
    """Refuse to overwrite a profile.

    Raises:
        ConfigError: naming the file.
    """
    if Path(profile).exists():
        raise ConfigError(f"--profile: '{profile}' exists already; delete it, or name another file.")


def check_memory_is_given(memory: object) -> None:
    """Refuse a plan for no device.

    Raises:
        ConfigError: naming the option.
    """
    if memory is None:
        raise ConfigError("--memory: is missing; name the device to plan for (H100), or its memory (80GiB).")


def look_up(content: DictConfig, key: str) -> Any:
    """A value that a config may have; what cannot be resolved is not needed."""
    try:
        return OmegaConf.select(content, key)
    except OmegaConfBaseException:
        return None


def no_tokenizer(path: str | os.PathLike[str]) -> ConfigError:
    """The error for a path of ``--tokenizer`` that holds none."""
    return ConfigError(
        f"--tokenizer: '{path}' is neither a SentencePiece model (.model) nor a folder with a tokenizer."
    )


def find_dataset(content: DictConfig, section: str | None, path: str | os.PathLike[str]) -> tuple[str, dict[str, Any]]:
    """The place of the dataset that a config describes, empty for the whole file, and its keys.

    Args:
        content: a recipe, or the config of a dataset.
        section: the place that the user gives; None: that of the training data.
        path: of the config, for messages.

    Raises:
        ConfigError: if there is no such section, it holds several datasets, or refers to what is missing.
    """
    place = _place_of_dataset(content, section, path)
    keys = plain(OmegaConf.select(content, place) if place else content, place or str(path), throw_on_missing=True)
    if "datasets" in keys:
        names = ", ".join(f"{place}.datasets.{name}".lstrip(".") for name in keys["datasets"])
        raise ConfigError(f"--section: '{place or path}' holds several datasets; choose one of {names}.")
    return place, keys


def _place_of_dataset(content: DictConfig, section: str | None, path: str | os.PathLike[str]) -> str:
    if section is not None:
        if not isinstance(look_up(content, section), DictConfig):
            raise ConfigError(f"--section: '{path}' has no section '{section}'; its sections are {', '.join(content)}.")
        return section
    found = [place for place in TRAINING_DATA if isinstance(OmegaConf.select(content, place), DictConfig)]
    if found:
        return found[0]
    if DATA_KEYS & set(content):
        return ""
    raise ConfigError(f"The config '{path}' has no {TRAINING_DATA[0]}; name the dataset's place in it by --section.")


def _forget_missing_paths(config: Any, in_paths: bool = False) -> None:
    if not isinstance(config, (DictConfig, ListConfig)) or config._is_none() or config._is_missing():
        return
    for key in list(config) if isinstance(config, DictConfig) else range(len(config)):
        is_path = in_paths or key in SOURCE_PATHS
        node = config._get_node(key)
        if isinstance(node, (DictConfig, ListConfig)) and not node._is_missing() and not node._is_interpolation():
            _forget_missing_paths(node, is_path)
        elif is_path and _refers_to_missing(config, key):
            config[key] = NOT_GIVEN


def _refers_to_missing(config: DictConfig | ListConfig, key: Any) -> bool:
    if OmegaConf.is_missing(config, key):
        return True
    try:
        value = config[key]
        if OmegaConf.is_config(value):
            OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        return "issing" in type(error).__name__
    return False


def _resolved(node: Any, place: str) -> Any:
    """A section as plain Python.

    Raises:
        ConfigError: naming the values that are missing.
    """
    if not OmegaConf.is_config(node):
        try:
            return node._dereference_node()._value() if node._is_interpolation() else node._value()
        except OmegaConfBaseException as error:
            raise _mistake(error, place) from error
    if missing := sorted(OmegaConf.missing_keys(_unresolved(node))):
        raise _left_to_you([f"{place}.{key}" for key in missing])
    try:
        return OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise _mistake(error, place) from error


def _unresolved(node: DictConfig | ListConfig) -> Any:
    """The same with interpolations as plain text, so that only its own missing values are found."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list):
            return [plain(item) for item in value]
        return "" if isinstance(value, str) and "${" in value else value

    return OmegaConf.create(plain(OmegaConf.to_container(node)))


def _mistake(error: OmegaConfBaseException, place: str) -> ConfigError:
    said = str(error).splitlines()[0].rstrip(".")
    if isinstance(error, InterpolationToMissingValueError):
        return _left_to_you([said.rpartition("alue: ")[2].strip()])
    return ConfigError(f"{error.full_key or place}: {said}; correct what it refers to.")


def _left_to_you(names: list[str]) -> ConfigError:
    return ConfigError(
        f"{', '.join(names)}: the recipe leaves this to you; give {names[0]}=... on the command line.",
        page=Help.MISSING_VALUE,
    )
