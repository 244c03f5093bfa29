"""Meters of a training step's memory, behind one interface."""

from __future__ import annotations

import functools
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.compiler import set_stance
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    is_traceable_wrapper_subclass,
    is_traceable_wrapper_subclass_type,
)

from nemo_emmett.oomptimizer.snapshot import replaced


@dataclass(frozen=True)
class Reading:
    """What was measured of one step.

    Args:
        peak: most bytes of tensors alive at once, weights and optimizer state included.
        resident: bytes alive before the step began (weights, optimizer state, held gradients).
        held: bytes alive at the end of the forward pass.
        seconds: wall time of the step; 0 where nothing is computed.
        reserved: most bytes held by the allocator; None if there is none. ``reserved - peak`` is fragmentation.
        out_of_memory: the device ran out of memory; ``peak`` is then what was reached before.
    """

    peak: int
    resident: int
    held: int
    seconds: float
    reserved: int | None = None
    out_of_memory: bool = False


class Meter(ABC):
    """Counts bytes on one device."""

    @abstractmethod
    def track(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that exist already (weights, buffers, optimizer state), unless the device's allocator does."""

    @abstractmethod
    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Measure what runs inside; the peak is reset to what is alive."""

    @property
    @abstractmethod
    def alive(self) -> int:
        """Bytes alive now."""

    @property
    @abstractmethod
    def peak(self) -> int:
        """Most bytes alive at once since :meth:`measuring` began."""

    @property
    def reserved(self) -> int | None:
        """Most bytes that the allocator held since :meth:`measuring` began, if there is an allocator."""
        return None

    def synchronize(self) -> None:  # noqa: B027 - nothing to wait for, where a device computes at once
        """Wait until the device has finished."""


class Unmetered(Meter):
    """Measures nothing, at no cost: every step takes 0 bytes."""

    alive = peak = 0

    def track(self, tensors: Iterable[Tensor]) -> None:
        """Nothing is counted."""

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Nothing is measured."""
        yield


class TensorMeter(Meter):
    """Exact bytes of tensors on any device: counts the storages that operations return.

    Every storage counts once, from the operation that makes it until nothing refers to it: views share it, and
    operations in place keep it. What autograd saves for the backward pass counts as long as autograd holds it. Under
    ``FakeTensorMode``, entered before :meth:`measuring`, the numbers are those of the real step. Not counted is what a
    kernel allocates and frees within itself, and what existed before, unless it is given to :meth:`track` or an
    operation returns it.

    Between two measurements nothing new is counted, but what is freed is subtracted; so a loop may measure every one of
    its steps.

    Args:
        device: the device whose tensors count; without an index, every device of its type.

    Example:
        >>> meter = TensorMeter(torch.device("cpu"))
        >>> x = torch.zeros(1000)  # 4,000 bytes
        >>> meter.track([x])
        >>> with meter.measuring():
        ...     y = (x + 1).view(10, 100).exp()
        >>> meter.alive, meter.peak
        (8000, 12000)
    """

    def __init__(self, device: torch.device) -> None:
        self._device = torch.device(device)
        self._entries: dict[int, _Entry] = {}  # by the id of the storage; an entry is removed when its storage is freed
        self._alive = 0
        self._peak = 0

    def track(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that exist already; what is counted is not counted again."""
        for tensor in tensors:
            for part in _parts(tensor):
                self._count(part)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Measure what runs inside; the peak is reset to what is alive."""
        self._peak = self._alive
        # Compiled functions, as torchao's optimizers have, cannot be observed; run eagerly, they take no less.
        with set_stance("force_eager"), _ObservedResults(self._count), _observed_resizes(self._resized):
            yield

    @property
    def alive(self) -> int:
        """Bytes of the counted storages that still exist."""
        return self._alive

    @property
    def peak(self) -> int:
        """Most bytes alive at once since :meth:`measuring` began."""
        return self._peak

    def _count(self, tensor: Tensor) -> None:
        # Every result of every operation comes through here: two look-ups, if its storage is known.
        if tensor.layout is not torch.strided:
            self.track([tensor])
            return
        storage = tensor.untyped_storage()
        entry = self._entries.get(id(storage))
        if entry is not None:
            if entry.nbytes != storage.nbytes():
                self._resized(storage)
        elif tensor.device.type == self._device.type and self._device.index in (None, tensor.device.index):
            self._entries[id(storage)] = _Entry(storage, self._freed)
            self._add(storage.nbytes())

    def _add(self, nbytes: int) -> None:
        self._alive += nbytes
        if self._alive > self._peak:
            self._peak = self._alive

    def _resized(self, storage: UntypedStorage) -> None:
        entry = self._entries.get(id(storage))
        if entry is not None:
            difference, entry.nbytes = storage.nbytes() - entry.nbytes, storage.nbytes()
            self._add(difference)

    def _freed(self, entry: _Entry) -> None:
        del self._entries[entry.key]
        self._alive -= entry.nbytes


class _Entry(weakref.ref):
    """A weak reference to a counted storage."""

    __slots__ = ("key", "nbytes")

    def __new__(cls, storage: UntypedStorage, when_freed: Callable[[_Entry], None]) -> _Entry:
        return super().__new__(cls, storage, when_freed)

    def __init__(self, storage: UntypedStorage, when_freed: Callable[[_Entry], None]) -> None:
        super().__init__(storage, when_freed)
        self.key = id(storage)
        self.nbytes = storage.nbytes()


_DEVICE = torch.ops.prim.device.default


class _ObservedResults(TorchDispatchMode):
    """Passes every tensor that an operation returns to a function."""

    supports_higher_order_operators = True

    def __init__(self, observe: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._observe = observe

    def __torch_dispatch__(self, func: Any, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        if types and _has_wrapper(types):
            return NotImplemented  # wrappers (DTensor) come back as operations on the tensors that they wrap
        if func is _DEVICE:
            return args[0].device  # which autograd reads of every fake tensor: much faster than the operator
        result = func(*args, **kwargs) if kwargs else func(*args)
        if isinstance(result, Tensor):
            self._observe(result)
        elif isinstance(result, (tuple, list)):
            self._observe_all(result)
        return result

    def _observe_all(self, results: Iterable[Any]) -> None:
        for result in results:
            if isinstance(result, Tensor):
                self._observe(result)
            elif isinstance(result, (tuple, list)):
                self._observe_all(result)


@functools.lru_cache
def _has_wrapper(types: tuple[type, ...]) -> bool:
    return any(is_traceable_wrapper_subclass_type(kind) for kind in types)


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that hold the memory of a tensor without storage: a sparse one, or a wrapper such as DTensor."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            if isinstance(part := getattr(tensor, name), Tensor):  # a DTensor lists its device mesh as well
                yield from _parts(part)
    elif tensor.layout is torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())
    elif tensor.layout is torch.strided:
        yield tensor


@contextmanager
def _observed_resizes(listener: Callable[[UntypedStorage], None]) -> Iterator[None]:
    """FSDP frees and allocates parameters by ``UntypedStorage.resize_``, which is no operation of a dispatch mode."""
    original = UntypedStorage.resize_

    def resize_(storage: UntypedStorage, nbytes: int) -> None:
        original(storage, nbytes)
        listener(storage)

    with replaced(UntypedStorage, resize_=resize_):
        yield
