"""Redoes a training step that ran out of memory in smaller microbatches, with the same gradient.

Lightning's hooks cannot catch an exception of the step, but the closure of its automatic optimization (forward,
``zero_grad``, backward), which the optimizer calls, can. :class:`Recovery` replaces that closure by its own.

What failed is halved until every microbatch fits. The gradients of microbatches add up in ``grad``; what the failed
attempt has added must not be added again. Autograd adds to the gradient of a parameter once per backward pass, when the
whole gradient of the batch is known. So each parameter is in one of two states when memory runs out: its gradient is
complete, or it is what it was. Complete ones take no part in the microbatches. The version counters of the gradients
show which these are, so no gradient is ever copied.

With DDP the microbatches run as those of gradient accumulation do: all but the last without communication; the backward
pass of the last one reduces the sum, while the other ranks wait in theirs.

Microbatches draw other numbers from the random generators than the whole batch, so their dropout differs. Batch norm
normalises each microbatch by itself, and keeps the statistics of a failed attempt.
"""

from __future__ import annotations

import gc
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from numbers import Number
from typing import Any, NoReturn, Protocol, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loops.optimization.automatic import Closure, ClosureResult
from lightning.pytorch.loops.utilities import _block_parallel_sync_behavior
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.memory import recursive_detach
from nemo.utils import logging
from torch import Tensor
from torch.nn import Parameter, SyncBatchNorm
from torch.nn.parallel import DistributedDataParallel

from nemo_emmett.oomptimizer.adapters.base import Adapter
from nemo_emmett.oomptimizer.memory import is_out_of_memory
from nemo_emmett.oomptimizer.snapshot import replaced

NOT_EVEN_ONE = "not even one example of it fits"
"""The reason to abort if a batch cannot be split further."""

_Result = TypeVar("_Result")


class RecoveryListener(Protocol):
    """Measures steps, and decides what happens to batches that do not fit."""

    def microbatches(self, batch: Any) -> int:
        """In how many microbatches to run a batch from the start; 1: as it is."""

    def measuring(self, batch: Any) -> AbstractContextManager[None]:
        """Around the forward and backward pass of a batch, or of a microbatch made before memory ran out."""

    def on_out_of_memory(self, batch: Any, phase: str) -> None:
        """A batch ran out of memory in its ``forward`` or ``backward`` pass; called once per batch."""

    def abort(self, batch: Any, reason: str) -> NoReturn:
        """End the training, since the step of a batch cannot be redone."""


class Recovery:
    """Redoes the steps of a training that run out of memory.

    Args:
        adapter: splits batches of the model.
        listener: measures and decides.
    """

    def __init__(self, adapter: Adapter, listener: RecoveryListener) -> None:
        self._adapter = adapter
        self._listener = listener
        self._loop: Any = None
        self._synchronized: list[torch.nn.Module] = []

    def install(self, trainer: Trainer, module: LightningModule) -> None:
        """Replace Lightning's closures from now on."""
        # _make_closure is private to Lightning: its _AutomaticOptimization.run calls it for every batch. The attribute
        # of the instance hides the method of the class, and `del` restores it. test_recovery.py checks its signature.
        self._loop = trainer.fit_loop.epoch_loop.automatic_optimization
        make_closure = self._loop._make_closure

        def make_recovering_closure(kwargs: dict, optimizer: Any, batch_idx: int) -> Closure:
            def closure_of(batch: Any) -> Closure:
                return make_closure({**kwargs, "batch": batch}, optimizer, batch_idx)

            if "batch" not in kwargs:  # a training step that fetches its batches itself
                return make_closure(kwargs, optimizer, batch_idx)
            return _RecoveringClosure(trainer, module, self._adapter, self._listener, kwargs["batch"], closure_of)

        self._loop._make_closure = make_recovering_closure
        if trainer.world_size > 1:
            # A rank that redoes its step alone must find no collective in the forward pass.
            self._synchronized = [part for part in module.modules() if getattr(part, "sync_max_audio_length", False)]
            for part in self._synchronized:
                part.sync_max_audio_length = False
            if self._synchronized:
                logging.info(
                    "OOMptimizer: sync_max_audio_length of the encoder is false while training, so that a rank can "
                    "redo a step alone."
                )

    def uninstall(self) -> None:
        """Restore Lightning's closures, and the model."""
        if self._loop is not None:
            del self._loop._make_closure
            self._loop = None
        for part in self._synchronized:
            part.sync_max_audio_length = True
        self._synchronized = []


@dataclass(frozen=True)
class _Microbatch:
    """A batch, or a part of it, that is to be run."""

    batch: Any
    complete: frozenset[Parameter] = frozenset()  # that have the gradient of these examples already


@dataclass(frozen=True)
class _Output:
    """The result of a microbatch."""

    weight: float
    loss: Tensor | None  # weighted
    extra: Mapping[str, Any]


