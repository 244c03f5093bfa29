"""The records of a speech manifest, one JSON object a line, and the checks of their values."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from typing import NamedTuple

from nemo_emmett.data.io.files import count_lines, decoded, open_lines
from nemo_emmett.data.io.skipped_records import InvalidRecord, SkippedRecords
from nemo_emmett.typed_config import is_number


class Record(NamedTuple):
    """One JSON object of a file, with its place there."""

    path: str
    number: int  # of its line, from 1
    data: dict

    @property
    def place(self) -> str:
        """Its name in reports."""
        return f"line {self.number}"

    @property
    def is_left_out(self) -> bool:
        """Whether NeMo's tools have marked it as not to be used."""
        return bool(self.data.get("_skipme", False))


class JsonRecords:
    """The JSON objects of a file, one a line. Lines that hold anything else are skipped; blank ones are no records."""

    def __init__(self, path: str, skipped_records: SkippedRecords) -> None:
        self.path = path
        self.skipped_records = skipped_records

    def __iter__(self) -> Iterator[Record]:
        for number, line in enumerate(open_lines(self.path), start=1):
            if (record := self.parse(number, line)) is not None:
                yield record

    def parse(self, number: int, line: bytes) -> Record | None:
        """The record in a line, counted from 1; None if it holds none."""
        if not line.strip():
            return None
        self.skipped_records.read(self.path)
        note = partial(self.skipped_records.add, self.path, f"line {number}")
        if (text := decoded(line, note)) is None:
            return None
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):  # the latter where it is nested too deeply
            note("not JSON")
            return None
        if not isinstance(data, dict):
            note("not a JSON object")
            return None
        return Record(self.path, number, data)

    def __len__(self) -> int:
        return count_lines(self.path)


def check_times(data: Mapping) -> None:
    """Refuse a manifest record without a length in seconds, or with an offset that is none."""
    duration, offset = data.get("duration"), data.get("offset")
    if duration is None:
        raise InvalidRecord("no duration")
    if not is_seconds(duration) or duration <= 0:
        raise InvalidRecord("invalid duration")
    if offset is not None and (not is_seconds(offset) or offset < 0):
        raise InvalidRecord("invalid offset")


def is_seconds(value: object) -> bool:
    """Whether a value is a number with which lhotse can count samples: finite, and of no more than twelve digits."""
    return is_number(value) and abs(value) < 1e12  # false for NaN


def sampling_rate_of(data: Mapping) -> object:
    """The sampling rate that a record has, under either of NeMo's names; None where it has none."""
    rate = data.get("sampling_rate")
    return data.get("sample_rate") if rate is None else rate


def check_sampling_rate(rate: object) -> None:
    """Refuse a sampling rate that is not a number of samples."""
    if not is_seconds(rate) or rate <= 0 or rate != int(rate):
        raise InvalidRecord("invalid sampling_rate")


def check_alternatives(data: Mapping) -> None:
    """Refuse what NeMo could not make further examples of: ``alt_text`` maps to texts and their languages."""
    texts = data.get("alt_text")
    if texts is not None and not (
        isinstance(texts, dict) and all(isinstance(t, dict) and {"text", "lang"} <= t.keys() for t in texts.values())
    ):
        raise InvalidRecord("alt_text is not a mapping of texts")


def times_of(record: Record) -> tuple[float, float]:
    """Offset and duration of a record in its recording, in seconds.

    Raises:
        InvalidRecord: if they are missing, or no times of a recording.
    """
    check_times(record.data)
    check_alternatives(record.data)
    return record.data.get("offset") or 0.0, record.data["duration"]
