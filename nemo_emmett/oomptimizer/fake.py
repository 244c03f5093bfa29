"""Training steps that compute nothing: fake tensors have a shape, a type and a device, but no values and no memory.

A whole step runs on them (forward, backward, optimizer), and a :class:`~nemo_emmett.oomptimizer.meter.TensorMeter`
reads from it the peak of the real step. So batch sizes can be planned on any machine, for any other.

- :func:`fake_model` lends a real model fake weights;
- :func:`fake_construction` builds a model that never had others.

Most operations of a step are those of an identical layer before. ``FakeTensorMode`` remembers what operations return,
but is slow to recall it; with :class:`_Recall` in front of it a step takes a third of the time.
"""

from __future__ import annotations

import sys
import traceback
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.nn import Module
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_emmett.errors import ConfigError


@contextmanager
def fake_construction() -> Iterator[None]:
    """Tensors made inside are fake: a model that is built here has all its layers, and takes no memory.

    It can be planned with inside only, and inside another ``fake_construction`` it is as if there were but one. Weights
    would be read from files for nothing: build with ``pretrained_weights: false``.

    Raises:
        ConfigError: if something inside cannot do without values; it names the operation.

    Example:
        >>> with fake_construction():
        ...     layer = torch.nn.Linear(1_000_000, 1_000_000)  # 4 TB
        ...     loss = layer(torch.ones(8, 1_000_000)).sum()
    """
    if active_fake_mode() is not None:
        yield
        return
    # Real tensors that slip in, such as those of a default argument, are taken for fake ones.
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    # _Recall stands before it, and a second memory of the same would only take time and room.
    mode.cache_enabled = False
    # It remembers weakly which tensors it made, for which there is no use here; and what is referenced weakly,
    # `Module.to` refuses to move.
    mode.fake_tensor_converter.set_tensor_memo = _forget
    with _refusing_in_words(), mode, _Recall(mode):
        yield


def _forget(*_: Any) -> None:
    """Stands in for a method that remembers."""


@contextmanager
def fake_model(module: Module, optimizers: Sequence[Optimizer] = ()) -> Iterator[None]:
    """Lend a model fake weights: inside, its steps compute nothing; afterwards it is what it was, to the object.

    Parameters, buffers and tensors in attributes of its modules are exchanged for fake ones of the same shape, type
    and device; tied ones stay tied. Optimizers step on the fake parameters, and begin without a state.

    Args:
        module: on one device, and not wrapped for distributed training.
        optimizers: of its parameters.

    Raises:
        ConfigError: if something inside cannot do without values; it names the operation.
    """
    with ExitStack() as undo:
        for part in module.modules():
            undo.enter_context(_kept(part))
        for optimizer in optimizers:
            undo.enter_context(_kept(optimizer))
        undo.enter_context(fake_construction())
        mode = active_fake_mode()
        for part in module.modules():
            _exchange(part, mode)
        for optimizer in optimizers:
            _start_anew(optimizer, mode)
        yield


@contextmanager
def _kept(owner: Module | Optimizer) -> Iterator[None]:
    """Afterwards an object has the attributes that it had, and its dicts and lists hold what they held."""
    attributes = dict(vars(owner))
    contents = [(value, value.copy()) for value in attributes.values() if type(value) in (dict, list, defaultdict)]
    groups = [(group, group.copy()) for group in attributes.get("param_groups", ())]
    try:
        yield
    finally:
        for container, content in [(vars(owner), attributes), *contents, *groups]:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)


def _exchange(module: Module, mode: FakeTensorMode) -> None:
    """Put fake tensors in the place of a module's own ones, not of its children's."""
    for name, tensor in [*module._parameters.items(), *module._buffers.items(), *vars(module).items()]:
        if isinstance(tensor, Tensor) and not isinstance(tensor, FakeTensor):
            # Through the module's own __setattr__: recurrent layers keep a list of their parameters by it.
            setattr(module, name, mode.from_tensor(tensor))


def _start_anew(optimizer: Optimizer, mode: FakeTensorMode) -> None:
    """Let an optimizer step on the fake parameters that stand for its real ones."""
    optimizer.state.clear()
    for group in optimizer.param_groups:
        # The mode remembers what it made of a tensor.
        group["params"] = [p if isinstance(p, FakeTensor) else mode.from_tensor(p) for p in group["params"]]


# What cannot be planned.


