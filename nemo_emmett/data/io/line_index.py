"""The lines of a text file by number.

The index of a plain file has the offset of each block of lines and its checksum, which is compared whenever the block
is read: data that is rewritten during a training ends it.

Text that is compressed, remote, or the output of a command cannot be entered in the middle. Of such a file only the
number of lines is kept, and it is read forward, some lines at a time.
"""

from __future__ import annotations

import gzip
import os
import zlib
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import lru_cache
from itertools import islice
from typing import ClassVar

import numpy as np
from lhotse.serialization import open_best

from nemo_emmett.data.io.files import FileState, is_local, open_lines
from nemo_emmett.data.io.index import FileChanged, Index, Progress, read_at
from nemo_emmett.data.io.sidecar import Contents
from nemo_emmett.errors import DataError

_PAGE = 4096
"""Bytes. One block is looked up and read at once: the lines that begin in the same page of the file."""

_CHUNK = 1 << 20
"""Bytes read at once while an index is built."""

_CACHED_BLOCK = 1 << 16
"""Bytes. Longer blocks (of very long lines) are read again rather than kept."""


class _Block:
    """The lines of a block that was read; it is split when a second one is asked for, since often none is."""

    def __init__(self, block: bytes) -> None:
        self._block = block
        self._lines: list[bytes] | None = None
        self._is_first = True

    def __getitem__(self, number: int) -> bytes:
        if self._lines is None:
            if self._is_first:
                self._is_first = False
                return self._block.split(b"\n", number + 1)[number]
            self._lines, self._block = self._block.split(b"\n"), b""
        return self._lines[number]


@lru_cache(maxsize=2048)
def _cached_block(state: FileState, offset: int, size: int, checksum: int) -> _Block:
    block = read_at(state, offset, size)
    if zlib.crc32(block) != checksum:  # the size and the time of a file can be those of another content
        raise FileChanged.of(state.path)
    return _Block(block)


class Lines(Index):
    """The lines of a text file by number, from 0; they end at a newline only, as :func:`open_lines` has it."""

    is_sequential: ClassVar[bool]  # whether only reading forward is cheap

    def __len__(self) -> int:
        return self.contents.facts["lines"]

    def prepare(self, start: int, stop: int) -> None:
        """Announce that the lines from ``start`` to before ``stop`` are read next."""

    def release(self) -> None:
        """Forget what :meth:`prepare` has read, and close the file."""

    @property
    @abstractmethod
    def digest(self) -> int:
        """Checksum of the content as it was when the index was built."""

    @abstractmethod
    def read(self, number: int) -> bytes:
        """One line, without its line end.

        Raises:
            IndexError: if there is none of this number.
            DataError: if the file has changed since it was indexed.
        """

    def _none_with(self, number: int) -> IndexError:
        return IndexError(f"{self.path} has {len(self)} lines, numbered from 0; there is none with number {number}.")


def is_read_forward(path: str) -> bool:
    """Whether only reading a text file forward is cheap."""
    return path.endswith(".gz") or not is_local(path)


def open_numbered_lines(path: str, index_dir: str | None = None, place: str | None = None) -> Lines:
    """The lines of a text file by number; arguments are those of :class:`Index`."""
    return (LineCount if is_read_forward(path) else LineIndex)(path, index_dir, place)


