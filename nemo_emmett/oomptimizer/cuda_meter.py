"""The meter of CUDA devices, by the counters of torch's caching allocator."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from nemo_emmett.errors import ConfigError
from nemo_emmett.oomptimizer.meter import Meter, TensorMeter


class CudaMeter(Meter):
    """Reads the counters of torch's caching allocator.

    ``peak`` is what tensors took, ``reserved`` what the allocator took for them: the difference is rounding and
    fragmentation. The cache is emptied before each measurement, so that fragmentation of an earlier one is not counted;
    the time that a step then takes to allocate from the driver is part of its time.

    Args:
        device: a CUDA device.
        empties_cache: before each measurement; false while training, whose steps must wait neither for the device
            nor for the driver.
    """

    def __init__(self, device: torch.device, empties_cache: bool = True) -> None:
        self._device = device
        self._empties_cache = empties_cache
        self._measured: tuple[int, int] | None = None  # peak and reserved of the last measurement, once it is over

    def track(self, tensors: Iterable[Tensor]) -> None:
        """Nothing to do: the allocator counts all tensors."""

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Measure what runs inside; the peak is reset to what is alive."""
        if self._empties_cache:
            gc.collect()
            self.synchronize()
            torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        self._measured = None
        try:
            yield
        finally:
            self._measured = self._counters()

    @property
    def alive(self) -> int:
        """Bytes of tensors now."""
        return torch.cuda.memory_allocated(self._device)

    @property
    def peak(self) -> int:
        """Most bytes of tensors at once since :meth:`measuring` began, until it ended."""
        return (self._measured or self._counters())[0]

    @property
    def reserved(self) -> int:
        """Most bytes that the allocator held since :meth:`measuring` began, until it ended."""
        return (self._measured or self._counters())[1]

    def synchronize(self) -> None:
        """Wait until the device has finished."""
        torch.cuda.synchronize(self._device)

    def _counters(self) -> tuple[int, int]:
        return torch.cuda.max_memory_allocated(self._device), torch.cuda.max_memory_reserved(self._device)


def meter_for(device: torch.device) -> Meter:
    """The meter of a device.

    Raises:
        ConfigError: for a device that is neither CUDA's nor the CPU.
    """
    if device.type == "cuda":
        return CudaMeter(device)
    if device.type == "cpu":
        return TensorMeter(device)
    raise ConfigError(f"trainer.accelerator: OOMptimizer measures CUDA devices and the CPU, not '{device}'.")