class _RecoveringClosure(Closure):
    """Lightning's closure of one batch, which runs the batch in microbatches if it must."""

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        adapter: Adapter,
        listener: RecoveryListener,
        batch: Any,
        closure_of: Callable[[Any], Closure],
    ) -> None:
        whole = closure_of(batch)
        # Cached, so that it runs once.
        super().__init__(whole._step_fn, whole._backward_fn, whole._zero_grad_fn and cache(whole._zero_grad_fn))
        self._strategy, self._module = trainer.strategy, module
        self._adapter, self._listener = adapter, listener
        self._batch, self._closure_of = batch, closure_of
        self._failed = False
        self._gradients: _GradientVersions | None = None  # only from the beginning of a backward pass
        self._reducing = False

    def closure(self, *args: Any, **kwargs: Any) -> ClosureResult:
        """Forward, ``zero_grad`` and backward of the batch."""
        count = self._listener.microbatches(self._batch)
        queue, logged = deque([_Microbatch(self._batch)]), False
        if count > 1 and self._unsafe_reason() is None:
            queue = deque(map(_Microbatch, self._with_targets(self._adapter.split_batch(self._batch, count))))
        if len(queue) == 1:
            whole = queue.popleft()
            result = self._attempt(whole, lambda: self._run(self._step_fn, self._backward_fn))
            if result is not None:
                return result
            logged = self._gradients is not None
            queue = self._halved(whole, queue)
        logs, outputs = _MicrobatchLogs(self._module, logged), []
        # Lightning looks up the name of the hook in which a value is logged.
        with replaced(self._module, _current_fx_name="training_step"), self._adapter.one_step(self._batch):
            while queue:
                microbatch = queue.popleft()
                output = self._attempt(microbatch, partial(self._run_one, microbatch.batch, logs, not queue))
                if output is None:
                    queue = self._halved(microbatch, queue)
                else:
                    outputs.append(output)
        return _merged(outputs)

    def _with_targets(self, batches: list[Any]) -> list[Any]:
        """Without batches of weight 0: the mean loss of no tokens is NaN, and so is 0 times NaN."""
        return [batch for batch in batches if self._adapter.loss_weight(batch, self._batch)] or batches[:1]

    def _attempt(self, microbatch: _Microbatch, run: Callable[[], _Result]) -> _Result | None:
        """Run a microbatch; None if it runs out of memory, and then all that it allocated is free again."""
        hook = self._module._current_fx_name
        measuring = nullcontext() if self._failed else self._listener.measuring(microbatch.batch)
        try:
            with unchanged_gradients(microbatch.complete), measuring:
                return run()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)
        # Only after the except clause nothing refers to the exception, and so to the tensors of its frames.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._module._current_fx_name = hook
        in_backward = self._gradients is not None
        if not self._failed:
            self._failed = True
            self._listener.on_out_of_memory(self._batch, "backward" if in_backward else "forward")
        if (reason := self._unsafe_reason()) is not None:
            self._listener.abort(self._batch, reason)
        if not in_backward and isinstance(self._strategy.model, DistributedDataParallel):
            # The forward pass began with the broadcast of buffers; the other ranks are past it.
            self._strategy.model.require_forward_param_sync = False
        return None

    def _unsafe_reason(self) -> str | None:
        """Why this step cannot be run in microbatches; None if it can."""
        model = self._strategy.model
        if not self._adapter.can_split:
            return f"no adapter can split the batches of {type(self._module).__name__}"
        if not isinstance(model, DistributedDataParallel):
            alone = isinstance(self._strategy, SingleDeviceStrategy)
            return None if alone else f"{type(self._strategy).__name__} needs all ranks in every pass"
        if model.static_graph:
            return "DDP's static_graph counts the passes of a step"
        if any(isinstance(part, SyncBatchNorm) for part in model.modules()):
            return "SyncBatchNorm needs all ranks in every forward pass"
        if self._gradients is not None and self._reducing:
            return "the ranks were adding up their gradients"
        return None

    def _halved(self, failed: _Microbatch, others: Iterable[_Microbatch]) -> deque[_Microbatch]:
        """Halves of the one that failed, then of the others, which would hardly fit either."""
        complete = self._gradients.complete() if self._gradients is not None else frozenset()
        if complete is None:
            self._listener.abort(
                self._batch, "reentrant checkpointing adds to a gradient several times in one backward pass"
            )
        halves = self._adapter.split_batch(failed.batch, 2)
        if len(halves) < 2:
            self._listener.abort(self._batch, NOT_EVEN_ONE)
        queue = deque(_Microbatch(half, failed.complete | complete) for half in self._with_targets(halves))
        for other in others:
            smaller = self._with_targets(self._adapter.split_batch(other.batch, 2))
            queue.extend(replace(other, batch=half) for half in smaller)
        return queue

    # One forward and backward pass.

    def _run(self, step_fn: Callable, backward_fn: Callable | None) -> ClosureResult:
        """Forward, ``zero_grad`` if it is still to be done, and backward."""

        def observed_backward_fn(loss: Tensor) -> None:
            self._gradients = _GradientVersions(self._module.parameters())
            self._reducing = getattr(self._strategy.model, "require_backward_grad_sync", False)
            backward_fn(loss)

        self._gradients = None
        return Closure(step_fn, backward_fn and observed_backward_fn, self._zero_grad_fn).closure()

    def _run_one(self, batch: Any, logs: _MicrobatchLogs, is_last: bool) -> _Output:
        closure = self._closure_of(batch)
        weight = self._adapter.loss_weight(batch, self._batch)

        def step_fn() -> ClosureResult:
            with logs.collected(weight):
                result = closure._step_fn()
            if is_last:
                # Before the backward pass, as in the whole batch: a logged value may be reduced over the ranks.
                logs.write()
            loss = result.closure_loss
            if loss is not None:
                loss = loss * weight
                model = self._strategy.model
                if is_last and isinstance(model, DistributedDataParallel) and not model.find_unused_parameters:
                    # DDP waits for the gradients of all parameters, whichever microbatches used them.
                    used = (p for p in model.parameters() if p.requires_grad and p.grad is not None)
                    loss = ZeroGradDependency.apply(loss, *used)
            return ClosureResult(loss, extra=recursive_detach(result.extra))

        # As Lightning does for all but the last batch of an accumulation.
        with _block_parallel_sync_behavior(self._strategy, block=not is_last):
            result = self._run(step_fn, closure._backward_fn)
        return _Output(weight, result.loss, result.extra)


