"""The examples of one source, by number: a chunk of records is read, made into examples, and sent through NeMo's chain.

A chunk is computed the same whenever it is computed. So the state of a source is the number of its chunk and how many
of its examples are taken, and an example that waits in a bucket is remembered by its chunk and its place in it.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from nemo_emmett.data.config.sources import Source
from nemo_emmett.data.io.skipped_records import SkippedRecords
from nemo_emmett.data.readers.base import Records
from nemo_emmett.data.readers.examples import ExampleKind, Examples
from nemo_emmett.data.readers.registry import defaults_of, open_source
from nemo_emmett.data.sampling.shuffle import RecordOrder
from nemo_emmett.data.sampling.transforms import TransformPipeline
from nemo_emmett.errors import DataError

CHUNK = 16
"""Records that are read at a time: enough to make the chain's overhead small, few enough for an early first batch."""

OPEN_CHUNKS = 16
"""Chunks that are open at a time where records make several examples: those of 256 records stand among one another."""

BLOCK = 1024
"""Examples of a stream that are shuffled together."""

EMPTY_RECORDS_IN_A_ROW = 10_000
"""A source that has been read through, and at least so far, without one usable example stops the run."""


class WorkerInfo(NamedTuple):
    """Which part of every source a worker reads: the workers take its records, or chunks of a stream, by turns."""

    worker: int = 0
    num_workers: int = 1


class ChunkReader(ABC):
    """The records of a source in chunks, which the workers take by turns."""

    @abstractmethod
    def read(self, chunk: int, epoch: int, share: WorkerInfo) -> list | None:
        """The examples of a worker's chunk number ``chunk``, before NeMo's chain; None past the end of an epoch."""

    @abstractmethod
    def reseed(self, seed: Sequence[int]) -> None:
        """Shuffle by another seed from now on."""

    @abstractmethod
    def records_in_a_pass(self) -> int | None:
        """How many records there are; None where nobody has counted."""


class RecordChunks(ChunkReader):
    """Chunks of a source whose records can be read by number.

    Args:
        source: the source.
        records: reads its records.
        order: in which they come.
        kind: what the dataset takes.
        skipped_records: ledger for records that make no example.
        finite: whether each epoch is one pass; otherwise passes follow one another without end.
        forbidden: what no text may hold.
    """

    def __init__(
        self,
        source: Source,
        records: Records,
        order: RecordOrder,
        kind: ExampleKind,
        skipped_records: SkippedRecords,
        finite: bool,
        forbidden: re.Pattern | None = None,
    ) -> None:
        self.source = source
        self.forbidden = forbidden
        self.records = records
        self.order = order
        self.kind = kind
        self.skipped_records = skipped_records
        self.finite = finite
        self._defaults = defaults_of(source)
        self._prepared: list[tuple[int, int, int]] = []

    def reseed(self, seed: Sequence[int]) -> None:
        """See :meth:`ChunkReader.reseed`."""
        self.order.reseed(seed)

    def records_in_a_pass(self) -> int | None:
        """How many records there are."""
        return len(self.order)

    def read(self, chunk: int, epoch: int, share: WorkerInfo) -> list | None:
        """See :meth:`ChunkReader.read`."""
        total = len(self.order)
        first = chunk * CHUNK * share.num_workers + share.worker
        positions = range(first, first + CHUNK * share.num_workers, share.num_workers)
        if self.finite:
            positions = [epoch * total + position for position in positions if position < total]
            if not positions:
                return None
        found = []
        for position in positions:
            self._prepare(position)
            found.extend(self.records.read(*self.order.locate(position)))
        if self.kind is ExampleKind.AS_READ:
            return found
        return list(Examples(found, self.kind, self._defaults, self.skipped_records, self.forbidden))

    def _prepare(self, position: int) -> None:
        if any(self.order.is_sequential):
            stretches = self.order.stretches_to_prepare(position)
            for stretch in stretches:
                if stretch not in self._prepared:
                    self.records.prepare(*stretch)
            self._prepared = stretches


