from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nemo_emmett.modules.loss import (
    IGNORE_INDEX,
    mask_padding,
    step_loss,
    sum_over_ranks,
)

from ..models.two_ranks import run_on_two_ranks


def test_mask_padding():
    assert mask_padding(torch.tensor([[3, 0]]), torch.tensor([[True, False]])).tolist() == [[3, IGNORE_INDEX]]


def test_each_modality_is_a_mean_of_its_own_and_weighted():
    loss = step_loss(torch.tensor([6.0, 5.0]), torch.tensor([2, 10]), torch.tensor([1.0, 4.0]))
    assert loss.item() == pytest.approx(1.0 * 6 / 2 + 4.0 * 5 / 10)


def test_an_absent_modality_adds_nothing():
    loss = step_loss(torch.tensor([0.0, 5.0]), torch.tensor([0, 10]), torch.ones(2))
    assert loss.item() == pytest.approx(0.5)


# Rank 0 holds 3 audio tokens and 1 text token, rank 1 holds text alone: 4 tokens.
INPUTS = {0: {"audio": [1.0, 2.0, 3.0], "text": [4.0]}, 1: {"audio": [], "text": [5.0, 6.0, 7.0, 8.0]}}


def local_loss(weight: torch.Tensor, inputs: dict) -> torch.Tensor:
    """Every token's loss is weight * its number, so the gradient is known by hand."""
    sums = torch.stack([(weight * torch.tensor(inputs[m])).sum() for m in ("audio", "text")])
    counts = torch.tensor([len(inputs[m]) for m in ("audio", "text")])
    return step_loss(sums, sum_over_ranks(counts), torch.tensor([1.0, 0.5]))


def rank_gradient(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", rank=rank, world_size=2)
    weight = torch.ones((), requires_grad=True)
    local_loss(weight, INPUTS[rank]).backward()
    torch.save(weight.grad, folder / f"{rank}.pt")


def test_two_ranks_average_to_the_gradient_of_one_process_on_the_joined_batch(tmp_path):
    run_on_two_ranks(rank_gradient, tmp_path, tmp_path)
    gradients = [torch.load(tmp_path / f"{rank}.pt").item() for rank in range(2)]

    weight = torch.ones((), requires_grad=True)
    joined = {m: INPUTS[0][m] + INPUTS[1][m] for m in ("audio", "text")}
    local_loss(weight, joined).backward()
    assert weight.grad.item() == pytest.approx((1 + 2 + 3) / 3 + 0.5 * (4 + 5 + 6 + 7 + 8) / 5)
    assert sum(gradients) / 2 == pytest.approx(weight.grad.item())
