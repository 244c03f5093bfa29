"""What was skipped, and why: one count per loader, shared by its worker processes.

Whoever reads a record (a source in the sampler, a dataset in a worker) notes a skipped one in the counts of its own
process. The notes travel to the main process with the batches (:meth:`SkippedRecords.drain`,
:meth:`SkippedRecords.merge`), where the loader compares them with ``max_bad_records``.
"""

from __future__ import annotations

import os
import threading
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from nemo.utils import logging

from nemo_emmett.errors import TooManyBadRecords

NAMED_IN_REPORTS = 10
"""So many bad records are named, one by one, when a run stops."""

REPORT_WIDTH = 96
"""Columns of a report: 100, less the four by which NeMo's log indents it."""

RECORDS_BEFORE_JUDGING_A_SHARE = 1_000
"""A share of fewer records of a source is judged when the data ends: one bad one of the first two is not half."""


class InvalidRecord(Exception):
    """Why a record cannot be used, in the words of the report."""


@dataclass(frozen=True)
class BadRecord:
    """One skipped record."""

    source: str  # the manifest or text file
    place: str  # "line 12", or the example's id
    cause: str  # "not JSON", "missing audio", ...
    record: tuple[str, str] = field(default=("", ""), compare=False)  # whose count it adds to: its source and place
    example: str = field(default="", compare=False)  # which of the record's examples: each meets the same fault

    def __str__(self) -> str:
        return f"{self.source}, {self.place}: {self.cause}"


@dataclass
class Notes:
    """Plain contents of a ledger: what travels between processes."""

    read: Counter[str] = field(default_factory=Counter)  # number of records by source
    skipped: list[BadRecord] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.read or self.skipped)


@dataclass
class Tally:
    """What was read and skipped in some stretch of time, by the sources of the recipe.

    A record that is bad in each of three passes was read three times and skipped three times.
    """

    read: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)  # records, whatever was wrong with them
    causes: Counter[tuple[str, str]] = field(default_factory=Counter)  # records by source and cause; may overlap


