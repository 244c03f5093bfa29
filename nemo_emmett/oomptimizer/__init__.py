"""Batch sizes that fit the memory, bucket by bucket.

- :class:`OOMptimizer`: the Lightning callback that gives every bucket the batch size of a profile.
- :class:`Profile`: bins and batch sizes, from a YAML file.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_emmett.oomptimizer.callback import OOMptimizer
    from nemo_emmett.oomptimizer.profile import Profile

__all__ = ["OOMptimizer", "Profile"]

_HOME = {"OOMptimizer": "nemo_emmett.oomptimizer.callback", "Profile": "nemo_emmett.oomptimizer.profile"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value
