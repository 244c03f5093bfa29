"""A training on fake tensors, from building its model to its fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from nemo_emmett.oomptimizer.fake import fake_construction
from nemo_emmett.oomptimizer.snapshot import replaced


@contextmanager
def fake_training() -> Iterator[None]:
    """Inside, a model can be built and passed to a trainer.

    Raises:
        ConfigError: if something needs values; it names the operation.
    """
    with fake_construction(), replaced(torch.utils, swap_tensors=_take_data):
        FakeTensor.__deepcopy__ = _clone
        try:
            yield
        finally:
            del FakeTensor.__deepcopy__


def _take_data(parameter: Tensor, converted: Tensor) -> None:
    """Let ``Module.to`` work on fake parameters, which ``torch.utils.swap_tensors`` refuses.

    It takes no tensors with weak references, and PyTorch keeps one to every fake parameter.
    """
    if (parameter.dtype, parameter.device) != (converted.dtype, converted.device):
        parameter.data = converted.data


def _clone(tensor: FakeTensor, memo: dict[int, Any]) -> Tensor:
    """Let ``copy.deepcopy`` work on fake tensors, as torchmetrics copies its states.

    Tensors copy their attributes as well; one of a fake tensor's is its mode, which cannot be copied.
    """
    if id(tensor) not in memo:
        copied = tensor.detach().clone()
        if isinstance(tensor, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied)
        memo[id(tensor)] = copied.requires_grad_(tensor.requires_grad)
    return memo[id(tensor)]
