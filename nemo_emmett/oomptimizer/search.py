"""The largest batch size of each bucket whose step stays within a memory budget, found with few steps.

The peak f(n) of a step with n examples is the maximum, over all points of the program, of what is alive there: a
constant plus n times a slope. A maximum of affine functions is convex and piecewise linear, so a reading f(m) = p
bounds f for all n >= m:

- from above: at no point less is alive without examples than throughout the whole step (``base``: weights and optimizer
  state), so f(n) <= p + (n - m) * (p - base) / m;
- from below: a convex function is above the line through two of its points, beyond them. With two readings, that line
  is the bound. With one, the second point is an upper bound ``nothing`` of f(0), the least that a bucket of longer
  examples took: f(n) >= p + (n - m) * (p - nothing) / m.

The chunk of logits of a chunked loss grows only up to some size, so small sizes make lines too steep. Therefore both
bounds are always taken from the largest readings.

A probe is made only if the line through the readings stays within the budget, and the bound from above does, too, if
the probe is far beyond them. The search ends when the bound from below shows that no larger batch fits, or none that is
larger by more than ``precision``. The first buckets take a few probes. They give the line of all others
(:class:`~nemo_emmett.oomptimizer.cost_model.MemoryModel`), most of which then need one probe, which confirms the
answer, or two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from nemo_emmett.errors import ConfigError, Help
from nemo_emmett.oomptimizer.buckets import Bucket
from nemo_emmett.oomptimizer.cost_model import MemoryModel, Sample, lengths
from nemo_emmett.oomptimizer.memory import shown
from nemo_emmett.oomptimizer.meter import Reading
from nemo_emmett.oomptimizer.profile import MemoryLine

Probe = Callable[[Bucket, int], Reading]
"""Runs one step with so many examples of a bucket's worst case."""

PRECISION = 0.01
"""A batch size is good enough when none fits that is larger by more than this share."""

MAX_BATCH_SIZE = 8192
"""No bucket gets more examples, whatever the memory."""

FAR, FAR_ALONE, FAR_KNOWN = 1.1, 1.03, 1.5
"""Factors up to which the line is trusted beyond the last of two readings, beyond a single one, or beyond either if the
intercepts of other buckets are known; further, the bound from above must agree."""

NEAR = 0.8
"""Share of the examples of a second, smaller probe, which decides whether a larger size may fit."""

OF_OTHERS = 1.1
"""Factor by which the intercept of a bucket may exceed those of others."""

_ENOUGH = 4
"""From so many buckets on, their common model is trusted with the next one."""

_LEAST_ERROR, _MOST_ERROR = 0.002, 0.2
"""How wrong a prediction for an unseen bucket may be at least and at most, as a share of the peak."""

_ERROR_OF_DISTANCE = 0.03
"""How much more for a size twice that of a known bucket of longer examples."""


@dataclass(frozen=True)
class Result:
    """What was found for a bucket.

    Args:
        bucket: which.
        batch_size: examples.
        predicted_peak: bytes that the step was expected to take, before the probe that confirmed it.
        confirmed: the reading of a step of this size; derived from a larger one's if not ``measured``.
        line: of the bucket's memory.
        probes: steps that were run for it.
        measured: whether a step of this very size was run.
    """

    bucket: Bucket
    batch_size: int
    predicted_peak: float
    confirmed: Reading
    line: MemoryLine
    probes: int
    measured: bool = True


@dataclass
class _Readings:
    """What is known of one bucket."""

    bucket: Bucket
    base: float
    of_size: dict[int, Reading] = field(default_factory=dict)
    seen: int = MAX_BATCH_SIZE  # a larger size did not fit, or did not of shorter examples
    by_line: int = MAX_BATCH_SIZE  # a larger size cannot fit by the bound from below
    exceeded: tuple[int, float] | None = None  # the smallest size that was seen not to fit, and its peak
    predicted: dict[int, float] = field(default_factory=dict)  # peaks, before they were read

    @property
    def most(self) -> int:
        """A larger size is known not to fit."""
        return min(self.seen, self.by_line)

    @property
    def fitting(self) -> int:
        """The largest size that was seen to fit; 0 if none was."""
        return max(self.of_size, default=0)

    @property
    def last(self) -> Reading:
        return self.of_size[self.fitting]

    @property
    def smallest_peak(self) -> float:
        """Of all its steps."""
        return min((reading.peak for reading in self.of_size.values()), default=math.inf)

    def intercept(self) -> float | None:
        """The intercept of the line through the two largest sizes that fit; None if there are not two.

        If sizes are close together, readings that vary by a percent give lines of any intercept; but none is below
        ``base`` or above a peak.
        """
        secant = self.secant()
        if secant is None:
            return None
        return max(self.base, min(self.last.peak - secant * self.fitting, self.smallest_peak))

    def least_intercept(self) -> float | None:
        """What a step without examples takes at least, by the line through the two smallest sizes."""
        if len(self.of_size) < 2:
            return None
        smaller, larger = sorted(self.of_size)[:2]
        low, high = self.of_size[smaller].peak, self.of_size[larger].peak
        return max(self.base, min(low - (high - low) / (larger - smaller) * smaller, self.smallest_peak))

    def rise_at_least(self, nothing: float) -> float:
        """Bytes that one more example takes at least, if a step without examples takes ``nothing`` at most."""
        rises = [(self.last.peak - min(nothing, self.last.peak)) / self.fitting]
        if (secant := self.secant()) is not None:
            rises.append(secant)
        return max(rises)

    def secant(self) -> float | None:
        """Slope of the line through the two largest sizes that fit."""
        if len(self.of_size) < 2:
            return None
        smaller, larger = sorted(self.of_size)[-2:]
        return (self.of_size[larger].peak - self.of_size[smaller].peak) / (larger - smaller)