class StreamChunks(ChunkReader):
    """Chunks of a source that can only be read from its beginning; going back reads it again.

    Args:
        source: the source; its readers shuffle shards by the seed given here.
        kind: what the dataset takes.
        skipped_records: ledger for records that make no example.
        finite: whether each epoch is one pass.
        shuffle: whether examples of a block are shuffled.
        seed: of all shuffling.
        forbidden: what no text may hold.
    """

    def __init__(
        self,
        source: Source,
        kind: ExampleKind,
        skipped_records: SkippedRecords,
        finite: bool,
        shuffle: bool,
        seed: Sequence[int],
        forbidden: re.Pattern | None = None,
    ) -> None:
        self.source = source
        self.forbidden = forbidden
        self.kind = kind
        self.skipped_records = skipped_records
        self.finite = finite
        self.shuffle = shuffle
        self.seed = list(seed)
        self._process = os.getpid()
        self._epoch: int | None = None
        self._stream: Iterator = iter(())
        self._block: list = []
        self._number = -1  # of the block at hand

    def reseed(self, seed: Sequence[int]) -> None:
        """See :meth:`ChunkReader.reseed`."""
        self.seed, self._epoch = list(seed), None

    def records_in_a_pass(self) -> int | None:
        """Unknown."""
        return None

    def read(self, chunk: int, epoch: int, share: WorkerInfo) -> list | None:
        """See :meth:`ChunkReader.read`."""
        start = (chunk * share.num_workers + share.worker) * CHUNK
        wanted, offset = divmod(start, BLOCK)
        # A forked worker shares its parent's places in open files: it opens them itself.
        if epoch != self._epoch or wanted < self._number or self._process != os.getpid():
            self._open(epoch)
        while self._number < wanted:
            self._block = list(islice(self._stream, BLOCK))
            self._number += 1
            if not self._block:
                break
            if self.shuffle:
                order = np.random.default_rng([*self.seed, epoch, self._number]).permutation(len(self._block))
                self._block = [self._block[index] for index in order]
        examples = self._block[offset : offset + CHUNK]
        return examples or None

    def _open(self, epoch: int) -> None:
        source = self.source.with_keys(shard_seed=sum(self.seed) + epoch, force_finite=self.finite)
        cuts, _ = open_source(source, self.skipped_records, self.kind)
        if self.kind is not ExampleKind.AS_READ:
            cuts = Examples(cuts, self.kind, defaults_of(self.source), self.skipped_records, self.forbidden)
        self._stream = iter(cuts) if self.finite else _without_end(cuts)
        self._process, self._epoch, self._number, self._block = os.getpid(), epoch, -1, []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stream": iter(()), "_block": [], "_epoch": None}


def _without_end(cuts: Any) -> Iterator:
    while True:
        nothing = True
        for cut in cuts:
            nothing = False
            yield cut
        if nothing:
            return


