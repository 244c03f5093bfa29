"""Wherever a checkpoint is written, the run that resumes from it does what the uninterrupted run did from there on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from nemo.utils.exp_manager import configure_no_restart_validation_training_loop

from nemo_emmett.callbacks.resumable_loop import ResumableEpochLoop, install_resumable_loop
from nemo_emmett.callbacks.validation_schedule import ValidateAtEpochEnd


class Batches:
    """Numbers, in passes of a given length or without an end; its state is how many were trained on."""

    def __init__(self, length: int | None) -> None:
        self.length, self.trained = length, 0

    def __iter__(self):
        number = self.trained
        end = None if self.length is None else self.length * (number // self.length + 1)
        while number != end:
            yield torch.tensor([float(number)])
            number += 1

    def state_dict(self) -> dict[str, int]:
        return {"trained": self.trained}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.trained = state["trained"]


class Model(LightningModule):
    """Keeps what happens to it: ``train 3`` is the fourth batch, ``validate 4`` comes after four steps."""

    def __init__(self, loader: Batches) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.loader, self.events = loader, []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.events.append(f"train {int(batch)} as {batch_idx} of epoch {self.current_epoch}")
        return (self.weight * batch).sum()

    def on_train_batch_end(self, outputs, batch, batch_idx) -> None:
        self.loader.trained = int(batch) + 1

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("score", batch.sum() + self.global_step)

    def on_validation_end(self) -> None:
        self.events.append(f"validate {self.global_step} in epoch {self.current_epoch}")

    def on_train_epoch_end(self) -> None:
        self.events.append(f"end of epoch {self.current_epoch}")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class SaveEverywhere(Callback):
    """Writes a checkpoint at each hook, as a callback behind all others, and notes what comes after it."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.saved: list[tuple[Path, int]] = []

    def setup(self, trainer, module, stage) -> None:
        install_resumable_loop(trainer)

    def save(self, hook: str, trainer: Trainer, model: Model, extra_events: int = 0) -> None:
        if self.folder is not None:
            path = self.folder / f"{len(self.saved)}-{hook}-step={trainer.global_step}.ckpt"
            trainer.save_checkpoint(path)
            self.saved.append((path, len(model.events) + extra_events))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        module.on_train_batch_end(outputs, batch, batch_idx)  # whose hook comes after those of callbacks
        self.save("train_batch_end", trainer, module)

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self.save("validation_batch_end", trainer, module)

    def on_validation_end(self, trainer, module) -> None:
        loop = trainer.fit_loop.epoch_loop
        if isinstance(loop, ResumableEpochLoop):
            loop.validation_finished()
        self.save("validation_end", trainer, module, extra_events=1)

    def on_train_epoch_end(self, trainer, module) -> None:
        self.save("train_epoch_end", trainer, module, extra_events=1)

    def on_train_end(self, trainer, module) -> None:
        self.save("train_end", trainer, module)


def fit(
    callback: Callback,
    length: int | None = None,
    resume: Path | None = None,
    extra: Sequence[Callback] = (),
    **options: Any,
) -> list[str]:
    loader = Batches(length)
    model = Model(loader)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "num_sanity_val_steps": 0}
    options = {"val_check_interval": 1.0, "check_val_every_n_epoch": 1} | options
    trainer = Trainer(accelerator="cpu", enable_model_summary=False, callbacks=[*extra, callback], **quiet, **options)
    validation = torch.utils.data.DataLoader(torch.zeros(2, 1), batch_size=None)
    trainer.fit(model, loader, validation, ckpt_path=resume)
    return model.events


RUNS = {
    "steps": {"max_steps": 7, "limit_train_batches": 3, "val_check_interval": 3},
    "steps-and-several-validations": {"max_steps": 9, "limit_train_batches": 4, "val_check_interval": 2},
    "epochs": {"max_epochs": 3, "limit_train_batches": 2, "val_check_interval": 2},
    "epochs-of-finite-data": {"max_epochs": 3, "length": 3},
    "validation-across-epochs": {
        "max_steps": 8,
        "limit_train_batches": 3,
        "val_check_interval": 2,
        "check_val_every_n_epoch": None,
    },
    "accumulation": {"max_steps": 4, "limit_train_batches": 4, "val_check_interval": 2, "accumulate_grad_batches": 2},
}


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_each_checkpoint_of_a_run_resumes_with_the_rest_of_it(options, tmp_path):
    saver = SaveEverywhere(tmp_path)
    whole = fit(saver, **options)
    assert len(saver.saved) > 10
    for path, done in saver.saved:
        assert fit(SaveEverywhere(), resume=path, **options) == whole[done:], path.name


def test_validations_at_the_end_of_short_epochs_are_not_repeated(tmp_path):
    options = {"max_steps": 9, "length": 3, "val_check_interval": 5, "limit_train_batches": 5}
    saver = SaveEverywhere(tmp_path)
    whole = fit(saver, extra=[ValidateAtEpochEnd()], **options)
    assert [event for event in whole if event.startswith("validate")] == [
        f"validate {step} in epoch {step // 3 - 1}" for step in (3, 6, 9)
    ]
    for path, done in saver.saved:
        if "validation_end" in path.name:  # what exp_manager writes
            rest = [event for event in whole[done:] if not event.startswith("end")]
            resumed = fit(SaveEverywhere(), extra=[ValidateAtEpochEnd()], resume=path, **options)
            assert [event for event in resumed if not event.startswith("end")] == rest, path.name


def test_a_longer_run_goes_on_where_max_steps_ended_the_shorter_one(tmp_path):
    long, short = RUNS["steps"], RUNS["steps"] | {"max_steps": 4}
    saver = SaveEverywhere(tmp_path)
    begun = fit(saver, **short)
    path, _ = saver.saved[-1]
    assert "train_end" in path.name
    rest = fit(SaveEverywhere(), resume=path, **long)
    early_end = "end of epoch 1"  # max_steps ended the epoch after its first batch
    assert begun[-1] == early_end
    assert begun[:-1] + rest == fit(SaveEverywhere(), **long)


@pytest.mark.parametrize("loop", ["lightning", "nemo"])
def test_a_checkpoint_of_another_loop_resumes_behind_its_last_batch(loop, tmp_path, monkeypatch):
    class Other(SaveEverywhere):
        def setup(self, trainer, module, stage) -> None:
            if loop == "nemo":
                validation = trainer.fit_loop.epoch_loop.val_loop
                configure_no_restart_validation_training_loop(trainer)
                trainer.fit_loop.epoch_loop.val_loop = validation

    saver = Other(tmp_path)
    whole = fit(saver, **RUNS["steps"])
    for path, done in saver.saved:
        if "validation_end" in path.name or "epoch_end" in path.name:
            assert fit(SaveEverywhere(), resume=path, **RUNS["steps"]) == whole[done:], path.name


def test_a_loop_of_ones_own_is_left_as_it_is_with_a_warning(monkeypatch):
    from nemo_emmett.callbacks import resumable_loop

    class Own(_TrainingEpochLoop):
        pass

    warnings = []
    monkeypatch.setattr(resumable_loop.logging, "warning", warnings.append)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit_loop.epoch_loop = own = Own(trainer)
    assert install_resumable_loop(trainer) is None
    assert trainer.fit_loop.epoch_loop is own
    assert "Own" in warnings[0]
