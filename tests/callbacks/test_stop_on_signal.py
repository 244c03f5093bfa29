"""A signal ends training with a checkpoint that resumes; what was there before gets its handlers back."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from nemo.utils.callbacks.preemption import PreemptionCallback

from nemo_emmett.callbacks.stop_on_signal import SIGNALS, StopOnSignal

from ..models.two_ranks import run_on_two_ranks


class Line(LightningModule):
    """One weight, and the batches that it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.batches = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.batches.append(batch_idx)
        return (self.weight - batch).square().sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SendSignal(Callback):
    """Sends a signal to its own process when a batch starts, from the given rank."""

    def __init__(self, number: int, batch: int, rank: int = 0, before_training: bool = False) -> None:
        self.number, self.batch, self.rank, self.before_training = number, batch, rank, before_training

    def on_fit_start(self, trainer, module) -> None:
        if self.before_training:
            os.kill(os.getpid(), self.number)

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if batch_idx == self.batch and trainer.global_rank == self.rank:
            os.kill(os.getpid(), self.number)


def fit(model: Line, callbacks: list[Callback], folder: Path, resume: str | None = None, **options) -> None:
    loader = torch.utils.data.DataLoader(torch.arange(6.0).view(6, 1), batch_size=None)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"accelerator": "cpu", "max_epochs": 1, "enable_checkpointing": True} | options
    trainer = Trainer(callbacks=callbacks, default_root_dir=folder, **quiet, **options)
    trainer.fit(model, loader, ckpt_path=resume)


def stopped(callbacks: list[Callback], folder: Path, **options) -> Line:
    """The model of a training that a signal ended, with exit code 75 and the handlers restored."""
    before = [signal.getsignal(number) for number in SIGNALS]
    model = Line()
    with pytest.raises(SystemExit) as end:
        fit(model, [*callbacks, StopOnSignal()], folder, **options)
    assert end.value.code == 75
    for number, handler in zip(SIGNALS, before, strict=True):
        # Lightning leaves what it found, our handler, which hands over to the one before.
        current = signal.getsignal(number)
        assert current == handler or current.__self__._previous[number] == handler
        signal.signal(number, handler)
    return model


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_the_checkpoint_takes_the_place_of_the_last_one(number, tmp_path, capfd):
    saver = ModelCheckpoint(tmp_path, filename="best", save_last=True)
    model = stopped([SendSignal(number, batch=2), saver], tmp_path)
    assert model.batches == [0, 1, 2]
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 3
    assert torch.equal(checkpoint["state_dict"]["weight"], model.weight)
    said = capfd.readouterr().err
    assert f"{number.name}: training stopped after step 3." in said
    assert f"continue from {tmp_path / 'last.ckpt'}" in said


def test_without_a_last_checkpoint_of_the_run_it_writes_one(tmp_path):
    stopped([SendSignal(signal.SIGTERM, batch=0), ModelCheckpoint(tmp_path / "kept")], tmp_path)
    assert (tmp_path / "kept" / "step=1-last.ckpt").is_file()


def test_without_checkpoints_it_says_that_none_was_written(tmp_path, capfd):
    stopped([SendSignal(signal.SIGTERM, batch=0)], tmp_path, enable_checkpointing=False)
    assert "No checkpoint was written" in capfd.readouterr().err


def test_accumulated_gradients_are_waited_for(tmp_path):
    saver = ModelCheckpoint(tmp_path, save_last=True)
    model = stopped([SendSignal(signal.SIGTERM, batch=2), saver], tmp_path, accumulate_grad_batches=2)
    assert model.batches == [0, 1, 2, 3]


def test_a_checkpoint_that_cannot_be_written_is_one_sentence(tmp_path, capfd, monkeypatch):
    def full(self, trainer, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ModelCheckpoint, "_save_checkpoint", full)
    stopped([SendSignal(signal.SIGTERM, batch=1), ModelCheckpoint(tmp_path, save_last=True)], tmp_path)
    assert "could not be written ([Errno 28] No space left on device)" in capfd.readouterr().err


def test_before_the_first_step_there_is_nothing_to_save(tmp_path, capfd):
    model = stopped([SendSignal(signal.SIGTERM, batch=-1, before_training=True)], tmp_path)
    assert model.batches == []
    assert "before the first step" in capfd.readouterr().err


@pytest.fixture
def python_handles_interrupts() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, which processes that share the tests may have changed."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_after_training_signals_have_their_usual_effect(tmp_path, python_handles_interrupts):
    before = [signal.getsignal(number) for number in SIGNALS]
    fit(Line(), [StopOnSignal()], tmp_path, enable_checkpointing=False)
    assert [signal.getsignal(number) for number in SIGNALS] == before
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_it_replaces_nemos_callback_for_sigterm(tmp_path):
    trainer = Trainer(accelerator="cpu", logger=False, callbacks=[PreemptionCallback(None), StopOnSignal()])
    stop = next(callback for callback in trainer.callbacks if isinstance(callback, StopOnSignal))
    stop.setup(trainer, Line(), "fit")
    stop.teardown(trainer, Line(), "fit")
    assert not any(isinstance(callback, PreemptionCallback) for callback in trainer.callbacks)


def two_ranks(rank: int, folder: Path) -> None:
    callbacks = [SendSignal(signal.SIGTERM, batch=1, rank=1), ModelCheckpoint(folder, save_last=True), StopOnSignal()]
    model = Line()
    with pytest.raises(SystemExit) as end:
        fit(model, callbacks, folder, devices=2, strategy="ddp", use_distributed_sampler=False)
    assert end.value.code == 75
    (folder / f"batches{rank}").write_text(repr(model.batches))


def test_ranks_stop_after_the_same_step_whichever_received_the_signal(tmp_path):
    run_on_two_ranks(two_ranks, tmp_path, tmp_path)
    # The signal of batch 1 goes to the other rank with that batch, and both read it at the end of batch 2.
    assert [(tmp_path / f"batches{rank}").read_text() for rank in (0, 1)] == ["[0, 1, 2]"] * 2
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 3
