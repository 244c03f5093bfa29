"""A training step that ran out of memory is done again in smaller pieces, with the same gradient.

Lightning's hooks cannot swallow an exception, but the closure of its automatic optimization (forward, ``zero_grad``,
backward), which the optimizer calls, can. :class:`Recovery` puts its own closure in that one's place.

What failed is halved until every piece fits. The gradients of pieces add up in place; so what the failed attempt has
left behind must not be added again. Parameters that had their whole gradient when memory ran out keep it and take no
part in the pieces; the version counters of the gradients tell which these are, so that no gradient is ever copied.

With DDP the pieces run as the micro-batches of an accumulation do: all but the last without communicating, and the
last one's backward pass reduces the sum, while the other ranks wait in theirs.

Pieces draw anew from the random generators: their dropout is not the whole batch's. Batch norm sees the pieces one by
one, and keeps what it saw of a failed attempt.
"""

from __future__ import annotations

import gc
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
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

NOT_EVEN_ONE = "not even one example of it fits"
"""The reason to give up where a batch cannot be split further."""

_Result = TypeVar("_Result")


class RecoveryListener(Protocol):
    """Who is told what memory a step takes, and decides what a step of pieces cannot."""

    def pieces(self, batch: Any) -> int:
        """In how many pieces to run a batch from the start; 1: whole."""

    def watching(self, batch: Any) -> AbstractContextManager[None]:
        """Around the forward and backward pass of a batch, or of a piece that was cut before memory ran out."""

    def ran_out(self, batch: Any, phase: str) -> None:
        """A batch ran out of memory in its ``forward`` or ``backward`` pass; told once for a batch."""

    def give_up(self, batch: Any, reason: str) -> NoReturn:
        """End the training, since the step of a batch cannot be redone."""


class Recovery:
    """Redoes the steps of a training that run out of memory.

    Args:
        adapter: cuts batches of the model.
        watcher: is told.
    """

    def __init__(self, adapter: Adapter, watcher: RecoveryListener) -> None:
        self._adapter = adapter
        self._watcher = watcher
        self._loop: Any = None
        self._synchronized: list[torch.nn.Module] = []

    def install(self, trainer: Trainer, module: LightningModule) -> None:
        """Take the place of Lightning's closures, from now on."""
        self._loop = trainer.fit_loop.epoch_loop.automatic_optimization
        make_closure = self._loop._make_closure

        def make_recovering_closure(kwargs: dict, optimizer: Any, batch_idx: int) -> Closure:
            def closure_of(batch: Any) -> Closure:
                return make_closure({**kwargs, "batch": batch}, optimizer, batch_idx)

            if "batch" not in kwargs:  # a training step that fetches its batches itself
                return make_closure(kwargs, optimizer, batch_idx)
            return _RecoveringClosure(trainer, module, self._adapter, self._watcher, kwargs["batch"], closure_of)

        self._loop._make_closure = make_recovering_closure
        if trainer.world_size > 1:
            self._unsynchronize(module)

    def uninstall(self) -> None:
        """Leave Lightning, and the model, as they were."""
        if self._loop is not None:
            del self._loop._make_closure
            self._loop = None
        for part in self._synchronized:
            part.sync_max_audio_length = True
        self._synchronized = []

    def _unsynchronize(self, module: LightningModule) -> None:
        """A rank that redoes its step alone must find no collective in the forward pass."""
        self._synchronized = [part for part in module.modules() if getattr(part, "sync_max_audio_length", False)]
        for part in self._synchronized:
            part.sync_max_audio_length = False
        if self._synchronized:
            logging.info(
                "OOMptimizer: sync_max_audio_length of the encoder is false while training, so that a rank can redo "
                "a step alone."
            )


@dataclass(frozen=True)
class _Piece:
    """A batch, or a part of it, that is to be run.

    Args:
        batch: the examples.
        settled: parameters that have the gradient of these examples already.
    """

    batch: Any
    settled: frozenset[Parameter] = frozenset()


@dataclass(frozen=True)
class _Done:
    """What remains of a piece that was run."""

    weight: float
    loss: Tensor | None  # weighted
    extra: Mapping[str, Any]


