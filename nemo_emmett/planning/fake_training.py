"""A whole training on fake tensors, from building its model to its fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from nemo_emmett.oomptimizer.fake import fake_construction


@contextmanager
def fake_training() -> Iterator[None]:
    """Inside, a trainer may be given a model that was built inside.

    Raises:
        ConfigError: if something cannot do without values; it names the operation.
    """
    with fake_construction(), _conversion_in_place(), _copies_by_clone():
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


@contextmanager
def _copies_by_clone() -> Iterator[None]:
    """Let ``copy.deepcopy`` work on fake tensors, as torchmetrics copies its states.

    Tensors copy their attributes, too; one of a fake tensor's is the mode that it belongs to.
    """
    FakeTensor.__deepcopy__ = _clone
    try:
        yield
    finally:
        del FakeTensor.__deepcopy__


def _clone(tensor: FakeTensor, memo: dict[int, Any]) -> Tensor:
    if id(tensor) not in memo:
        copied = tensor.detach().clone()
        if isinstance(tensor, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied)
        memo[id(tensor)] = copied.requires_grad_(tensor.requires_grad)
    return memo[id(tensor)]
