"""A run that is resumed with ``RandomState`` equals the run that was never interrupted."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from nemo_emmett.callbacks.random_state import RandomState
from nemo_emmett.modules.random_state import random_state

from ..models.two_ranks import run_on_two_ranks

STEPS, HALF = 20, 10


class NoisyRegression(LightningModule):
    """Its loss depends on torch's, NumPy's and Python's global generators."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
        self.losses: list[float] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = self.layers(batch).square().mean() * (1 + np.random.rand()) + random.random()
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        torch.rand(3), np.random.rand(), random.random()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def fit(folder: Path, steps: int, callbacks: list[Callback], resume: Path | None = None, seed: int = 0) -> list[float]:
    """Losses of a run that starts from ``seed``, validates every five steps and saves a checkpoint every ten."""
    torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
    # The same batch at every step: which batches come after resuming is the loader's affair.
    loader = torch.utils.data.DataLoader([torch.arange(8.0).view(2, 4) / 10] * STEPS, batch_size=None)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        val_check_interval=5,
        callbacks=[*callbacks, ModelCheckpoint(folder, filename="half", every_n_train_steps=HALF)],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = NoisyRegression()
    trainer.fit(model, loader, loader, ckpt_path=resume)
    return model.losses


def interrupted(folder: Path, callbacks: type[Callback] | None) -> list[float]:
    made = [callbacks()] if callbacks else []
    first = fit(folder, HALF, made)
    made = [callbacks()] if callbacks else []
    return first + fit(folder, STEPS, made, resume=folder / "half.ckpt", seed=99)


def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(tmp_path: Path) -> None:
    uninterrupted = fit(tmp_path / "whole", STEPS, [RandomState()])
    assert len(uninterrupted) == STEPS
    assert interrupted(tmp_path / "halves", RandomState) == uninterrupted


def test_without_it_they_differ_from_the_resumption_on(tmp_path: Path) -> None:
    uninterrupted = fit(tmp_path / "whole", STEPS, [])
    resumed = interrupted(tmp_path / "halves", None)
    assert resumed[:HALF] == uninterrupted[:HALF]
    assert resumed[HALF] != uninterrupted[HALF]


def test_the_checkpoint_loads_without_arbitrary_code(tmp_path: Path) -> None:
    fit(tmp_path, HALF, [RandomState()])
    checkpoint = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert len(checkpoint["callbacks"]["RandomState"]["ranks"]) == 1


def test_with_another_number_of_ranks_nothing_is_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_emmett.callbacks import random_state as module

    warnings = []
    monkeypatch.setattr(module.logging, "warning", warnings.append)
    callback = RandomState()
    callback.load_state_dict({"ranks": [random_state(), random_state()]})
    before = torch.get_rng_state()
    torch.rand(1)
    moved = torch.get_rng_state()
    fit(tmp_path, 1, [callback], seed=7)
    assert not torch.equal(before, moved)
    (warning,) = warnings
    assert "random states of 2 ranks, this run has 1" in warning


def _two_ranks(rank: int) -> None:
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(rank)
    states = RandomState().state_dict()["ranks"]
    expected = [torch.Generator().manual_seed(seed).get_state() for seed in (0, 1)]
    assert all(torch.equal(state["torch"], other) for state, other in zip(states, expected, strict=True))


def test_every_ranks_state_is_in_the_checkpoint(tmp_path: Path) -> None:
    run_on_two_ranks(_two_ranks, tmp_path)
