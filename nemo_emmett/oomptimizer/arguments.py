"""Checks of the callback's arguments; each raises a ConfigError that names the argument and its value."""

from __future__ import annotations

from typing import Any

from nemo_emmett.errors import ConfigError


def check_share(name: str, value: Any, least: float) -> None:
    """A number from ``least`` to below 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < 1:
        raise ConfigError(f"OOMptimizer.{name}: {value!r} is no share; give a number from {least:g} to below 1.")


def check_positive(name: str, value: Any, kind: type | tuple[type, ...]) -> None:
    """A number of a kind, above 0."""
    if isinstance(value, bool) or not isinstance(value, kind) or not value > 0:
        number = "whole number" if kind is int else "number"
        raise ConfigError(f"OOMptimizer.{name}: {value!r} cannot be used; give a {number} above 0.")


def check_switch(name: str, value: Any) -> None:
    """True, false, or None where neither is said."""
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"OOMptimizer.{name}: {value!r} is neither true nor false; give one, or leave it out.")
