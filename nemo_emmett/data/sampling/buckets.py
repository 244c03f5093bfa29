"""Buckets: examples of similar length are collected until there is a batch for every rank."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lhotse.dataset.sampling.base import SamplingConstraint, TimeConstraint


class SampledExample(NamedTuple):
    """An example, and the numbers by which a resumed run reads it again."""

    example: Any
    source: int
    chunk: int
    index: int


class _Bucket:
    def __init__(self, constraint: SamplingConstraint) -> None:
        self.full: list[list[SampledExample]] = []
        self.open: list[SampledExample] = []
        self.constraint = deepcopy(constraint)  # NeMo's constraints have counters inside that copy() would share
        self.constraint.reset()

    def add(self, sampled: SampledExample) -> None:
        self.open.append(sampled)
        self.constraint.add(sampled.example)
        if self.constraint.close_to_exceeding():  # the rule of lhotse's samplers
            self.full.append(self.open)
            self.open = []
            self.constraint.reset()

    def batches(self) -> list[list[SampledExample]]:
        """The full batches, and the one that is being filled."""
        return [*self.full, self.open] if self.open else list(self.full)


@dataclass
class Buckets:
    """Puts examples into buckets; as soon as one has a full batch for each rank, these batches are a step.

    So batches come in the order in which their examples were sampled, as closely as their lengths allow, and keep the
    shares of the blend. All batches of a step are from one bucket: no rank waits for another's longer batch.

    Args:
        constraint: NeMo's or lhotse's measure of a batch: the bucket of an example, and when a batch is full.
        duration_bins: bin edges between the buckets; None: one bucket.
        world_size: number of ranks.
        drop_last: leave out what does not fill a batch for every rank when the data ends.
    """

    constraint: SamplingConstraint
    duration_bins: Sequence | None
    world_size: int
    drop_last: bool
    _buckets: dict[int, _Bucket] = field(default_factory=dict, init=False)

    def add(self, sampled: SampledExample) -> list[list[SampledExample]] | None:
        """Add an example; return the batches of a step, one for each rank, if it completes one."""
        number = 0
        if self.duration_bins is not None:
            number = self.constraint.select_bucket(self.duration_bins, example=sampled.example)
        if (bucket := self._buckets.get(number)) is None:
            bucket = self._buckets[number] = _Bucket(self.constraint)
        bucket.add(sampled)
        if len(bucket.full) < self.world_size:
            return None
        step, bucket.full = bucket.full, []
        return step

    def flush(self) -> tuple[list[list[list[SampledExample]]], int]:
        """Empty the buckets when the data ends.

        No batch is larger than before; if there are too few for all ranks, larger ones are halved.

        Returns:
            the last steps, and the number of examples that fit into none.
        """
        steps, left_out = [], 0
        for number in sorted(self._buckets):
            left = [sampled for batch in self._buckets[number].batches() for sampled in batch]
            if self.drop_last:
                left_out += len(left)
                continue
            batches = self._divided(left)
            complete = len(batches) // self.world_size * self.world_size
            left_out += sum(len(batch) for batch in batches[complete:])
            steps += [batches[first : first + self.world_size] for first in range(0, complete, self.world_size)]
        self._buckets = {}
        return steps, left_out

    def _divided(self, left: list[SampledExample]) -> list[list[SampledExample]]:
        """Batches of similar length, as many as make whole steps if there are enough examples for it."""
        bucket = _Bucket(self.constraint)
        only_counts = isinstance(self.constraint, TimeConstraint) and self.constraint.max_duration is None
        if not only_counts:  # else examples may have no length in seconds
            # The longest first: a batch is full when one more example as long as its longest would not fit.
            left = sorted(left, key=lambda sampled: self.constraint.measure_length(sampled.example), reverse=True)
        for sampled in left:
            bucket.add(sampled)
        batches = bucket.batches()
        while len(batches) % self.world_size and (largest := max(batches, key=len)) and len(largest) > 1:
            batches.remove(largest)
            batches += [largest[::2], largest[1::2]]
        return batches

    def waiting(self) -> list[SampledExample]:
        """All examples in the buckets, those of a bucket in the order in which they were added."""
        batches = [batch for number in sorted(self._buckets) for batch in self._buckets[number].batches()]
        return [sampled for batch in batches for sampled in batch]
