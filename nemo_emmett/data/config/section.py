"""A dataset's section of a recipe as plain dicts and lists, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_emmett.config import escape_interpolations
from nemo_emmett.errors import ConfigError


def place_of(section: Mapping | DictConfig, parent: str) -> str:
    """A section's place in its recipe, for messages; ``data.train_ds`` for one that is part of none.

    Args:
        section: of a dataset.
        parent: the section of the recipe that holds the datasets: NeMo's models keep a copy of ``model``, detached from
            the rest.

    Example:
        >>> place_of(OmegaConf.create({"model": {"validation_ds": {"batch_size": 4}}}).model.validation_ds, "model")
        'model.validation_ds'
    """
    place = section._get_full_key(None) if isinstance(section, DictConfig) else ""
    return place if "." in place else f"{parent}.{place}" if place else "data.train_ds"


def plain(section: Any, place: str = "data.train_ds", *, throw_on_missing: bool = False) -> Any:
    """A section as plain dicts and lists, with its interpolations resolved and its paths as text, as YAML has them.

    Args:
        section: a mapping or list, of OmegaConf or plain.
        place: in the recipe, for messages.
        throw_on_missing: refuse the missing value, ``???``, too.

    Raises:
        ConfigError: naming the key whose value cannot be resolved.
    """
    try:
        section = section if OmegaConf.is_config(section) else OmegaConf.create(section)
        return _paths_as_text(OmegaConf.to_container(section, resolve=True, throw_on_missing=throw_on_missing))
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(
            f"{error.full_key or place}: cannot be resolved ({reason}); write the value into the config."
        ) from error


def _paths_as_text(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {key: _paths_as_text(item) for key, item in value.items()}
    return [_paths_as_text(item) for item in value] if isinstance(value, list) else value


def config_of(section: Mapping[str, Any]) -> DictConfig:
    """The inverse of :func:`plain`: ``${`` in a text, such as a path, is no interpolation any more."""
    return OmegaConf.create(escaped(section))


def escaped(value: Any) -> Any:
    """The same with all its texts as a recipe has them."""
    if isinstance(value, str):
        return escape_interpolations(value)
    if isinstance(value, Mapping):
        return {key: escaped(item) for key, item in value.items()}
    return [escaped(item) for item in value] if isinstance(value, (list, tuple)) else value


def keys_within(section: Any, place: str) -> Iterator[tuple[str, str, Any]]:
    """The place, key and value of each key of a section, of what is in it, and so on; but for ``tags``."""
    entries = (
        section.items() if isinstance(section, Mapping) else enumerate(section) if isinstance(section, list) else ()
    )
    for key, value in entries:
        if key == "tags":
            continue
        if isinstance(key, str):
            yield place, key, value
        yield from keys_within(value, f"{place}.{key}")
