"""EMMeTT for a stock NeMo: text translation and speech translation in one training of one model.

- ``nemo_emmett.models``: the models (``SALMT5``), and ``load`` for a saved one.
- ``nemo_emmett.data``: files to batches (``MultimodalDataModule``, ``get_multimodal_dataloader``).
- ``nemo_emmett.callbacks``: Lightning callbacks (``OOMptimizer``, ``RandomState``).
- ``nemo_emmett.evaluation``: translate a test set, score it, report it.
- ``nemo_emmett.corpora``: corpora to manifests.
- ``nemo_emmett.plugin``: what installing the package makes Lightning, Hydra and NeMo see.

Importing the package imports neither torch nor NeMo: these attributes load when they are first used. It does leave word
with Python's import system, so that whoever imports NeMo afterwards finds our data types, prompt formats and dataloader
registered with it.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from nemo_emmett import plugin

__version__ = "0.2.0.dev0"

_ON_DEMAND = ("callbacks", "corpora", "data", "evaluation", "models", "modules", "oomptimizer", "prompts")

__all__ = ["__version__", "plugin", *_ON_DEMAND]


def __getattr__(name: str) -> ModuleType:
    if name not in _ON_DEMAND:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_DEMAND})


plugin.register()
