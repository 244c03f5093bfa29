"""Batch sizes, and the bins that go with them, before a training.

- :func:`oomptimize`: find a recipe's batch sizes on the device at hand.
- :func:`plan`: find them anywhere for a memory budget, and, if asked, the bins with the shortest epoch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_emmett.planning.commands import oomptimize, plan

__all__ = ["oomptimize", "plan"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module("nemo_emmett.planning.commands"), name)
    globals()[name] = value
    return value