@contextmanager
def _refusing_in_words() -> Iterator[None]:
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
        raise _refusal(f"the operation {error.func}", error) from error
    except RuntimeError as error:
        # NumPy, and kernels from outside of PyTorch, ask for the memory of a tensor.
        if not any(words in str(error) for words in ("data pointer", "tensor subclasses")):
            raise
        raise _refusal("a kernel that is none of PyTorch's own", error) from error


def _refusal(operation: str, error: BaseException) -> ConfigError:
    """The sentence for what cannot be planned, with the innermost module that the error came through."""
    place = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if isinstance(owner, Module):
            place = f" in {type(owner).__name__}.{frame.f_code.co_name} ({frame.f_code.co_filename}:{line})"
    return ConfigError(
        f"OOMptimizer: {operation}{place} cannot be planned, since there are no values to work on; "
        "use `mode: calibrate` on the device instead."
    )


# What makes it fast.


@dataclass(frozen=True)
class _New:
    """An operation makes a tensor with a storage of its own."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class _View:
    """An operation returns a view of the storage of one of its arguments."""

    argument: int
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class _Argument:
    """An operation returns one of its arguments: it works in place."""

    argument: int


@dataclass(frozen=True)
class _Value:
    """An operation returns no tensor."""

    value: Any


_Outcome = _New | _View | _Argument | _Value | tuple | list

_WEIGHT_OF_NORM = {
    torch.ops.aten.native_layer_norm.default: 2,
    torch.ops.aten.native_group_norm.default: 1,
    torch.ops.aten.native_batch_norm.default: 1,
}
"""Where normalisations have their weight among their arguments."""

_READ = torch.ops.aten._local_scalar_dense.default
_PLAIN = frozenset(
    {int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format},
)
"""Arguments beside tensors that tell an operation all that they mean by being equal."""

_UNKNOWN = object()

_ANY_VALUE = {torch.bool: True, torch.float16: 1.0, torch.bfloat16: 1.0, torch.float32: 1.0, torch.float64: 1.0}


class _NotRecalled(Exception):
    """An operation whose outcome does not follow from the shapes of its arguments."""


class _Recall(TorchDispatchMode):
    """Remembers what an operation made of arguments of the same shapes, and makes the same again.

    Left to ``FakeTensorMode`` are operations on nothing but tensors with known values, on real, sparse or complex ones,
    and those that change an argument's shape.

    Args:
        mode: the mode that works outcomes out; already entered.
    """

    supports_higher_order_operators = True

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self._mode = mode
        self._outcomes: dict[tuple, _Outcome | None] = {}
        self._attributes: dict[torch.device, dict[str, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        tensors: list[FakeTensor] = []
        try:
            key = _key(func, args, kwargs, tensors)
        except _NotRecalled:
            return self._work_out(func, args, kwargs)
        outcome = self._outcomes.get(key, _UNKNOWN)
        if outcome is _UNKNOWN:
            result = self._work_out(func, args, kwargs)
            self._outcomes[key] = self._outcome(func, result, tensors)
            return result
        return self._work_out(func, args, kwargs) if outcome is None else self._make(outcome, tensors)

    def _work_out(self, func: Any, args: tuple, kwargs: dict) -> Any:
        try:
            result = func(*args, **kwargs)
        except DataDependentOutputException:
            # Adafactor reads norms of parameters: it scales by them, and its memory does not depend on them.
            if func is _READ and args[0].dtype in _ANY_VALUE and _is_optimizer(sys._getframe()):
                return _ANY_VALUE[args[0].dtype]
            raise
        return _with_statistics_of(args[_WEIGHT_OF_NORM[func]], result) if func in _WEIGHT_OF_NORM else result

    def _make(self, outcome: _Outcome, tensors: Sequence[FakeTensor]) -> Any:
        kind = type(outcome)
        if kind is _New:
            with torch._C._DisableTorchDispatch():
                made = torch.empty_strided(outcome.shape, outcome.stride, dtype=outcome.dtype, device="meta")
            return self._fake(made, outcome.device)
        if kind is _View:
            storage = tensors[outcome.argument].untyped_storage()
            with torch._C._DisableTorchDispatch():
                made = torch.empty(0, dtype=outcome.dtype, device="meta")
                made.set_(storage, outcome.offset, outcome.shape, outcome.stride)
            return self._fake(made, outcome.device)
        if kind is _Argument:
            return tensors[outcome.argument]
        if kind is _Value:
            return outcome.value
        return kind([self._make(part, tensors) for part in outcome])

    def _fake(self, made: Tensor, device: torch.device) -> FakeTensor:
        """What ``FakeTensor(mode, made, device)`` gives, whose constructor would take most of the time of a step."""
        if device not in self._attributes:
            self._attributes[device] = vars(FakeTensor(self._mode, made, device))
        fake = Tensor._make_subclass(FakeTensor, made, dispatch_device=True, device_for_backend_keys=device)
        torch._C._set_throw_on_mutable_data_ptr(fake)
        vars(fake).update(self._attributes[device])
        return fake

    def _outcome(self, func: Any, result: Any, tensors: Sequence[FakeTensor]) -> _Outcome | None:
        if torch.Tag.inplace_view in func.tags:
            return None
        try:
            outcome = _outcome_of(result, tensors)
        except _NotRecalled:
            return None
        return outcome if _same(self._make(outcome, tensors), result) else None


def _key(func: Any, args: tuple, kwargs: dict, tensors: list[FakeTensor]) -> tuple:
    """All that the outcome of an operation depends on; its tensors are added to a list.

    Raises:
        _NotRecalled: if it may depend on more.
    """
    key = [func, torch.get_default_dtype(), torch.is_inference_mode_enabled()]
    known = _describe(args, key, tensors)
    if kwargs:
        _describe(kwargs, key, None)
        _describe(kwargs.values(), key, None)
    if known and (known == len(tensors) or func._schema.is_mutable):
        raise _NotRecalled  # the result has known values, or an argument no longer has
    if not tensors and active_fake_mode() is None:
        raise _NotRecalled  # somebody makes a real tensor, having left the mode for that
    return tuple(key)


def _describe(arguments: Iterable[Any], key: list, tensors: list[FakeTensor] | None) -> int:
    """Add to a key all that the outcome of an operation may depend on, and to a list the tensors.

    Returns:
        How many of the tensors have known values.
    """
    known = 0
    for argument in arguments:
        kind = type(argument)
        if kind is FakeTensor:
            if tensors is None or argument.dtype.is_complex or argument.layout is not torch.strided:
                raise _NotRecalled
            known += argument.constant is not None
            tensors.append(argument)
            key += (
                argument.shape,
                argument.stride(),
                argument.storage_offset(),
                argument.dtype,
                argument.fake_device,
                argument.requires_grad,
            )
        elif kind is list or kind is tuple:
            key += (kind, len(argument))
            known += _describe(argument, key, tensors)
        elif kind in _PLAIN:
            # 1 and 1.0 are the same key, but make different tensors.
            key += (kind, argument)
        else:
            raise _NotRecalled
    return known


def _with_statistics_of(weight: Tensor | None, result: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A normalisation's results, its mean and deviation of the weight's type.

    So the kernels keep them under autocast, where the weight is float32 and the input is not; fake ones on the CPU are
    of the input's type.
    """
    if weight is None:
        return result
    return result[0], *(statistics.to(weight.dtype) for statistics in result[1:])


