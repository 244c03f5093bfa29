"""The order in which a source's records are read: a function from position to record, so that its state is a number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

SHUFFLE_BLOCK_SIZE = 256
"""Records of a block of neighbours: large enough to be read from disk in one go, small enough to shuffle well."""


class RecordLocation(NamedTuple):
    """A shard and the number of a record in it, from 0."""

    shard: int
    number: int


@dataclass(frozen=True)
class _Pass:
    """The blocks of one pass over all records, in the order in which they are read."""

    shards: np.ndarray  # (S,) of each block
    starts: np.ndarray  # (S,) number of each block's first record
    sizes: np.ndarray  # (S,) records of each block
    ends: np.ndarray  # (S,) position, within the pass, at which each block ends


@dataclass(frozen=True)
class _Group:
    """The records of consecutive blocks, shuffled together."""

    start: int  # position of its first record within the pass
    shards: np.ndarray  # (N,) of its records in the order in which they are read
    numbers: np.ndarray  # (N,)


@dataclass
class RecordOrder:
    """Maps positions to records: pass after pass over all shards, each pass in another order.

    In each pass the shards come in a random order, and each is cut into blocks of neighbouring records. The blocks come
    in a random order, or, if the shard can only be read forward (gzip), in the order of the file. Consecutive blocks,
    across shards, form groups of about ``group_size`` records, and the records of a group are shuffled. So the records
    that are read at a time are in few places, no record repeats in a pass, and only one group's numbers are in memory.
    All workers and ranks compute the same order.

    Args:
        shard_sizes: records of each shard.
        is_sequential: for each shard, whether only reading forward is cheap.
        shuffle: False: the order of the files, in every pass.
        seed: of all shuffling.
        group_size: records that are shuffled together, at least.
    """

    shard_sizes: Sequence[int]
    is_sequential: Sequence[bool]
    shuffle: bool
    seed: Sequence[int]
    group_size: int
    _pass: tuple[int, _Pass] | None = field(default=None, init=False)
    _group: tuple[int, _Group] | None = field(default=None, init=False)

    def reseed(self, seed: Sequence[int]) -> None:
        """Shuffle by another seed from now on."""
        self.seed, self._pass, self._group = seed, None, None

    def __len__(self) -> int:
        """Records in one pass."""
        return sum(self.shard_sizes)

    def locate(self, position: int) -> RecordLocation:
        """The record at a position (from 0, without end)."""
        group, index = self._group_at(position)
        return RecordLocation(int(group.shards[index]), int(group.numbers[index]))

    def ranges_to_prepare(self, position: int) -> list[tuple[int, int, int]]:
        """The ranges (shard, start, stop) of sequential shards that hold the group of records at a position."""
        group, _ = self._group_at(position)
        ranges = []
        for shard in np.unique(group.shards):
            if self.is_sequential[shard]:
                numbers = group.numbers[group.shards == shard]
                ranges.append((int(shard), int(numbers.min()), int(numbers.max()) + 1))
        return ranges

    def _group_at(self, position: int) -> tuple[_Group, int]:
        """The group of the record at a position, and the record's index in it."""
        number_of_pass, offset = divmod(position, len(self))
        if self._group is not None:
            of_pass, group = self._group
            if of_pass == number_of_pass and group.start <= offset < group.start + len(group.numbers):
                return group, offset - group.start
        blocks = self._blocks_of(number_of_pass)
        begins = blocks.ends - blocks.sizes
        index = begins[np.searchsorted(blocks.ends, offset, side="right")] // self.group_size
        first, last = np.searchsorted(begins // self.group_size, [index, index + 1])
        group = self._shuffled(blocks, int(first), int(last), number_of_pass)
        self._group = (number_of_pass, group)
        return group, offset - group.start

    def _shuffled(self, blocks: _Pass, first: int, last: int, number_of_pass: int) -> _Group:
        sizes = blocks.sizes[first:last]
        shards = np.repeat(blocks.shards[first:last], sizes)
        begins = np.cumsum(sizes) - sizes
        numbers = np.arange(sizes.sum()) - np.repeat(begins, sizes) + np.repeat(blocks.starts[first:last], sizes)
        if self.shuffle:
            # A generator for each group, so that a group needs none of those before it.
            order = np.random.default_rng([*self.seed, number_of_pass, 1, first]).permutation(len(numbers))
            shards, numbers = shards[order], numbers[order]
        return _Group(int(blocks.ends[first] - blocks.sizes[first]), shards, numbers)

    def _blocks_of(self, number_of_pass: int) -> _Pass:
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
