"""The position of each line of a text file, and what all indexes share: found in one pass, then kept beside the data.

An index is a few arrays in a small file named after the data (``train.de.emmett-index``), mapped into memory, so that
all workers share one copy. It is built again unless its own checksum is right and the data file has the size, times and
sampled content that it had (:class:`FileState`). It holds a checksum of each block of lines, which is compared whenever
the block is read: data that is rewritten during a training ends it. Where nothing can be written beside the data,
indexes go into ``index_dir``; without one they last as long as the process.

Text that is compressed, remote, or the output of a command cannot be entered in the middle. Of such a file only the
number of lines is kept, and it is read forward, a stretch at a time.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import multiprocessing
import os
import zlib
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import contextmanager, suppress
from functools import lru_cache
from itertools import islice
from typing import Any, BinaryIO, ClassVar

import numpy as np
from lhotse.serialization import open_best
from nemo.utils import logging
from tqdm import tqdm

from nemo_emmett.data.io.files import SECONDS_WITHOUT_A_BAR, FileState, is_local, open_lines
from nemo_emmett.data.io.sidecar import Contents, read_index, write_index
from nemo_emmett.errors import ConfigError, DataError
from nemo_emmett.processes import available_cores, forked_pool

INDEX_SUFFIX = ".emmett-index"

_PAGE = 8192
"""Bytes. One block is looked up and read at once: the lines that begin in the same page of the file."""

_CHUNK = 1 << 20
"""Bytes read at once while an index is built."""

_CACHED_BLOCK = 1 << 16
"""Bytes. Longer blocks (of very long lines) are read again rather than kept."""

_PARALLEL_FROM = 32 << 20
"""Bytes. Less is indexed faster than processes start."""

_MAX_PROCESSES = 16

Progress = Callable[[int], Any]
"""Is told how many more bytes have been read."""


class FileChanged(DataError):
    """A data file is no longer what was indexed."""

    @classmethod
    def of(cls, path: str) -> FileChanged:
        """The error for a file."""
        return cls(f"{path}: has changed since it was indexed; start again, and it is indexed again.")


class _Descriptor:
    """An open file, closed when nobody uses it any more: a thread may still read what the cache has let go."""

    def __init__(self, state: FileState) -> None:
        self.number = os.open(state.path, os.O_RDONLY)

    def __del__(self) -> None:
        with suppress(AttributeError, OSError):  # opening failed, or the interpreter is going down
            os.close(self.number)


@lru_cache(maxsize=256)
def _opened(state: FileState) -> _Descriptor:
    """Reading at a position moves no pointer, so that a descriptor inherited by a forked worker serves both."""
    return _Descriptor(state)


def read_at(state: FileState, offset: int, size: int) -> bytes:
    """So many bytes of a local file from an offset on; fewer where it ends.

    Raises:
        FileChanged: if the file has another size or time than in this state.
        OSError: if it cannot be read.
    """
    file = _opened(state)
    parts = []
    while size > 0 and (part := os.pread(file.number, size, offset)):
        parts.append(part)
        offset, size = offset + len(part), size - len(part)
    status = os.fstat(file.number)  # behind the bytes: nothing was written before they were read
    if (status.st_size, status.st_mtime_ns) != (state.size, state.mtime_ns):
        raise FileChanged.of(state.path)
    return parts[0] if len(parts) == 1 else b"".join(parts)


@lru_cache(maxsize=1024)
def _cached_lines(state: FileState, offset: int, size: int, checksum: int) -> list[bytes]:
    block = read_at(state, offset, size)
    if zlib.crc32(block) != checksum:  # the size and the time of a file can be those of another content
        raise FileChanged.of(state.path)
    return block.split(b"\n")


class Index(ABC):
    """What was found in a data file by reading it once. Subclasses say what to look for.

    Made, it has read nothing; the first use loads the index or builds it (:func:`build_indexes` does so for many).
    It can be pickled, and goes to forked workers as it is. That of remote data is taken to fit as long as it exists.

    Args:
        path: the data file, or a URL.
        index_dir: folder for the index where it cannot be written beside the data.
        beside: where the index is written first of all; by default the data file's name with ``.emmett-index``.
    """

    kind: ClassVar[str]

    def __init__(self, path: str, index_dir: str | None = None, beside: str | None = None) -> None:
        self.path = path
        self.index_dir = index_dir
        self.beside = beside or path + INDEX_SUFFIX
        self.state: FileState | None = None
        self._contents: Contents | None = None
        self._is_mapped = False

    def __getstate__(self) -> dict:
        state = self.__dict__.copy()
        if self._is_mapped:  # the process that unpickles it maps the file, too
            state.update(_contents=None, _is_mapped=False)
        return state

    @property
    def contents(self) -> Contents:
        """The arrays, loaded or built when they are first asked for."""
        if self._contents is None:
            build_indexes([self])
        return self._contents

    @property
    def is_loaded(self) -> bool:
        """Whether it can be used without reading a file."""
        return self._contents is not None

    @property
    def places(self) -> list[str]:
        """Where its file may be, in the order of preference."""
        places = [self.beside] if is_local(self.path) else []
        if self.index_dir is not None:
            name = self.path if not is_local(self.path) else os.path.abspath(self.path)
            stem = "".join(c if c.isalnum() or c in "._-" else "_" for c in os.path.basename(name))[-80:]
            digest = hashlib.sha256(name.encode()).hexdigest()[:16]
            places.append(os.path.join(self.index_dir, f"{stem}-{digest}{INDEX_SUFFIX}"))
        return places

    def load(self) -> bool:
        """Take the index from its file, if there is one that fits the data as it is now.

        Raises:
            DataError: if the data file cannot be looked at.
        """
        self.state = FileState.of(self.path)
        for place in self.places:
            if (contents := read_index(place, self.kind, self.state)) is not None:
                self._contents, self._is_mapped = contents, True
                return True
        return False

    def build(self, progress: Progress) -> tuple[FileState, Contents | None]:
        """Read the data and write the index.

        Returns:
            The data file as it was read, and what was found, or None in place of it where it has been written.

        Raises:
            DataError: if the data cannot be read.
            ConfigError: if ``index_dir`` is given, and the index cannot be written there either.
        """
        state = FileState.of(self.path)
        try:
            contents = self._find(state, progress)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{self.path}: cannot be read to its end ({error}).") from error
        if FileState.of(self.path) != state:
            raise self._changing()
        return state, None if self._is_written(state, contents) else contents

    def adopt(self, state: FileState, contents: Contents | None) -> None:
        """Take over what :meth:`build` returned, perhaps in another process."""
        self.state = state
        if contents is not None:
            self._contents = contents
        elif not self.load():
            raise self._changing()

    def _changing(self) -> DataError:
        return DataError(f"{self.path}: changes while it is being indexed; start again when it is complete.")

    def _discard(self) -> None:
        """Remove the index files, so that the next start builds them again whatever the data file's times are."""
        for place in self.places:
            with suppress(OSError):
                os.remove(place)

    def _is_written(self, state: FileState, contents: Contents) -> bool:
        for place in self.places:
            try:
                write_index(place, self.kind, state, contents)
                return True
            except OSError as error:
                if self.index_dir is not None and place == self.places[-1]:
                    raise ConfigError(
                        f"index_dir: cannot write to '{self.index_dir}' ({error.strerror}); name a folder that can "
                        "be written."
                    ) from error
        return False

    @abstractmethod
    def _find(self, state: FileState, progress: Progress) -> Contents:
        """Read the data file once."""