def _outcome_of(result: Any, tensors: Sequence[FakeTensor]) -> _Outcome:
    if isinstance(result, (tuple, list)):
        return type(result)(_outcome_of(part, tensors) for part in result)
    if not isinstance(result, Tensor):
        return _Value(result)
    if not isinstance(result, FakeTensor) or result.constant is not None or result.layout is not torch.strided:
        raise _NotRecalled
    for index, tensor in enumerate(tensors):
        if tensor is result:
            return _Argument(index)
    form = (result.shape, result.stride(), result.dtype, result.fake_device)
    storage = result.untyped_storage()
    shares = [index for index, tensor in enumerate(tensors) if tensor.untyped_storage() is storage]
    if len(shares) > 1:
        raise _NotRecalled
    return _View(shares[0], result.storage_offset(), *form) if shares else _New(*form)


def _same(made: Any, result: Any) -> bool:
    """Whether what was made after an outcome is like the result that it was taken from."""
    if isinstance(result, (tuple, list)):
        return all(_same(*pair) for pair in zip(made, result, strict=True))
    if not isinstance(result, Tensor) or made is result:
        return True
    return (
        made.untyped_storage().nbytes() == result.untyped_storage().nbytes()
        and made.storage_offset() == result.storage_offset()
        and made.requires_grad == result.requires_grad
        and torch._C._dispatch_key_set(made) == torch._C._dispatch_key_set(result)
    )


def _is_optimizer(frame: FrameType | None) -> bool:
    """Whether the innermost optimizer or module that is at work is an optimizer."""
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, (Module, Optimizer)):
            return isinstance(owner, Optimizer)
        frame = frame.f_back
    return False
