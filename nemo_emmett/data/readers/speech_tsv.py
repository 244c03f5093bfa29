"""Tab-separated files of speech: recordings with a transcript and its translation, one a row.

A row becomes the record of a NeMo manifest, so that its recording is read and its cut made by the rules of
:class:`~nemo_emmett.data.readers.nemo_manifest.NeMoManifest`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping

from lhotse.cut import Cut

from nemo_emmett.audio_file import fitted, read_header
from nemo_emmett.data.config.sources import Source
from nemo_emmett.data.io.files import is_local
from nemo_emmett.data.io.skipped_records import InvalidRecord, SkippedRecords
from nemo_emmett.data.readers.json_records import LineRecords, Record
from nemo_emmett.data.readers.nemo_manifest import NeMoManifest
from nemo_emmett.data.readers.tsv import TsvColumns
from nemo_emmett.errors import ConfigError

REQUIRED = ("audio", "target")
"""Columns that every file has, under these names or others."""

OPTIONAL = ("id", "source", "duration", "offset", "source_lang", "target_lang")
"""Columns that are read if they are there."""

_COPIED = ("id", "source_lang", "target_lang")
"""Columns that a record has under the same name."""


class TsvRecords(LineRecords):
    """The rows of a file as records of a NeMo manifest.

    Args:
        path: of the file.
        columns: of the file.
        audio_dir: folder of the recordings, where they have relative paths; by default that of the file.
        skipped_records: receives the rows that cannot be used.
    """

    blanks = b" "  # a line of tabs is a row of empty cells

    def __init__(self, path: str, columns: TsvColumns, audio_dir: str | None, skipped_records: SkippedRecords) -> None:
        super().__init__(path, skipped_records)
        self.columns = columns
        folder = os.path.dirname(path) if audio_dir is None else audio_dir
        # Absolute: NeMo looks for a relative path in the current folder first.
        self.audio_dir = os.path.abspath(folder) if is_local(folder) else folder

    def __len__(self) -> int:
        return max(super().__len__() - self.columns.has_header, 0)

    def parse(self, number: int, line: bytes) -> Record | None:
        """See :meth:`LineRecords.parse`; the header is no record."""
        if self.columns.has_header and number == 1:
            self.columns.read_header(self.path, line)
            return None
        return super().parse(number, line)

    def _data(self, text: str) -> dict:
        row = self.columns.row(self.path, text)
        if not row["audio"]:
            raise InvalidRecord("no audio")
        path = row["audio"]
        if is_local(path):
            path = os.path.join(self.audio_dir, path)
        data: dict = {"audio_filepath": path, "text": row["target"]}
        data |= {field: row[field] for field in _COPIED if row.get(field)}
        if row.get("source"):
            data["source_text"] = row["source"]
        if row.get("offset"):
            data["offset"] = _seconds(row["offset"])
        if row.get("duration"):
            data["duration"] = _seconds(row["duration"])
        elif "duration" not in row and is_local(path):
            header = read_header(path)
            data["sampling_rate"] = header.sampling_rate
            start = max(0.0, data.get("offset", 0.0))
            data["duration"] = fitted(header.duration, start, header.duration - start, header.missing)
        return data  # without a duration the manifest's reader refuses it


def _seconds(cell: str) -> float:
    """The number in a cell; NaN, which the manifest's reader refuses, if there is none."""
    try:
        return float(cell)
    except ValueError:
        return math.nan


class SpeechTsv(NeMoManifest):
    """The recordings of a ``speech_tsv`` source, as cuts.

    Args:
        source: names the files and columns.
        skipped_records: receives the rows that cannot be used.
        metadata_only: the cuts are not loaded; files are opened only for durations that the rows do not have.

    Raises:
        ConfigError: if it names no files.
    """

    def __init__(self, source: Source, skipped_records: SkippedRecords, metadata_only: bool = False) -> None:
        if source.paths is None or isinstance(source.paths, Mapping):
            raise ConfigError(f"{source.place}.paths: give the TSV file(s) of a source of type 'speech_tsv'.")
        given = {field: getattr(source, f"{field}_column") for field in (*REQUIRED, *OPTIONAL)}
        columns = {field: field if column is None else column for field, column in given.items()}
        optional = [field for field in OPTIONAL if given[field] is None]
        self.columns = TsvColumns(columns, optional, has_escapes=True)
        self.audio_dir = source.audio_dir
        super().__init__(
            source.paths,
            skipped_records,
            source.channel_selector,
            shuffle_shards=bool(source.shuffle),
            shard_seed="trng" if source.shard_seed is None else source.shard_seed,
            metadata_only=metadata_only,
        )

    def _records_of(self, path: str) -> TsvRecords:
        return TsvRecords(path, self.columns, self.audio_dir, self.skipped_records)

    def _cut(self, record: Record) -> Cut:
        cut = super()._cut(record)
        cut.id = record.data.get("id", cut.id)
        return cut
