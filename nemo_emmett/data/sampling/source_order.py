"""The order in which the examples of one source come: pass after pass, shuffled in groups of blocks, computed from its
length index."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from nemo_emmett.data.lengths.index import LengthIndex
from nemo_emmett.data.lengths.selection import Selection
from nemo_emmett.errors import DataError, Help

EXAMPLE = np.dtype(
    [
        ("position", np.int64),  # among the draws of its group's mixing
        ("entry", np.int64),  # in the length index of its source
        ("length", np.float64),  # where batches close by a measured limit; of packed recordings, seconds
        ("positions", np.int32),  # where rows are packed: those of the language model's input
        ("answers", np.int32),  # there: tokens of the answer
        ("number_of_pass", np.int32),
        ("source", np.int16),
        ("bucket", np.int16),  # of a packed step, the row
    ]
)
"""What a schedule keeps of an example. Arrays of it are gathered by ``take``, ten times as fast as by indexing."""


def joined(pieces: Iterable[np.ndarray]) -> np.ndarray:
    """Arrays of :data:`EXAMPLE` one after another; as bytes, since NumPy would copy field by field."""
    return np.concatenate(
        [np.empty(0, np.uint8), *(np.ascontiguousarray(piece).view(np.uint8) for piece in pieces)]
    ).view(EXAMPLE)


class Cursor(NamedTuple):
    """How far a source has been drawn from."""

    number_of_pass: int
    group: int  # of the pass
    offset: int  # in the examples that are kept of the group


@dataclass
class SourceOrder:
    """The examples of a source in the order of training, and where in it the next one is.

    In each pass the shards come in a random order, each cut into blocks of neighbouring records, in a random order too.
    Consecutive blocks, across shards, form groups of about ``group_size`` examples, and the examples of a group are
    shuffled. So the records that are read at a time are in few places, and only one group is in memory. Everything is
    computed from the seed: all processes have the same order.

    Args:
        index: of the source.
        selection: leaves examples out, and puts the others into buckets.
        name: of the source, for messages.
        shuffle: False: the order of the files, in every pass.
        seed: of all shuffling.
        group_size: examples that are shuffled together, at least.
        left_out: counts the examples that filters have left out.
        only_pass: number of the one pass that there is over finite data; None: passes follow one another without end.
    """

    index: LengthIndex
    selection: Selection
    name: str
    shuffle: bool
    seed: Sequence[int]
    group_size: int
    left_out: Counter = field(default_factory=Counter)
    only_pass: int | None = None

    def __post_init__(self) -> None:
        self._blocks: tuple[int, np.ndarray, np.ndarray] | None = None  # pass, blocks in its order, groups' first ones
        self._group: tuple[int, int, np.ndarray] | None = None  # pass, group, its examples
        self.cursor = self._counted_until = Cursor(self.only_pass or 0, 0, 0)
        self._kept_in_pass = 0

    def go_to(self, cursor: Cursor, seed: Sequence[int]) -> None:
        """Continue in the middle of a pass that was shuffled by this seed."""
        self.cursor = self._counted_until = cursor
        self._kept_in_pass = 1  # unknown, but that of a whole pass is not known to be none
        if list(seed) != list(self.seed):
            self.seed, self._blocks, self._group = list(seed), None, None

    def take(self, number: int) -> np.ndarray:
        """(M,) :data:`EXAMPLE`, not to be changed: the next examples, ``number`` of them unless a finite pass ends.

        Raises:
            DataError: if a whole pass over endless data has no example that can be used.
        """
        taken = []
        while number > 0 and (group := self._current_group()) is not None:
            piece = group[self.cursor.offset : self.cursor.offset + number]
            taken.append(piece)
            number -= len(piece)
            self.cursor = self.cursor._replace(offset=self.cursor.offset + len(piece))
        return taken[0] if len(taken) == 1 else joined(taken)

    def _current_group(self) -> np.ndarray | None:
        """The group that the next example is in; None at the end of the last pass."""
        while True:
            number_of_pass, group, offset = self.cursor
            if self.only_pass is not None and number_of_pass > self.only_pass:
                return None
            _, starts = self._blocks_of(number_of_pass)
            if group < len(starts) - 1:
                examples = self._group_of(number_of_pass, group)
                if offset < len(examples):
                    return examples
                self.cursor = Cursor(number_of_pass, group + 1, 0)
                continue
            if self.only_pass is None and not self._kept_in_pass:
                raise DataError(
                    f"{self.name}: of its {int(self.index.shard_sizes.sum())} records nothing could be used, or the "
                    "filters leave nothing of them; look at the report of bad records, and at the filters (min_/max_ "
                    "keys, bucket_duration_bins).",
                    page=Help.NOTHING_LEFT,
                )
            self._kept_in_pass = 0
            self.cursor = Cursor(number_of_pass + 1, 0, 0)

    def _group_of(self, number_of_pass: int, group: int) -> np.ndarray:
        if self._group is not None and self._group[:2] == (number_of_pass, group):
            return self._group[2]
        blocks, starts = self._blocks_of(number_of_pass)
        entries, measures = self.index.read_blocks(blocks[starts[group] : starts[group + 1]])
        # A group may be computed again; the filters' examples count once.
        is_new = self._counted_until <= (number_of_pass, group, 0)
        bucket = self.selection.buckets(measures, self.left_out if is_new else None)
        if is_new:
            self._counted_until = Cursor(number_of_pass, group + 1, 0)
        kept = np.flatnonzero(bucket >= 0)
        if self.shuffle:
            # A generator for each group, so that a group needs none of those before it.
            kept = np.random.default_rng([*self.seed, number_of_pass, 1, group]).permutation(kept)
        examples = np.empty(len(kept), EXAMPLE)
        examples["entry"], examples["bucket"] = entries[kept], bucket[kept]
        examples["number_of_pass"] = number_of_pass
        self.selection.fill(examples, measures[kept])
        self._group = (number_of_pass, group, examples)
        self._kept_in_pass += len(examples)
        return examples

    def _blocks_of(self, number_of_pass: int) -> tuple[np.ndarray, np.ndarray]:
        """The blocks of a pass in its order, and at which of them each group starts."""
        if self._blocks is not None and self._blocks[0] == number_of_pass:
            return self._blocks[1:]
        order = np.arange(len(self.index.block_shards))
        if self.shuffle:
            rng = np.random.default_rng([*self.seed, number_of_pass, 0])
            place_of_shard = rng.permutation(len(self.index.shard_sizes))
            order = np.lexsort((rng.random(len(order)), place_of_shard[self.index.block_shards]))
        sizes = np.diff(self.index.block_entries)[order]
        begins = np.cumsum(sizes) - sizes
        groups = begins // self.group_size
        starts = np.flatnonzero(np.diff(groups, prepend=-1, append=groups[-1] + 1 if len(groups) else 0))
        self._blocks = (number_of_pass, order, starts)
        return order, starts

    def examples_at(self, entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The examples of these entries, as far as they exist and are selected.

        Returns:
            (M,) which of the entries they are, and (M,) :data:`EXAMPLE`, the examples, in this order.
        """
        found = np.flatnonzero(entries < self.index.num_entries)
        numbers, measures = self.index.read_blocks(np.unique(self.index.blocks_of(entries[found])))  # ascending
        places = np.searchsorted(numbers, entries[found])
        bucket = self.selection.buckets(measures[places])
        kept = bucket >= 0
        examples = np.empty(int(kept.sum()), EXAMPLE)
        examples["entry"], examples["bucket"] = entries[found][kept], bucket[kept]
        self.selection.fill(examples, measures[places[kept]])
        return found[kept], examples
