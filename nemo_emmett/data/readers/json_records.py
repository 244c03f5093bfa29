"""The records of a speech manifest, one JSON object a line, and the checks of their values."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import partial
from typing import ClassVar, NamedTuple

from nemo_emmett.audio_file import AudioFault
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


class LineRecords(ABC):
    """The records of a text file, one a line. Lines that hold none are skipped and counted; blank ones are no records.

    Args:
        path: of the file.
        skipped_records: receives the lines that cannot be used.
    """

    blanks: ClassVar[bytes | None] = None  # a line of these characters alone is blank; None: of any white space

    def __init__(self, path: str, skipped_records: SkippedRecords) -> None:
        self.path = path
        self.skipped_records = skipped_records

    def __iter__(self) -> Iterator[Record]:
        for number, line in enumerate(open_lines(self.path), start=1):
            if (record := self.parse(number, line)) is not None:
                yield record

    def __len__(self) -> int:
        return count_lines(self.path)

    def parse(self, number: int, line: bytes) -> Record | None:
        """The record in a line, counted from 1; None if it holds none."""
        if not line.strip(self.blanks):
            return None
        self.skipped_records.read(self.path)
        note = partial(self.skipped_records.add, self.path, f"line {number}")
        if (text := decoded(line, note)) is None:
            return None
        try:
            return Record(self.path, number, self._data(text))
        except (InvalidRecord, AudioFault) as cause:
            note(str(cause))
            return None

    @abstractmethod
    def _data(self, text: str) -> dict:
        """The record in a line.

        Raises:
            InvalidRecord: if it holds none.
            AudioFault: if its recording, which had to be opened, cannot be used.
        """


class JsonRecords(LineRecords):
    """The JSON objects of a file, one a line."""

    def _data(self, text: str) -> dict:
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):  # the latter where it is nested too deeply
            raise InvalidRecord("not JSON") from None
        if not isinstance(data, dict):
            raise InvalidRecord("not a JSON object")
        return data


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
