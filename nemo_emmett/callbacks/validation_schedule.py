"""A training that would never validate: a warning before it starts, and a validation at the end of its epochs."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from nemo.utils import logging

from nemo_emmett.errors import ConfigError


class ValidateAtEpochEnd(Callback):
    """Validates at the end of an epoch for which the trainer's schedule has brought no validation.

    Lightning validates every ``val_check_interval`` batches, or after ``limit_train_batches``; where the data of an
    epoch ends before, it never does, and says nothing. Epochs without a validation of their own by
    ``check_val_every_n_epoch`` stay without; the end of a training that was never validated has one. What the schedule
    brings stays as it is.
    """

    def __init__(self) -> None:
        self._came_in_epoch = self._came_by_schedule = False
        self._validates = False
        self._warned = False

    def state_dict(self) -> dict[str, Any]:
        """Whether the schedule has brought a validation in this epoch, and ever."""
        return {"in_epoch": self._came_in_epoch, "by_schedule": self._came_by_schedule}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with a checkpoint's."""
        self._came_in_epoch, self._came_by_schedule = state_dict["in_epoch"], state_dict["by_schedule"]

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note a validation; before it ends, for at its end a checkpoint may be made."""
        if not self._validates and not trainer.sanity_checking:
            self._came_in_epoch = self._came_by_schedule = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate, if it is due and has not come."""
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
            if not loop.skip:
                self._warn_once(trainer)
                loop.run()
        finally:
            self._validates, trainer.training = False, True

    def _warn_once(self, trainer: Trainer) -> None:
        if self._warned:
            return
        self._warned = True
        batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        logging.warning(
            f"No validation fell into epoch {trainer.current_epoch} of {batches} batches (trainer.val_check_interval: "
            f"{trainer.val_check_interval}, trainer.limit_train_batches: {trainer.limit_train_batches}, "
            f"trainer.check_val_every_n_epoch: {trainer.check_val_every_n_epoch}), so it is validated at its end. To "
            f"validate more often, set trainer.val_check_interval to {batches} or less."
        )


def check_validation(trainer: Trainer, monitor: str | None, has_validation: bool) -> None:
    """Refuse to wait for a score that cannot come, and say before training if no validation falls into it.

    Args:
        trainer: before ``fit``.
        monitor: the score by which the recipe says that checkpoints are compared; None if it does not say.
        has_validation: whether there is a validation set.

    Raises:
        ConfigError: if the monitored score will never exist.
    """
    can_validate = has_validation and trainer.limit_val_batches != 0
    if monitor is not None and monitor.startswith("val_") and not can_validate:
        missing = "trainer.limit_val_batches is 0" if has_validation else "the recipe has no data.validation_ds"
        raise ConfigError(
            f"exp_manager.checkpoint_callback_params.monitor: '{monitor}' will never be there, since {missing}; give a "
            "validation set, or leave checkpoint_callback_params.monitor out."
        )
    if not can_validate or trainer.fast_dev_run or trainer.ckpt_path:  # a resumed run may have few steps left
        return
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


def _first_validation(trainer: Trainer) -> float:
    """The step after which validation first comes if no epoch ends for want of data; 0 where that cannot be known."""
    interval, limit = trainer.val_check_interval, trainer.limit_train_batches
    epoch = limit if isinstance(limit, int) else None
    in_epoch = interval if isinstance(interval, int) else None if epoch is None else max(1, int(epoch * interval))
    every = trainer.check_val_every_n_epoch
    if in_epoch is None or (epoch is None and every not in (None, 1)):
        return 0
    batches = in_epoch if every in (None, 1) else (every - 1) * epoch + in_epoch
    return -(-batches // trainer.accumulate_grad_batches)
