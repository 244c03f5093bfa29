"""Which adapter a model gets."""

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
    """Let OOMptimizer know a family of models of your own.

    Args:
        family: the models' class, or a function that tells of a model whether it belongs to them. What is registered
            last is asked first, and before all that nemo_emmett knows itself.
        adapter_class: is made with the model as its argument.

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
        ConfigError: if nothing is known of its batches.
    """
    for belongs, adapter_class in _registered:
        if belongs(model):
            return adapter_class(model)
    if not hasattr(type(model), "oomptimizer_schema"):
        raise ConfigError(
            f"model: {type(model).__name__} has no `oomptimizer_schema`, so no batch of it can be made up; give it one "
            "as NeMo's models have, or register an adapter (nemo_emmett.oomptimizer.adapters.register_adapter)."
        )
    return _adapter_class(model)(model)


def _adapter_class(model: Any) -> type[Adapter]:
    # By names and attributes: the classes themselves are not imported before someone trains one of them.
    names = {kind.__name__ for kind in type(model).__mro__}
    if callable(type(model).oomptimizer_schema) and hasattr(model, "audio_locator_id"):
        return SpeechTextAdapter
    if hasattr(type(model), "audio_locator_tag_id"):
        return SALMAdapter
    if "EncDecMultiTaskModel" in names:
        return MultiTaskAdapter
    is_hybrid = any("Hybrid" in name for name in names)  # two losses in one
    if "EncDecCTCModel" in names or ("EncDecRNNTModel" in names and not is_hybrid):
        return TranscriptAdapter
    return SchemaAdapter
