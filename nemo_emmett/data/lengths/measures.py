"""The lengths of many examples, as arrays."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Measures:
    """The lengths of N examples.

    Args:
        seconds: (N,) float64: duration of a Cut; of a conversation with speech, the sum over its cuts; else NaN.
        inputs: (N,) int64: ``Formattable.input_length``; 0 for a Cut; -1: there is no example.
        outputs: (N,) int64: ``Formattable.output_length``; for a Cut what NeMo's ``_measure_tokens`` counts.
        totals: (N,) int64: ``Formattable.total_length``; for a Cut the tokens of its supervisions.
        is_cut: (N,) bool.
    """

    seconds: np.ndarray
    inputs: np.ndarray
    outputs: np.ndarray
    totals: np.ndarray
    is_cut: np.ndarray

    def __getitem__(self, which: Any) -> Measures:
        return Measures(*(getattr(self, field.name)[which] for field in fields(self)))
