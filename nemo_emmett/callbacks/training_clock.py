"""Seconds of training: the time axis on which trainings of different batches can be compared."""

from __future__ import annotations

import time
from typing import NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from nemo.core.classes.common import Serialization
from nemo.utils import logging


class Reading(NamedTuple):
    """Seconds on both clocks, from an arbitrary origin."""

    wall: float
    cpu: float  # of all threads of this process; not of the data loader's workers

    def __add__(self, other: Reading) -> Reading:  # type: ignore[override]
        return Reading(self.wall + other.wall, self.cpu + other.cpu)

    def __sub__(self, other: Reading) -> Reading:
        return Reading(self.wall - other.wall, self.cpu - other.cpu)


class TrainingClock(Callback, Serialization):
    """Logs, with each validation, for how long the model has been trained: ``train_seconds`` and ``train_cpu_seconds``.

    Validation itself is not counted, data loading is. With ``val_bleu`` this gives the seconds to a score, if steps
    cannot be compared because batches differ. The CPU's seconds hardly depend on the machine's other load. A resumed
    run goes on counting.

    Example:
        In a recipe::

            trainer:
              callbacks:
                - _target_: nemo_emmett.callbacks.TrainingClock
    """

    def __init__(self) -> None:
        self._trained = Reading(0.0, 0.0)
        self._resumed_at: Reading | None = None  # None while the clock is stopped

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock. Warn if no validation will log the time."""
        if not trainer.enable_validation or (trainer.val_dataloaders is not None and not sum(trainer.num_val_batches)):
            logging.warning(
                "TrainingClock logs nothing in this training: it logs with each validation, and nothing is validated; "
                "give a validation_ds and a trainer.limit_val_batches above 0, or remove the callback."
            )
        self._resumed_at = _now()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock; at the sanity check it has not started yet."""
        self._trained, self._resumed_at = self._so_far(), None

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log with the validation's scores."""
        if not trainer.sanity_checking:
            seconds = {"train_seconds": self._trained.wall, "train_cpu_seconds": self._trained.cpu}
            pl_module.log_dict(seconds, reduce_fx="max", sync_dist=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock again, unless training has not begun."""
        if not trainer.sanity_checking:
            self._resumed_at = _now()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._trained, self._resumed_at = self._so_far(), None

    def state_dict(self) -> dict[str, float]:
        """Seconds so far."""
        return self._so_far()._asdict()

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Go on from a checkpoint's seconds."""
        self._trained = Reading(**state_dict)

    def _so_far(self) -> Reading:
        return self._trained if self._resumed_at is None else self._trained + (_now() - self._resumed_at)


def _now() -> Reading:
    return Reading(time.perf_counter(), time.process_time())
