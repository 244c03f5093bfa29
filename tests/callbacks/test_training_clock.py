"""``TrainingClock`` counts the seconds of training and leaves validation out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from nemo_emmett.callbacks import training_clock
from nemo_emmett.callbacks.training_clock import Reading, TrainingClock

STEP, VALIDATION = 1.0, 100.0  # seconds of the clock on the wall; of the CPU's twice as many


class Clock:
    """A clock that moves only on demand."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> Reading:
        return Reading(self.seconds, 2 * self.seconds)


class Timed(LightningModule):
    """A training step takes STEP seconds, a validation step VALIDATION."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock, self.layer, self.logged = clock, torch.nn.Linear(2, 1), []

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        self.clock.seconds += STEP
        return self.layer(batch).sum()

    def validation_step(self, batch: torch.Tensor) -> None:
        self.clock.seconds += VALIDATION

    def on_validation_end(self) -> None:
        if not self.trainer.sanity_checking:
            metrics = self.trainer.callback_metrics
            self.logged.append((metrics["train_seconds"].item(), metrics["train_cpu_seconds"].item()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(training_clock, "_now", clock)
    return clock


def fit(clock: Clock, folder: Path, steps: int, resume: Path | None = None) -> Timed:
    model = Timed(clock)
    trainer = Trainer(
        max_steps=steps,
        limit_train_batches=3,
        callbacks=[TrainingClock(), ModelCheckpoint(folder, save_last=True)],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = torch.utils.data.DataLoader(torch.ones(64, 2))
    trainer.fit(model, data, data, ckpt_path=resume)
    return model


def test_validation_is_left_out_and_so_is_the_check_before_training(clock: Clock, tmp_path: Path):
    assert fit(clock, tmp_path, steps=9).logged == [(3.0, 6.0), (6.0, 12.0), (9.0, 18.0)]


def test_a_resumed_run_goes_on_counting(clock: Clock, tmp_path: Path):
    fit(clock, tmp_path, steps=6)
    clock.seconds += 5000.0
    assert fit(clock, tmp_path, steps=9, resume=tmp_path / "last.ckpt").logged[-1] == (9.0, 18.0)


def test_the_real_clock_moves(tmp_path: Path):
    before = training_clock._now()
    sum(range(100_000))
    passed = training_clock._now() - before
    assert passed.wall > 0
    assert passed.cpu > 0
