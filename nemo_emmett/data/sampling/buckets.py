"""Examples of like length, gathered until there is a batch for every rank."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, NamedTuple

from lhotse.dataset.sampling.base import SamplingConstraint, TimeConstraint


class Drawn(NamedTuple):
    """An example, and by what it is found again."""

    example: Any
    leaf: int
    chunk: int
    index: int


class _Bucket:
    def __init__(self, constraint: SamplingConstraint) -> None:
        self.full: list[list[Drawn]] = []
        self.open: list[Drawn] = []
        self.constraint = deepcopy(constraint)  # NeMo's hold counters inside, which their copy() shares
        self.constraint.reset()

    def add(self, drawn: Drawn) -> None:
        self.open.append(drawn)
        self.constraint.add(drawn.example)
        if self.constraint.close_to_exceeding():  # the rule of lhotse's samplers
            self.full.append(self.open)
            self.open = []
            self.constraint.reset()

    def batches(self) -> list[list[Drawn]]:
        """The full ones, and the one that is being filled."""
        return [*self.full, self.open] if self.open else list(self.full)


class Buckets:
    """Puts examples into buckets; as soon as one holds a full batch for each rank, these batches are a step.

    So batches come in the order in which their examples were drawn, as closely as their lengths allow, and no share of
    the blend gathers in a buffer. All batches of a step are from one bucket: no rank waits for another's longer batch.

    Args:
        constraint: NeMo's or lhotse's measure of a batch; it knows the bucket of an example, and when a batch is full.
        duration_bins: limits between the buckets; None: one bucket.
        world_size: number of ranks.
        drop_last: leave out what does not fill a batch for every rank when the data ends.
    """

    def __init__(
        self, constraint: SamplingConstraint, duration_bins: Sequence | None, world_size: int, drop_last: bool
    ) -> None:
        self.constraint = constraint
        self.duration_bins = duration_bins
        self.world_size = world_size
        self.drop_last = drop_last
        self._buckets: dict[int, _Bucket] = {}

    def add(self, drawn: Drawn) -> list[list[Drawn]] | None:
        """Take an example; return the batches of a step, one for each rank, if it completes one."""
        number = 0
        if self.duration_bins is not None:
            number = self.constraint.select_bucket(self.duration_bins, example=drawn.example)
        if (bucket := self._buckets.get(number)) is None:
            bucket = self._buckets[number] = _Bucket(self.constraint)
        bucket.add(drawn)
        if len(bucket.full) < self.world_size:
            return None
        step, bucket.full = bucket.full, []
        return step

    def flush(self) -> tuple[list[list[list[Drawn]]], int]:
        """What is left when the data ends, as steps, and the number of examples that fit into none.

        Batches are no larger than others; where there is none for some ranks, larger ones are halved.
        """
        steps, left_out = [], 0
        for number in sorted(self._buckets):
            left = [drawn for batch in self._buckets[number].batches() for drawn in batch]
            if self.drop_last:
                left_out += len(left)
                continue
            batches = self._shared_out(left)
            complete = len(batches) // self.world_size * self.world_size
            left_out += sum(len(batch) for batch in batches[complete:])
            steps += [batches[first : first + self.world_size] for first in range(0, complete, self.world_size)]
        self._buckets = {}
        return steps, left_out

    def _shared_out(self, left: list[Drawn]) -> list[list[Drawn]]:
        """Batches of like length, as many as make whole steps if there are enough examples for it."""
        bucket = _Bucket(self.constraint)
        only_counts = isinstance(self.constraint, TimeConstraint) and self.constraint.max_duration is None
        if not only_counts:  # some examples have no length in seconds
            # The longest first: then no later one is longer than what a batch was found to have room for.
            left = sorted(left, key=lambda drawn: self.constraint.measure_length(drawn.example), reverse=True)
        for drawn in left:
            bucket.add(drawn)
        batches = bucket.batches()
        while len(batches) % self.world_size and (largest := max(batches, key=len)) and len(largest) > 1:
            batches.remove(largest)
            batches += [largest[::2], largest[1::2]]
        return batches

    def waiting(self) -> list[Drawn]:
        """All examples in the buckets, those of a bucket in the order in which they came."""
        return [
            drawn for number in sorted(self._buckets) for batch in self._buckets[number].batches() for drawn in batch
        ]
