"""A Lightning epoch loop that resumes exactly: no batch is trained twice or skipped, and no validation repeated.

A checkpoint can be written in the middle of a step: after the optimizer has stepped and before validation, during
validation, or after it. Lightning 2.4 does not store which of these it was. After resuming, its own loop repeats a
validation that is done, and the loop that NeMo's ``exp_manager`` installs (``SkipResumeTrainingValidationLoop``) trains
on one batch more than the epoch has. The loop here stores where in the step it was, and completes exactly the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loops.progress import _BaseProgress, _Progress
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from nemo.utils import logging
from nemo.utils.exp_manager import SkipResumeTrainingValidationLoop

_KEY = "nemo_emmett_resume"
"""Key of our part of the loop's state. Lightning's loop ignores it, so it can resume from our checkpoints."""


@dataclass
class StepState:
    """Where in a step a checkpoint was written.

    Args:
        pending: the batch is trained on, but what follows it (validation, logging) is not finished.
        validated: the validation that follows the batch is finished.
        epoch_ended: if the epoch is over, it is not because ``max_steps`` or a callback ended it early.
    """

    pending: bool = False
    validated: bool = False
    epoch_ended: bool = False


class ResumableEpochLoop(_TrainingEpochLoop):
    """Lightning's training loop of one epoch, with the position inside the step in its state.

    It overrides private methods of Lightning 2.4, the newest version that NeMo 3.0 admits.
    """

    def __init__(self, trainer: Trainer, min_steps: int | None = None, max_steps: int = -1) -> None:
        self._pending = False
        self._validated = False
        self._completes_step = False  # the interrupted step is completed first
        super().__init__(trainer, min_steps, max_steps)

    @property
    def max_steps(self) -> int:
        """The trainer's; one more until the last step is completed, so that training does not end before."""
        return self._max_steps + (self._completes_step and self._max_steps != -1)

    @max_steps.setter
    def max_steps(self, max_steps: int) -> None:
        self._max_steps = max_steps

    def validation_finished(self) -> None:
        """Note for checkpoints that the validation after the current batch is finished."""
        self._validated = True

    @property
    def _is_validation_done(self) -> bool:
        return not self._completes_step

    def advance(self, data_fetcher: Any) -> None:
        """Train on a batch, unless the interrupted step is still to be completed."""
        self.val_loop.restarting = False  # a validation that was interrupted starts over
        if self._completes_step:
            return
        self._restarting = False  # else Lightning may validate instead of training
        self._validated = False
        super().advance(data_fetcher)

    def on_advance_end(self, data_fetcher: Any) -> None:
        """Validate if it is due, log; then the step is complete."""
        self._pending = True
        super().on_advance_end(data_fetcher)
        self._pending = self._completes_step = False

    def _should_check_val_fx(self, data_fetcher: Any) -> bool:
        return not self._validated and super()._should_check_val_fx(data_fetcher)

    def on_save_checkpoint(self) -> dict[str, Any]:
        """Lightning's state, the position inside the step, and the metrics that callbacks monitor."""
        current = self.batch_progress.current
        in_step = current.ready == current.processed and (self._pending or current.processed > current.completed)
        cut_short = self.trainer.should_stop or 0 <= self._max_steps <= self.global_step
        epoch_ended = self._num_ready_batches_reached() or not cut_short
        step = StepState(in_step, in_step and self._validated, epoch_ended)
        metrics = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        return super().on_save_checkpoint() | {_KEY: vars(step) | {"callback_metrics": metrics}}

    def load_state_dict(self, state_dict: dict[str, Any], prefix: str = "") -> None:
        """Restore Lightning's counters, then set them to the position of the interrupted run."""
        super().load_state_dict(state_dict, prefix)
        state = dict(state_dict.get(f"{prefix}state_dict", {}).get(_KEY, {}))
        metrics = state.pop("callback_metrics", {})
        # Callbacks that monitor a score need the last one, which the interrupted run computed.
        self.trainer._logger_connector._callback_metrics.update({k: torch.tensor(v) for k, v in metrics.items()})
        self._resume_at(StepState(**state) if state else self._guess())

    def _guess(self) -> StepState:
        """For a checkpoint of another loop: most are written after the validation or at the end of a batch."""
        current = self.batch_progress.current
        epoch = self.trainer.fit_loop.epoch_progress.current
        in_epoch = epoch.ready > epoch.processed
        ended = self.batch_progress.is_last_batch or current.ready == self.trainer.limit_train_batches
        return StepState(in_epoch and current.processed > 0, current.completed == current.processed, ended)

    def _resume_at(self, step: StepState) -> None:
        """Set Lightning's counters of batches and epochs to one of two states: inside an epoch, or before its start."""
        batches, epochs = self.batch_progress, self.trainer.fit_loop.epoch_progress
        _settle(batches, batches.current.processed, batches.total.processed)
        done = epochs.current.processed
        in_epoch = epochs.current.ready > done
        if not in_epoch and not step.epoch_ended and done:
            done -= 1  # max_steps ended the epoch early: it goes on
        elif not in_epoch:  # as Lightning does at the start of an epoch
            batches.reset_on_run()
            self.scheduler_progress.reset_on_run()
            self.automatic_optimization.optim_progress.reset_on_run()
            self.val_loop.batch_progress.total.reset()
            # The loaders that are about to be restored continue with their next epoch, not with the rest of the last
            # one: only the loops can decide that an epoch is over after `limit_train_batches`. A loader reads it from
            # the key `epoch_ended` of its state; states without that key are not changed.
            self.trainer.fit_loop._combined_loader_states_to_load = [
                state | {"epoch_ended": True} if "epoch_ended" in state else state
                for state in self.trainer.fit_loop._combined_loader_states_to_load
            ]
        _settle(epochs, done, epochs.total.processed - (epochs.current.processed - done))
        # Without an epoch that is begun and unfinished, Lightning would not restore the position in the data.
        epochs.current.ready += 1
        epochs.current.started += 1
        self._completes_step = in_epoch and step.pending
        self._validated = step.validated


