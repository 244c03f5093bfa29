"""The lines of progress: when they come, and what they say."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from nemo_emmett.callbacks import run_progress
from nemo_emmett.callbacks.run_progress import RunProgress


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(run_progress.time, "perf_counter", clock)
    return clock


class Model:
    """Two examples of speech and three of text in each step."""

    def __init__(self) -> None:
        self.steps = 0

    def trained_totals(self) -> torch.Tensor:
        return torch.tensor([[9.0, 2.0], [9.0, 3.0]]) * self.steps


def trainer(**changed) -> SimpleNamespace:
    metrics = {"loss_audio": torch.tensor(1.5), "loss_text": torch.tensor(2.25), "val_bleu": torch.tensor(31.41592)}
    of_trainer = {
        "max_steps": 100,
        "max_epochs": -1,
        "num_training_batches": 10,
        "accumulate_grad_batches": 1,
        "global_step": 0,
        "is_global_zero": True,
        "sanity_checking": False,
        "world_size": 2,
        "callbacks": [],
        "callback_metrics": metrics,
        "checkpoint_callback": None,
    }
    return SimpleNamespace(**{**of_trainer, **changed})


def train(progress: RunProgress, of: SimpleNamespace, clock: Clock, steps: int, seconds: float = 1.0) -> None:
    model = Model()
    progress.setup(of, model, "fit")
    progress.on_train_start(of, model)
    for _ in range(steps):
        clock.now += seconds
        of.global_step += 1
        model.steps += 1
        progress.on_train_batch_end(of, model, None, None, 0)


def test_a_line_after_the_first_step_then_every_thirty_seconds_and_at_the_end(clock, capsys) -> None:
    train(RunProgress(), trainer(), clock, steps=100)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["1/100", "31/100", "61/100", "91/100", "100/100"]
    assert lines[0] == "step 1/100 (1%)  loss audio 1.500, text 2.250"
    # 5 examples a second on each of two ranks; 69 steps of a second are left.
    assert lines[1] == "step 31/100 (31%)  loss audio 1.500, text 2.250  10.0 examples/s  0:01:09 left"


def test_objectives_of_the_step_follow_the_modalities(clock, capsys, monkeypatch) -> None:
    monkeypatch.setattr(
        Model,
        "objectives",
        (
            SimpleNamespace(name="distillation"),
            SimpleNamespace(name="retention"),
            SimpleNamespace(name="transcription"),
        ),
        raising=False,
    )
    of = trainer()
    of.callback_metrics |= {"loss_distillation": torch.tensor(0.125), "loss_other": torch.tensor(1.0)}
    of.callback_metrics |= {"loss_retention": torch.tensor(-1e-6), "loss_transcription": torch.tensor(torch.nan)}
    train(RunProgress(), of, clock, steps=1)
    assert (
        capsys.readouterr().out
        == "step 1/100 (1%)  loss audio 1.500, text 2.250, distillation 0.125, retention 0.000\n"
    )


def test_validation_counts_for_what_is_left_but_not_for_the_rate(clock, capsys) -> None:
    progress, of = RunProgress(), trainer()
    train(progress, of, clock, steps=1)
    progress.on_validation_start(of, None)
    clock.now += 50
    progress.on_validation_end(of, None)
    model = Model()
    for _ in range(4):
        clock.now += 10
        of.global_step += 1
        model.steps = of.global_step
        progress.on_train_batch_end(of, model, None, None, 0)
    first, scores, second = capsys.readouterr().out.splitlines()[:3]
    assert first.startswith("step 1/100")
    assert scores == "step 1/100 (1%)  validation: val_bleu 31.42"
    # 5 examples x 2 ranks in the 10 seconds of step 2; (11 + 50) seconds for two steps, 98 to go.
    assert second.endswith("1.0 examples/s  0:49:49 left")
    assert (progress.training_seconds, progress.validation_seconds) == (11.0 + 30, 50.0)


def test_steps_end_by_epochs_too(clock) -> None:
    progress, of = RunProgress(), trainer(max_steps=-1, max_epochs=3, accumulate_grad_batches=4)
    progress.setup(of, None, "fit")
    assert progress.planned_steps(of) == 9  # 10 batches are 3 steps of at most 4


def test_an_accumulated_step_is_printed_once_and_other_ranks_print_nothing(clock, capsys) -> None:
    progress, of = RunProgress(every_seconds=0), trainer()
    train(progress, of, clock, steps=2)
    progress.on_train_batch_end(of, Model(), None, None, 0)  # a batch without a step of the optimizer
    assert len(capsys.readouterr().out.splitlines()) == 2
    train(RunProgress(every_seconds=0), trainer(is_global_zero=False), clock, steps=2)
    train(RunProgress(steps=False), trainer(), clock, steps=2)
    assert capsys.readouterr().out == ""
