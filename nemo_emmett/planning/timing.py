"""The predicted time of a step on a device: its operations, divided by the device's rate.

A step of n examples is predicted to take ``overhead + n * operations(caps) / (rate * efficiency)`` seconds. Operations
are those of matrix products, convolutions and attention, forward and backward, which grow exactly linearly with the
batch, so one small step of a bucket suffices. The share of a device's peak rate that is reached and the time of a step
without examples are assumptions, :data:`EFFICIENCY` and :data:`OVERHEAD_SECONDS`: the predicted seconds are as good as
these.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch.compiler import set_stance
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from nemo_emmett.oomptimizer.adapters.registry import adapter_for
from nemo_emmett.oomptimizer.buckets import Group
from nemo_emmett.oomptimizer.memory import find_device
from nemo_emmett.oomptimizer.meter import Unmetered
from nemo_emmett.oomptimizer.search import spread_out
from nemo_emmett.oomptimizer.steps import TrainingSteps
from nemo_emmett.planning.bins_and_sizes import Surface, TimeModel

EFFICIENCY = 0.35
"""Share of the peak rate that training reaches: large language models report 0.21 to 0.46 (arXiv 2204.02311)."""

OVERHEAD_SECONDS = 0.05
"""Time of a step without examples: launching kernels, and the optimizer's update."""

DEFAULT_DEVICE = "A100"
"""Device whose rate is assumed if memory is given as an amount."""

PROBED_BUCKETS = 8
"""Buckets of each group whose operations are counted, for a polynomial of six terms."""

_PROBED_SIZE = 2
"""Examples of a step whose operations are counted."""


@dataclass(frozen=True)
class Rate:
    """The assumed speed of a device.

    Args:
        device: its name, for the report.
        flops_per_second: its peak rate.
        efficiency: share of the peak that is reached.
        overhead: seconds of a step without examples.
    """

    device: str
    flops_per_second: float
    efficiency: float = EFFICIENCY
    overhead: float = OVERHEAD_SECONDS

    @classmethod
    def of(cls, memory: str) -> Rate:
        """The rate of the device that is named as memory; for an amount, that of ``DEFAULT_DEVICE``."""
        is_amount = memory.strip()[:1].isdigit()
        device = find_device(DEFAULT_DEVICE if is_amount else memory, "--memory")
        return cls(device.name, device.flops_per_second)

    def __str__(self) -> str:
        return (
            f"{self.device}: {self.flops_per_second / 1e12:.0f} TFLOP/s at {100 * self.efficiency:.0f} %, and "
            f"{1000 * self.overhead:.0f} ms a step"
        )

    def time_model(self, bins: Sequence, operations: Sequence[float]) -> TimeModel:
        """The time of all buckets, from the operations of one example of some of them.

        Args:
            bins: caps, or pairs of caps, of some buckets.
            operations: floating-point operations per example of each, forward and backward.
        """
        per_second = self.flops_per_second * self.efficiency
        return TimeModel(self.overhead, Surface.fit(bins, [count / per_second for count in operations]))


def operations_per_example(
    trainer: Trainer, module: LightningModule, groups: Mapping[str, Group]
) -> dict[str, tuple[list, list[float]]]:
    """The operations of one example, forward and backward, in some buckets of each group.

    Args:
        trainer: in ``on_fit_start`` or later.
        module: that it trains; may be of fake tensors.
        groups: buckets by the name of their group.

    Returns:
        By group, the bins of the buckets and their operations.
    """
    counter, adapter, counts = OperationCounter(), adapter_for(module), {}
    device = trainer.strategy.root_device
    with TrainingSteps(trainer, module, counter) as steps:
        for name, group in groups.items():
            chosen = [group.buckets[number] for number in spread_out(len(group.buckets))[:PROBED_BUCKETS]]
            operations = []
            for bucket in chosen:
                batch = adapter.synthetic_batch(bucket.shape, _PROBED_SIZE, device)
                if not counts and not operations:
                    steps.warm_up(batch)
                steps.run(batch)
                if module.device_mesh is not None:
                    # In the first step torch finds how each operation is split, by running it whole; it remembers.
                    steps.run(batch)
                operations.append(counter.operations / _PROBED_SIZE)
            counts[name] = [bucket.bin for bucket in chosen], operations
    return counts


class OperationCounter(Unmetered):
    """Counts the floating-point operations of a step on this rank instead of its memory."""

    def __init__(self) -> None:
        self.operations = 0

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Count the operations inside."""
        counter = FlopCounterMode(display=False)
        with set_stance("force_eager"), counter, _OfThisRank():
            yield
        self.operations = counter.get_total_flops()


class _OfThisRank(TorchDispatchMode):
    """Within it, an operation on tensors that are split over ranks comes to the modes around it as that on this rank's
    parts, not as one of all ranks."""

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: tuple = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        return func(*args, **(kwargs or {}))
