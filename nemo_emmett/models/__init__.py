"""The models, each readable alone.

- :class:`SALMT5` (``salm_t5``): encoder-decoder; speech and prompt enter the text encoder together.
- :class:`SALMGPT` (``salm_gpt``): decoder-only; speech stands among the prompt's tokens. NeMo's SALM made multimodal.
- :class:`BestowGPT` (``bestow_gpt``): decoder-only; speech through cross-attention in front of the LLM.
- :func:`load`: a model from the folder that ``save_pretrained`` wrote.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_emmett.models.bestow_gpt import BestowGPT
    from nemo_emmett.models.load import load
    from nemo_emmett.models.salm_gpt import SALMGPT
    from nemo_emmett.models.salm_t5 import SALMT5

__all__ = ["SALMGPT", "SALMT5", "BestowGPT", "load"]

_HOME = {
    "BestowGPT": "nemo_emmett.models.bestow_gpt",
    "SALMGPT": "nemo_emmett.models.salm_gpt",
    "SALMT5": "nemo_emmett.models.salm_t5",
    "load": "nemo_emmett.models.load",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value