class SkippedRecords:
    """Ledger of the records that were read and of those that had to be skipped.

    Data that is read again and again (endless training data, one reader per worker) meets its bad records again and
    again: a record counts once in :meth:`count` and :attr:`first`, however often it is met. A record from which several
    examples are made (one per target language) counts once per pass in :meth:`shares`, as it is read once.

    Example:
        >>> ledger = SkippedRecords()
        >>> ledger.add("train.json", "line 2", "not JSON")
        >>> ledger.count()
        1
    """

    def __init__(self, announce: bool = False, source_of: Mapping[str, str] | None = None) -> None:
        """
        Args:
            announce: log the first bad record of each source and cause. Workers do not: the main process does, once.
            source_of: for each file, the source of the recipe that it belongs to. Shares are judged by these; a file
                that is not among them is a source of its own.
        """
        self.announce = announce
        self.source_of = dict(source_of or {})
        self._forget()

    def _forget(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()  # bucketing samplers read ahead in a thread
        self._notes = Notes()
        self._meetings: defaultdict[tuple[str, str], Counter[tuple[BadRecord, str]]] = defaultdict(Counter)
        self._passes_of_fault: Counter[BadRecord] = Counter()
        self._passes_of_record: Counter[tuple[str, str]] = Counter()
        self._total = Tally()
        self._epoch = Tally()
        self.counts: Counter[tuple[str, str]] = Counter()
        self.first: list[BadRecord] = []
        self._first_of: defaultdict[str, list[BadRecord]] = defaultdict(list)

    def _own(self) -> None:
        """A forked worker inherits its parent's notes, which the parent will report itself: start afresh."""
        if self._process != os.getpid():
            self._forget()

    def __getstate__(self) -> dict:
        return {"announce": self.announce, "source_of": self.source_of}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)

    def read(self, source: str, records: int = 1) -> None:
        """Note that so many records of a source (a manifest or text file) were read, good or bad."""
        self._own()
        with self._lock:
            self._notes.read[source] += records
            self._count_read(source, records)

    def add(
        self, source: str, place: str, cause: str, record: tuple[str, str] | None = None, example: str = ""
    ) -> None:
        """Note that a record, or one of the examples made from it, had to be skipped.

        Args:
            source: the file to name in the report.
            place: where it stands in the file.
            cause: what is wrong with it.
            record: source and place under which the record was read, if the report shall name others.
            example: id of the example, where a record makes several.
        """
        self._own()
        with self._lock:
            source, place = str(source), str(place)
            skipped = BadRecord(source, place, cause, record or (source, place), str(example))
            self._notes.skipped.append(skipped)
            self._count(skipped)

    def drain(self) -> Notes:
        """Take the notes made in this process since the last call."""
        self._own()
        with self._lock:
            notes, self._notes = self._notes, Notes()
        return notes

    def merge(self, notes: Notes) -> None:
        """Count what another ledger noted."""
        self._own()
        with self._lock:
            for source, records in notes.read.items():
                self._count_read(source, records)
            for record in notes.skipped:
                self._count(record)

    def _count_read(self, file: str, records: int) -> None:
        for tally in (self._total, self._epoch):
            tally.read[self.source_of.get(file, file)] += records

    def _count(self, record: BadRecord) -> None:
        source = self.source_of.get(record.record[0], record.record[0])
        # In each pass, every example of a record meets the same fault once. So a fault was met in as many passes as the
        # example that met it most often, and the record was bad in as many as its most frequent fault.
        faults = self._meetings[record.record]
        faults[record, record.example] += 1
        passes = faults[record, record.example]
        is_new = record not in self._passes_of_fault
        if passes > self._passes_of_fault[record]:
            self._passes_of_fault[record] = passes
            for tally in (self._total, self._epoch):
                tally.causes[source, record.cause] += 1
        if passes > self._passes_of_record[record.record]:
            self._passes_of_record[record.record] = passes
            for tally in (self._total, self._epoch):
                tally.skipped[source] += 1
        if not is_new:
            return
        self.counts[record.source, record.cause] += 1
        if len(self.first) < NAMED_IN_REPORTS:
            self.first.append(record)
        if len(self._first_of[source]) < NAMED_IN_REPORTS:
            self._first_of[source].append(record)
        if self.announce and self.counts[record.source, record.cause] == 1:
            logging.warning(f"Skipped a bad record: {record}. More of this kind are counted, not logged.")

    @property
    def read_count(self) -> int:
        """How many records were read, of all sources."""
        return self._total.read.total()

    def count(self) -> int:
        """How many different records were skipped."""
        return len(self._passes_of_record)

    def records(self) -> frozenset[tuple[str, str]]:
        """The different records that were skipped, each by its source and its place there."""
        return frozenset(self._passes_of_record)

    def shares(self) -> dict[str, float]:
        """For each source that had bad records, their share of its records read, from 0 to 1."""
        return {source: bad / max(self._total.read[source], bad) for source, bad in self._total.skipped.items()}

    def causes(self) -> dict[str, int]:
        """Number of different records skipped, per cause; a record may have several."""
        causes: Counter[str] = Counter()
        for (_, cause), count in self.counts.items():
            causes[cause] += count
        return dict(causes)

    def table(self) -> str:
        """One line per file and cause, the most frequent first."""
        rows = [(str(count), cause, source) for (source, cause), count in self.counts.most_common()]
        header = ("skipped", "cause", "source")
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(2)]
        room = REPORT_WIDTH - sum(widths) - 4
        return "\n".join(
            f"{n:>{widths[0]}}  {cause:<{widths[1]}}  {_shortened(source, room)}"
            for n, cause, source in [header, *rows]
        )

    def end_epoch(self) -> str:
        """End an epoch: what was read and skipped since the last one ended, and in total, as a table.

        Returns:
            a line for each source that had bad records in this epoch, and one for each of their causes (a record may
            have several); empty if nothing was skipped.
        """
        self._own()
        with self._lock:
            epoch, self._epoch = self._epoch, Tally()
        rows: list[tuple[str, ...]] = [("this epoch", "", "in total", "", ""), ("read", "skipped") * 2 + ("source",)]
        for source, skipped in epoch.skipped.most_common():
            numbers = (epoch.read[source], skipped, self._total.read[source], self._total.skipped[source])
            rows.append((*(f"{number:,}" for number in numbers), source))
            for (of, cause), count in epoch.causes.most_common():
                if of == source:
                    rows.append(("", f"{count:,}", "", f"{self._total.causes[source, cause]:,}", f"  {cause}"))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        room = REPORT_WIDTH - sum(widths) - 8
        lines = ["  ".join([*map(str.rjust, row, widths), _shortened(row[4], room)]).rstrip() for row in rows]
        return "\n".join(lines) if epoch.skipped else ""

    def check(self, limit: int | float | None, at_end: bool = False) -> None:
        """Stop the run if more was skipped than allowed.

        Args:
            limit: an integer is a number of different records, of all sources together; a fraction below 1 is a share
                of the records read of any one source, so that a small source cannot vanish behind a large one.
            at_end: the data has ended, so that a share is judged however few records were read.

        Raises:
            TooManyBadRecords: naming the first ten, and the source whose share it is.
        """
        if limit is None:
            return
        if not (isinstance(limit, float) and limit < 1):
            if self.count() > limit:
                raise _too_many(self.count(), f"{self.read_count} records", str(int(limit)), self.first)
            return
        for source, share in self.shares().items():
            read = self._total.read[source]
            if share > limit and (at_end or read >= RECORDS_BEFORE_JUDGING_A_SHARE):
                allowed = f"{limit:.4g} of the records read"
                raise _too_many(
                    self._total.skipped[source], f"{read} records of {source}", allowed, self._first_of[source]
                )


def _too_many(bad: int, read: str, allowed: str, first: Sequence[BadRecord]) -> TooManyBadRecords:
    named = "\n".join(f"  {record}" for record in first)
    return TooManyBadRecords(
        f"max_bad_records: {bad} bad records were skipped in {read} read, more than allowed "
        f"({allowed}); mend the data, or raise max_bad_records (null: no limit). The first of them:\n{named}"
    )


def _shortened(source: str, width: int) -> str:
    """A source in at most so many columns. It loses its middle, since files differ in the end of their paths."""
    if len(source) <= width:
        return source
    end = width // 2
    return f"{source[: width - end - 3]}...{source[-end:]}"
