"""Training steps on fake tensors, which have a shape, a type and a device, but no values and no memory.

A whole step runs on them (forward, backward, optimizer), and a :class:`~nemo_emmett.oomptimizer.meter.TensorMeter`
measures the peak of the real step. So batch sizes can be planned on any machine, for any other.

- :func:`fake_model` replaces the weights of a real model by fake ones, and restores them;
- :func:`fake_construction` builds a model with fake weights.

Most operations of a step are those of an identical layer before. ``FakeTensorMode`` has a cache of results, but a slow
one; with :class:`_ResultCache` in front of it a step takes a third of the time.
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

    The model can be used inside only. Inside another ``fake_construction`` this one has no effect. Build without
    reading weights from files, which would be dropped: ``pretrained_weights: false``.

    Raises:
        ConfigError: if something inside needs values; it names the operation.

    Example:
        >>> with fake_construction():
        ...     layer = torch.nn.Linear(1_000_000, 1_000_000)  # 4 TB
        ...     loss = layer(torch.ones(8, 1_000_000)).sum()
    """
    if active_fake_mode() is not None:
        yield
        return
    # Real tensors, such as those of a default argument, are converted to fake ones.
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    # _ResultCache precedes its cache, which would only cost time and memory.
    mode.cache_enabled = False
    # Its memo of converted tensors holds weak references, and `Module.to` refuses to move what is weakly referenced.
    mode.fake_tensor_converter.set_tensor_memo = lambda *_: None
    with _readable_errors(), mode, _ResultCache(mode):
        yield


@contextmanager
def fake_model(module: Module, optimizers: Sequence[Optimizer] = ()) -> Iterator[None]:
    """Replace the weights of a model by fake ones inside; afterwards it has the same objects as before.

    Parameters, buffers and tensors in attributes of its modules are replaced by fake ones of the same shape, type and
    device; tied ones stay tied. The real ones are kept, not copied: so the callback and the command run one code, on a
    model that exists or one that never had real weights. Optimizers step on the fake parameters, and begin without a
    state.

    Args:
        module: on one device, and not wrapped for distributed training.
        optimizers: of its parameters.

    Raises:
        ConfigError: if something inside needs values; it names the operation.
    """
    with ExitStack() as undo:
        for part in module.modules():
            undo.enter_context(_restored(part))
        for optimizer in optimizers:
            undo.enter_context(_restored(optimizer))
        undo.enter_context(fake_construction())
        mode = active_fake_mode()
        for part in module.modules():
            for name, tensor in [*part._parameters.items(), *part._buffers.items(), *vars(part).items()]:
                if isinstance(tensor, Tensor) and not isinstance(tensor, FakeTensor):
                    # Through the module's own __setattr__: recurrent layers keep a list of their parameters by it.
                    setattr(part, name, mode.from_tensor(tensor))
        for optimizer in optimizers:
            optimizer.state.clear()
            for group in optimizer.param_groups:
                # from_tensor returns the same fake tensor for the same real one.
                group["params"] = [p if isinstance(p, FakeTensor) else mode.from_tensor(p) for p in group["params"]]
        yield


@contextmanager
def _restored(owner: Module | Optimizer) -> Iterator[None]:
    """Restore an object's attributes, and the contents of its dicts and lists."""
    attributes = dict(vars(owner))
    contents = [(value, value.copy()) for value in attributes.values() if type(value) in (dict, list, defaultdict)]
    groups = [(group, group.copy()) for group in attributes.get("param_groups", ())]
    try:
        yield
    finally:
        for container, content in [(vars(owner), attributes), *contents, *groups]:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)


# Errors.


@contextmanager
def _readable_errors() -> Iterator[None]:
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
        raise _refusal(f"the operation {error.func}", error) from error
    except RuntimeError as error:
        # NumPy, and kernels from outside of PyTorch, access the memory of a tensor.
        if not any(words in str(error) for words in ("data pointer", "tensor subclasses")):
            raise
        raise _refusal("a kernel that is none of PyTorch's own", error) from error


def _refusal(operation: str, error: BaseException) -> ConfigError:
    """The error for an operation that cannot be planned, with the innermost module in its traceback."""
    place = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if isinstance(owner, Module):
            place = f" in {type(owner).__name__}.{frame.f_code.co_name} ({frame.f_code.co_filename}:{line})"
    return ConfigError(
        f"OOMptimizer: {operation}{place} cannot be planned, since it needs values, which fake tensors lack; "
        "use `mode: calibrate` on the device instead."
    )


# The cache.


@dataclass(frozen=True)
class _New:
    """The operation makes a tensor, with a storage of its own or as a view of one of its arguments."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    viewed: int | None = None  # the argument
    offset: int = 0


@dataclass(frozen=True)
class _Argument:
    """The operation returns one of its arguments: it works in place."""

    argument: int


@dataclass(frozen=True)
class _Value:
    """The operation returns no tensor."""

    value: Any


_Form = _New | _Argument | _Value | tuple | list

_WEIGHT_OF_NORM = {
    torch.ops.aten.native_layer_norm.default: 2,
    torch.ops.aten.native_group_norm.default: 1,
    torch.ops.aten.native_batch_norm.default: 1,
}
"""Index of the weight among the arguments of normalisations."""

_READ = torch.ops.aten._local_scalar_dense.default
_PLAIN = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format})
"""Types of arguments that are a part of the cache's key by value."""

_UNKNOWN = object()

_ANY_VALUE = {torch.bool: True, torch.float16: 1.0, torch.bfloat16: 1.0, torch.float32: 1.0, torch.float64: 1.0}


class _NotCacheable(Exception):
    """An operation whose result does not follow from the shapes of its arguments."""


