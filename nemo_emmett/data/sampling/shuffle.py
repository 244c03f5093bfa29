"""The order in which a source's records are read: a function from position to record, so that its state is a number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

SHUFFLE_BLOCK_SIZE = 256
"""So many neighbouring records are read from one place: long enough for a disk, short enough to be well shuffled."""


class Place(NamedTuple):
    """Where a record stands."""

    shard: int
    number: int  # in the shard, from 0


@dataclass(frozen=True)
class _Pass:
    """One pass over all records: stretches of neighbours, in the order in which they are read."""

    shards: np.ndarray  # (S,) of each stretch
    starts: np.ndarray  # (S,) number of each stretch's first record
    sizes: np.ndarray  # (S,) records of each stretch
    ends: np.ndarray  # (S,) position, within the pass, at which each stretch is over


@dataclass(frozen=True)
class _Group:
    """Stretches that are shuffled together."""

    start: int  # position of its first record within the pass
    shards: np.ndarray  # (N,) of its records in the order in which they are read
    numbers: np.ndarray  # (N,)


class RecordOrder:
    """At which position stands which record: pass after pass over all shards, each in another order.

    In each pass the shards come in a random order; each is cut into stretches of neighbouring records, which come in a
    random order where the shard can be read at any place, and one after the other where it cannot (gzip); consecutive
    stretches, across shards, form groups of about ``group_size`` records, and within its group a record stands
    anywhere. So what is read at a time lies in few places, no record comes twice in a pass, and nothing is held in
    memory but one group's numbers. All workers and ranks compute the same order.

    Args:
        shard_sizes: records of each shard.
        is_sequential: for each shard, whether only reading forward is cheap.
        shuffle: False: as the files have it, in every pass.
        seed: of all shuffling.
        group_size: records that are shuffled together, at least.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        is_sequential: Sequence[bool],
        shuffle: bool,
        seed: Sequence[int],
        group_size: int,
    ) -> None:
        self.shard_sizes = list(shard_sizes)
        self.is_sequential = list(is_sequential)
        self.shuffle = shuffle
        self.seed = list(seed)
        self.group_size = max(group_size, 1)
        self._pass: tuple[int, _Pass] | None = None
        self._group: tuple[tuple[int, int], _Group] | None = None

    def reseed(self, seed: Sequence[int]) -> None:
        """Shuffle by another seed from now on."""
        self.seed, self._pass, self._group = list(seed), None, None

    def __len__(self) -> int:
        """Records in one pass."""
        return sum(self.shard_sizes)

    def locate(self, position: int) -> Place:
        """The record at a position (from 0, without end)."""
        number_of_pass, offset = divmod(position, len(self))
        group = self.group_at(number_of_pass, offset)
        return Place(int(group.shards[offset - group.start]), int(group.numbers[offset - group.start]))

    def stretches_to_prepare(self, position: int) -> list[tuple[int, int, int]]:
        """The stretches (shard, start, stop) of sequential shards that the group at this position reads."""
        number_of_pass, offset = divmod(position, len(self))
        group = self.group_at(number_of_pass, offset)
        stretches = []
        for shard in np.unique(group.shards):
            if self.is_sequential[shard]:
                numbers = group.numbers[group.shards == shard]
                stretches.append((int(shard), int(numbers.min()), int(numbers.max()) + 1))
        return stretches

    def group_at(self, number_of_pass: int, offset: int) -> _Group:
        """The records that are shuffled together with the one at ``offset`` in a pass."""
        if self._group is not None:
            (of_pass, _), group = self._group
            if of_pass == number_of_pass and group.start <= offset < group.start + len(group.numbers):
                return group
        stretches = self._stretches_of(number_of_pass)
        begins = stretches.ends - stretches.sizes
        index = begins[np.searchsorted(stretches.ends, offset, side="right")] // self.group_size
        first, last = np.searchsorted(begins // self.group_size, [index, index + 1])
        group = self._shuffled(stretches, int(first), int(last), number_of_pass)
        self._group = ((number_of_pass, int(index)), group)
        return group

    def _shuffled(self, stretches: _Pass, first: int, last: int, number_of_pass: int) -> _Group:
        sizes = stretches.sizes[first:last]
        shards = np.repeat(stretches.shards[first:last], sizes)
        begins = np.cumsum(sizes) - sizes
        numbers = np.arange(sizes.sum()) - np.repeat(begins, sizes) + np.repeat(stretches.starts[first:last], sizes)
        if self.shuffle:
            order = np.random.default_rng([*self.seed, number_of_pass, 1, first]).permutation(len(numbers))
            shards, numbers = shards[order], numbers[order]
        return _Group(int(stretches.ends[first] - stretches.sizes[first]), shards, numbers)

    def _stretches_of(self, number_of_pass: int) -> _Pass:
        if self._pass is not None and self._pass[0] == number_of_pass:
            return self._pass[1]
        rng = np.random.default_rng([*self.seed, number_of_pass, 0])
        order = np.arange(len(self.shard_sizes))
        if self.shuffle:
            rng.shuffle(order)
        shards, starts, sizes = [], [], []
        for shard in order:
            begins = np.arange(0, self.shard_sizes[shard], SHUFFLE_BLOCK_SIZE)
            if self.shuffle and not self.is_sequential[shard]:
                rng.shuffle(begins)
            shards.append(np.full(len(begins), shard))
            starts.append(begins)
            sizes.append(np.minimum(self.shard_sizes[shard] - begins, SHUFFLE_BLOCK_SIZE))
        all_sizes = np.concatenate(sizes)
        computed = _Pass(np.concatenate(shards), np.concatenate(starts), all_sizes, np.cumsum(all_sizes))
        self._pass = (number_of_pass, computed)
        return computed