class _RecoveringClosure(Closure):
    """Lightning's closure of one batch, which runs the batch in pieces where it must."""

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        adapter: Adapter,
        watcher: RecoveryListener,
        batch: Any,
        closure_of: Callable[[Any], Closure],
    ) -> None:
        whole = closure_of(batch)
        super().__init__(whole._step_fn, whole._backward_fn, whole._zero_grad_fn and _Once(whole._zero_grad_fn))
        self._strategy, self._module = trainer.strategy, module
        self._adapter, self._watcher = adapter, watcher
        self._batch, self._closure_of = batch, closure_of
        self._failed = False
        self._gradients: _Gradients | None = None  # only from the beginning of a backward pass
        self._reducing = False

    def closure(self, *args: Any, **kwargs: Any) -> ClosureResult:
        """Forward, ``zero_grad`` and backward of the batch."""
        pieces = deque(self._planned())
        logged = False
        if len(pieces) == 1:
            whole = pieces.popleft()
            result = self._attempt(whole, lambda: self._run(self._step_fn, self._backward_fn))
            if result is not None:
                return result
            logged = self._gradients is not None
            pieces = self._halved(whole, pieces)
        return self._in_pieces(pieces, _PieceLogs(self._module, logged))

    def _planned(self) -> list[_Piece]:
        number = self._watcher.pieces(self._batch)
        if number == 1 or self._why_unsafe() is not None:
            return [_Piece(self._batch)]
        return [_Piece(batch) for batch in self._that_count(self._adapter.split_batch(self._batch, number))]

    def _that_count(self, pieces: list[Any]) -> list[Any]:
        """Without pieces that nothing is learnt from: the mean loss of no tokens is not a number, times 0 either."""
        counting = [piece for piece in pieces if self._adapter.loss_weight(piece, self._batch)]
        return counting or pieces[:1]

    def _in_pieces(self, pieces: deque[_Piece], logs: _PieceLogs) -> ClosureResult:
        done: list[_Done] = []
        with _in_hook(self._module, "training_step"), self._adapter.one_step(self._batch):
            while pieces:
                piece = pieces.popleft()
                is_last = not pieces
                outcome = self._attempt(piece, partial(self._run_piece, piece.batch, logs, is_last))
                if outcome is None:
                    pieces = self._halved(piece, pieces)
                else:
                    done.append(outcome)
        return _merged(done)

    def _attempt(self, piece: _Piece, run: Callable[[], _Result]) -> _Result | None:
        """Run a piece; None if it runs out of memory, and then all that it allocated is free again."""
        hook = self._module._current_fx_name
        watching = nullcontext() if self._failed else self._watcher.watching(piece.batch)
        try:
            with put_aside(piece.settled), watching:
                return run()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)
        # Only now, behind the clause, nothing holds the exception and with it the tensors of its frames.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._module._current_fx_name = hook
        self._note_failure()
        return None

    def _note_failure(self) -> None:
        in_backward = self._gradients is not None
        if not self._failed:
            self._failed = True
            self._watcher.ran_out(self._batch, "backward" if in_backward else "forward")
        if (reason := self._why_unsafe()) is not None:
            self._watcher.give_up(self._batch, reason)
        if not in_backward and isinstance(self._strategy.model, DistributedDataParallel):
            # The forward pass began with the broadcast of buffers; the other ranks are past it.
            self._strategy.model.require_forward_param_sync = False

    def _why_unsafe(self) -> str | None:
        """Why this step cannot be run in pieces; None if it can."""
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

    def _halved(self, failed: _Piece, others: Iterable[_Piece]) -> deque[_Piece]:
        """Smaller pieces: the failed one's, then the others', which would hardly fit either."""
        settled = self._gradients.complete() if self._gradients is not None else frozenset()
        if settled is None:
            self._watcher.give_up(
                self._batch, "reentrant checkpointing adds to a gradient several times in one backward pass"
            )
        halves = self._adapter.split_batch(failed.batch, 2)
        if len(halves) < 2:
            self._watcher.give_up(self._batch, NOT_EVEN_ONE)
        pieces = deque(_Piece(half, failed.settled | settled) for half in self._that_count(halves))
        for piece in others:
            smaller = self._that_count(self._adapter.split_batch(piece.batch, 2))
            pieces.extend(replace(piece, batch=half) for half in smaller)
        return pieces

    # One forward and backward pass.

    def _run(self, step_fn: Callable, backward_fn: Callable | None) -> ClosureResult:
        """Forward, ``zero_grad`` if it is still to be done, and backward."""

        def noted_backward_fn(loss: Tensor) -> None:
            self._gradients = _Gradients(self._module.parameters())
            self._reducing = getattr(self._strategy.model, "require_backward_grad_sync", False)
            backward_fn(loss)

        self._gradients = None
        return Closure(step_fn, backward_fn and noted_backward_fn, self._zero_grad_fn).closure()

    def _run_piece(self, batch: Any, logs: _PieceLogs, is_last: bool) -> _Done:
        closure = self._closure_of(batch)
        weight = self._adapter.loss_weight(batch, self._batch)

        def step_fn() -> ClosureResult:
            with logs.collected(weight):
                result = closure._step_fn()
            if is_last:
                # Where it is in the whole batch: before the backward pass, for a value may be reduced over the ranks.
                logs.write()
            loss = result.closure_loss
            if loss is not None:
                loss = self._tied(loss * weight) if is_last else loss * weight
            return ClosureResult(loss, extra=recursive_detach(result.extra))

        # As Lightning does for all but the last batch of an accumulation.
        with _block_parallel_sync_behavior(self._strategy, block=not is_last):
            result = self._run(step_fn, closure._backward_fn)
        return _Done(weight, result.loss, result.extra)

    def _tied(self, loss: Tensor) -> Tensor:
        """DDP waits for the gradients of all parameters in the last piece, whichever pieces they were used in."""
        model = self._strategy.model
        if not isinstance(model, DistributedDataParallel) or model.find_unused_parameters:
            return loss
        return ZeroGradDependency.apply(
            loss, *(p for p in model.parameters() if p.requires_grad and p.grad is not None)
        )


