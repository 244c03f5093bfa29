"""Validation at the end of epochs that the trainer's schedule leaves without, and a warning before training."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from nemo.utils import logging

from nemo_emmett.errors import ConfigError


class ValidateAtEpochEnd(Callback):
    """Validates at the end of an epoch in which the trainer's schedule had no validation.

    Lightning validates every ``val_check_interval`` batches, or after ``limit_train_batches``; if the data of an epoch
    ends before, it does not validate, and does not warn. Epochs that ``check_val_every_n_epoch`` leaves out are not
    validated; a training that was never validated is validated at its end. Scheduled validations are not changed.

    Args:
        warns: log the first epoch that it validates.
    """

    def __init__(self, warns: bool = True) -> None:
        self._came_in_epoch = self._came_by_schedule = False
        self._validates = False
        self._warned = not warns

    def state_dict(self) -> dict[str, Any]:
        """Whether the schedule had a validation in this epoch, and in any."""
        return {"in_epoch": self._came_in_epoch, "by_schedule": self._came_by_schedule}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        self._came_in_epoch, self._came_by_schedule = state_dict["in_epoch"], state_dict["by_schedule"]

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note a validation at its start, since a checkpoint may be written at its end."""
        if not self._validates and not trainer.sanity_checking:
            self._came_in_epoch = self._came_by_schedule = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate, if a validation is due and there was none."""
        came, self._came_in_epoch = self._came_in_epoch, False
        if came or trainer.should_stop:
            return
        out_of_steps = 0 <= trainer.max_steps <= trainer.global_step
        out_of_epochs = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= trainer.max_epochs
        every = trainer.check_val_every_n_epoch
        is_due = every is not None and (trainer.current_epoch + 1) % every == 0 and not out_of_steps
        if is_due or ((out_of_steps or out_of_epochs) and not self._came_by_schedule):
            self._validate(trainer)

    def _validate(self, trainer: Trainer) -> None:
        loop = trainer.fit_loop.epoch_loop.val_loop
        self._validates = trainer.validating = True
        try:
            loop.setup_data()
            if loop.skip:
                return
            if not self._warned:
                batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
                logging.warning(
                    f"No validation fell into epoch {trainer.current_epoch} of {batches} batches "
                    f"(trainer.val_check_interval: {trainer.val_check_interval}, trainer.limit_train_batches: "
                    f"{trainer.limit_train_batches}, trainer.check_val_every_n_epoch: "
                    f"{trainer.check_val_every_n_epoch}), so it is validated at its end. To validate more often, set "
                    f"trainer.val_check_interval to {batches} or less."
                )
                self._warned = True
            loop.run()
        finally:
            self._validates, trainer.training = False, True


def warn_of_no_validation(trainer: Trainer) -> bool:
    """Warn at the end of an epoch if its data has ended before ``trainer.val_check_interval``.

    Returns:
        Whether it has warned.
    """
    batches, interval = trainer.fit_loop.epoch_loop.batch_progress.current.ready, trainer.val_check_batch
    if not trainer.enable_validation or trainer.check_val_every_n_epoch is None or math.isinf(interval):
        return False  # not by batches of the epoch
    is_last = trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step
    if is_last or batches >= interval:
        return False
    logging.warning(
        f"No validation falls into an epoch: the data of epoch {trainer.current_epoch} ended after {batches} batches, "
        f"and trainer.val_check_interval asks for a validation after {interval:g}, so nothing is validated, and no "
        f"checkpoint is written that waits for a validation. Set trainer.val_check_interval to {batches} or less, or "
        "trainer.check_val_every_n_epoch to null to count batches over epochs."
    )
    return True


def check_validation(trainer: Trainer, monitor: str | None, has_validation: bool) -> bool:
    """Refuse a monitored score that cannot exist, and warn if no validation falls into the training.

    Args:
        trainer: before ``fit``.
        monitor: the score by which checkpoints are compared, if the recipe names it.
        has_validation: whether there is a validation set.

    Returns:
        Whether it has warned.

    Raises:
        ConfigError: if the monitored score will never exist.
    """
    can_validate = has_validation and trainer.limit_val_batches != 0
    if monitor is not None and monitor.startswith("val_") and not can_validate:
        missing = "trainer.limit_val_batches is 0" if has_validation else "the recipe has no data.validation_ds"
        raise ConfigError(
            f"exp_manager.checkpoint_callback_params.monitor: '{monitor}' will never exist, since {missing}; give a "
            "validation set, or leave checkpoint_callback_params.monitor out."
        )
    if not can_validate or trainer.fast_dev_run or trainer.ckpt_path:  # a resumed run may have few steps left
        return False
    first = _first_validation(trainer)
    epochs_end = trainer.max_epochs not in (None, -1) and trainer.max_epochs < (trainer.check_val_every_n_epoch or 1)
    if epochs_end or 0 <= trainer.max_steps < first:
        end = f"trainer.max_epochs ({trainer.max_epochs})" if epochs_end else f"trainer.max_steps ({trainer.max_steps})"
        when = f"epoch {trainer.check_val_every_n_epoch}" if epochs_end else f"step {first:g}"
        logging.warning(
            f"No validation falls within {end}: the first would come after {when} by trainer.val_check_interval "
            f"({trainer.val_check_interval}), trainer.limit_train_batches ({trainer.limit_train_batches}) and "
            f"trainer.check_val_every_n_epoch ({trainer.check_val_every_n_epoch}). It is validated at the end, once; "
            "lower them to validate more often."
        )
        return True
    return False


def _first_validation(trainer: Trainer) -> float:
    """The step of the first validation if no epoch ends for lack of data; 0 if that cannot be known."""
    interval, limit = trainer.val_check_interval, trainer.limit_train_batches
    epoch = limit if isinstance(limit, int) else None
    in_epoch = interval if isinstance(interval, int) else None if epoch is None else max(1, int(epoch * interval))
    every = trainer.check_val_every_n_epoch
    if in_epoch is None or (epoch is None and every not in (None, 1)):
        return 0
    batches = in_epoch if every in (None, 1) else (every - 1) * epoch + in_epoch
    return -(-batches // trainer.accumulate_grad_batches)
