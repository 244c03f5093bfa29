"""Bins and batch sizes together, such that an epoch takes the least time.

Bins determine the padding, and, by the memory of their longest examples, the batch sizes. An example in a bucket of
caps (x, y), which has the batch size b, takes

    seconds(x, y) = overhead / b + per_example(x, y),        b = (budget - intercept) / slope(x, y)  rounded down,

a function of the caps alone that does not fall with them, as the exact solver of
:mod:`nemo_emmett.data.bucketing.bins` requires. ``slope`` and ``per_example`` are fitted to a few probed buckets, while
the solver evaluates other caps; so the bins that it finds are probed in turn, until the time stops falling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from nemo_emmett.data.bucketing.bins import solve_bins, solve_bins_2d
from nemo_emmett.data.bucketing.length_stats import Lengths
from nemo_emmett.data.bucketing.padding import bucket_of, padding_of
from nemo_emmett.oomptimizer.cost_model import quadratic_terms, relative_nnls
from nemo_emmett.oomptimizer.profile import MemoryLine
from nemo_emmett.oomptimizer.search import MAX_BATCH_SIZE

WORTH_ANOTHER_ROUND = 1e-3
"""The search ends with bins that save a smaller share of the time."""

MAX_ROUNDS = 5
"""Searches for bins at most; the second or third seldom changes the bins."""


@dataclass(frozen=True)
class Surface:
    """A monotonic function of a bucket's caps: a quadratic polynomial whose coefficients are not negative.

    Args:
        coefficients: (6,) of 1, x, y, x^2, x*y, y^2, where x is the cap of inputs and y that of outputs; in one
            dimension y is 0.
    """

    coefficients: tuple[float, ...]

    @classmethod
    def fit(cls, caps: ArrayLike, values: ArrayLike) -> Surface:
        """Least squares of the relative errors.

        Args:
            caps: (N,) caps or (N, 2) pairs of caps.
            values: (N,) positive.
        """
        solution_6 = relative_nnls(quadratic_terms(*_sides(caps)), np.asarray(values, dtype=float))
        return cls(tuple(solution_6.tolist()))

    def __call__(self, inputs: ArrayLike, outputs: ArrayLike = 0.0) -> np.ndarray:
        """The value at each pair of caps; inputs and outputs broadcast."""
        return quadratic_terms(inputs, outputs) @ np.array(self.coefficients)


def _sides(caps: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    array = np.asarray(caps, dtype=float)
    return (array, np.zeros_like(array)) if array.ndim == 1 else (array[:, 0], array[:, 1])


@dataclass(frozen=True)
class MemoryModel:
    """The memory of a step with n examples of a bucket: ``intercept + slope(caps) * n`` bytes.

    Args:
        intercept: bytes without examples.
        slope: bytes per example.
        max_batch_size: no bucket gets more examples.
    """

    intercept: float
    slope: Surface
    max_batch_size: int = MAX_BATCH_SIZE

    @classmethod
    def fit(cls, bins: Sequence, sizes: Sequence[int], lines: Sequence[MemoryLine]) -> MemoryModel:
        """Fit the batch sizes of some buckets, and the lines of their memory."""
        intercept = float(np.median([line.intercept for line in lines]))
        slopes = [
            (line.intercept + line.slope * size - intercept) / size for line, size in zip(lines, sizes, strict=True)
        ]
        return cls(intercept, Surface.fit(bins, np.maximum(slopes, np.finfo(float).tiny)))

    def batch_sizes(self, budget: float, inputs: ArrayLike, outputs: ArrayLike = 0.0) -> np.ndarray:
        """The most examples within a budget of bytes, for each pair of caps; 1 where not even one fits."""
        most = np.floor((budget - self.intercept) / self.slope(inputs, outputs))
        return np.clip(most, 1, self.max_batch_size)


@dataclass(frozen=True)
class TimeModel:
    """The time of a step with n examples of a bucket: ``overhead + per_example(caps) * n`` seconds."""

    overhead: float
    per_example: Surface

    def of_example(self, sizes: ArrayLike, inputs: ArrayLike, outputs: ArrayLike = 0.0) -> np.ndarray:
        """Seconds that one example takes in a batch of each size."""
        return self.overhead / np.asarray(sizes, dtype=float) + self.per_example(inputs, outputs)

    def of_step(self, size: int, bin_: Any) -> float:
        """Seconds of a step with so many examples of a bucket."""
        return float(size * self.of_example(size, *np.atleast_1d(np.asarray(bin_, dtype=float))))


@dataclass(frozen=True)
class BinPlan:
    """Bins, their batch sizes, and the padding and time of an epoch with them.

    Args:
        bins: caps, or pairs of caps.
        sizes: examples of each bucket's batch.
        examples: of those measured, that fit into the buckets.
        padding: share of padding in the batches, from 0 to 1.
        epoch_seconds: predicted, on one device.
    """

    bins: list
    sizes: tuple[int, ...]
    examples: int
    padding: float
    epoch_seconds: float

    @classmethod
    def of(cls, bins: list, sizes: Sequence[int], lengths: Lengths, time: TimeModel) -> BinPlan:
        """Evaluate bins and batch sizes on the lengths of a dataset's examples."""
        padding = padding_of(bins, *lengths.sides)
        return cls(list(bins), tuple(sizes), padding.kept, padding.share, epoch_seconds(bins, sizes, lengths, time))

    @property
    def examples_per_second(self) -> float:
        """Predicted, on one device."""
        return self.examples / self.epoch_seconds


