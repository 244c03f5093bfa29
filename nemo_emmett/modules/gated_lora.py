"""LoRA that acts only on the examples with speech of a batch (Phi-4-multimodal, arXiv 2503.01743, section 2.1).

For every other example a layer returns what the language model's own layer returns, to the bit: the adapter's output is
selected, not multiplied by zero, so that not even an infinite one reaches them. Where no example has speech, it is not
computed.

Shapes: B examples, K hypotheses of each in a beam search, T tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nemo_emmett.errors import ConfigError, ModelError


class SpeechGate:
    """Which examples of the batch that is in a language model have speech; its LoRA layers share it.

    Attributes:
        rows: (B,) bool; False where none has speech; None outside of :meth:`of`.
        row_N: (N,) int64, the row of each position that the output layer reads alone; None: it reads whole rows.
    """

    def __init__(self) -> None:
        self.rows: Tensor | bool | None = None
        self.row_N: Tensor | None = None

    @contextmanager
    def of(self, rows: Tensor | bool | None) -> Iterator[None]:
        """Within it, the language model reads this batch."""
        before = self.rows, self.row_N
        self.rows, self.row_N = rows, None
        try:
            yield
        finally:
            self.rows, self.row_N = before

    def select(self, kept_R: Tensor) -> None:
        """Go on with some rows of the batch, by their numbers (R,) int64."""
        if isinstance(self.rows, Tensor):
            self.rows = self.rows[kept_R]

    def checkpoint(self, function: Callable, *args: Any) -> Any:
        """``torch.utils.checkpoint``: activations are computed again with the rows of the forward pass, after which
        other batches may have been in the model."""
        rows = self.rows
        return checkpoint(function, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), self.of(rows)))


class GatedLinear(lora.Linear):
    """peft's LoRA layer, whose adapter acts on the rows of its gate alone."""

    speech_gate: SpeechGate
    is_output_layer: bool  # which may read (N, H), positions of any rows

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output, with the adapter's added in the rows with speech.

        Args:
            x: (B * K, T, H), where the hypotheses of an example follow one another.
            args: of the base layer.
            kwargs: of the base layer.

        Raises:
            ModelError: if it is not known which rows have speech.
        """
        base = self.base_layer(x, *args, **kwargs)
        rows = False if self.disable_adapters else self.speech_gate.rows
        if rows is False:
            return base
        if rows is None:
            raise ModelError(
                "model.lora_modality: audio: which examples have speech is not known here; call the model's `forward` "
                "or `generate` with a batch, not its language model."
            )
        if x.dim() < 3 and self.is_output_layer and self.speech_gate.row_N is not None:
            rows = rows[self.speech_gate.row_N]
        elif x.shape[0] != rows.shape[0]:
            rows = rows.repeat_interleave(x.shape[0] // rows.shape[0])
        if (x.dim() < 3 and not self.is_output_layer) or x.shape[0] != rows.shape[0]:
            raise ModelError(
                f"model.lora_modality: audio: LoRA in a layer of {self.in_features} inputs, which gets the shape "
                f"{tuple(x.shape)} of a batch, cannot act on some examples alone; leave the layer out of "
                "model.lora.target_modules."
            )
        (adapter,) = self.active_adapters
        x = self._cast_input_dtype(x, self.lora_A[adapter].weight.dtype)
        if adapter in self.lora_variant:
            adapted = self.lora_variant[adapter].forward(self, active_adapter=adapter, x=x, result=base)
        else:
            hidden = self.lora_A[adapter](self.lora_dropout[adapter](x))
            adapted = base + self.lora_B[adapter](hidden) * self.scaling[adapter]
        return torch.where(rows.view(-1, *[1] * (base.dim() - 1)), adapted.to(base.dtype), base)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: merged weights would act on text too.

        Raises:
            ModelError: always.
        """
        raise ModelError(
            "model.lora_modality: audio: LoRA that acts on speech alone cannot be merged into the weights, which text "
            "uses too; keep it apart."
        )


def gate_lora(llm: nn.Module, output_layer: nn.Module) -> SpeechGate:
    """Make the LoRA of a language model act on speech alone; names of parameters stay.

    Args:
        llm: with peft's layers; they are changed in place.
        output_layer: the layer in it that computes logits.

    Returns:
        The gate of all layers, also under ``llm.speech_gate``.

    Raises:
        ConfigError: for a layer whose output rows do not belong to single examples.
    """
    gate = SpeechGate()
    for name, layer in llm.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        if type(layer) is not lora.Linear or any(
            not isinstance(variant, DoraLinearVariant) for variant in layer.lora_variant.values()
        ):
            raise ConfigError(
                f"model.lora_modality: audio: LoRA in '{name.removeprefix('base_model.model.')}' cannot act on some "
                "examples of a batch alone; name linear layers in model.lora.target_modules."
            )
        layer.__class__ = GatedLinear
        layer.speech_gate = gate
        layer.is_output_layer = layer is output_layer
    llm.speech_gate = gate
    return gate


def gated(llm: nn.Module, rows: Tensor | bool | None) -> AbstractContextManager[None]:
    """Within it, a language model reads a batch whose ``rows`` have speech (:attr:`SpeechGate.rows`); without effect
    on one whose LoRA acts on all examples, or that has none."""
    gate = getattr(llm, "speech_gate", None)
    return nullcontext() if gate is None else gate.of(rows)
