"""A whole training on fake tensors, from building its model to its fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from nemo_emmett.oomptimizer.fake import fake_construction


@contextmanager
def fake_training() -> Iterator[None]:
    """Inside, a trainer may be given a model that was built inside.

    Raises:
        ConfigError: if something cannot do without values; it names the operation.
    """
    with fake_construction(), _conversion_in_place():
        yield


@contextmanager
def _conversion_in_place() -> Iterator[None]:
    """Let ``Module.to`` work on fake parameters.

    It exchanges a fake parameter for its conversion by ``torch.utils.swap_tensors``, which refuses any tensor that
    something refers to weakly, as PyTorch does to every fake parameter. Giving it the conversion's contents is enough.
    """
    original = torch.utils.swap_tensors
    torch.utils.swap_tensors = _take_contents
    try:
        yield
    finally:
        torch.utils.swap_tensors = original


def _take_contents(parameter: Tensor, converted: Tensor) -> None:
    if (parameter.dtype, parameter.device) != (converted.dtype, converted.device):
        parameter.data = converted.data
