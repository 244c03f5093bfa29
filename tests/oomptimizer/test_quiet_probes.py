"""Probes log nothing and compute no metrics, however often the training itself does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from nemo.collections.asr.metrics.multitask import MultiTaskMetric
from nemo.collections.asr.metrics.wer import WER
from torch.utils.data import DataLoader

from nemo_emmett.oomptimizer.adapters import adapter_for
from nemo_emmett.oomptimizer.buckets import Shape
from nemo_emmett.oomptimizer.steps import PROBE_BATCH_IDX, TrainingSteps

from .models import tiny_ctc, tiny_hybrid, tiny_multitask, tiny_rnnt
from .probing import Probing, assert_no_side_effects, trainer_for

CPU = torch.device("cpu")
SPEECH = Shape("audio", seconds=1.0, input_tokens=0, output_tokens=6)


class Calls:
    """What was called while a probe ran, and afterwards."""

    def __init__(self) -> None:
        self.is_probing = False
        self.in_probes: list[str] = []
        self.in_training: list[str] = []

    def note(self, name: str) -> None:
        (self.in_probes if self.is_probing else self.in_training).append(name)

    def noting(self, owner: type, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Note each call of a method."""
        original = getattr(owner, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            self.note(f"{owner.__name__}.{name}")
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, noted)


class NotingLogger(DummyLogger):
    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self.calls = calls

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        self.calls.note("log_metrics")


def probed(model: LightningModule, calls: Calls, **options: Any) -> tuple[Probing, Trainer]:
    """A training of one step, after probes."""
    adapter = adapter_for(model)

    def probe(steps: TrainingSteps) -> None:
        calls.is_probing = True
        steps.warm_up(adapter.synthetic_batch(SPEECH, 1, CPU))
        steps.run(adapter.synthetic_batch(SPEECH, 3, CPU))
        calls.is_probing = False

    probing = Probing(probe)
    trainer = trainer_for(probing, max_steps=1, logger=NotingLogger(calls), **options)
    trainer.fit(model, DataLoader([adapter.synthetic_batch(SPEECH, 2, CPU)] * 2, batch_size=None))
    return probing, trainer


@pytest.mark.parametrize("build", [tiny_ctc, tiny_rnnt, tiny_hybrid, tiny_multitask])
def test_no_metric_is_computed_and_nothing_is_logged(
    build: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls()
    calls.noting(WER, "update", monkeypatch)
    calls.noting(MultiTaskMetric, "eval", monkeypatch)
    probing, trainer = probed(build(tmp_path), calls, log_every_n_steps=1)
    assert calls.in_probes == []
    assert trainer.log_every_n_steps == 1
    # The training itself does both, in its only step.
    assert "log_metrics" in calls.in_training
    assert set(calls.in_training) - {"log_metrics"}
    assert_no_side_effects(probing)


class Chatty(LightningModule):
    """Reports in every n-th batch, by every way that a model may have of counting them."""

    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.calls = calls
        self.indices: list[int] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.indices.append(batch_idx)
        every = self.trainer.log_every_n_steps
        for number in (batch_idx, batch_idx + 1, self.global_step, self.trainer.global_step + 1):
            if number and number % every == 0:
                self.calls.note("the trainer's interval")
        if any(number % n == 0 for n in (3, 4, 5, 10, 50, 1000) for number in (batch_idx, batch_idx + 1)):
            self.calls.note("an interval of its own")
        self.log("loss", 1.0)
        self.logger.log_metrics({"loss": 1.0})
        return self.linear(batch).square().mean()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        self.indices.append(batch_idx)
        super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("every", [1, 2, 50])
def test_no_interval_is_met(every: int) -> None:
    calls, seen = Calls(), []
    model = Chatty(calls)

    def probe(steps: TrainingSteps) -> None:
        calls.is_probing = True
        steps.warm_up(torch.ones(1, 4))
        steps.run(torch.ones(2, 4))
        calls.is_probing = False
        seen.extend(model.indices)

    probing = Probing(probe)
    trainer = trainer_for(probing, max_steps=1, logger=NotingLogger(calls), log_every_n_steps=every)
    trainer.fit(model, DataLoader([torch.ones(2, 4)], batch_size=None))
    assert calls.in_probes == []
    assert "log_metrics" in calls.in_training
    assert seen == [PROBE_BATCH_IDX] * 6  # three forward passes, three times gradients are dropped
    assert model.indices == [0, 0]  # the probes' have been forgotten
    assert trainer.log_every_n_steps == every
    assert_no_side_effects(probing)


def test_neither_the_index_nor_the_next_is_a_multiple_of_a_usual_interval() -> None:
    factors = {n for n in range(2, 1500) for number in (PROBE_BATCH_IDX, PROBE_BATCH_IDX + 1) if number % n == 0}
    assert factors == {2}
    assert PROBE_BATCH_IDX % 2 == 1
