"""The lengths of examples as NeMo's sampling constraints and filters measure them, as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields

import numpy as np
from lhotse.cut import Cut
from nemo.collections.common.data.lhotse.sampling import _measure_tokens
from nemo.collections.common.data.lhotse.text_adapters import Formattable, NeMoMultimodalConversation


@dataclass(frozen=True)
class Measures:
    """The lengths of N examples.

    Args:
        seconds: (N,) float64; of a cut, or of all cuts of a conversation; NaN where there is no speech.
        inputs: (N,) int64; ``input_length`` in tokens; for a cut those of its prompt; -1: there is no example.
        outputs: (N,) int64; ``output_length`` in tokens; for a cut the tokens that NeMo counts, 0 if it has none.
        totals: (N,) int64; ``total_length`` in tokens; for a cut the tokens of its supervisions.
        is_cut: (N,) bool.
    """

    seconds: np.ndarray
    inputs: np.ndarray
    outputs: np.ndarray
    totals: np.ndarray
    is_cut: np.ndarray

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: np.ndarray | slice) -> Measures:
        return Measures(*(getattr(self, field.name)[index] for field in fields(self)))


TYPES = {"seconds": np.float64, "inputs": np.int64, "outputs": np.int64, "totals": np.int64, "is_cut": np.bool_}
"""The type of each array of :class:`Measures`, in their order."""

NO_EXAMPLE = {"seconds": np.nan, "inputs": -1, "outputs": 0, "totals": 0, "is_cut": False}
"""The measures of a place without an example."""


def measure(examples: Sequence[Cut | Formattable]) -> Measures:
    """Measure examples that have been tokenised; what has no tokens measures 0 tokens."""
    rows = [_of_cut(example) if isinstance(example, Cut) else _of_formattable(example) for example in examples]
    columns = zip(*rows, strict=True) if rows else [()] * len(TYPES)
    return Measures(*(np.array(column, dtype) for column, dtype in zip(columns, TYPES.values(), strict=True)))


def _of_cut(cut: Cut) -> tuple[float, int, int, int, bool]:
    outputs = 0
    with suppress(AssertionError):  # it has no tokens
        outputs = _measure_tokens(cut)
    tokens = sum(len(s.tokens) for s in cut.supervisions if s.has_custom("tokens"))
    context = getattr(cut, "context_ids", None)
    return cut.duration, 0 if context is None else len(context), outputs, tokens, True


def _of_formattable(example: Formattable) -> tuple[float, int, int, int, bool]:
    seconds = np.nan
    if isinstance(example, NeMoMultimodalConversation) and not example.is_text_only:
        seconds = sum(cut.duration for cut in example.list_cuts())
    lengths = []
    for name in ("input_length", "output_length", "total_length"):
        try:
            lengths.append(getattr(example, name, None) or 0)
        except AssertionError:  # a conversation without token_equivalent_duration
            lengths.append(0)
    return seconds, *lengths, False