def _settle(progress: _Progress, current: int, total: int) -> None:
    """Set all of a progress's counters: so many events are over, and none is running."""
    for tracker, count in ((progress.current, current), (progress.total, total)):
        _BaseProgress.load_state_dict(tracker, dict.fromkeys(vars(tracker), count))


def install_resumable_loop(trainer: Trainer) -> ResumableEpochLoop | None:
    """Replace Lightning's epoch loop, or that of NeMo's ``exp_manager``, by a :class:`ResumableEpochLoop`.

    Returns:
        The loop; None if the trainer has one of another class, which is kept, with a warning.
    """
    loop = trainer.fit_loop.epoch_loop
    if isinstance(loop, ResumableEpochLoop):
        return loop
    if type(loop) not in (_TrainingEpochLoop, SkipResumeTrainingValidationLoop):
        logging.warning(
            f"The trainer has an epoch loop of its own ({type(loop).__name__}): a resumed run may train on one batch "
            "more or validate once more than an uninterrupted one."
        )
        return None
    trainer.fit_loop.setup_data = partial(_set_up_data, trainer, trainer.fit_loop.setup_data)
    trainer.fit_loop.epoch_loop = resumable = ResumableEpochLoop(trainer, loop.min_steps, loop.max_steps)
    resumable.val_loop = loop.val_loop  # which has its data already
    return resumable


def _set_up_data(trainer: Trainer, set_up: Callable[[], None]) -> None:
    """Let ``val_check_interval`` be longer than the data, as Lightning does for loaders without a length.

    NeMo's recipes set it to ``limit_train_batches``, which may be more than the data has.
    """
    every, interval, limit = trainer.check_val_every_n_epoch, trainer.val_check_interval, trainer.limit_train_batches
    if isinstance(interval, int) and not (isinstance(limit, int) and interval > limit):
        trainer.check_val_every_n_epoch = None  # what Lightning checks, and nothing else while the data is set up
    try:
        set_up()
    finally:
        trainer.check_val_every_n_epoch = every