# Gradients.


class _GradientVersions:
    """The gradients as they are before a backward pass."""

    def __init__(self, parameters: Iterable[Parameter]) -> None:
        self._before = [(p, p.grad, _version(p.grad)) for p in parameters if p.requires_grad]

    def complete(self) -> frozenset[Parameter] | None:
        """The parameters to whose gradient the backward pass has added since: once, and so all that it had to add.

        None if it added more than once: then the missing rest cannot be known.
        """
        # An addition in place raises the version counter of the same tensor; a first gradient is another tensor.
        if any(p.grad is grad and _version(grad) > version + 1 for p, grad, version in self._before):
            return None
        return frozenset(p for p, grad, version in self._before if p.grad is not grad or _version(grad) != version)


def _version(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor._version


@contextmanager
def unchanged_gradients(parameters: Iterable[Parameter]) -> Iterator[None]:
    """Inside, what a backward pass adds to the gradients of these parameters is dropped at once."""
    gradients = {parameter: parameter.grad for parameter in parameters}
    hooks = [parameter.register_post_accumulate_grad_hook(_drop_gradient) for parameter in gradients]
    for parameter in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, gradient in gradients.items():
            parameter.grad = gradient


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class ZeroGradDependency(torch.autograd.Function):
    """Makes a loss depend on parameters, with a gradient of zero for each."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *parameters: Tensor) -> Tensor:
        """The loss, unchanged."""
        ctx.parameters = [(p.shape, p.dtype, p.device) for p in parameters]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        """The loss's gradient; zero for each parameter."""
        # One zero each, expanded to the shape: nothing is allocated.
        zeros = (torch.zeros((), dtype=dtype, device=device).expand(shape) for shape, dtype, device in ctx.parameters)
        return gradient, *zeros


# What is logged and returned.


class _MicrobatchLogs:
    """Logs once what a model logs in each microbatch of a step: means, weighted as the losses are."""

    def __init__(self, module: LightningModule, logged: bool) -> None:
        self._module, self._written = module, logged  # by the whole batch's forward pass
        self._values: dict[str, list[tuple[float, Any]]] = {}
        self._options: dict[str, tuple[tuple, dict]] = {}

    @contextmanager
    def collected(self, weight: float) -> Iterator[None]:
        """Keep what is logged inside, unless that fails."""
        calls: list[tuple[str, Any, tuple, dict]] = []
        outer = vars(self._module).get("log")
        self._module.log = lambda name, value, *args, **kwargs: calls.append((name, value, args, kwargs))
        try:
            yield
        finally:
            del self._module.log
            if outer is not None:
                self._module.log = outer
        for name, value, args, kwargs in calls:
            self._values.setdefault(name, []).append((weight, recursive_detach(value)))
            self._options[name] = (args, kwargs)

    def write(self) -> None:
        """Log what was kept, unless the step is logged already."""
        if self._written:
            return
        self._written = True
        for name, values in self._values.items():
            args, kwargs = self._options[name]
            self._module.log(name, _mean(values), *args, **kwargs)


def _merged(outputs: list[_Output]) -> ClosureResult:
    """What the closure of the whole batch would return."""
    losses = [output.loss for output in outputs if output.loss is not None]
    names = {name: None for output in outputs for name in output.extra}
    extra = {name: _mean([(o.weight, o.extra[name]) for o in outputs if name in o.extra]) for name in names}
    return ClosureResult(torch.stack(losses).sum() if losses else None, extra=extra)


def _mean(values: list[tuple[float, Any]]) -> Any:
    """The weighted mean of numbers; the last of other values."""
    total = sum(weight for weight, _ in values)
    if total == 0 or not all(isinstance(v, Number) or (isinstance(v, Tensor) and v.numel() == 1) for _, v in values):
        return values[-1][1]
    return sum(weight * value for weight, value in values) / total
