"""How long a training has trained: the time axis on which trainings of unlike batches can be compared."""

from __future__ import annotations

import time
from typing import NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from nemo.core.classes.common import Serialization
from nemo.utils import logging


class Reading(NamedTuple):
    """Seconds since some moment, on both clocks."""

    wall: float
    cpu: float  # of all threads of this process; not of the data loader's workers

    def __add__(self, other: Reading) -> Reading:  # type: ignore[override]
        return Reading(self.wall + other.wall, self.cpu + other.cpu)

    def __sub__(self, other: Reading) -> Reading:
        return Reading(self.wall - other.wall, self.cpu - other.cpu)


class TrainingClock(Callback, Serialization):
    """Logs, with each validation, for how long the model has been trained: ``train_seconds`` and ``train_cpu_seconds``.

    Validation itself is left out, data loading is not. Beside ``val_bleu`` this tells the seconds to a score, where
    steps cannot be compared because batches differ. The CPU's seconds hardly depend on what else the machine does. A
    resumed run goes on counting.

    Example:
        In a recipe::

            trainer:
              callbacks:
                - _target_: nemo_emmett.callbacks.TrainingClock
    """

    def __init__(self) -> None:
        self._trained = Reading(0.0, 0.0)
        self._resumed_at: Reading | None = None  # None while the clock stands

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start; what came before was building and checking. Warn where no validation will log the time."""
        if not trainer.enable_validation or (trainer.val_dataloaders is not None and not sum(trainer.num_val_batches)):
            logging.warning(
                "TrainingClock logs nothing in this training: it logs with each validation, and nothing is validated; "
                "give a validation_ds and a trainer.limit_val_batches above 0, or remove the callback."
            )
        self._resumed_at = _now()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop; the check before training finds the clock standing."""
        self._trained, self._resumed_at = self._so_far(), None

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log beside the validation's scores."""
        if not trainer.sanity_checking:
            pl_module.log_dict(
                {"train_seconds": self._trained.wall, "train_cpu_seconds": self._trained.cpu},
                reduce_fx="max",
                sync_dist=True,
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on, unless training has not begun."""
        if not trainer.sanity_checking:
            self._resumed_at = _now()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop for good."""
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
