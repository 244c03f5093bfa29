"""Whether weights are finite."""

from __future__ import annotations

import pytest
import torch

from nemo_emmett.errors import NonFiniteError
from nemo_emmett.modules.tensors import nonfinite_weight, refuse_nonfinite


def test_what_counts_as_finite() -> None:
    nan, inf, whole = torch.tensor([1.0, float("nan")]), torch.tensor([float("-inf")]), torch.tensor([7])
    assert nonfinite_weight([("a", torch.ones(2)), ("b", whole)], [("mask", inf)]) is None
    assert nonfinite_weight([("a", torch.ones(2)), ("b", inf.bfloat16())]) == "b"
    assert nonfinite_weight([], [("mask", inf), ("statistics", nan)]) == "statistics"
    assert nonfinite_weight([]) is None
    refuse_nonfinite({"mask": inf, "a": whole}, buffers=["mask"])
    with pytest.raises(NonFiniteError, match="'mask'"):
        refuse_nonfinite({"mask": inf})