class Search:
    """Finds batch sizes, bucket after bucket; each one's readings reduce the probes of the next.

    Args:
        probe: runs a step; a size does not fit if its reading is above the budget, or out of memory.
        budget: bytes that a step may take.
        base: bytes alive throughout every step (weights and optimizer state).
        precision: see ``PRECISION``.
        max_batch_size: no bucket gets more.
        floor: bytes that the optimizer's step takes, whatever the batch.
        careful: avoid steps above the budget; on fake tensors they do no harm, and fewer steps are needed.
    """

    def __init__(
        self,
        probe: Probe,
        budget: int,
        base: float,
        *,
        precision: float = PRECISION,
        max_batch_size: int = MAX_BATCH_SIZE,
        floor: float = 0.0,
        careful: bool = True,
    ) -> None:
        self._probe, self._budget, self._base, self._floor = probe, budget, base, floor
        self._precision, self._max_batch_size, self._careful = precision, max_batch_size, careful
        self._found: list[Result] = []
        self._known: list[_Readings] = []
        self._samples: list[Sample] = []
        self._errors: list[float] = []
        self._model: MemoryModel | None = None

    def run(self, buckets: Sequence[Bucket]) -> Iterator[Result]:
        """Find the batch size of each bucket, the extreme ones first: others are predicted by interpolation.

        Raises:
            ConfigError: if a bucket does not fit with a single example.
        """
        for position in spread_out(len(buckets)):
            yield self.find(buckets[position])

    def find(self, bucket: Bucket) -> Result:
        """Find the batch size of one bucket.

        Raises:
            ConfigError: if it does not fit with a single example.
        """
        # No bucket gets more examples than one whose examples are shorter.
        sizes = [r.batch_size * (1 + self._precision) for r in self._found if _within(r.bucket, bucket)]
        known = _Readings(bucket, self._base, seen=math.floor(min([self._max_batch_size, *sizes])))
        probes = 0
        while known.most - known.fitting > self._precision * known.fitting:
            size = self._next_size(known)
            if known.of_size:
                known.predicted[size] = known.last.peak + (size - known.fitting) * self._rise(known)
            else:
                known.predicted[size] = self._model.peak(bucket.shape, size) if self._model is not None else 0.0
            self._note(known, size, self._probe(bucket, size))
            probes += 1
        size, reading = known.fitting, known.last
        for examples, of_size in known.of_size.items():
            if of_size.peak > self._base + (self._budget - self._base) / 2:  # far above the floor
                self._samples.append(Sample(bucket.shape, examples, of_size.peak))
        if self._samples:
            self._model = MemoryModel.fit(self._samples)
        intercepts, own = self._intercepts(), known.intercept()
        if own is None:
            own = float(np.median(intercepts)) if intercepts else self._base
        intercept = min(own, reading.peak)
        line = MemoryLine(self._floor, intercept, (reading.peak - intercept) / size)
        result = Result(bucket, size, known.predicted[size] or reading.peak, reading, line, probes)
        self._found.append(result)
        self._known.append(known)
        return result

    def _next_size(self, known: _Readings) -> int:
        if not known.of_size and known.exceeded is None:
            return min(self._first_guess(known.bucket), known.most)
        guess = self._between(known) if known.exceeded is not None else self._guess(known)
        if guess <= known.fitting and known.secant() is None and known.fitting > 1:
            # Nothing larger is expected to fit: a smaller probe decides, without exceeding the budget.
            return min(math.ceil(NEAR * known.fitting), known.fitting - 1)
        return min(max(guess, known.fitting + 1), known.most)

    def _first_guess(self, bucket: Bucket) -> int:
        """A size that fits, according to other buckets."""
        # What fits with longer examples fits with these.
        surely = max((r.batch_size for r in self._found if _within(bucket, r.bucket)), default=1)
        if self._model is None or len(self._found) < _ENOUGH or (slope := self._model.slope(bucket.shape)) <= 0:
            return surely
        guess = (self._budget - self._model.intercept) / slope
        if not self._careful:
            return max(surely, math.floor(guess))
        # As wrong as the last predictions for unseen buckets, and more with the distance from what was read.
        error = float(np.clip(3 * max(self._errors[-6:], default=_MOST_ERROR), _LEAST_ERROR, _MOST_ERROR))
        error += _ERROR_OF_DISTANCE * max(0.0, guess / surely - 1)
        room = self._budget / (1 + min(error, _MOST_ERROR)) - self._model.intercept
        return max(surely, math.floor(room / slope))

    def _guess(self, known: _Readings) -> int:
        """The largest size that fits by the line of the readings so far."""
        room = self._budget - known.last.peak
        farthest = known.fitting + _examples_in(room, self._rise(known))
        if not self._careful:
            return farthest
        far = FAR_ALONE if known.secant() is None else FAR
        far = FAR_KNOWN if len(self._intercepts()) >= _ENOUGH else far
        trusted = min(far * known.fitting, self._max_batch_size) // 1
        if farthest > trusted:
            rise_at_most = (known.last.peak - self._base) / known.fitting
            safe = known.fitting + _examples_in(room, rise_at_most)
            farthest = max(safe, min(farthest, int(trusted)))
        return farthest

    def _between(self, known: _Readings) -> int:
        """The largest size that fits by the line from the readings to one that exceeded the budget."""
        size, peak = known.exceeded
        below, low = (known.fitting, known.last.peak) if known.of_size else (0, self._base)
        rise = (peak - low) / (size - below)
        if not math.isfinite(rise) or rise <= 0:
            return (below + size) // 2
        return min(below + _examples_in(self._budget - low, rise), size - 1)

    def _rise(self, known: _Readings) -> float:
        """Bytes that one more example is expected to take."""
        secant = known.secant()
        if secant is not None and secant > 0:
            return secant
        # Rather too steep than too flat: the next probe must not exceed the budget.
        intercept = min(self._intercepts(), default=self._base)
        return (known.last.peak - min(intercept, known.last.peak)) / known.fitting

    def _note(self, known: _Readings, size: int, reading: Reading) -> None:
        if not known.of_size and known.predicted[size] and not reading.out_of_memory:
            self._errors.append(abs(reading.peak / known.predicted[size] - 1))
        if reading.out_of_memory or reading.peak > self._budget:
            if size == 1:
                needs = "runs out of memory" if reading.out_of_memory else f"needs {shown(reading.peak)}"
                raise ConfigError(
                    f"bucket_duration_bins: {known.bucket} {needs} with one example, but the budget is "
                    f"{shown(self._budget)}; shorten the bins, raise the budget, or make the model lighter (freeze, "
                    "LoRA, activation checkpointing).",
                    page=Help.OUT_OF_MEMORY,
                )
            known.seen = min(known.seen, size - 1)
            known.exceeded = (size, math.inf if reading.out_of_memory else reading.peak)
            return
        known.of_size[size] = reading
        rise = known.rise_at_least(self._nothing(known))
        # From the largest sizes alone: a chunk of logits, which stops growing, makes lines through small ones too
        # steep.
        known.by_line = known.fitting + _examples_in(self._budget - known.last.peak, rise)
        if size == 1:
            # No smaller probe can decide whether two examples fit, so the intercepts of other buckets do. A floor, such
            # as the batch of another group in the same step, hides those of their largest sizes.
            least = [other.least_intercept() for other in self._known]
            nothing = [*self._intercepts(), *(found for found in least if found is not None)]
            if nothing and 2 * reading.peak - OF_OTHERS**2 * max(nothing) > self._budget:
                known.seen = 1

    def _nothing(self, known: _Readings) -> float:
        """An upper bound of what a step without examples takes, or of the intercept of the last reading's line."""
        longer = [other for other in self._known if _within(known.bucket, other.bucket)]
        intercepts = [found for other in longer if (found := other.intercept()) is not None]
        peaks = [other.smallest_peak for other in (*longer, known)]
        return min([*peaks, *([OF_OTHERS * max(intercepts)] if intercepts else [])])

    def _intercepts(self) -> list[float]:
        """The intercepts of the buckets with two readings."""
        return [found for known in self._known if (found := known.intercept()) is not None]


def spread_out(count: int) -> list[int]:
    """The numbers 0 to ``count - 1`` in an order that begins with the ends and then halves the gaps.

    Example:
        >>> spread_out(5)
        [0, 4, 2, 1, 3]
    """
    order = [0, count - 1] if count > 1 else list(range(count))
    gaps = [(0, count - 1)]
    for low, high in gaps:
        middle = (low + high) // 2
        if middle not in (low, high):
            order.append(middle)
            gaps += [(low, middle), (middle, high)]
    return order


def _within(shorter: Bucket, longer: Bucket) -> bool:
    """Whether the examples of one bucket are no longer than those of the other, in input and output."""
    return all(a <= b for a, b in zip(lengths(shorter.shape), lengths(longer.shape), strict=True))


def _examples_in(room: float, rise: float) -> int:
    """How many examples of ``rise`` bytes fit into ``room`` bytes."""
    return MAX_BATCH_SIZE if rise <= 0 else math.floor(room / rise)
