"""Random states in Lightning checkpoints: a resumed run draws what the uninterrupted run would have drawn."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from nemo.core.classes.common import Serialization
from nemo.utils import logging

from nemo_emmett.modules.loss import world_size
from nemo_emmett.modules.random_state import random_state, restore_random_state


class RandomState(Callback, Serialization):
    """Saves the states of the random generators of every rank, and restores them when training resumes.

    Lightning checkpoints hold weights, optimizers and counters but no random states, so dropout and SpecAugment of a
    resumed run differ from those of a run that was never interrupted. With this callback both draw the same. It covers
    the global generators of Python, NumPy and torch, and torch's on every CUDA device.

    Validation does not change the training's random states, so that it does not matter whether it ran before or after
    an interruption. Our data loader has generators of its own; what another loader draws in the main process while it
    fetches the first batch after resuming is not repeated.

    Example:
        In a recipe::

            trainer:
              callbacks:
                - _target_: nemo_emmett.callbacks.RandomState
    """

    def __init__(self) -> None:
        self._to_restore: list[dict[str, Any]] | None = None
        self._after_batch: dict[str, Any] | None = None
        self._validating = False

    def state_dict(self) -> dict[str, Any]:
        """The random states by rank. Lightning calls it on every rank whenever a checkpoint is made."""
        state = self._after_batch if self._validating else random_state()
        states: list[Any] = [state] * world_size()
        if world_size() > 1:
            torch.distributed.all_gather_object(states, state)
        return {"ranks": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states until training starts, since building loaders and models draws numbers."""
        self._to_restore = state_dict["ranks"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the states of the checkpoint, if training resumes from one."""
        self._after_batch = random_state()
        if self._to_restore is None:
            return
        ranks, self._to_restore = self._to_restore, None
        if trainer.world_size != len(ranks):
            logging.warning(
                f"The checkpoint holds the random states of {len(ranks)} ranks, this run has {trainer.world_size}: "
                "they are not restored, so dropout and augmentation differ from an uninterrupted run."
            )
            return
        restore_random_state(ranks[trainer.global_rank])
        self._after_batch = random_state()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the states, since a validation may follow."""
        self._after_batch = random_state()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on a checkpoint holds the states of training, not those of validation."""
        self._validating = self._after_batch is not None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the states that the last training batch left."""
        if self._after_batch is not None:
            restore_random_state(self._after_batch)
        self._validating = False
