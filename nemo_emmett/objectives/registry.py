"""The objectives by name, and the section ``model.objectives``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from nemo_emmett.config import check_keys
from nemo_emmett.errors import ConfigError
from nemo_emmett.objectives.consistency import Consistency
from nemo_emmett.objectives.objective import Objective
from nemo_emmett.objectives.teaching import Distillation, Retention
from nemo_emmett.objectives.transcription import Transcription
from nemo_emmett.typed_config import parse_section, parse_value

OBJECTIVES: dict[str, type[Objective]] = {
    kind.name: kind for kind in (Distillation, Retention, Consistency, Transcription)
}
"""In the order of the terms of a loss."""


def parse_objectives(section: Mapping[str, Any], place: str = "model.objectives") -> tuple[Objective, ...]:
    """The objectives of a section, in the order of :data:`OBJECTIVES`; those that are null are left out.

    Raises:
        ConfigError: for a name that does not exist, or a key or value that an objective does not take.
    """
    for name in check_keys(section, OBJECTIVES, place):
        raise ConfigError(f"{place}.{name}: there is no such objective; use {', '.join(OBJECTIVES)}.")
    return tuple(
        _parse(kind, section[name], f"{place}.{name}")
        for name, kind in OBJECTIVES.items()
        if section.get(name) is not None
    )


def _parse(kind: type[Objective], section: Any, place: str) -> Objective:
    section = parse_value(dict, section, place)
    keys = [field.name for field in fields(kind)]
    for key in check_keys(section, keys, place):
        raise ConfigError(f"{place}.{key}: there is no such key; use {', '.join(keys)}.")
    return parse_section(kind, section, place)
