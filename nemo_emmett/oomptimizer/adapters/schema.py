"""Batches by ``oomptimizer_schema``: the types and lengths of the inputs of NeMo's models.

A schema is a dict: ``cls``, what the batch is made of (``tuple``, ``dict``, a dataclass), and ``inputs``, a list of
dicts with the keys ``type`` (a ``NeuralType``, ``"constant"`` with its ``value``, or ``"dummy"``), ``seq_length``
(``"input"`` or ``"output"``), ``vocab_size`` for token ids, and ``name`` where ``cls`` takes names. The format is that
of NeMo's own OOMptimizer; lengths of speech are in samples, all others in tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from nemo.core.neural_types import AudioSignal, LabelsType, LengthsType, MaskType, NeuralType
from torch import Tensor

from nemo_emmett.errors import ConfigError
from nemo_emmett.oomptimizer.adapters.base import Extent
from nemo_emmett.oomptimizer.adapters.draws import (
    full_lengths,
    random_ids,
    random_recordings,
    samples_of,
    sampling_rate,
    special_ids,
)
from nemo_emmett.oomptimizer.adapters.lengths import encoder_decoder_lengths
from nemo_emmett.oomptimizer.adapters.rows import stack_padded
from nemo_emmett.oomptimizer.buckets import Shape


class Schema:
    """The schema of a model whose batches hold one modality.

    Args:
        model: the model.
        content: its schema; by default what the model's property ``oomptimizer_schema`` gives.

    Raises:
        ConfigError: if the schema is not of the form above.
    """

    def __init__(self, model: Any, content: Any = None) -> None:
        self.model = model
        if content is None:
            try:
                content = model.oomptimizer_schema
            except (AttributeError, NotImplementedError) as error:
                raise ConfigError(
                    f"oomptimizer_schema: that of {type(model).__name__} cannot be read ({type(error).__name__}: "
                    f"{error}); register an adapter (nemo_emmett.oomptimizer.adapters.register_adapter)."
                ) from error
        if not isinstance(content, dict) or not callable(content.get("cls")) or not content.get("inputs"):
            raise ConfigError(
                f"oomptimizer_schema: {type(model).__name__} gives {content!r}; a dict with `cls` and `inputs` is "
                "needed, as nemo_emmett.oomptimizer.adapters.schema describes it."
            )
        self.cls: Any = content["cls"]
        self.inputs: list[dict] = list(content["inputs"])

    @property
    def modality(self) -> str:
        """``audio`` if anything in it is speech, else ``text``."""
        return "audio" if any(_is_a(item, AudioSignal) for item in self.inputs) else "text"

    def batch(self, shape: Shape, size: int, device: torch.device) -> Any:
        """A random batch of ``size`` examples, each as long as the longest of the bucket.

        Raises:
            ConfigError: if the bucket's modality is not the schema's, or an input has a type that is not known.
        """
        if shape.modality != self.modality:
            raise ConfigError(
                f"train_ds: {type(self.model).__name__} reads {self.modality}, by its oomptimizer_schema, but a group "
                f"holds {shape.modality}; leave that group out or train another model."
            )
        lengths = encoder_decoder_lengths(shape)
        inputs = samples_of(self.model, lengths.seconds) if shape.modality == "audio" else lengths.context
        positions = {"input": inputs, "output": lengths.answer}
        return self._assemble([self._value(item, positions, size, device) for item in self.inputs])

    def values(self, batch: Any) -> list[Any]:
        """What a batch holds for each of the schema's inputs, in their order."""
        keys = [item.get("name", index) for index, item in enumerate(self.inputs)]
        is_object = not isinstance(batch, dict)
        return [getattr(batch, key) if is_object and isinstance(key, str) else batch[key] for key in keys]

    def extent(self, batch: Any) -> Extent:
        """Number and lengths of the examples of a batch."""
        longest, examples = {"input": 0, "output": 0}, 0
        for item, value in zip(self.inputs, self.values(batch), strict=True):
            if not isinstance(item["type"], NeuralType):
                continue
            examples = len(value)
            if _is_a(item, LengthsType):
                longest[item["seq_length"]] = max(longest[item["seq_length"]], int(value.max()))
        for item, value in zip(self.inputs, self.values(batch), strict=True):
            if isinstance(item["type"], NeuralType) and not longest[item["seq_length"]]:
                longest[item["seq_length"]] = value.shape[1]
        if self.modality == "text":
            return Extent("text", examples, 0.0, longest["input"], longest["output"])
        return Extent("audio", examples, longest["input"] / sampling_rate(self.model), 0, longest["output"])

    def join(self, batches: Sequence[Any]) -> Any:
        """All examples of several batches in one, as the dataset collates them when it gets them together."""
        if len(batches) == 1:
            return batches[0]
        columns = zip(*(self.values(batch) for batch in batches), strict=True)
        return self._assemble([self._joined(item, column) for item, column in zip(self.inputs, columns, strict=True)])

    def _joined(self, item: dict, column: tuple) -> Any:
        if not isinstance(item["type"], NeuralType):
            return column[0]
        pad_id = getattr(getattr(self.model, "tokenizer", None), "pad_id", None)
        filling = pad_id if _is_token_ids(item) and isinstance(pad_id, int) and pad_id >= 0 else 0
        return stack_padded(column, filling)

    def _value(self, item: dict, positions: dict[str, int], size: int, device: torch.device) -> Tensor:
        if item["type"] == "constant":
            value = size if item["value"] == "batch" else item["value"]
            return torch.tensor([value], dtype=torch.long, device=device)
        if not isinstance(item["type"], NeuralType):
            return torch.tensor([], device=device)
        length = positions[item["seq_length"]]
        if _is_a(item, AudioSignal) and item["seq_length"] == "input":
            return random_recordings(size, length, device)
        if _is_a(item, LengthsType):
            return full_lengths(size, length, device)
        if _is_a(item, MaskType):
            return torch.ones(size, length, dtype=torch.bool, device=device)
        if _is_token_ids(item) and "vocab_size" in item:
            return random_ids(size, length, item["vocab_size"], special_ids(self.model), device)
        raise ConfigError(
            f"oomptimizer_schema: {type(self.model).__name__} has an input {item}, of which no random example can be "
            "made; register an adapter that can (nemo_emmett.oomptimizer.adapters.register_adapter)."
        )

    def _assemble(self, values: Sequence[Any]) -> Any:
        if self.cls in (tuple, list):
            return self.cls(values)
        entries = [(item.get("name"), value) for item, value in zip(self.inputs, values, strict=True)]
        named = {name: value for name, value in entries if name is not None}
        return self.cls(*(value for name, value in entries if name is None), **named)


def _is_a(item: dict, kind: type) -> bool:
    return isinstance(item["type"], NeuralType) and isinstance(item["type"].elements_type, kind)


def _is_token_ids(item: dict) -> bool:
    return _is_a(item, LabelsType) and not _is_a(item, MaskType)  # to NeMo a mask is a kind of labels