@dataclass(frozen=True)
class Probed:
    """Buckets whose batch sizes were found.

    Args:
        bins: caps, or pairs of caps.
        sizes: examples of each bucket's batch.
        lines: of each bucket's memory.
    """

    bins: list
    sizes: tuple[int, ...]
    lines: tuple[MemoryLine, ...]


def examples_per_bucket(bins: Sequence, lengths: Lengths) -> np.ndarray:
    """(K,) number of examples in each bucket; those that fit into none are left out."""
    buckets = bucket_of(bins, *lengths.sides)
    return np.bincount(buckets[buckets >= 0], minlength=len(bins))


def epoch_seconds(bins: Sequence, sizes: Sequence[int], lengths: Lengths, time: TimeModel) -> float:
    """Predicted time on one device to train once on every example that fits into a bucket, in full batches."""
    counts_K, caps = examples_per_bucket(bins, lengths), _sides(bins)
    return float(counts_K @ time.of_example(sizes, *caps))


def fastest_bins(
    lengths: Lengths, num_buckets: int, num_sub_buckets: int | None, memory: MemoryModel, time: TimeModel, budget: float
) -> list:
    """The bins with the shortest epoch, by the two models: no others are faster.

    Args:
        lengths: of the examples.
        num_buckets: how many strips of input lengths.
        num_sub_buckets: how many buckets of output lengths in each; None for one-dimensional bins.
        memory: predicts batch sizes.
        time: predicts the time of an example.
        budget: bytes that a step may take.
    """

    def cost(*caps: np.ndarray) -> np.ndarray:
        return time.of_example(memory.batch_sizes(budget, *caps), *caps)

    if num_sub_buckets is None:
        return solve_bins(lengths.inputs, num_buckets, cost=cost).bins
    return solve_bins_2d(*lengths.sides, num_buckets, num_sub_buckets, cost=cost).bins


def plan_bins(
    lengths: Lengths,
    num_buckets: int,
    num_sub_buckets: int | None,
    first: Probed,
    probe: Callable[[list], Probed],
    time: TimeModel,
    budget: float,
) -> BinPlan:
    """Alternate between bins and batch sizes, as long as the predicted time of an epoch falls.

    Args:
        lengths: of the examples.
        num_buckets: how many strips of input lengths.
        num_sub_buckets: how many buckets of output lengths in each; None for one-dimensional bins.
        first: bins to start from, such as those of least padding, with their batch sizes.
        probe: finds the batch sizes of other bins.
        time: predicts the time of an example.
        budget: bytes that a step may take.

    Returns:
        The fastest plan that was probed; that of ``first``, if none is faster.
    """
    seen = [first]
    best = BinPlan.of(first.bins, first.sizes, lengths, time)
    for _ in range(MAX_ROUNDS):
        memory = MemoryModel.fit(
            *([item for probed in seen for item in getattr(probed, name)] for name in ("bins", "sizes", "lines"))
        )
        bins = fastest_bins(lengths, num_buckets, num_sub_buckets, memory, time, budget)
        if any(np.array_equal(np.asarray(bins, dtype=float), np.asarray(p.bins, dtype=float)) for p in seen):
            break
        seen.append(probe(bins))
        plan = BinPlan.of(bins, seen[-1].sizes, lengths, time)
        gained = plan.epoch_seconds < (1 - WORTH_ANOTHER_ROUND) * best.epoch_seconds
        best = min(best, plan, key=lambda candidate: candidate.epoch_seconds)
        if not gained:
            break
    return best
