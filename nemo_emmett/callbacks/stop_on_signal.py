"""SIGTERM and SIGINT end a training with a checkpoint, so that a preempted job loses no step."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import deque
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from nemo.core.classes.common import Serialization
from nemo.utils import logging
from nemo.utils.callbacks.preemption import PreemptionCallback

from nemo_emmett.errors import EXIT_TRY_AGAIN
from nemo_emmett.files import end_failed_transaction
from nemo_emmett.modules.loss import world_size

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopOnSignal(Callback, Serialization):
    """Ends training on SIGTERM or SIGINT with a checkpoint after the current step, one sentence and exit code 75.

    The checkpoint replaces the run's ``-last`` checkpoint, so the same command continues the run. With one process a
    signal during validation is handled after the validation batch; the resumed run repeats that validation. With
    several ranks it is handled at the end of the next training step but one, when the ranks have agreed, whichever of
    them received it. With gradient accumulation training goes on to the end of the accumulated step. A second signal
    ends the process at once, as does a first one before training starts.

    SLURM and Kubernetes send SIGKILL 30 seconds after SIGTERM unless configured otherwise (``KillWait``,
    ``terminationGracePeriodSeconds``): a step, a validation batch and the checkpoint must fit in.

    ``train`` and ``examples/speechlm/train.py`` add this callback; it replaces NeMo's ``PreemptionCallback``, which
    handles SIGTERM only, needs CUDA and exits with code 0.

    Example:
        In a recipe::

            trainer:
              callbacks:
                - _target_: nemo_emmett.callbacks.StopOnSignal
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._stops = False  # on all ranks
        self._active = False  # between setup and the end of training
        self._training = False
        self._previous: dict[int, Any] = {}  # handlers to restore
        self._pid = os.getpid()
        self._votes: deque[_Vote] = deque()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Install the signal handlers."""
        if stage != "fit":
            return
        kept = [callback for callback in trainer.callbacks if not isinstance(callback, PreemptionCallback)]
        if len(kept) < len(trainer.callbacks):
            trainer.callbacks[:] = kept
            logging.info("NeMo's PreemptionCallback is replaced by StopOnSignal.")
        self._pid, self._active = os.getpid(), True
        self._previous = {number: signal.getsignal(number) for number in SIGNALS}
        self._install()

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install them again: Lightning has installed a handler that ends training without a checkpoint."""
        self._install()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on a signal ends training after the step. Warn if it would end without a checkpoint."""
        self._install()
        _warn_of_no_effect(trainer)
        self._training = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the reduction over the ranks, which runs while they compute."""
        if world_size() > 1:
            self._votes.append(_Vote(self._received is not None, pl_module.device))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop if a signal was received and no gradients wait for further batches."""
        if world_size() == 1:
            self._stops = self._received is not None
        elif len(self._votes) > 1:  # the newest may not be complete; reading it would stall the device
            self._stops = self._votes.popleft().result() or self._stops
        if self._stops and not trainer.fit_loop.epoch_loop._should_accumulate():
            self._stop(trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop if a signal was received; ranks that differ in their number of batches could not agree here."""
        if self._training and world_size() == 1 and self._received is not None:
            self._stop(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the previous signal handlers."""
        self._uninstall()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the previous signal handlers; if a checkpoint could not be written, let loggers still write."""
        self._uninstall()
        end_failed_transaction()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the previous signal handlers."""
        self._uninstall()

    def _install(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._on_signal)

    def _uninstall(self) -> None:
        """Called twice in a run: in between Lightning restores the handlers that it found, which are ours."""
        self._active = self._training = False
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._previous.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self._active and callable(previous := self._previous.get(number)):
            previous(number, frame)
            return
        is_copy = os.getpid() != self._pid  # a forked process, which has inherited the handler
        if is_copy or not self._active or self._received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        name = signal.Signals(number).name
        self._received = number
        if not self._training:
            _print(f"{name} received before the first step: nothing is lost. Run the same command to start again.")
            raise SystemExit(EXIT_TRY_AGAIN)
        _print(f"{name} received: training stops after this step, with a checkpoint. A second signal ends it at once.")

    def _stop(self, trainer: Trainer) -> None:
        signals = signal.Signals(self._received).name if self._received is not None else "A signal to another rank"
        outcome = self._save(trainer)
        if trainer.is_global_zero:
            _print(
                f"{signals}: training stopped after step {trainer.global_step:,}. {outcome} Exit code {EXIT_TRY_AGAIN}."
            )
        raise SystemExit(EXIT_TRY_AGAIN)

    def _save(self, trainer: Trainer) -> str:
        """Write the last checkpoint on all ranks; returns a sentence on where."""
        callbacks = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        try:
            for callback in callbacks:
                if callback.save_last:
                    callback._save_last_checkpoint(trainer, callback._monitor_candidates(trainer))
                    return f"Run the same command to continue from {callback.last_model_path}."
            if callbacks:
                path = Path(callbacks[0].dirpath) / f"step={trainer.global_step}-last.ckpt"
                trainer.save_checkpoint(path)
                return f"Continue from {path}."
        except OSError as error:
            return f"The checkpoint could not be written ({error}); the run continues from the one before."
        return "No checkpoint was written, because the trainer has no ModelCheckpoint."


def _warn_of_no_effect(trainer: Trainer) -> None:
    if threading.current_thread() is not threading.main_thread():
        logging.warning(
            "StopOnSignal has no effect in this training: Python handles signals in the main thread, and this is "
            "another one; start the training in the main thread, or remove the callback."
        )
    elif not any(isinstance(callback, ModelCheckpoint) for callback in trainer.checkpoint_callbacks):
        logging.warning(
            "StopOnSignal: the trainer has no ModelCheckpoint, so a signal ends this training without a checkpoint; "
            "set ++exp_manager.create_checkpoint_callback=true, or give the trainer a ModelCheckpoint."
        )


class _Vote:
    """A reduction of whether any rank has received a signal, started in one step and read in a later one."""

    def __init__(self, received: bool, device: torch.device) -> None:
        self._flag = torch.full((), int(received), dtype=torch.int32, device=device)
        self._work = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, async_op=True)
        self._copied: torch.cuda.Event | None = None
        if self._flag.is_cuda:  # copied on a stream of its own, so that reading it does not wait for the step's kernels
            with torch.cuda.stream(torch.cuda.Stream(device)):
                self._work.wait()
                flag = torch.empty((), dtype=torch.int32, pin_memory=True)
                self._on_device, self._flag = self._flag, flag.copy_(self._flag, non_blocking=True)
                self._copied = torch.cuda.current_stream(device).record_event()

    def result(self) -> bool:
        if self._copied is None:
            self._work.wait()
        else:
            self._copied.synchronize()
        return bool(self._flag.item())


def _print(sentence: str) -> None:
    sys.stderr.write(f"{sentence}\n")
    sys.stderr.flush()
