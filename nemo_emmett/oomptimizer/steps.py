"""The training's own step on synthetic batches, measured; all state is restored afterwards.

A step is what Lightning's automatic optimization does with a batch in the middle of a training: the forward pass runs
while the gradients of the step before are still held, they are dropped (unless gradients are accumulated), the backward
pass makes new ones, the optimizer steps. The model, its wrapper, precision and hooks are those of the training.
"""

from __future__ import annotations

import inspect
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import chain
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities.memory import garbage_collection_cuda
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from nemo_emmett.errors import ConfigError, ModelError
from nemo_emmett.modules.loss import world_size
from nemo_emmett.modules.tensors import local_part
from nemo_emmett.oomptimizer.memory import is_out_of_memory
from nemo_emmett.oomptimizer.meter import Meter, Reading
from nemo_emmett.oomptimizer.snapshot import without_side_effects

PROBE_BATCH_IDX = 1000081
"""Batch index of a probe. Models log, print and compute metrics in every n-th batch, counted from 0 (``batch_idx % n``)
or from 1 (``(batch_idx + 1) % n``, as NeMo's do). This number is prime and the next one is twice a prime, so that
neither is a multiple of any n from 3 to half a million. The logger's interval, which may be 1 and which NeMo's
transducers compare with the global step, is changed while probes run
(:func:`~nemo_emmett.oomptimizer.snapshot.without_side_effects`).
"""


