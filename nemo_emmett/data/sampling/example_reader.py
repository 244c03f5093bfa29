"""Addresses to examples: reads the entries of a batch, and nothing else, wherever they are in the data.

Only what cannot be read although the length index has it is counted as skipped here. Which records were read and which
of them cannot be used, the length index says (:meth:`LengthIndex.report`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import NamedTuple

import numpy as np

from nemo_emmett.data.io.index import FileChanged
from nemo_emmett.data.io.skipped_records import SkippedRecords
from nemo_emmett.data.lengths.index import LengthIndex
from nemo_emmett.data.lengths.measures import Measures, measure
from nemo_emmett.data.lengths.notes import Recorder
from nemo_emmett.data.lengths.packing import Packing
from nemo_emmett.data.readers.base import Records
from nemo_emmett.data.readers.examples import ExampleKind, Examples, SourceDefaults, mark_row
from nemo_emmett.data.sampling.transforms import TransformPipeline
from nemo_emmett.errors import DataError

_SECONDS_OFF, _SHARE_OFF = 0.1, 0.01
"""By how much the duration of an example may differ from its entry: headers of recordings are less exact than files."""


class Place(NamedTuple):
    """Where an entry of a source is: one of the examples that a record makes."""

    shard: int
    record: int  # in its shard, from 0
    k: int  # how many entries of the record come before
    is_complete: bool  # the record makes all examples that a record of this source can make


@dataclass
class SourceReader:
    """Reads the entries of one source.

    Args:
        records: reads its records; reports to ``notes``.
        notes: what ``records`` has reported of the record that was read last.
        index: of its entries.
        kind: what the dataset takes.
        defaults: the source's own languages and tags.
        skipped_records: counts what cannot be read although the index has it.
        seed: of the random transforms.
        forbidden: what no text may contain.
    """

    records: Records
    notes: Recorder
    index: LengthIndex
    kind: ExampleKind
    defaults: SourceDefaults
    skipped_records: SkippedRecords
    seed: Sequence[int] = (0,)
    forbidden: re.Pattern | None = None
    _unchanged: set[int] = field(default_factory=set, init=False)  # shards whose files are those that were measured

    def locate(self, entries: np.ndarray) -> list[Place]:
        """The places of entries (N,)."""
        shards, records, ks, counts = self.index.locate(entries)
        most = self.records.examples_of_complete if self.index.is_one_to_one else None
        is_complete = counts == most if most is not None else np.zeros(len(entries), bool)
        return list(map(Place, shards.tolist(), records.tolist(), ks.tolist(), is_complete.tolist()))

    def read(self, place: Place) -> list:
        """What the maps of a pipeline make the entry of: its example alone if entries are the reader's examples, else
        all examples of the record; none if it cannot be read, which is counted."""
        if place.shard not in self._unchanged:
            self._check_unchanged(place.shard)
        self.notes.clear()
        if place.is_complete and (one := self.records.read_one(place.shard, place.record, place.k)) is not None:
            examples = list(self._examples([one]))
        else:
            made = self._examples(self.records.read(place.shard, place.record))
            # Of a generator: examples after this one are not made.
            examples = list(islice(made, place.k, place.k + 1) if self.index.is_one_to_one else made)
        if not examples:
            self._note(place)
        return examples

    def _check_unchanged(self, shard: int) -> None:
        """Compare the files as they are, by the indexes of their lines, with those that were measured.

        Raises:
            DataError: if a file has changed since.
        """
        for lines, digest in zip(self.records.shard_lines[shard], self.index.digests(shard), strict=True):
            if lines.digest != digest:
                self.index.sidecar.remove()  # else the next start would take it for that of the file
                raise FileChanged.of(lines.path)
        self._unchanged.add(shard)

    def _note(self, place: Place) -> None:
        path, line = self.records.shard_files[place.shard][0], f"line {place.record + 1}"
        for source, of_record, cause, *record, _ in self.notes.skips or [
            (path, line, "fewer examples than in the length index", path, line, "")
        ]:
            # As an example of its own: a record fails once in a pass, whichever of its entries are read.
            self.skipped_records.add(source, of_record, cause, tuple(record), str(place.k))

    def _examples(self, found: Sequence) -> Iterator:
        if self.kind is ExampleKind.AS_READ:
            return iter(found)
        return iter(Examples(found, self.kind, self.defaults, self.notes, self.forbidden))


@dataclass
class ExampleReader:
    """Reads and transforms the examples of a rank's batches; for a worker process.

    Args:
        readers: of the sources of one group.
        pipeline: transforms of the group.
        packing: the rows of its batches; None: examples are not packed.
    """

    readers: Sequence[SourceReader]
    pipeline: TransformPipeline
    packing: Packing | None = None

    def read(
        self,
        sources: np.ndarray,
        entries: np.ndarray,
        passes: np.ndarray,
        expected: Measures | None = None,
        rows: Sequence[int] | None = None,
        row_size: int = 0,
    ) -> list:
        """The examples at these addresses, in this order, without those that cannot be read.

        An example is determined by its address, whatever else is in the batch.

        Args:
            sources: (M,) numbers of the readers.
            entries: (M,) int64 numbers of the entries in their sources.
            passes: (M,) how many times each source was read before; seeds random transforms.
            expected: (M,) what the length indexes say of these entries.
            rows: (M,) in which they are packed, noted in the examples (:func:`packed_row`); None: they are not.
            row_size: most positions of a row.

        Raises:
            DataError: if a file has changed, so that an example has another length than its entry.
        """
        sources, entries = np.asarray(sources), np.asarray(entries, np.int64)
        found = self._read(sources, entries)
        seeds = [
            [*self.readers[source].seed, number_of_pass, entry, number]
            for source, number_of_pass, entry, of_entry in zip(
                sources.tolist(), np.asarray(passes).tolist(), entries.tolist(), found, strict=True
            )
            for number in range(len(of_entry.examples))
        ]
        made = iter(self.pipeline.transform_each([one for of_entry in found for one in of_entry.examples], seeds))
        numbers, examples = [], []
        for number, of_entry in enumerate(found):
            of_record = list(chain.from_iterable(islice(made, len(of_entry.examples))))
            if of_entry.k < len(of_record):
                numbers.append(number)
                examples.append(of_record[of_entry.k])
                if rows is not None:
                    mark_row(examples[-1], rows[number], row_size)
        if expected is not None:
            self._check(examples, [found[number] for number in numbers], expected[np.array(numbers, np.int64)])
        return examples

    def _read(self, sources: np.ndarray, entries: np.ndarray) -> list[_Found]:
        """What is read for each address, source after source, forward in its files."""
        found: dict[int, _Found] = {}
        for source in np.unique(sources).tolist():
            reader = self.readers[source]
            numbers = np.flatnonzero(sources == source)
            numbers = numbers[np.argsort(entries[numbers], kind="stable")]
            for number, place in zip(numbers.tolist(), reader.locate(entries[numbers]), strict=True):
                k = 0 if reader.index.is_one_to_one else place.k
                found[number] = _Found(reader, place, reader.read(place), k)
        return [found[number] for number in range(len(entries))]

    def _check(self, examples: Sequence, found: Sequence[_Found], expected: Measures) -> None:
        measured = measure(examples)
        is_other = np.isnan(measured.seconds) != np.isnan(expected.seconds)
        is_other |= np.abs(measured.seconds - expected.seconds) > _SECONDS_OFF + _SHARE_OFF * expected.seconds
        for name in ("inputs", "outputs", "totals", "is_cut"):
            is_other |= getattr(measured, name) != getattr(expected, name)
        for n in np.flatnonzero(is_other)[:1].tolist():
            reader, place = found[n].reader, found[n].place
            raise DataError(
                f"{reader.records.shard_files[place.shard][0]}: line {place.record + 1} is not as long as its entry in "
                f"the length index says ({_lengths(measured, n)}, not {_lengths(expected, n)}); the file has changed: "
                f"delete {' or '.join(reader.index.sidecar.places)} and start again."
            )


class _Found(NamedTuple):
    """What was read for an address; the example is output ``k`` of what the maps make of it."""

    reader: SourceReader
    place: Place
    examples: list
    k: int


def _lengths(measures: Measures, number: int) -> str:
    """The lengths of one example, for a message."""
    tokens = (getattr(measures, name)[number] for name in ("inputs", "outputs", "totals"))
    seconds = measures.seconds[number]
    return "/".join(map(str, tokens)) + " tokens" + ("" if np.isnan(seconds) else f" and {seconds:.2f} s")
