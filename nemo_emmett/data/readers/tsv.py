"""The columns of tab-separated files, and which of their rows cannot be used."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import closing
from typing import NamedTuple

from nemo_emmett.data.io.files import open_lines, strip_bom
from nemo_emmett.data.io.rows import split_row
from nemo_emmett.data.io.skipped_records import InvalidRecord
from nemo_emmett.errors import ConfigError, DataError


class Layout(NamedTuple):
    """Where a file has its values."""

    numbers: Mapping[str, int]  # of the columns, from 0, by field
    width: int | None  # number of columns; None where no header determines it


class TsvColumns:
    """The columns of files, by their names in the first line of each file, or by number.

    Files have a header unless every column that they must have is given by number.

    Args:
        columns: the column of each field: its name, or its number from 0.
        optional: fields whose column need not be there.
        has_escapes: the files have the escapes of :func:`~nemo_emmett.data.io.rows.split_row`.
    """

    def __init__(
        self, columns: Mapping[str, int | str], optional: Collection[str] = (), *, has_escapes: bool = False
    ) -> None:
        self.has_header = any(isinstance(column, str) for field, column in columns.items() if field not in optional)
        self.has_escapes = has_escapes
        self._columns = dict(columns)
        self._optional = frozenset(optional)
        by_number = {field: column for field, column in columns.items() if isinstance(column, int)}
        self._without_header = Layout(by_number, None)
        self._layouts: dict[str, Layout] = {}

    def layout(self, path: str) -> Layout:
        """Where a file has its values; its header is read unless :meth:`read_header` was called.

        Raises:
            ConfigError: if it lacks a column.
            DataError: if its first line is no header.
        """
        if not self.has_header:
            return self._without_header
        if path not in self._layouts:
            with closing(open_lines(path)) as lines:
                self.read_header(path, next(lines, b""))
        return self._layouts[path]

    def read_header(self, path: str, line: bytes) -> None:
        """Find the columns of a file in its first line; raises as :meth:`layout` does."""
        names = header_names(path, line)
        numbers = {}
        for field, column in self._columns.items():
            if column in names or (isinstance(column, int) and column < len(names)):
                numbers[field] = names.index(column) if isinstance(column, str) else column
            elif field not in self._optional:
                raise ConfigError(
                    f"{field}_column: {path} has no column '{column}'; its columns are {', '.join(names)}."
                )
            if names.count(column) > 1:
                raise ConfigError(f"{field}_column: {path} has several columns '{column}'; rename all but one.")
        self._layouts[path] = Layout(numbers, len(names))

    def row(self, path: str, line: str) -> dict[str, str]:
        """The values of a row, by field.

        Raises:
            InvalidRecord: if it has more or fewer columns than the header, or fewer than are needed.
        """
        numbers, width = self.layout(path)
        cells = split_row(line, width) if self.has_escapes else line.split("\t")
        if width is not None and len(cells) > width:
            raise InvalidRecord("too many columns")
        if len(cells) < (width or 0) or len(cells) <= max(numbers.values()):
            raise InvalidRecord("missing column")
        return {field: cells[number].strip() for field, number in numbers.items()}


def header_names(path: str, line: bytes) -> list[str]:
    """The names in the first line of a file.

    Raises:
        DataError: if it is empty, or not UTF-8 text.
    """
    line = strip_bom(line)
    if not line.strip():
        raise DataError(f"{path}: has no first line with the names of its columns; add it, or give numbers of columns.")
    try:
        names = [name.strip() for name in line.decode("utf-8").split("\t")]
    except UnicodeDecodeError:
        names = ["\0"]
    if any("\0" in name for name in names):
        raise DataError(f"{path}: its first line is not UTF-8 text; convert the file to UTF-8.")
    return names