class TrainingSteps:
    """Measures steps of a training that is about to begin, and restores its state afterwards.

    With several ranks every rank makes the same calls, and all get the same readings: the maximum over the ranks. Under
    DDP gradients are not averaged meanwhile: that takes no memory beyond the buckets, which exist already, and no rank
    waits for another that runs out of memory in its backward pass.

    Args:
        trainer: in ``on_fit_start`` or later, so that the model is on its device and has its optimizer.
        module: that it trains.
        meter: of the module's device.

    Raises:
        ConfigError: if the module or its optimizer takes steps of another kind, or if a model that is sharded by FSDP2
            runs out of memory.

    Example:
        >>> with TrainingSteps(trainer, module, meter) as steps:
        ...     floor = steps.warm_up(adapter.synthetic_batch(shape, 1, device))
        ...     reading = steps.run(adapter.synthetic_batch(shape, 8, device))
    """

    def __init__(self, trainer: Trainer, module: LightningModule, meter: Meter) -> None:
        _check_kind_of_steps(trainer, module)
        self._trainer, self._module, self._meter = trainer, module, meter
        self._parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._restoring: AbstractContextManager = without_side_effects(trainer, module)
        self._device = trainer.strategy.root_device
        self._conflict = getattr(module, "gradient_conflict", None)  # keeps gradients besides those of parameters
        self._floor: Reading | None = None
        self._optimizer_seconds = 0.0

    def __enter__(self) -> TrainingSteps:
        self._restoring.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback_: TracebackType | None
    ) -> None:
        self._restoring.__exit__(kind, error, traceback_)
        garbage_collection_cuda()

    @property
    def floor(self) -> Reading:
        """The reading of :meth:`warm_up`: no step takes less."""
        assert self._floor is not None, "warm_up comes first"
        return self._floor

    def warm_up(self, batch: Any) -> Reading:
        """Take two whole steps, optimizer included: the first allocates the optimizer's state, the second is measured.

        The optimizer steps with gradients of zero, so that none overflows the loss scale, and with one for every
        trained parameter, also if the batch lacks a modality.

        Args:
            batch: a small one; the peak is then that of the optimizer's step.

        Returns:
            The second step's reading, or the first's if that ran out of memory.
        """
        for _ in range(2):
            step = _Step(self._trainer, self._module, self._meter, batch)
            self._floor = self._measure(step, step.optimize)
            (self._optimizer_seconds,) = _most([step.optimizer_seconds], self._device)
            if self._floor.out_of_memory:
                break
        return self._floor

    def run(self, batch: Any) -> Reading:
        """Take a step without the optimizer's part, whose memory does not depend on the batch.

        Args:
            batch: as an adapter makes it.

        Returns:
            The reading; its seconds include those of the optimizer's part in :meth:`warm_up`.
        """
        assert self._floor is not None, "warm_up comes first"
        step = _Step(self._trainer, self._module, self._meter, batch)
        reading = self._measure(step, step.forward, step.backward)
        optimizer_seconds = self._optimizer_seconds / self._trainer.accumulate_grad_batches
        return replace(reading, seconds=reading.seconds + optimizer_seconds)

    def _measure(self, step: _Step, *parts: Callable[[], None]) -> Reading:
        meter = self._meter
        fits = self._fits(step, step.receive) and self._fits(step, self._hold_gradients)
        meter.track(self._tensors())
        batch = [leaf for leaf in tree_leaves(step.batch) if isinstance(leaf, Tensor)]
        meter.track(batch)
        resident = meter.alive - sum(tensor.nbytes for tensor in batch)
        with _without_averaging(self._trainer), meter.measuring():
            started = time.perf_counter()
            for part in parts:
                # All ranks enter the next part, or none: it may contain collectives.
                (failed,) = _most([not (fits and self._fits(step, part))], self._device)
                fits = not failed
            meter.synchronize()
            seconds = time.perf_counter() - started
        if not fits:
            self._discard(step)
        held = resident if step.held is None else step.held
        reserved = meter.reserved  # None on all ranks, or on none
        *sizes, seconds = _most([meter.peak, resident, held, reserved or 0, seconds], self._device)
        peak, resident, held, most_reserved = map(int, sizes)
        return Reading(peak, resident, held, seconds, None if reserved is None else most_reserved, not fits)

    def _fits(self, step: _Step, part: Callable[[], None]) -> bool:
        """Run a part of a step. Whether it has enough memory; if not, what it took is free again."""
        try:
            part()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            # FSDP2's state (what is gathered, what comes next) cannot be restored, and other ranks wait for this one's
            # shards.
            if any(isinstance(part, FSDPModule) for part in self._module.modules()):
                raise ConfigError(
                    "OOMptimizer: a step ran out of memory while it was measured, after which a model that is sharded "
                    "by FSDP2 cannot go on; lower OOMptimizer.memory_fraction or memory_budget."
                ) from error
            _clear_frames(error)
        else:
            return True
        # Only after the except clause nothing refers to the error, and so to what the failed functions held.
        self._discard(step)
        return False

    def _discard(self, step: _Step) -> None:
        step.release()
        if self._conflict is not None:
            self._conflict.clear()
        for parameter in self._parameters:
            parameter.grad = None
        garbage_collection_cuda()

    def _hold_gradients(self) -> None:
        """Every step but a training's first begins with the gradients of the one before."""
        if self._conflict is not None:
            if self._trainer.accumulate_grad_batches > 1:
                self._conflict.hold(self._module)
                return
            self._conflict.clear()
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def _tensors(self) -> Iterator[Tensor]:
        """What is alive before a step on this rank: weights, buffers, gradients, the optimizer's state."""
        state = tree_leaves([optimizer.state for optimizer in self._trainer.optimizers])
        gradients = (parameter.grad for parameter in self._parameters)
        kept = [] if self._conflict is None else self._conflict.kept_gradients()
        for tensor in chain(self._module.parameters(), self._module.buffers(), gradients, kept, state):
            if isinstance(tensor, Tensor):
                yield local_part(tensor)