class Leaf:
    """The examples of one source in the order in which one worker draws them.

    Where a record makes several examples (one per target language), they must not all stand in one batch: then several
    chunks are open at a time, and each example comes from any of them.

    Args:
        reader: reads its records.
        chain: NeMo's chain for the group that the source belongs to.
        seed: of the chain's random stages, and of the order of examples within chunks.
        share: the worker's.
        epoch: which epoch of finite data this is.
        name: of the source, for messages.
        num_open: chunks that are open at a time; with more than one, the examples of a chunk come in a random order.
    """

    def __init__(
        self,
        reader: ChunkReader,
        chain: TransformPipeline,
        seed: Sequence[int],
        share: WorkerInfo,
        epoch: int = 0,
        name: str = "",
        num_open: int = 1,
    ) -> None:
        self.reader = reader
        self.chain = chain
        self.seed = list(seed)
        self.share = share
        self.epoch = epoch
        self.name = name
        self.num_open = num_open
        self._next_chunk = 0
        self._drawn = 0
        self._open: list[_OpenChunk] = []
        self._at_end = False
        self._empty = 0

    def next(self) -> tuple[Any, tuple[int, int]]:
        """The next example, with its chunk and its place in it.

        Raises:
            StopIteration: at the end of finite data.
            DataError: if the source is endless but nothing of it can be used.
        """
        while True:
            choice = self._choice()
            if choice == len(self._open):
                self._open_another()
                continue
            chunk = self._open[choice]
            if chunk.taken >= len(chunk.examples):
                del self._open[choice]
                continue
            self._drawn += 1
            chunk.taken += 1
            return chunk.examples[chunk.taken - 1], (chunk.number, chunk.taken - 1)

    def _choice(self) -> int:
        """Which of the open chunks gives the next example; one past the last: a new one."""
        if self._at_end:
            if not self._open:
                raise StopIteration
            return _mixed(self.seed[0], self.seed[-1], self._drawn) % len(self._open)
        return min(_mixed(self.seed[0], self.seed[-1], self._drawn) % self.num_open, len(self._open))

    def _open_another(self) -> None:
        examples = self._examples_of(self._next_chunk)
        if examples is None:
            self._at_end = True
            return
        self._note_empty(examples)
        if examples:
            self._open.append(_OpenChunk(self._next_chunk, 0, examples))
        self._next_chunk += 1

    def examples_at(self, places: Sequence[tuple[int, int]]) -> list[Any]:
        """The examples at these chunks and places in them; None where the data has changed and there is none."""
        found = {}
        for chunk in sorted({chunk for chunk, _ in places}):
            found[chunk] = self._examples_of(chunk) or []
        return [found[chunk][index] if index < len(found[chunk]) else None for chunk, index in places]

    def state_dict(self) -> dict[str, Any]:
        """The chunks that are open, with how many examples of each are taken, and how far the source is."""
        opened = [[chunk.number, chunk.taken] for chunk in self._open]
        return {
            "seed": list(self.seed),
            "open": opened,
            "next_chunk": self._next_chunk,
            "drawn": self._drawn,
            "at_end": self._at_end,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, by the seed that it was shuffled by."""
        if self.seed != list(state["seed"]):
            self.seed = list(state["seed"])
            self.reader.reseed(self.seed)
        self._open = [_OpenChunk(number, taken, []) for number, taken in state["open"]]
        for chunk in sorted(self._open, key=lambda chunk: chunk.number):  # a stream is read forward
            chunk.examples = self._examples_of(chunk.number) or []
        self._next_chunk, self._drawn, self._at_end = state["next_chunk"], state["drawn"], state["at_end"]

    def _examples_of(self, chunk: int) -> list | None:
        examples = self.reader.read(chunk, self.epoch, self.share)
        if examples is None:
            return None
        seed = [*self.seed, self.share.worker, self.epoch, chunk]
        examples = self.chain.run(examples, seed)
        if self.num_open > 1:
            examples = [examples[index] for index in np.random.default_rng(seed).permutation(len(examples))]
        return examples

    def _note_empty(self, examples: list) -> None:
        self._empty = 0 if examples else self._empty + CHUNK
        limit = max(self.reader.records_in_a_pass() or 0, EMPTY_RECORDS_IN_A_ROW)
        if self._empty > limit:
            raise DataError(
                f"{self.name}: of the last {self._empty} records nothing could be used, or the filters leave nothing "
                "of them; look at the report of bad records, and at the filters (min_/max_ keys, bucket_duration_bins)."
            )


@dataclass
class _OpenChunk:
    number: int
    taken: int
    examples: list


def _mixed(*numbers: int) -> int:
    """A number that looks drawn at random, of numbers that do not (the finaliser of SplitMix64)."""
    mixed = 0
    for number in numbers:
        mixed = (mixed + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 31
    return mixed


def chunks_to_open(reader: ChunkReader, chain: TransformPipeline, shuffle: bool) -> int:
    """How many chunks of a source are to be open at a time: several where its records make several examples each, one
    per target language, speed or window."""
    if not shuffle or (examples := reader.read(0, 0, WorkerInfo())) is None:
        return 1
    made = max(len(examples), len(chain.run(examples, [0])))
    chain.filtered.clear()
    return OPEN_CHUNKS if made > CHUNK else 1


def make_reader(
    source: Source,
    records: Records | None,
    kind: ExampleKind,
    skipped_records: SkippedRecords,
    finite: bool,
    shuffle: bool,
    seed: Sequence[int],
    group_size: int,
    forbidden: re.Pattern | None,
) -> ChunkReader:
    """The reader of a source: by number where that can be done, as a stream otherwise.

    Raises:
        DataError: if the source holds nothing.
    """
    if records is None:
        return StreamChunks(source, kind, skipped_records, finite, shuffle, seed, forbidden)
    if not sum(records.shard_sizes):
        raise DataError(f"{source.place}: {source.name} is empty; correct the path, or drop the source.")
    order = RecordOrder(records.shard_sizes, records.is_sequential, shuffle, seed, group_size)
    return RecordChunks(source, records, order, kind, skipped_records, finite, forbidden)
