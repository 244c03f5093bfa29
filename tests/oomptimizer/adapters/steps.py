"""What one training step leaves behind: its loss, its gradients, its peak of memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nemo_emmett.oomptimizer.adapters import Adapter

CPU = torch.device("cpu")


def loss_of(model: LightningModule, batch: Any) -> Tensor:
    answer = model.training_step(batch, 0)
    return answer["loss"] if isinstance(answer, dict) else answer


def gradients(model: LightningModule) -> dict[str, Tensor]:
    """Of all parameters that have one; they are forgotten afterwards."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def whole_and_pieces(adapter: Adapter, batch: Any, pieces: int) -> tuple[tuple, tuple, int]:
    """Loss and gradients of a batch at once and in pieces, and how many pieces these were."""
    model = adapter.model
    whole = loss_of(model, batch)
    whole.backward()
    expected = whole.item(), gradients(model)
    parts = adapter.split_batch(batch, pieces)
    total = 0.0
    with adapter.one_step(batch):
        for part in parts:
            loss = adapter.loss_weight(part, batch) * loss_of(model, part)
            loss.backward()
            total += loss.item()
    return expected, (total, gradients(model)), len(parts)


def assert_same(expected: tuple, found: tuple) -> None:
    assert abs(found[0] / expected[0] - 1) < 1e-5
    assert found[1].keys() == expected[1].keys()
    largest = max(float(gradient.abs().max()) for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-5 * largest, msg=name)


def is_trained(adapter: Adapter, batch: Any) -> bool:
    """Whether the real step gives a finite loss and each parameter a finite gradient, not all zero."""
    loss = loss_of(adapter.model, batch)
    loss.backward()
    found = gradients(adapter.model)
    trainable = {name for name, p in adapter.model.named_parameters() if p.requires_grad}
    finite = loss.isfinite() and all(gradient.isfinite().all() for gradient in found.values())
    return bool(finite) and found.keys() == trainable and any(gradient.any() for gradient in found.values())


class Peak(TorchDispatchMode):
    """The most bytes of tensors that were alive at once, of those that operators returned."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._alive.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self._alive = {key: value for key, value in self._alive.items() if not value[0].expired()}
        self.bytes = max(self.bytes, sum(nbytes for _, nbytes in self._alive.values()))
        return out


def peak_of_step(adapter: Adapter, batch: Any) -> int:
    """Bytes of a step, the second of two: in the first one positional tables may grow with the audio."""
    for _ in range(2):
        gc.collect()
        gc.disable()  # tensors in cycles are alive until a collection, which would come in some steps and not in others
        try:
            with Peak() as peak:
                loss_of(adapter.model, batch).backward()
        finally:
            gc.enable()
        adapter.model.zero_grad(set_to_none=True)
    return peak.bytes


@contextmanager
def fake(adapter: Adapter) -> Iterator[None]:
    """A ``FakeTensorMode`` with the model's parameters and buffers in it; shared ones stay shared."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[int, Tensor] = {}
    for module in adapter.model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in made:
                converted = torch.nn.Parameter(mode.from_tensor(parameter.detach()), parameter.requires_grad)
                made[id(parameter)] = made[id(converted)] = converted
            module._parameters[name] = made.get(id(parameter))
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else mode.from_tensor(buffer)
    with mode, adapter.planning():
        yield
