"""What OOMptimizer needs of each family of models: synthetic batches, lengths of real ones, and microbatches.

- :func:`adapter_for`: the adapter of a model.
- :func:`register_adapter`: for families of your own.
- :class:`Adapter`, :class:`Extent`: the interface of an adapter, and the lengths of a batch.
- :class:`SpeechTextAdapter` (ours), :class:`SALMAdapter` (NeMo's SALM), :class:`TranscriptAdapter` (CTC, RNN-T),
  :class:`MultiTaskAdapter` (Canary), :class:`SchemaAdapter` (any other model with NeMo's ``oomptimizer_schema``).

Modules: ``base`` and ``registry``; the adapters in ``speech_text``, ``salm``, ``asr`` and ``generic``; and their parts:
``schema`` (batches by a schema), ``lengths`` and ``prompts`` (the longest examples of a bucket), ``draws`` (random ids
and recordings), ``rows`` (splitting and joining batches), ``fakes`` (patches for fake tensors).
"""

from __future__ import annotations

from nemo_emmett.oomptimizer.adapters.asr import MultiTaskAdapter, TranscriptAdapter
from nemo_emmett.oomptimizer.adapters.base import Adapter, Extent
from nemo_emmett.oomptimizer.adapters.generic import SchemaAdapter
from nemo_emmett.oomptimizer.adapters.registry import adapter_for, register_adapter
from nemo_emmett.oomptimizer.adapters.salm import SALMAdapter
from nemo_emmett.oomptimizer.adapters.speech_text import SpeechTextAdapter

__all__ = [
    "adapter_for",
    "register_adapter",
    "Adapter",
    "Extent",
    "SpeechTextAdapter",
    "SALMAdapter",
    "TranscriptAdapter",
    "MultiTaskAdapter",
    "SchemaAdapter",
]
