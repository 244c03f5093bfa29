"""Skipped records and their causes, counted over all worker processes of a loader.

Readers in a sampler and datasets in a worker note the records that they skip in the counts of their own process. These
travel to the main process with the batches (:meth:`SkippedRecords.drain`, :meth:`SkippedRecords.merge`), where the
loader compares them with ``max_bad_records``.
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
"""Number of bad records that are named when a run stops."""

REPORT_WIDTH = 96
"""Columns of a report: 100, less the four by which NeMo's log indents it."""

RECORDS_BEFORE_JUDGING_A_SHARE = 1_000
"""The share of a source with fewer records is judged when the data ends: one bad one of the first two is not half."""


class InvalidRecord(Exception):
    """A record cannot be used; the text is the cause, as reports show it."""


@dataclass(frozen=True)
class BadRecord:
    """One skipped record."""

    source: str  # the manifest or text file
    place: str  # "line 12", or the example's id
    cause: str  # "not JSON", "missing audio", ...
    record: tuple[str, str] = field(default=("", ""), compare=False)  # source and place by which it is counted
    example: str = field(default="", compare=False)  # id of the example, where a record makes several

    def __str__(self) -> str:
        return f"{self.source}, {self.place}: {self.cause}"


@dataclass
class RecordsDelta:
    """What a process has read and skipped since its last batch; sent to the main process."""

    read: Counter[str] = field(default_factory=Counter)  # number of records by source
    skipped: list[BadRecord] = field(default_factory=list)


@dataclass
class SourceCounts:
    """Records read and skipped in an epoch or in total, by the sources of the recipe.

    A record that is bad in each of three passes was read three times and skipped three times.
    """

    read: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)  # records, whatever the causes
    causes: Counter[tuple[str, str]] = field(default_factory=Counter)  # records by source and cause; may overlap


class SkippedRecords:
    """Counts of the records that were read and of those that were skipped.

    Data is read repeatedly (endless training data, one reader per worker), and so are its bad records. In :meth:`count`
    and :attr:`first` a record counts once. In :meth:`shares` it counts once per pass, also if several examples are made
    from it (one per target language).

    Example:
        >>> skipped_records = SkippedRecords()
        >>> skipped_records.add("train.json", "line 2", "not JSON")
        >>> skipped_records.count()
        1
    """

    def __init__(self, announce: bool = False, source_of: Mapping[str, str] | None = None) -> None:
        """
        Args:
            announce: log the first bad record of each source and cause. True in the main process only, so that it is
                logged once.
            source_of: for each file, the source of the recipe that it belongs to. Shares are judged by source; any
                other file is a source of its own.
        """
        self.announce = announce
        self.source_of = dict(source_of or {})
        self._reset()

    def _reset(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()  # bucketing samplers read ahead in a thread
        self._delta = RecordsDelta()
        self._occurrences: defaultdict[tuple[str, str], Counter[tuple[BadRecord, str]]] = defaultdict(Counter)
        self._passes_of_fault: Counter[BadRecord] = Counter()
        self._passes_of_record: Counter[tuple[str, str]] = Counter()
        self._total = SourceCounts()
        self._epoch = SourceCounts()
        self.counts: Counter[tuple[str, str]] = Counter()
        self.first: list[BadRecord] = []
        self._first_of: defaultdict[str, list[BadRecord]] = defaultdict(list)

    def _reset_after_fork(self) -> None:
        """A forked worker inherits counts that its parent reports itself."""
        if self._process != os.getpid():
            self._reset()

    def __getstate__(self) -> dict:
        return {"announce": self.announce, "source_of": self.source_of}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)

    def read(self, source: str, records: int = 1) -> None:
        """Count records of a source (a manifest or text file) that were read, good or bad."""
        self._reset_after_fork()
        with self._lock:
            self._delta.read[source] += records
            self._count_read(source, records)

    def add(
        self, source: str, place: str, cause: str, record: tuple[str, str] | None = None, example: str = ""
    ) -> None:
        """Count a skipped record, or a skipped example of a record.

        Args:
            source: the file to name in the report.
            place: of the record in the file.
            cause: why it was skipped.
            record: source and place under which the record was read, if the report names others.
            example: id of the example, where a record makes several.
        """
        self._reset_after_fork()
        with self._lock:
            source, place = str(source), str(place)
            skipped = BadRecord(source, place, cause, record or (source, place), str(example))
            self._delta.skipped.append(skipped)
            self._count(skipped)

    def drain(self) -> RecordsDelta:
        """Return what was read and skipped in this process since the last call."""
        self._reset_after_fork()
        with self._lock:
            delta, self._delta = self._delta, RecordsDelta()
        return delta

    def merge(self, delta: RecordsDelta) -> None:
        """Add what another process has read and skipped."""
        self._reset_after_fork()
        with self._lock:
            for source, records in delta.read.items():
                self._count_read(source, records)
            for record in delta.skipped:
                self._count(record)

    def _count_read(self, file: str, records: int) -> None:
        for counts in (self._total, self._epoch):
            counts.read[self.source_of.get(file, file)] += records

    def _count(self, record: BadRecord) -> None:
        source = self.source_of.get(record.record[0], record.record[0])
        # Each example of a record has the same fault once per pass. So the fault occurred in as many passes as in the
        # example that has it most often, and the record was bad in as many passes as its most frequent fault.
        faults = self._occurrences[record.record]
        faults[record, record.example] += 1
        passes = faults[record, record.example]
        is_new = record not in self._passes_of_fault
        if passes > self._passes_of_fault[record]:
            self._passes_of_fault[record] = passes
            for counts in (self._total, self._epoch):
                counts.causes[source, record.cause] += 1
        if passes > self._passes_of_record[record.record]:
            self._passes_of_record[record.record] = passes
            for counts in (self._total, self._epoch):
                counts.skipped[source] += 1
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
        """Number of records read, of all sources."""
        return self._total.read.total()

    def count(self) -> int:
        """Number of different records that were skipped."""
        return len(self._passes_of_record)

    def records(self) -> frozenset[tuple[str, str]]:
        """The different records that were skipped, each by its source and place."""
        return frozenset(self._passes_of_record)

    def shares(self) -> dict[str, float]:
        """For each source with bad records, their share of its records read, from 0 to 1."""
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
        """End an epoch, and return a table of what was read and skipped in it and in total.

        Returns:
            a line for each source with bad records in this epoch, and one for each of their causes (a record may have
            several); empty if nothing was skipped.
        """
        self._reset_after_fork()
        with self._lock:
            epoch, self._epoch = self._epoch, SourceCounts()
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
                of the records read of any one source, so that a large source does not hide a small one.
            at_end: the data has ended, so that a share is judged for any number of records read.

        Raises:
            TooManyBadRecords: naming the first ten, and the source whose share exceeds the limit.
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
        f"({allowed}); correct the data, or raise max_bad_records (null: no limit). The first of them:\n{named}"
    )


def _shortened(source: str, width: int) -> str:
    """A source in at most ``width`` columns, without the beginning of its path: files differ in the end of theirs.

    Example:
        >>> _shortened("data.train_ds.input_cfg.0 (/data/my_corpus/train.tsv)", 46)
        'data.train_ds.input_cfg.0 (...orpus/train.tsv)'
    """
    if len(source) <= width:
        return source
    place, opening, path = source.rpartition(" (")
    end = width - len(place + opening) - 3
    if end < 16:  # the place leaves no room
        place, opening, path, end = "", "", source, width - 3
    return f"{place}{opening}...{path[-end:]}"
