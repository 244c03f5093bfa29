"""A training that would never validate validates at the end of its epochs; any other validates when it did before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from nemo_emmett.callbacks.resumable_data import ResumableData
from nemo_emmett.callbacks.validation_schedule import ValidateAtEpochEnd, check_validation
from nemo_emmett.errors import ConfigError

ROWS = torch.ones(2, 3)


class Unsized:
    """So many batches in each epoch, without a length."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __iter__(self):
        return iter([ROWS] * self.number)


class Model(LightningModule):
    def __init__(self, validates: bool = True) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)
        self.validated_at: list[int] = []
        self.validates = validates

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(batch).mean()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.validated_at.append(self.trainer.global_step)
        self.log("val_score", float(self.trainer.global_step))

    def val_dataloader(self) -> list:
        return torch.utils.data.DataLoader([ROWS], batch_size=None) if self.validates else []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer_of(*callbacks: Callback, **options) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    quiet["enable_checkpointing"] = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    return Trainer(accelerator="cpu", callbacks=list(callbacks), **quiet, **options)


def validated_at(batches: int, *callbacks: Callback, resume: Path | None = None, **options) -> list[int]:
    model = Model()
    trainer_of(*callbacks, **options).fit(model, Unsized(batches), ckpt_path=resume)
    return model.validated_at


@pytest.mark.parametrize(
    ("batches", "options", "expected"),
    [
        # No epoch is as long as what the schedule waits for.
        (5, {"max_epochs": 2, "limit_train_batches": 100}, [5, 10]),
        (5, {"max_epochs": 2, "val_check_interval": 7}, [5, 10]),
        (5, {"max_epochs": 2, "limit_train_batches": 9, "val_check_interval": 7}, [5, 10]),
        (5, {"max_epochs": 4, "limit_train_batches": 100, "check_val_every_n_epoch": 2}, [10, 20]),
        (5, {"max_steps": 10, "max_epochs": -1, "limit_train_batches": 100}, [5, 10]),
        (5, {"max_steps": 8, "max_epochs": -1, "limit_train_batches": 100}, [5, 8]),
        (6, {"max_epochs": 1, "limit_train_batches": 100, "accumulate_grad_batches": 3}, [2]),
        # The training ends before the first validation.
        (90, {"max_steps": 4, "max_epochs": -1, "val_check_interval": 7}, [4]),
        (90, {"max_steps": 4, "max_epochs": -1, "limit_train_batches": 50, "val_check_interval": 50}, [4]),
        (5, {"max_epochs": 2, "check_val_every_n_epoch": 3}, [10]),
        (5, {"max_epochs": 2, "val_check_interval": 30, "check_val_every_n_epoch": None}, [10]),
    ],
)
def test_where_no_validation_would_come(batches: int, options: dict, expected: list[int], caplog) -> None:
    assert validated_at(batches, **options) == []  # or the fault is Lightning's no more
    assert validated_at(batches, ValidateAtEpochEnd(), **options) == expected
    (said,) = [record.message for record in caplog.records if "No validation fell into epoch" in record.message]
    assert "trainer.val_check_interval" in said


@pytest.mark.parametrize(
    ("batches", "options"),
    [
        (5, {"max_epochs": 2}),
        (5, {"max_epochs": 2, "limit_train_batches": 3}),
        (5, {"max_epochs": 2, "val_check_interval": 2}),
        (5, {"max_epochs": 3, "check_val_every_n_epoch": 2}),
        (90, {"max_steps": 7, "max_epochs": -1, "limit_train_batches": 3, "val_check_interval": 3}),
        (5, {"max_epochs": 4, "val_check_interval": 7, "check_val_every_n_epoch": None}),
        (5, {"max_epochs": 2, "limit_val_batches": 0}),
    ],
)
def test_what_the_schedule_brings_stays_as_it_is(batches: int, options: dict, caplog) -> None:
    assert validated_at(batches, ValidateAtEpochEnd(), **options) == validated_at(batches, **options)
    assert "No validation fell" not in caplog.text


LONG = {"max_epochs": 3, "limit_train_batches": 9, "val_check_interval": 7}


