"""The examples of one source: chunks of records are read, made into examples, and transformed.

A chunk gives the same examples whenever it is computed. So the state of a source is a chunk number and how many of its
examples were taken, and an example that waits in a bucket is stored as a chunk number and an index.
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
from nemo_emmett.data.readers.registry import ReaderContext, defaults_of, open_source, reader_context
from nemo_emmett.data.sampling.shuffle import RecordOrder
from nemo_emmett.data.sampling.transforms import TransformPipeline
from nemo_emmett.errors import DataError, Help

CHUNK = 16
"""Records that are read at a time: enough for a small overhead of the pipeline, few enough for an early first batch."""

OPEN_CHUNKS = 16
"""Chunks that are open at a time if records make several examples, so that those of 256 records are mixed."""

BLOCK = 1024
"""Examples of a stream that are shuffled together."""

EMPTY_RECORDS_IN_A_ROW = 10_000
"""A source stops the run after a whole pass, and at least as many records as this, without a usable example."""


class WorkerInfo(NamedTuple):
    """Which part of every source a worker reads: the workers take its records, or chunks of a stream, in turn."""

    id: int = 0
    num_workers: int = 1


class ChunkReader(ABC):
    """The records of a source in chunks, which the workers take in turn."""

    @abstractmethod
    def read(self, chunk: int, epoch: int, worker: WorkerInfo) -> list | None:
        """The examples of a worker's chunk number ``chunk``, not transformed; None past the end of an epoch."""

    @abstractmethod
    def reseed(self, seed: Sequence[int]) -> None:
        """Shuffle by another seed from now on."""

    @abstractmethod
    def records_in_a_pass(self) -> int | None:
        """The number of records; None if it is unknown."""

    def restart(self) -> None:  # noqa: B027
        """Read, and count, the records again that were read so far."""


@dataclass
class RecordChunks(ChunkReader):
    """Chunks of a source whose records can be read by number.

    Args:
        source: the source.
        records: reads its records.
        order: in which they are read.
        kind: what the dataset takes.
        skipped_records: counts records that make no example.
        finite: whether each epoch is one pass; otherwise passes follow one another without end.
        forbidden: what no text may contain.
    """

    source: Source
    records: Records
    order: RecordOrder
    kind: ExampleKind
    skipped_records: SkippedRecords
    finite: bool
    forbidden: re.Pattern | None = None

    def __post_init__(self) -> None:
        self._defaults = defaults_of(self.source)
        self._prepared: list[tuple[int, int, int]] = []

    def reseed(self, seed: Sequence[int]) -> None:
        """See :meth:`ChunkReader.reseed`."""
        self.order.reseed(seed)

    def records_in_a_pass(self) -> int | None:
        """The number of records."""
        return len(self.order)

    def read(self, chunk: int, epoch: int, worker: WorkerInfo) -> list | None:
        """See :meth:`ChunkReader.read`."""
        total = len(self.order)
        first = chunk * CHUNK * worker.num_workers + worker.id
        positions = range(first, first + CHUNK * worker.num_workers, worker.num_workers)
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
            ranges = self.order.ranges_to_prepare(position)
            for new in ranges:
                if new not in self._prepared:
                    self.records.prepare(*new)
            self._prepared = ranges


@dataclass
class StreamChunks(ChunkReader):
    """Chunks of a source that can only be read from its beginning; to go back, it is read again.

    Args:
        source: the source; its readers shuffle shards by the seed given here.
        kind: what the dataset takes.
        skipped_records: counts records that make no example.
        finite: whether each epoch is one pass.
        shuffle: whether the examples of a block are shuffled.
        seed: of all shuffling.
        forbidden: what no text may contain.
    """

    source: Source
    kind: ExampleKind
    skipped_records: SkippedRecords
    finite: bool
    shuffle: bool
    seed: Sequence[int]
    forbidden: re.Pattern | None = None

    def __post_init__(self) -> None:
        self._process = os.getpid()
        self._epoch: int | None = None
        self._stream: Iterator = iter(())
        self._block: list = []
        self._number = -1  # of the current block

    def reseed(self, seed: Sequence[int]) -> None:
        """See :meth:`ChunkReader.reseed`."""
        self.seed, self._epoch = seed, None

    def restart(self) -> None:
        """See :meth:`ChunkReader.restart`."""
        self._epoch = None

    def records_in_a_pass(self) -> int | None:
        """Unknown."""
        return None

    def read(self, chunk: int, epoch: int, worker: WorkerInfo) -> list | None:
        """See :meth:`ChunkReader.read`."""
        start = (chunk * worker.num_workers + worker.id) * CHUNK
        wanted, offset = divmod(start, BLOCK)
        # A forked worker shares the file offsets of its parent's open files, so it opens its own.
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
        with reader_context(ReaderContext(self.skipped_records, self.kind)):  # for our readers inside of NeMo's
            cuts, _ = open_source(source, self.skipped_records, self.kind)
        if self.kind is not ExampleKind.AS_READ:
            cuts = Examples(cuts, self.kind, defaults_of(self.source), self.skipped_records, self.forbidden)
        self._stream = iter(cuts) if self.finite else _repeated(cuts)
        self._process, self._epoch, self._number, self._block = os.getpid(), epoch, -1, []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stream": iter(()), "_block": [], "_epoch": None}


def _repeated(cuts: Any) -> Iterator:
    """The cuts, pass after pass, until a pass has none."""
    while True:
        is_empty = True
        for cut in cuts:
            is_empty = False
            yield cut
        if is_empty:
            return


