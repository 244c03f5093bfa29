"""What was skipped, and why: one ledger per loader, kept across its worker processes.

Whoever reads a record (a source in the sampler, a dataset in a worker) notes it in the ledger of its own process. The
notes travel to the main process with the batches (:meth:`BadRecords.drain`, :meth:`BadRecords.merge`), where the loader
judges them against ``max_bad_records``.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from dataclasses import dataclass, field

from nemo.utils import logging

from nemo_emmett.errors import TooManyBadRecords

NAMED_IN_REPORTS = 10
"""So many bad records are named, one by one, when a run stops."""

RECORDS_BEFORE_JUDGING_A_SHARE = 1_000
"""A share of fewer records than this is judged only when the data ends: one bad one of the first two is not half."""


@dataclass(frozen=True)
class BadRecord:
    """One skipped record."""

    source: str  # the manifest or text file
    place: str  # "line 12", or the example's id
    cause: str  # "not JSON", "missing audio", ...

    def __str__(self) -> str:
        return f"{self.source}, {self.place}: {self.cause}"


@dataclass
class Notes:
    """Plain contents of a ledger: what travels between processes."""

    read: int = 0
    skipped: list[BadRecord] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.read or self.skipped)


class BadRecords:
    """Ledger of the records that were read and of those that had to be skipped.

    Data that is read again and again (endless training data, one reader per worker) meets its bad records again and
    again: a record counts once in :meth:`count` and :attr:`first`, however often it is met.

    Example:
        >>> ledger = BadRecords()
        >>> ledger.add("train.json", "line 2", "not JSON")
        >>> ledger.count()
        1
    """

    def __init__(self, announce: bool = False) -> None:
        """
        Args:
            announce: log the first bad record of each source and cause. Workers do not: the main process does, once.
        """
        self.announce = announce
        self._forget()

    def _forget(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()  # bucketing samplers read ahead in a thread
        self._notes = Notes()
        self._seen: set[BadRecord] = set()
        self.read_count = 0
        self.met_count = 0
        self.counts: Counter[tuple[str, str]] = Counter()
        self.first: list[BadRecord] = []

    def _own(self) -> None:
        """A forked worker inherits its parent's notes, which the parent will report itself: start afresh."""
        if self._process != os.getpid():
            self._forget()

    def __getstate__(self) -> dict:
        return {"announce": self.announce}

    def __setstate__(self, state: dict) -> None:
        self.announce = state["announce"]
        self._forget()

    def read(self, records: int = 1) -> None:
        """Note that so many records were read, good or bad."""
        self._own()
        with self._lock:
            self._notes.read += records
            self.read_count += records

    def add(self, source: str, place: str, cause: str) -> None:
        """Note that a record had to be skipped."""
        self._own()
        with self._lock:
            record = BadRecord(str(source), str(place), cause)
            self._notes.skipped.append(record)
            self._count(record)

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
            self.read_count += notes.read
            for record in notes.skipped:
                self._count(record)

    def _count(self, record: BadRecord) -> None:
        self.met_count += 1
        if record in self._seen:
            return
        self._seen.add(record)
        self.counts[record.source, record.cause] += 1
        if len(self.first) < NAMED_IN_REPORTS:
            self.first.append(record)
        if self.announce and self.counts[record.source, record.cause] == 1:
            logging.warning(f"Skipped a bad record: {record}. More of this kind are counted, not logged.")

    def count(self) -> int:
        """How many different records were skipped."""
        return len(self._seen)

    def share(self) -> float:
        """Share of the records read that had to be skipped, from 0 to 1."""
        return self.met_count / max(self.read_count, self.met_count, 1)

    def causes(self) -> dict[str, int]:
        """Number of different records skipped, per cause."""
        causes: Counter[str] = Counter()
        for (_, cause), count in self.counts.items():
            causes[cause] += count
        return dict(causes)

    def table(self) -> str:
        """One line per source and cause, the most frequent first."""
        rows = [(str(count), cause, source) for (source, cause), count in self.counts.most_common()]
        header = ("skipped", "cause", "source")
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(2)]
        lines = [f"{n:>{widths[0]}}  {cause:<{widths[1]}}  {source}" for n, cause, source in [header, *rows]]
        return "\n".join(lines)

    def check(self, limit: int | float | None, at_end: bool = False) -> None:
        """Stop the run if more was skipped than allowed.

        Args:
            limit: an integer is a number of different records, a fraction below 1 a share of those read.
            at_end: the data has ended, so that a share is judged however few records were read.

        Raises:
            TooManyBadRecords: naming the first ten.
        """
        if limit is None:
            return
        if isinstance(limit, float) and limit < 1:
            judged = at_end or self.read_count >= RECORDS_BEFORE_JUDGING_A_SHARE
            exceeded = judged and self.share() > limit
            allowed = f"{limit:.4g} of the records read"
        else:
            exceeded = self.count() > limit
            allowed = str(int(limit))
        if not exceeded:
            return
        named = "\n".join(f"  {record}" for record in self.first)
        raise TooManyBadRecords(
            f"max_bad_records: {self.count()} bad records were skipped in {self.read_count} read, more than allowed "
            f"({allowed}); mend the data, or raise max_bad_records (null: no limit). The first of them:\n{named}"
        )
