"""AdamW with float32 copies of its weights: the updates of float32 AdamW on the same gradients, bit for bit."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from nemo_emmett.optimizers import MASTER, MasterWeightAdamW

SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1}


def gradient(step: int, shape: torch.Size) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(step)).bfloat16()


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    made = torch.Generator().manual_seed(0)
    first = [torch.randn(shape, generator=made).bfloat16() for shape in ((7, 5), (3,))]
    return [nn.Parameter(one.to(dtype)) for one in first]


@pytest.mark.parametrize("fused", [None, True])
def test_updates_are_those_of_float32(fused):
    ours, wide = parameters(torch.bfloat16), parameters(torch.float32)
    optimizer = MasterWeightAdamW(ours, **SETTINGS, fused=fused)
    reference = torch.optim.AdamW(wide, **SETTINGS, fused=fused)
    for step in range(20):
        for parameter in (*ours, *wide):
            parameter.grad = gradient(step, parameter.shape).to(parameter.dtype)
        assert optimizer.step(lambda: 3.0) == 3.0
        reference.step()
        for parameter, expected in zip(ours, wide, strict=True):
            assert torch.equal(optimizer.state[parameter][MASTER], expected)
            assert torch.equal(parameter, expected.bfloat16())


def test_small_updates_add_up():
    """Each is too small to change a weight of bfloat16, which AdamW alone leaves as it is."""
    ours, alone = nn.Parameter(torch.ones(4).bfloat16()), nn.Parameter(torch.ones(4).bfloat16())
    for parameter, kind in ((ours, MasterWeightAdamW), (alone, torch.optim.AdamW)):
        optimizer = kind([parameter], lr=1e-4, weight_decay=0.0)
        for _ in range(200):
            parameter.grad = torch.ones(4).bfloat16()
            optimizer.step()
    assert torch.equal(alone, torch.ones(4).bfloat16())
    assert torch.equal(ours, torch.full((4,), 0.98).bfloat16())


def test_its_state_is_restored_in_float32():
    ours = parameters(torch.bfloat16)
    optimizer = MasterWeightAdamW(ours, **SETTINGS)
    for parameter in ours:
        parameter.grad = gradient(0, parameter.shape)
    optimizer.step()
    restored = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    other = MasterWeightAdamW(restored, **SETTINGS)
    other.load_state_dict(deepcopy(optimizer.state_dict()))
    for step in (1, 2):
        for parameter in (*ours, *restored):
            parameter.grad = gradient(step, parameter.shape)
        optimizer.step()
        other.step()
    for parameter, same in zip(ours, restored, strict=True):
        assert other.state[same][MASTER].dtype == torch.float32
        assert all(torch.equal(value, other.state[same][name]) for name, value in optimizer.state[parameter].items())
        assert torch.equal(parameter, same)


def test_weights_of_float32_have_no_copy():
    (weight, _) = parameters(torch.float32)
    weight.grad = torch.ones_like(weight)
    optimizer = MasterWeightAdamW([weight])
    optimizer.step()
    assert MASTER not in optimizer.state[weight]