class LineIndex(Lines):
    """Lines of a local, uncompressed file: one read of about 8 KiB finds any of them.

    Lines that begin in the same page of the file are a block; the index holds each block's offset and first line.
    """

    kind = "lines"
    is_sequential = False
    _views: tuple[memoryview, ...] | None = None  # single numbers come faster out of these than out of arrays

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_views": None}

    @property
    def digest(self) -> int:
        """See :attr:`Lines.digest`."""
        return zlib.crc32(self.contents.arrays["checksums"].data, self.state.size & 0xFFFFFFFF)

    def read(self, number: int) -> bytes:
        """See :meth:`Lines.read`."""
        if self._views is None:
            arrays = self.contents.arrays
            self._views = tuple(memoryview(arrays[name]) for name in ("first_lines", "offsets", "checksums"))
        first_lines, offsets, checksums = self._views
        if not 0 <= number < first_lines[-1]:
            raise self._none_with(number)
        block = bisect_right(first_lines, number) - 1
        offset, size = offsets[block], offsets[block + 1] - offsets[block]
        read = _cached_block if size <= _CACHED_BLOCK else _cached_block.__wrapped__
        try:
            lines = read(self.state, offset, size, checksums[block])
        except FileChanged:
            self.sidecar.remove()
            raise
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror}).") from error
        return lines[number - first_lines[block]].rstrip(b"\r")

    def _find(self, state: FileState, progress: Progress) -> Contents:
        offsets, first_lines, checksums = [[0]], [[0]], []
        size, newlines, last, checksum = 0, 0, b"\n", 0
        with open(state.path, "rb") as file:
            while chunk := file.read(_CHUNK):
                starts = np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + (size + 1)
                begins_block = np.diff(starts // _PAGE, prepend=-1) > 0
                offsets.append(starts[begins_block])
                first_lines.append(newlines + 1 + np.flatnonzero(begins_block))
                view, done = memoryview(chunk), 0
                for begin in (offsets[-1] - size).tolist():
                    checksums.append(zlib.crc32(view[done:begin], checksum))
                    checksum, done = 0, begin
                checksum = zlib.crc32(view[done:], checksum)
                newlines += len(starts)
                size += len(chunk)
                last = chunk[-1:]
                progress(len(chunk))
        lines = newlines + (last != b"\n")  # the last line may lack its newline
        arrays = {
            "offsets": np.concatenate([*offsets, [size]], dtype=np.int64),
            "first_lines": np.concatenate([*first_lines, [lines]], dtype=np.int64),
            "checksums": np.array([*checksums, checksum], np.uint32),
        }
        return Contents(arrays, {"lines": lines})


class LineCount(Lines):
    """Lines of a file that is compressed, remote, or the output of a command: counted, and read forward."""

    kind = "count"
    is_sequential = True

    def __init__(self, path: str, index_dir: str | None = None, place: str | None = None) -> None:
        super().__init__(path, index_dir, place)
        self.release()

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_reader": None, "_lines": [], "_start": 0}

    @property
    def digest(self) -> int:
        """See :attr:`Lines.digest`."""
        return self.contents.facts["crc32"]

    def release(self) -> None:
        """See :meth:`Lines.release`."""
        self._reader: Iterator[bytes] | None = None
        self._lines: list[bytes] = []  # in memory; the reader is at the line after them
        self._start = 0  # number of its first line
        self._process = os.getpid()

    def prepare(self, start: int, stop: int) -> None:
        """Read these lines into memory, and forget the earlier ones.

        Raises:
            DataError: if the file has changed.
        """
        if self._process != os.getpid():  # a forked worker shares the position in the file with its parent
            self.release()
        stop = min(stop, len(self))
        try:
            if self._reader is None or not self._start <= start <= self._start + len(self._lines):
                self._go_to(start)
            del self._lines[: start - self._start]
            self._start = start
            self._lines.extend(islice(self._reader, max(stop - start - len(self._lines), 0)))
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{self.path}: cannot be read to its end ({error}).") from error
        if len(self._lines) < stop - start:
            raise self._changed()
        self._check_unchanged()

    def read(self, number: int) -> bytes:
        """See :meth:`Lines.read`; a line that was not prepared is read forward to."""
        if not 0 <= number < len(self):
            raise self._none_with(number)
        if self._process != os.getpid() or not self._start <= number < self._start + len(self._lines):
            self.prepare(number, number + 1)
        return self._lines[number - self._start]

    def _go_to(self, number: int) -> None:
        behind = self._start + len(self._lines)
        if self._reader is None or number < behind:
            self._reader, behind = open_lines(self.path), 0
        self._lines, self._start = [], number
        skipped = sum(1 for _ in islice(self._reader, number - behind))
        if skipped < number - behind:
            raise self._changed()

    def _check_unchanged(self) -> None:
        if not is_local(self.path):
            return
        status = os.stat(self.path)
        if (status.st_size, status.st_mtime_ns) != (self.state.size, self.state.mtime_ns):
            raise FileChanged.of(self.path)
        if status.st_ctime_ns != self.state.ctime_ns:  # perhaps its name, owner or permissions alone
            state = FileState.of(self.path)
            if self._find(state, lambda _: None).facts != self.contents.facts:
                raise FileChanged.of(self.path)
            self.state = state

    def _changed(self) -> DataError:
        places = self.sidecar.places
        kept = f"delete its index ({' or '.join(places)}) and " if places else ""
        return DataError(f"{self.path}: no longer has {len(self)} lines, as its index says; {kept}start again.")

    def _find(self, state: FileState, progress: Progress) -> Contents:
        lines, last, checksum, done = 0, b"\n", 0, 0
        with ExitStack() as stack:
            raw = stack.enter_context(open(state.path, "rb")) if is_local(state.path) else None
            file = stack.enter_context(open_best(state.path, "rb") if raw is None else gzip.GzipFile(fileobj=raw))
            while block := file.read(_CHUNK):
                lines += block.count(b"\n")
                last = block[-1:]
                checksum = zlib.crc32(block, checksum)
                if raw is not None:  # progress in compressed bytes
                    progress(raw.tell() - done)
                    done = raw.tell()
            if raw is not None:
                progress(raw.tell() - done)
        return Contents({}, {"lines": lines + (last != b"\n"), "crc32": checksum})


def is_compressed(path: str) -> bool:
    """Whether a local file begins as gzip, bzip2 or xz data do; their usual suffixes may be missing."""
    with suppress(OSError), open(path, "rb") as file:
        return file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ"))
    return False