class _Once:
    """A function that is called the first time, and then no more."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function: Callable[[], None] | None = function

    def __call__(self) -> None:
        function, self._function = self._function, None
        if function is not None:
            function()


# Gradients.


class _Gradients:
    """The gradients as they are before a backward pass.

    Args:
        parameters: of the model.
    """

    def __init__(self, parameters: Iterable[Parameter]) -> None:
        self._before = [(p, p.grad, 0 if p.grad is None else p.grad._version) for p in parameters if p.requires_grad]

    def complete(self) -> frozenset[Parameter] | None:
        """The parameters to whose gradient the backward pass has added since: once, and so all that it had to add.

        None if it added more than once: then what else it would have added cannot be known.
        """
        added = frozenset(p for p, grad, version in self._before if p.grad is not grad or _version(grad) != version)
        for p, grad, version in self._before:
            if p.grad is grad and _version(grad) > version + 1:
                return None
        return added


def _version(tensor: Tensor | None) -> int:
    """Counts the operations in place."""
    return 0 if tensor is None else tensor._version


@contextmanager
def put_aside(parameters: Iterable[Parameter]) -> Iterator[None]:
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
    """A loss that depends on parameters, with a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *parameters: Tensor) -> Tensor:
        """The loss, unchanged."""
        ctx.parameters = [(p.shape, p.dtype, p.device) for p in parameters]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        """The loss's gradient; zero for each parameter."""
        # One zero each, seen as many: nothing is allocated.
        zeros = (torch.zeros((), dtype=dtype, device=device).expand(shape) for shape, dtype, device in ctx.parameters)
        return gradient, *zeros


# What is logged and returned.


class _PieceLogs:
    """What a model logs in the pieces of a step, logged once: means, weighted as the losses are.

    Args:
        module: the model.
        logged: nothing is to be logged, since the whole batch's forward pass has done it.
    """

    def __init__(self, module: LightningModule, logged: bool) -> None:
        self._module, self._written = module, logged
        self._values: dict[str, list[tuple[float, Any]]] = {}
        self._options: dict[str, tuple[tuple, dict]] = {}

    @contextmanager
    def collected(self, weight: float) -> Iterator[None]:
        """Keep what is logged inside; if it fails, forget it."""
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


def _merged(done: list[_Done]) -> ClosureResult:
    """What the closure of the whole batch would return."""
    losses = [piece.loss for piece in done if piece.loss is not None]
    names = {name: None for piece in done for name in piece.extra}
    extra = {name: _mean([(p.weight, p.extra[name]) for p in done if name in p.extra]) for name in names}
    return ClosureResult(torch.stack(losses).sum() if losses else None, extra=extra)


def _mean(values: list[tuple[float, Any]]) -> Any:
    """The weighted mean of numbers; of what are no numbers, the last."""
    total = sum(weight for weight, _ in values)
    if total == 0 or not all(_is_number(value) for _, value in values):
        return values[-1][1]
    return sum(weight * value for weight, value in values) / total


def _is_number(value: Any) -> bool:
    return isinstance(value, Number) or (isinstance(value, Tensor) and value.numel() == 1)


@contextmanager
def _in_hook(module: LightningModule, name: str) -> Iterator[None]:
    """Lightning asks for the name of the hook in which a value is logged."""
    outer, module._current_fx_name = module._current_fx_name, name
    try:
        yield
    finally:
        module._current_fx_name = outer