class _ResultCache(TorchDispatchMode):
    """Caches the form of an operation's result by the operation and the shapes of its arguments.

    ``FakeTensorMode`` itself handles operations on nothing but tensors with known values, on real, sparse or complex
    ones, and those that change an argument's shape.

    Args:
        mode: that computes results which are not cached; already entered.
    """

    supports_higher_order_operators = True

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self._mode = mode
        self._forms: dict[tuple, _Form | None] = {}
        self._attributes: dict[torch.device, dict[str, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        tensors: list[FakeTensor] = []
        try:
            key = _key(func, args, kwargs, tensors)
        except _NotCacheable:
            return self._compute(func, args, kwargs)
        form = self._forms.get(key, _UNKNOWN)
        if form is _UNKNOWN:
            result = self._compute(func, args, kwargs)
            self._forms[key] = self._form(func, result, tensors)
            return result
        return self._compute(func, args, kwargs) if form is None else self._make(form, tensors)

    def _compute(self, func: Any, args: tuple, kwargs: dict) -> Any:
        try:
            result = func(*args, **kwargs)
        except DataDependentOutputException:
            # Adafactor reads norms of parameters to scale by them; its memory does not depend on their values.
            if func is _READ and args[0].dtype in _ANY_VALUE and _is_optimizer(sys._getframe()):
                return _ANY_VALUE[args[0].dtype]
            raise
        if func in _WEIGHT_OF_NORM and (weight := args[_WEIGHT_OF_NORM[func]]) is not None:
            # Under autocast the weight is float32 and the input is not: real kernels return mean and deviation in the
            # weight's type, fake ones on the CPU in the input's.
            return result[0], *(statistics.to(weight.dtype) for statistics in result[1:])
        return result

    def _make(self, form: _Form, tensors: Sequence[FakeTensor]) -> Any:
        kind = type(form)
        if kind is _New:
            storage = None if form.viewed is None else tensors[form.viewed].untyped_storage()
            with torch._C._DisableTorchDispatch():
                if storage is None:
                    made = torch.empty_strided(form.shape, form.stride, dtype=form.dtype, device="meta")
                else:
                    made = torch.empty(0, dtype=form.dtype, device="meta")
                    made.set_(storage, form.offset, form.shape, form.stride)
            return self._fake(made, form.device)
        if kind is _Argument:
            return tensors[form.argument]
        if kind is _Value:
            return form.value
        return kind([self._make(part, tensors) for part in form])

    def _fake(self, made: Tensor, device: torch.device) -> FakeTensor:
        """The result of ``FakeTensor(mode, made, device)``, whose constructor would take most of the time of a step."""
        if device not in self._attributes:
            self._attributes[device] = vars(FakeTensor(self._mode, made, device))
        fake = Tensor._make_subclass(FakeTensor, made, dispatch_device=True, device_for_backend_keys=device)
        torch._C._set_throw_on_mutable_data_ptr(fake)
        vars(fake).update(self._attributes[device])
        return fake

    def _form(self, func: Any, result: Any, tensors: Sequence[FakeTensor]) -> _Form | None:
        if torch.Tag.inplace_view in func.tags:
            return None
        try:
            form = _form_of(result, tensors)
        except _NotCacheable:
            return None
        return form if _same(self._make(form, tensors), result) else None


def _key(func: Any, args: tuple, kwargs: dict, tensors: list[FakeTensor]) -> tuple:
    """All that the form of an operation's result depends on; its tensors are added to a list.

    Raises:
        _NotCacheable: if it may depend on more.
    """
    key = [func, torch.get_default_dtype(), torch.is_inference_mode_enabled()]
    known = _describe(args, key, tensors)
    if kwargs:
        _describe(kwargs, key, None)
        _describe(kwargs.values(), key, None)
    if known and (known == len(tensors) or func._schema.is_mutable):
        raise _NotCacheable  # the result has known values, or an argument loses its own
    if not tensors and active_fake_mode() is None:
        raise _NotCacheable  # a real tensor is made outside of the mode
    return tuple(key)


def _describe(arguments: Iterable[Any], key: list, tensors: list[FakeTensor] | None) -> int:
    """Add to a key all that the form of an operation's result may depend on, and to a list the tensors.

    Returns:
        How many of the tensors have known values.
    """
    known = 0
    for argument in arguments:
        kind = type(argument)
        if kind is FakeTensor:
            if tensors is None or argument.dtype.is_complex or argument.layout is not torch.strided:
                raise _NotCacheable
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
            raise _NotCacheable
    return known


def _form_of(result: Any, tensors: Sequence[FakeTensor]) -> _Form:
    if isinstance(result, (tuple, list)):
        return type(result)(_form_of(part, tensors) for part in result)
    if not isinstance(result, Tensor):
        return _Value(result)
    if not isinstance(result, FakeTensor) or result.constant is not None or result.layout is not torch.strided:
        raise _NotCacheable
    for index, tensor in enumerate(tensors):
        if tensor is result:
            return _Argument(index)
    layout = (result.shape, result.stride(), result.dtype, result.fake_device)
    storage = result.untyped_storage()
    shares = [index for index, tensor in enumerate(tensors) if tensor.untyped_storage() is storage]
    if len(shares) > 1:
        raise _NotCacheable
    return _New(*layout, shares[0], result.storage_offset()) if shares else _New(*layout)


def _same(made: Any, result: Any) -> bool:
    """Whether a tensor that was made from a cached form equals the result that the form was taken from."""
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
    """Whether the innermost optimizer or module on the call stack is an optimizer."""
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, (Module, Optimizer)):
            return isinstance(owner, Optimizer)
        frame = frame.f_back
    return False
