"""Bytes of tensors, compared with what one counts by hand and with PyTorch's own tracker."""

from __future__ import annotations

import gc
import os

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.checkpoint import checkpoint

from nemo_emmett.oomptimizer.meter import TensorMeter

CPU = torch.device("cpu")
KB = 1000  # bytes of a tensor of 250 float32


@pytest.fixture(params=["real", "fake"])
def meter(request):
    """Either on real tensors or inside a FakeTensorMode: the numbers must be the same."""
    if request.param == "real":
        yield TensorMeter(CPU)
        return
    with FakeTensorMode():
        yield TensorMeter(CPU)


def kilobytes(n: int, **options) -> torch.Tensor:
    return torch.zeros(250 * n, **options)


def test_each_storage_counts_once_and_until_it_is_freed(meter):
    x = kilobytes(1)
    meter.track([x, x.view(10, 25)])
    assert meter.alive == 1 * KB
    with meter.measuring():
        y = x + 1  # 2
        z = y[10:].view(-1, 2).t()  # a view
        y.mul_(2)  # in place
        del y
        assert meter.alive == 2 * KB  # the view holds it
        del z
        assert meter.alive == 1 * KB
        w = torch.cat([x, x, x])  # 1 + 3
        assert meter.alive == 4 * KB
        del w
    assert (meter.alive, meter.peak) == (1 * KB, 4 * KB)


def test_the_peak_is_reset_and_what_is_alive_is_kept(meter):
    with meter.measuring():
        kept = kilobytes(3)
        kilobytes(5)
    assert (meter.alive, meter.peak) == (3 * KB, 8 * KB)
    uncounted = kilobytes(7)
    with meter.measuring():
        kept = kept[:250].clone()
        assert meter.alive == 1 * KB
    assert (meter.alive, meter.peak) == (1 * KB, 4 * KB)
    del kept, uncounted
    assert meter.alive == 0


def test_a_linear_layer_forward_and_backward(meter):
    # x (100, 50) 20 KB, w (50, 20) 4 KB, y = x w (100, 20) 8 KB, z = exp(y) 8 KB, its sum 4 bytes.
    x, w = torch.ones(100, 50), torch.ones(50, 20, requires_grad=True)
    meter.track([x, w])
    with meter.measuring():
        loss = (x @ w).exp().sum()
        assert meter.peak == 24 * KB + 16 * KB
        assert meter.alive == 24 * KB + 8 * KB + 4  # exp saves its result, y is gone
    with meter.measuring():
        loss.backward()
    assert meter.peak == 24 * KB + 8 * KB + 8 * KB + 8  # z and dy = z dz; dz is a view of the loss's gradient
    assert meter.alive == 24 * KB + 4 * KB + 4  # the loss, and the gradient of w
    assert w.grad.shape == (50, 20)


def test_what_dropout_saves_counts(meter):
    x = kilobytes(4, requires_grad=True)
    meter.track([x])
    with meter.measuring():
        y = nn.functional.dropout(x, 0.5)
    # x, the mask as float32 (CPU), and the product.
    assert meter.alive == 4 * KB + 4 * KB + 4 * KB
    with meter.measuring():
        y.sum().backward()
    assert meter.alive == 4 * KB + 4 * KB + 4 * KB  # y, x and its gradient: the mask is gone


def test_activation_checkpointing_holds_the_inputs_of_layers_only(meter):
    layers = nn.ModuleList(nn.Sequential(nn.Linear(50, 50), nn.GELU(), nn.Linear(50, 50)) for _ in range(4))
    x = torch.zeros(500, 50)
    meter.track([x, *layers.parameters()])
    resident = meter.alive

    def forward(wrapped: bool):
        y = x
        for layer in layers:
            y = checkpoint(layer, y, use_reentrant=False) if wrapped else layer(y)
        return y

    held = {}
    for wrapped in (False, True):
        with meter.measuring():
            y = forward(wrapped)
        held[wrapped] = meter.alive - resident
        with meter.measuring():
            y.sum().backward()
        for layer in layers:
            layer.zero_grad()
        del y
        assert meter.alive == resident
    activation = 500 * 50 * 4
    assert held == {False: 4 * 3 * activation, True: 4 * activation}


@pytest.mark.parametrize("resize", ["storage", "operation"])
def test_storages_that_are_resized_in_place_are_followed(resize):
    meter = TensorMeter(CPU)
    x = kilobytes(2)
    meter.track([x])
    with meter.measuring():
        for n in (5, 0, 1):
            x.untyped_storage().resize_(n * KB) if resize == "storage" else x.resize_(250 * max(n, 1))
    assert (meter.alive, meter.peak) == (1 * KB if resize == "storage" else 5 * KB, 5 * KB)
    x.untyped_storage().resize_(0)  # outside: counted at the next operation
    with meter.measuring():
        x.detach()
    assert meter.alive == 0


def test_other_devices_do_not_count():
    meter = TensorMeter(CPU)
    with meter.measuring():
        elsewhere, here = torch.zeros(100, device="meta"), torch.zeros(10)
    assert meter.alive == 40
    del elsewhere, here
    assert meter.alive == 0


def test_of_distributed_tensors_the_local_part_counts():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        mesh = init_device_mesh("cpu", (1,))
        meter = TensorMeter(CPU)
        x = distribute_tensor(torch.ones(100, 10), mesh, [Shard(0)])
        meter.track([x])
        assert meter.alive == 4 * KB
        with meter.measuring():
            y = x * 2
            z = y.redistribute(mesh, [Replicate()])
        assert meter.alive - 2 * 4 * KB in (0, 4 * KB)  # one rank need not copy
        del x, y, z
        assert meter.alive == 0
    finally:
        torch.distributed.destroy_process_group()


def test_sparse_gradients_count_as_indices_and_values():
    meter = TensorMeter(CPU)
    table, ids = nn.Embedding(1000, 8, sparse=True), torch.tensor([1, 5, 7])
    meter.track([ids])
    with meter.measuring():
        table(ids).sum().backward()
    assert meter.alive == 3 * 8 + (3 * 8 + 3 * 8 * 4)


def transformer() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True), nn.LSTM(16, 8, batch_first=True)
    )
    return model, torch.randn(4, 10, 16)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(x)[0].float().pow(2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def test_peaks_are_those_of_pytorch_s_own_tracker():
    model, x = transformer()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, x)
    meter = TensorMeter(CPU)
    state = [t for s in optimizer.state.values() for t in s.values()]
    meter.track([*model.parameters(), *(p.grad for p in model.parameters()), *state, x])
    with meter.measuring():
        train(model, optimizer, x)
    tracker = MemTracker()
    tracker.track_external(model, optimizer, x)
    with tracker:
        train(model, optimizer, x)
    theirs = tracker.get_tracker_snapshot("peak")[CPU]
    assert meter.peak == theirs["Total"]


def test_hundreds_of_steps_leave_nothing_in_the_books():
    model, x = transformer()
    optimizer, meter = torch.optim.AdamW(model.parameters()), TensorMeter(CPU)
    meter.track([*model.parameters(), x])
    readings = []
    for _ in range(100):
        with meter.measuring():
            train(model, optimizer, x)
        readings.append((meter.peak, meter.alive, len(meter._entries)))
    gc.collect()
    assert len(set(readings[1:])) == 1
    del model, optimizer, x
    gc.collect()
    assert (meter.alive, meter._entries) == (0, {})