@dataclass
class SourceIterator:
    """The examples of one source in the order in which one worker takes them.

    If records make several examples (one per target language), they must not all be in one batch. Then several chunks
    are open at a time, and each example comes from any of them.

    Args:
        reader: reads the records.
        pipeline: transforms of the group that the source belongs to.
        seed: of the random transforms, and of the order of examples within chunks.
        worker: whose examples these are.
        epoch: number of the epoch of finite data.
        name: of the source, for messages.
        num_open: chunks that are open at a time; with more than one, the examples of a chunk are shuffled.
    """

    reader: ChunkReader
    pipeline: TransformPipeline
    seed: list[int]
    worker: WorkerInfo
    epoch: int = 0
    name: str = ""
    num_open: int = 1

    def __post_init__(self) -> None:
        self._next_chunk = 0
        self._drawn = 0
        self._open: list[_OpenChunk] = []
        self._at_end = False
        self._empty = 0

    def next(self) -> tuple[Any, tuple[int, int]]:
        """The next example, with its chunk and its index in the chunk.

        Raises:
            StopIteration: at the end of finite data.
            DataError: if the source is endless but has no usable example.
        """
        while True:
            choice = self._choose_chunk()
            if choice == len(self._open):
                self._open_chunk()
                continue
            chunk = self._open[choice]
            if chunk.taken >= len(chunk.examples):
                del self._open[choice]
                continue
            self._drawn += 1
            chunk.taken += 1
            return chunk.examples[chunk.taken - 1], (chunk.number, chunk.taken - 1)

    def _choose_chunk(self) -> int:
        """Which of the open chunks gives the next example; one past the last: a new one."""
        if self._at_end and not self._open:
            raise StopIteration
        # A hash of the count takes the place of a generator, whose state would have to be saved.
        number = _hash(self.seed[0], self.seed[-1], self._drawn)
        return number % len(self._open) if self._at_end else min(number % self.num_open, len(self._open))

    def _open_chunk(self) -> None:
        examples = self._examples_of(self._next_chunk)
        if examples is None:
            self._at_end = True
            return
        self._empty = 0 if examples else self._empty + CHUNK
        if self._empty > max(self.reader.records_in_a_pass() or 0, EMPTY_RECORDS_IN_A_ROW):
            raise DataError(
                f"{self.name}: of the last {self._empty} records nothing could be used, or the filters leave nothing "
                "of them; look at the report of bad records, and at the filters (min_/max_ keys, "
                "bucket_duration_bins).",
                page=Help.NOTHING_LEFT,
            )
        if examples:
            self._open.append(_OpenChunk(self._next_chunk, 0, examples))
        self._next_chunk += 1

    def examples_at(self, places: Sequence[tuple[int, int]]) -> list[Any]:
        """The examples at these chunks and indices; None if the data has changed and there is none."""
        found = {chunk: self._examples_of(chunk) or [] for chunk in sorted({chunk for chunk, _ in places})}
        return [found[chunk][index] if index < len(found[chunk]) else None for chunk, index in places]

    def state_dict(self) -> dict[str, Any]:
        """The open chunks, with how many examples of each were taken, and the position in the source."""
        return {
            "seed": list(self.seed),
            "open": [[chunk.number, chunk.taken] for chunk in self._open],
            "next_chunk": self._next_chunk,
            "drawn": self._drawn,
            "at_end": self._at_end,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state, with its seed."""
        if self.seed != list(state["seed"]):
            self.seed = list(state["seed"])
            self.reader.reseed(self.seed)
        self._open = [_OpenChunk(number, taken, []) for number, taken in state["open"]]
        for chunk in sorted(self._open, key=lambda chunk: chunk.number):  # a stream is read forward
            chunk.examples = self._examples_of(chunk.number) or []
        self._next_chunk, self._drawn, self._at_end = state["next_chunk"], state["drawn"], state["at_end"]

    def _examples_of(self, chunk: int) -> list | None:
        examples = self.reader.read(chunk, self.epoch, self.worker)
        if examples is None:
            return None
        # Seeded by the chunk, so that random transforms give the same examples when a resumed run reads it again.
        seed = [*self.seed, self.worker.id, self.epoch, chunk]
        examples = self.pipeline.run(examples, seed)
        if self.num_open > 1:
            examples = [examples[index] for index in np.random.default_rng(seed).permutation(len(examples))]
        return examples


@dataclass
class _OpenChunk:
    number: int
    taken: int
    examples: list


def _hash(*numbers: int) -> int:
    """A pseudo-random number of 64 bits (SplitMix64's finaliser; Steele et al. 2014)."""
    mixed = 0
    for number in numbers:
        mixed = (mixed + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 31
    return mixed


def chunks_to_open(reader: ChunkReader, pipeline: TransformPipeline, shuffle: bool) -> int:
    """How many chunks of a source to open at a time: several if its records make several examples each, one per target
    language, speed or window."""
    if not shuffle or (examples := reader.read(0, 0, WorkerInfo())) is None:
        return 1
    made = max(len(examples), len(pipeline.run(examples, [0])))
    pipeline.filtered.clear()
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
    """The reader of a source: by record number if possible, else as a stream.

    Raises:
        DataError: if the source is empty.
    """
    if records is None:
        return StreamChunks(source, kind, skipped_records, finite, shuffle, seed, forbidden)
    if not sum(records.shard_sizes):
        raise DataError(f"{source.place}: {source.name} is empty; correct the path, or drop the source.")
    order = RecordOrder(records.shard_sizes, records.is_sequential, shuffle, seed, group_size)
    return RecordChunks(source, records, order, kind, skipped_records, finite, forbidden)