class _Step:
    """One step, in the parts that Lightning's closure and optimizer step have."""

    def __init__(self, trainer: Trainer, module: LightningModule, meter: Meter, batch: Any) -> None:
        self._trainer, self._module, self._meter = trainer, module, meter
        self._optimizer: Optimizer = trainer.optimizers[0]
        self._output: Any = None
        self._loss: Tensor | None = None
        self._closed = 0.0  # when forward and backward pass were done
        self.batch = batch
        self.held: int | None = None  # bytes alive at the end of the forward pass
        self.optimizer_seconds = 0.0

    def receive(self) -> None:
        """Bring the batch to the device and into the training's precision."""
        batch = self._trainer.precision_plugin.convert_input(self.batch)
        self.batch = self._trainer.strategy.batch_to_device(batch)

    def forward(self) -> None:
        """Compute the loss."""
        with_index = is_param_in_hook_signature(self._module.training_step, "batch_idx", min_args=2)
        arguments = (self.batch, PROBE_BATCH_IDX) if with_index else (self.batch,)
        # The whole output is held during the backward pass, as Lightning does.
        self._output = self._trainer.strategy.training_step(*arguments)
        loss = self._output.get("loss") if isinstance(self._output, Mapping) else self._output
        if loss is None:
            raise ModelError(
                f"{type(self._module).__name__}.training_step returned no loss for a synthetic batch, so its memory "
                "cannot be measured; remove OOMptimizer, or return a loss."
            )
        self._loss = loss / self._trainer.accumulate_grad_batches
        self.held = self._meter.alive

    def backward(self) -> None:
        """Drop the gradients of the step before, or add to them, and compute new ones."""
        if self._trainer.accumulate_grad_batches == 1:
            self._module.optimizer_zero_grad(self._trainer.current_epoch, PROBE_BATCH_IDX, self._optimizer)
        self._trainer.strategy.backward(self._loss, self._optimizer)
        self.release()

    def optimize(self) -> None:
        """Take the whole step."""
        self._trainer.strategy.optimizer_step(self._optimizer, self._closure, model=self._module)
        self._meter.synchronize()
        self.optimizer_seconds = time.perf_counter() - self._closed

    def release(self) -> None:
        """Free the loss and the graph that it was computed with."""
        self._output = self._loss = None

    @torch.enable_grad()
    def _closure(self) -> Tensor:
        self.forward()
        loss = self._loss.detach()
        self.backward()
        if (conflict := getattr(self._module, "gradient_conflict", None)) is not None:
            conflict.clear()  # gradients are combined before the optimizer steps
        for parameter in self._module.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.zero_()
        self._meter.synchronize()
        self._closed = time.perf_counter()
        return loss


def _check_kind_of_steps(trainer: Trainer, module: LightningModule) -> None:
    if not module.automatic_optimization:
        raise ConfigError(
            f"OOMptimizer: {type(module).__name__} optimizes by itself (automatic_optimization is false), so its steps "
            "cannot be measured; remove OOMptimizer and set bucket_batch_size by hand."
        )
    for optimizer in trainer.optimizers:
        closure = inspect.signature(type(optimizer).step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ConfigError(
                f"OOMptimizer: {type(optimizer).__name__} runs the model several times in a step, so its steps cannot "
                "be measured; use another optimizer, or remove OOMptimizer and set bucket_batch_size by hand."
            )


def _without_averaging(trainer: Trainer) -> AbstractContextManager:
    """Keep DDP from averaging gradients, which would also rebuild its buckets: a side effect."""
    strategy = trainer.strategy
    # Gradients that are views of the buckets get there by being averaged; as separate tensors they would count twice.
    if not isinstance(strategy, ParallelStrategy) or getattr(strategy.model, "gradient_as_bucket_view", False):
        return nullcontext()
    return strategy.block_backward_sync()


def _clear_frames(error: BaseException | None) -> None:
    """Clear the frames of an error and of its causes, whose variables hold tensors."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _most(values: Sequence[float], device: torch.device) -> list[float]:
    """The maximum over all ranks of each value."""
    if world_size() == 1:
        return list(values)
    with _disable_current_modes():  # no part of the step: not counted, and with values where its tensors are fake
        gathered = torch.tensor(values, dtype=torch.float64, device=device)  # exact for bytes: whole and below 2^53
        dist.all_reduce(gathered, dist.ReduceOp.MAX)
        return gathered.tolist()
