"""The infinite learning-rate schedule of continual pretraining: most of it needs no end of the training."""

from __future__ import annotations

import math
from typing import Any

from nemo.core.classes.common import Serialization
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from nemo_emmett.errors import ConfigError
from nemo_emmett.typed_config import Count, NonNegative, Positive, PositiveWhole, parse_value

WHERE = "model.lr_scheduler"
"""Place of the section in a recipe, for messages."""

_STATE = ("base_lrs", "reference_lr", "last_epoch", "_step_count", "_last_lr")


class InfiniteLR(LRScheduler, Serialization):
    """Warm-up, cool-down, a constant learning rate for as long as the training lasts, and annealing at its end.

    A cosine schedule ends with a learning rate of nearly zero, so data that comes later needs another warm-up, which
    makes a model forget. Here a checkpoint of the constant phase can be trained on at the same learning rate, with more
    or other data, and annealed when a model is needed (arXiv 2403.08763, "Infinite learning rate schedules"; arXiv
    2503.02844). With L the optimizer's learning rate, at step t, from 0:

    - linear warm-up for W = ``warmup_steps`` steps: L t / W;
    - cosine cool-down for C = ``cooldown_steps`` steps: constant + (L - constant) (1 + cos(pi (t - W) / C)) / 2;
    - ``constant_lr``;
    - if ``annealing_steps`` is given, for the last A = ``annealing_steps`` of ``max_steps`` steps, exponentially:
      constant (min / constant) ** ((t - (max_steps - A)) / A), which is ``min_lr`` at ``max_steps``.

    Where parameter groups have learning rates of their own, each has the same share of its own at every step.

    A checkpoint holds the position, and not the arguments: those of the recipe count, so that the constant phase of one
    training can be followed by the annealing of another.

    Args:
        optimizer: whose learning rate is set, in each step.
        warmup_steps: steps of the warm-up; 0: none.
        cooldown_steps: steps of the cool-down; 0: none.
        constant_lr: learning rate of the constant phase; at most the optimizer's.
        annealing_steps: steps of the annealing, the last ones; None: the learning rate stays constant to the end.
        max_steps: steps of the training; needed for the annealing, and without effect otherwise.
        min_lr: learning rate at the end of the annealing, above 0 and at most ``constant_lr``.
        last_epoch: step to start at, as PyTorch's schedules have it.

    Raises:
        ConfigError: for a value of the wrong type or range, and for phases that are longer than ``max_steps``.

    Example:
        In a recipe::

            model:
              optimizer: {_target_: torch.optim.AdamW, lr: 3.0e-4}
              lr_scheduler:
                _target_: nemo_emmett.schedulers.InfiniteLR
                warmup_steps: 1000
                cooldown_steps: 5000
                constant_lr: 1.5e-4
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        warmup_steps: Count,
        cooldown_steps: Count,
        constant_lr: Positive,
        annealing_steps: PositiveWhole | None = None,
        max_steps: PositiveWhole | None = None,
        min_lr: NonNegative = 0.0,
        last_epoch: int = -1,
    ) -> None:
        self.warmup_steps = parse_value(Count, warmup_steps, f"{WHERE}.warmup_steps")
        self.cooldown_steps = parse_value(Count, cooldown_steps, f"{WHERE}.cooldown_steps")
        self.constant_lr = parse_value(Positive, constant_lr, f"{WHERE}.constant_lr")
        self.annealing_steps = parse_value(PositiveWhole | None, annealing_steps, f"{WHERE}.annealing_steps")
        self.max_steps = parse_value(PositiveWhole | None, max_steps, f"{WHERE}.max_steps")
        self.min_lr = parse_value(NonNegative, min_lr, f"{WHERE}.min_lr")
        self.reference_lr = float(optimizer.defaults["lr"])
        self._check()
        super().__init__(optimizer, last_epoch)

    def _check(self) -> None:
        if self.constant_lr > self.reference_lr:
            raise ConfigError(
                f"{WHERE}.constant_lr: {self.constant_lr} is above the optimizer's learning rate, {self.reference_lr}; "
                "give at most this one."
            )
        if self.annealing_steps is None:
            return
        if self.max_steps is None:
            raise ConfigError(
                f"{WHERE}.max_steps is missing: annealing_steps, {self.annealing_steps}, are the last ones of it; give "
                "max_steps: ${trainer.max_steps}."
            )
        if not 0 < self.min_lr <= self.constant_lr:
            raise ConfigError(
                f"{WHERE}.min_lr: {self.min_lr} is no end of an exponential annealing; give a value above 0 and at "
                f"most constant_lr, {self.constant_lr}."
            )
        phases = self.warmup_steps + self.cooldown_steps + self.annealing_steps
        if phases > self.max_steps:
            raise ConfigError(
                f"{WHERE}.annealing_steps: {self.annealing_steps}, with {self.warmup_steps} steps of warm-up and "
                f"{self.cooldown_steps} of cool-down, are more than max_steps, {self.max_steps}; give at most "
                f"{max(self.max_steps - self.warmup_steps - self.cooldown_steps, 0)}."
            )

    def get_lr(self) -> list[float]:
        """The learning rate of each parameter group at this step."""
        share = self._lr_at(self.last_epoch) / self.reference_lr
        return [base_lr * share for base_lr in self.base_lrs]

    def _lr_at(self, step: int) -> float:
        """The learning rate of a parameter group that has the optimizer's."""
        if step < self.warmup_steps:
            return self.reference_lr * step / self.warmup_steps
        if step < self.warmup_steps + self.cooldown_steps:
            left = (1 + math.cos(math.pi * (step - self.warmup_steps) / self.cooldown_steps)) / 2
            return self.constant_lr + (self.reference_lr - self.constant_lr) * left
        if self.annealing_steps is None:
            return self.constant_lr
        passed = (step - (self.max_steps - self.annealing_steps)) / self.annealing_steps
        passed = min(max(passed, 0.0), 1.0)
        return self.constant_lr * (self.min_lr / self.constant_lr) ** passed

    def state_dict(self) -> dict[str, Any]:
        """The position; the arguments are those of the recipe."""
        return {key: getattr(self, key) for key in _STATE}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at the position of a checkpoint."""
        super().load_state_dict({key: state_dict[key] for key in _STATE if key in state_dict})
