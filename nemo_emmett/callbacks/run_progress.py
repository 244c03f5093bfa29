"""The progress of a training as lines of text, for logs that are no terminal, and its clock."""

from __future__ import annotations

import math
import sys
import time
from datetime import timedelta

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from tqdm import tqdm

from nemo_emmett.modules.batch import MODALITIES
from nemo_emmett.modules.data_ranks import number_of_data_ranks


class RunProgress(Callback):
    """Prints a line after the first step, then every ``every_seconds``, and one with the scores of each validation.

    A line has the step, the losses by modality, the examples per second of all ranks, and the time that is left. Only
    rank zero prints.

    Args:
        steps: print the lines of steps; false where a progress bar shows the same.
        every_seconds: between two lines of steps, at least.

    Attributes:
        first_step: where this run began.
        training_seconds: of this run, data loading included and validation left out.
        validation_seconds: of this run.
    """

    def __init__(self, steps: bool = True, every_seconds: float = 30.0) -> None:
        self.steps = steps
        self.every_seconds = every_seconds
        self.first_step = 0
        self.training_seconds = self.validation_seconds = 0.0
        self._max_steps = -1
        self._resumed_at: float | None = None
        self._printed_at = -math.inf
        self._printed_step = 0
        self._printed_examples = self._printed_seconds = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep ``max_steps``: the epoch loop's is one more while an interrupted step is completed."""
        self._max_steps = trainer.max_steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.first_step = self._printed_step = trainer.global_step
        self._resumed_at = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The seconds of validation count apart."""
        self._pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the scores."""
        if trainer.sanity_checking or self._resumed_at is None:
            return
        now = time.perf_counter()
        self.validation_seconds += now - self._resumed_at
        self._resumed_at = now
        if trainer.is_global_zero and (scores := _scores(trainer)):
            _print(f"{self._step(trainer)}  validation: {scores}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Print a line, if one is due."""
        if not (self.steps and trainer.is_global_zero) or trainer.global_step == self._printed_step:
            return
        is_first, now = self._printed_at == -math.inf, time.perf_counter()
        is_last = trainer.global_step == self.planned_steps(trainer)
        if not (is_first or is_last) and now - self._printed_at < self.every_seconds:
            return
        self._pause()
        parts = [self._step(trainer), *filter(None, [_losses(trainer, pl_module)])]
        examples = _examples(pl_module)
        if not is_first:
            seconds = self.training_seconds - self._printed_seconds
            if examples > self._printed_examples:
                rate = (
                    (examples - self._printed_examples) * number_of_data_ranks(pl_module, trainer.world_size) / seconds
                )
                parts.append(f"{rate:,.1f} examples/s")
            if (left := self._seconds_left(trainer)) is not None:
                parts.append(f"{timedelta(seconds=round(left))} left")
        _print("  ".join(parts))
        self._printed_at, self._printed_step = now, trainer.global_step
        self._printed_seconds, self._printed_examples = self.training_seconds, examples

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self.stop()

    def stop(self) -> None:
        """Stop the clock, also where training ended by an exception."""
        self._pause()
        self._resumed_at = None

    def planned_steps(self, trainer: Trainer) -> int | None:
        """Steps of the optimizer at which training ends by ``max_steps`` or ``max_epochs``; None if neither is set."""
        limits = [self._max_steps] if self._max_steps >= 0 else []
        batches = trainer.num_training_batches
        if trainer.max_epochs not in (None, -1) and batches != math.inf:
            limits.append(trainer.max_epochs * math.ceil(batches / trainer.accumulate_grad_batches))
        return min(limits, default=None)

    def _step(self, trainer: Trainer) -> str:
        steps = self.planned_steps(trainer)
        if steps is None:
            return f"step {trainer.global_step:,}"
        return f"step {trainer.global_step:,}/{steps:,} ({trainer.global_step / max(steps, 1):.0%})"

    def _pause(self) -> None:
        """Add the time since the clock was last read to the seconds of training."""
        if self._resumed_at is not None:
            now = time.perf_counter()
            self.training_seconds += now - self._resumed_at
            self._resumed_at = now

    def _seconds_left(self, trainer: Trainer) -> float | None:
        """By the pace of this run, validation included; None if the training has no end."""
        limits = [callback.time_remaining() for callback in trainer.callbacks if isinstance(callback, Timer)]
        done = trainer.global_step - self.first_step
        if (steps := self.planned_steps(trainer)) is not None and done:
            pace = (self.training_seconds + self.validation_seconds) / done
            limits.append(max(0, steps - trainer.global_step) * pace)
        return min((limit for limit in limits if limit is not None), default=None)


def _losses(trainer: Trainer, model: LightningModule) -> str:
    metrics = trainer.callback_metrics
    objectives = [objective.name for objective in getattr(model, "objectives", ())]
    losses = {n: float(metrics[f"loss_{n}"]) for n in (*MODALITIES, *objectives) if f"loss_{n}" in metrics}
    if losses := {name: loss for name, loss in losses.items() if name in MODALITIES or not math.isnan(loss)}:
        # A divergence of zero may be rounded to below it.
        return "loss " + ", ".join(f"{name} {round(loss, 3) + 0.0:.3f}" for name, loss in losses.items())
    total = next((metrics[name] for name in ("loss", "train_loss") if name in metrics), None)
    return "" if total is None else f"loss {float(total):.3f}"


def _scores(trainer: Trainer) -> str:
    """The means over the validation sets, and what the checkpoints are chosen by."""
    monitor = getattr(trainer.checkpoint_callback, "monitor", None)
    names = dict.fromkeys([*([monitor] if monitor else []), "val_bleu", "val_loss", "val_acc"])
    metrics = trainer.callback_metrics
    return ", ".join(f"{name} {float(metrics[name]):.4g}" for name in names if name in metrics)


def _examples(model: LightningModule) -> float:
    """That this rank has trained on; 0 for a model that does not count them."""
    totals = model.trained_totals() if hasattr(model, "trained_totals") else None
    return 0.0 if totals is None else float(totals[:, 1].sum())


def _print(line: str) -> None:
    tqdm.write(line, file=sys.stdout)  # above a bar, if there is one
    sys.stdout.flush()