@pytest.mark.parametrize(
    ("batches", "options", "callbacks", "count"),
    [
        (5, LONG, [], 1),  # of three epochs, the last of which says nothing new
        (5, LONG, [ValidateAtEpochEnd()], 0),
        (8, LONG, [], 0),
        (5, {"max_steps": 3, "val_check_interval": 7}, [], 0),  # the training ended, not the data
        (5, LONG | {"check_val_every_n_epoch": None}, [], 0),
        (5, {"max_epochs": 2}, [], 0),
        (5, LONG | {"limit_val_batches": 0}, [], 0),
    ],
)
def test_resumable_data_warns_where_the_data_ends_before_its_validation(
    batches: int, options: dict, callbacks: list, count: int, caplog
) -> None:
    validated_at(batches, ResumableData(), *callbacks, **options)
    said = [record.message for record in caplog.records if "No validation falls into an epoch" in record.message]
    assert len(said) == count
    assert all("ended after 5 batches, and trainer.val_check_interval asks for a validation after 7" in s for s in said)


def test_without_validation_sets_nothing_is_said(caplog) -> None:
    model = Model(validates=False)
    trainer_of(ValidateAtEpochEnd(), max_epochs=1).fit(model, Unsized(2))
    assert "No validation fell" not in caplog.text


@pytest.mark.parametrize(
    ("end", "interval"),
    [({"max_epochs": 2}, 1.0), ({"max_epochs": 2}, 7), ({"max_epochs": -1, "max_steps": 10}, 1.0)],
)
def test_the_best_checkpoint_has_the_score_and_a_resumed_run_goes_on(tmp_path: Path, end: dict, interval) -> None:
    saving = {"monitor": "val_score", "mode": "max", "filename": "{val_score:.1f}", "save_last": True}
    options = {"limit_train_batches": 100, "val_check_interval": interval, **end}
    checkpoint = ModelCheckpoint(tmp_path, **saving)
    assert validated_at(5, ValidateAtEpochEnd(), checkpoint, **options) == [5, 10]
    assert Path(checkpoint.best_model_path).name == "val_score=10.0.ckpt"
    options |= {key: 2 * value for key, value in end.items() if value > 0}
    again = ModelCheckpoint(tmp_path, **saving)
    assert validated_at(5, ValidateAtEpochEnd(), again, resume=tmp_path / "last.ckpt", **options) == [15, 20]


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ({"max_steps": 4, "val_check_interval": 7}, "step 7"),
        ({"max_steps": 4, "limit_train_batches": 5}, "step 5"),
        ({"max_steps": 4, "limit_train_batches": 10, "val_check_interval": 0.5}, "step 5"),
        ({"max_steps": 4, "limit_train_batches": 3, "check_val_every_n_epoch": 2}, "step 6"),
        ({"max_steps": 4, "limit_train_batches": 10, "accumulate_grad_batches": 2}, "step 5"),
        ({"max_epochs": 2, "check_val_every_n_epoch": 3}, "epoch 3"),
        ({"max_steps": 5, "limit_train_batches": 5}, None),
        ({"max_steps": 5, "limit_train_batches": 10, "accumulate_grad_batches": 2}, None),
        ({"max_steps": 4}, None),
        ({"max_epochs": 2, "limit_train_batches": 5}, None),
    ],
)
def test_said_before_training_where_it_can_be_computed(options: dict, first: str | None, caplog) -> None:
    check_validation(trainer_of(**{"max_epochs": -1, **options}), "val_score", has_validation=True)
    assert ("No validation falls within" in caplog.text) == (first is not None)
    assert first is None or f"the first would come after {first} by" in caplog.text
    check_validation(trainer_of(**{"max_epochs": -1, **options}), None, has_validation=False)


def test_a_score_that_cannot_come_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"monitor: 'val_bleu' will never exist, since the recipe has no data"):
        check_validation(trainer_of(max_steps=4), "val_bleu", has_validation=False)
    with pytest.raises(ConfigError, match=r"since trainer.limit_val_batches is 0"):
        check_validation(trainer_of(max_steps=4, limit_val_batches=0), "val_loss", has_validation=True)
    check_validation(trainer_of(max_steps=4), "loss", has_validation=False)
