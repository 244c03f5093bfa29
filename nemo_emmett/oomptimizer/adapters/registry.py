"""The adapter of each model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nemo_emmett.errors import ConfigError
from nemo_emmett.oomptimizer.adapters.asr import MultiTaskAdapter, TranscriptAdapter
from nemo_emmett.oomptimizer.adapters.base import Adapter
from nemo_emmett.oomptimizer.adapters.generic import SchemaAdapter
from nemo_emmett.oomptimizer.adapters.salm import SALMAdapter
from nemo_emmett.oomptimizer.adapters.speech_text import SpeechTextAdapter

_registered: list[tuple[Callable[[Any], bool], type[Adapter]]] = []


def register_adapter(family: type | Callable[[Any], bool], adapter_class: type[Adapter]) -> None:
    """Register an adapter for a family of models.

    Args:
        family: the models' class, or a function from a model to whether it is one of them. The last one that was
            registered takes precedence, and all take precedence over the adapters of nemo_emmett.
        adapter_class: called with the model.

    Example:
        In a module that the training script imports::

            register_adapter(MyModel, MyAdapter)
    """
    belongs = (lambda model: isinstance(model, family)) if isinstance(family, type) else family
    _registered.insert(0, (belongs, adapter_class))


def adapter_for(model: Any) -> Adapter:
    """The adapter of a model.

    Args:
        model: the LightningModule itself, not as a strategy wraps it.

    Raises:
        ConfigError: if there is none, and the model has no schema.
    """
    for belongs, adapter_class in _registered:
        if belongs(model):
            return adapter_class(model)
    if not hasattr(type(model), "oomptimizer_schema"):
        raise ConfigError(
            f"model: {type(model).__name__} has no `oomptimizer_schema`, so no batch of it can be made; give it one "
            "as NeMo's models have, or register an adapter (nemo_emmett.oomptimizer.adapters.register_adapter)."
        )
    # By names and attributes: their classes are slow to import, and needed only by those who train one.
    names = {kind.__name__ for kind in type(model).__mro__}
    if callable(type(model).oomptimizer_schema) and hasattr(model, "audio_locator_id"):
        return SpeechTextAdapter(model)
    if hasattr(type(model), "audio_locator_tag_id"):
        return SALMAdapter(model)
    if "EncDecMultiTaskModel" in names:
        return MultiTaskAdapter(model)
    is_hybrid = any("Hybrid" in name for name in names)  # two losses in one
    if "EncDecCTCModel" in names or ("EncDecRNNTModel" in names and not is_hybrid):
        return TranscriptAdapter(model)
    return SchemaAdapter(model)