class Lines(Index):
    """The lines of a text file by number, from 0; they end at a newline only, as :func:`open_lines` has it."""

    is_sequential: ClassVar[bool]  # whether only reading forward is cheap

    def __len__(self) -> int:
        return self.contents.facts["lines"]

    def prepare(self, start: int, stop: int) -> None:
        """Expect lines from ``start`` to before ``stop`` to be read next."""

    def release(self) -> None:
        """Forget what :meth:`prepare` has read, and close the file."""

    @abstractmethod
    def read(self, number: int) -> bytes:
        """One line, without its line end.

        Raises:
            IndexError: if there is none of this number.
            DataError: if the file has changed since it was indexed.
        """

    def _none_with(self, number: int) -> IndexError:
        return IndexError(f"{self.path} has {len(self)} lines, numbered from 0; there is none with number {number}.")


def open_numbered_lines(path: str, index_dir: str | None = None, beside: str | None = None) -> Lines:
    """The lines of a text file by number; arguments are those of :class:`Index`."""
    is_plain = is_local(path) and not path.endswith(".gz")
    return (LineIndex if is_plain else LineCount)(path, index_dir, beside)


class LineIndex(Lines):
    """Lines of a local, uncompressed file: one read of about 8 KiB finds any of them.

    Lines that begin in the same page of the file are a block; the index holds each block's offset and first line.
    """

    kind = "lines"
    is_sequential = False
    _views: tuple[memoryview, ...] | None = None  # single numbers come faster out of these than out of arrays

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_views": None}

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
        read = _cached_lines if size <= _CACHED_BLOCK else _cached_lines.__wrapped__
        try:
            lines = read(self.state, offset, size, checksums[block])
        except FileChanged:
            self._discard()
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

    def __init__(self, path: str, index_dir: str | None = None, beside: str | None = None) -> None:
        super().__init__(path, index_dir, beside)
        self.release()

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_reader": None, "_lines": [], "_start": 0}

    def release(self) -> None:
        """See :meth:`Lines.release`."""
        self._reader: Iterator[bytes] | None = None
        self._lines: list[bytes] = []  # the stretch in memory; the reader stands behind it
        self._start = 0  # number of its first line
        self._process = os.getpid()

    def prepare(self, start: int, stop: int) -> None:
        """Read this stretch into memory, and forget what came before it.

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
        """See :meth:`Lines.read`; outside the stretch that was prepared, it reads forward to the line."""
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
        kept = f"delete its index ({' or '.join(self.places)}) and " if self.places else ""
        return DataError(f"{self.path}: no longer has {len(self)} lines, as its index says; {kept}start again.")

    def _find(self, state: FileState, progress: Progress) -> Contents:
        lines, last, checksum = 0, b"\n", 0
        with _opened_to_count(state, progress) as file:
            while block := file.read(_CHUNK):
                lines += block.count(b"\n")
                last = block[-1:]
                checksum = zlib.crc32(block, checksum)
        return Contents({}, {"lines": lines + (last != b"\n"), "crc32": checksum})


@contextmanager
def _opened_to_count(state: FileState, progress: Progress) -> Iterator[BinaryIO]:
    """Open text of any kind; progress is told in bytes of the file, compressed as they are."""
    if not is_local(state.path):
        with open_best(state.path, "rb") as file:
            yield file
        return
    with open(state.path, "rb") as raw, gzip.open(_Watched(raw, progress)) as file:
        yield file


class _Watched(io.RawIOBase):
    """A file that tells how much is read of it."""

    def __init__(self, file: BinaryIO, progress: Progress) -> None:
        self.file = file
        self.progress = progress

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        self.progress(len(data))
        return data


def is_compressed(path: str) -> bool:
    """Whether a local file begins as gzip, bzip2 or xz data do; their usual suffixes may be missing."""
    with suppress(OSError), open(path, "rb") as file:
        return file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ"))
    return False


def build_indexes(indexes: Sequence[Index]) -> None:
    """Load indexes, and build those that are missing or out of date, in several processes; a bar shows the bytes.

    Ranks may do so at the same time: each writes a file of its own and puts it in place at once.

    Raises:
        DataError: if data cannot be read.
        ConfigError: if ``index_dir`` is given, but cannot be written.
    """
    missing: dict[tuple[str, str], list[Index]] = {}
    for index in indexes:
        if not index.is_loaded and not index.load():
            missing.setdefault((index.kind, index.path), []).append(index)
    firsts = [same[0] for same in missing.values()]
    total = sum(max(index.state.size, 0) for index in firsts)
    with tqdm(total=total, desc="Indexing data", unit="B", unit_scale=True, delay=SECONDS_WITHOUT_A_BAR) as bar:
        build = _build_in_processes if total >= _PARALLEL_FROM and _can_fork(len(firsts)) else _build_here
        build(firsts, bar)
    for first, *others in missing.values():
        for index in others:
            index.adopt(first.state, None if first._is_mapped else first._contents)
    _warn_uncached([index for index in firsts if not index._is_mapped])


def _build_here(indexes: Sequence[Index], bar: tqdm) -> None:
    for index in indexes:
        index.adopt(*index.build(bar.update))


def _can_fork(files: int) -> bool:
    return (
        files > 1
        and available_cores() > 1
        and "fork" in multiprocessing.get_all_start_methods()
        and not multiprocessing.current_process().daemon  # a worker of a loader may have no children
    )


def _build_in_processes(indexes: Sequence[Index], bar: tqdm) -> None:
    done = multiprocessing.get_context("fork").Value("q", 0)
    workers = min(len(indexes), available_cores(), _MAX_PROCESSES)
    with forked_pool(workers, _share_progress, done) as pool:
        built = {pool.submit(_build_in_process, index): index for index in indexes}
        pending = set(built)
        while pending:
            finished, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            for future in finished:
                built[future].adopt(*future.result())
            bar.update(done.value - bar.n)


_done: Any = None
"""In a process that builds indexes: the number of bytes that all of them have read."""


def _share_progress(done: Any) -> None:
    global _done
    _done = done


def _build_in_process(index: Index) -> tuple[FileState, Contents | None]:
    return index.build(_add_to_done)


def _add_to_done(count: int) -> None:
    with _done.get_lock():
        _done.value += count


def _warn_uncached(indexes: Sequence[Index]) -> None:
    if indexes:
        others = f" (and those of {len(indexes) - 1} more files)" if len(indexes) > 1 else ""
        logging.info(
            f"The index of {indexes[0].path}{others} cannot be kept beside the data, and is lost when this process "
            "ends; name a folder for it with index_dir."
        )
