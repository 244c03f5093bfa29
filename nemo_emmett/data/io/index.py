"""Indexes of data files: what is found by reading a file once, kept in a sidecar.

An index (``.nemo_emmett/train.de.emmett-index``) is a few arrays. It is built again unless its own checksum is right
and the data file has the size, times and sampled content that it had
(:class:`~nemo_emmett.data.io.files.FileState`).
"""

from __future__ import annotations

import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from functools import lru_cache
from typing import Any, ClassVar

from tqdm import tqdm

from nemo_emmett.data.io.files import SECONDS_WITHOUT_A_BAR, FileState
from nemo_emmett.data.io.sidecar import Contents, Sidecar, warn_uncached
from nemo_emmett.errors import DataError, Help
from nemo_emmett.processes import map_in_processes, workers_for

INDEX_SUFFIX = ".emmett-index"

_PARALLEL_FROM = 32 << 20
"""Bytes. Less is indexed faster than processes start."""

Progress = Callable[[int], Any]
"""Takes the number of bytes that have been read since the last call."""


class FileChanged(DataError):
    """A data file is no longer what was indexed."""

    page = Help.FILE_CHANGED

    @classmethod
    def of(cls, path: str) -> FileChanged:
        """The error for a file."""
        return cls(f"{path}: has changed since it was indexed; start again, and it is indexed again.")


class _Descriptor:
    """An open file, closed when its last user is gone: a thread may still read what the cache has dropped."""

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
    status = os.fstat(file.number)  # after the bytes: nothing was written before they were read
    if (status.st_size, status.st_mtime_ns) != (state.size, state.mtime_ns):
        raise FileChanged.of(state.path)
    return parts[0] if len(parts) == 1 else b"".join(parts)


class Index(ABC):
    """What was found in a data file by reading it once. Subclasses define what that is.

    The first use loads the index or builds it (:func:`build_indexes` does so for many). It can be pickled, and can be
    used in forked workers. That of remote data is taken to fit as long as it exists.

    Args:
        path: the data file, or a URL.
        index_dir: folder for the index where it cannot be written next to the data.
        place: where the index is written first of all; by default the hidden folder next to the data file.
    """

    kind: ClassVar[str]

    def __init__(self, path: str, index_dir: str | None = None, place: str | None = None) -> None:
        self.path = path
        self.sidecar = Sidecar(path, INDEX_SUFFIX, self.kind, index_dir, place)
        self.state: FileState | None = None
        self._contents: Contents | None = None

    def __getstate__(self) -> dict:
        if self._contents is not None and self._contents.is_mapped:  # the process that unpickles it maps the file, too
            return {**self.__dict__, "_contents": None}
        return self.__dict__.copy()

    @property
    def contents(self) -> Contents:
        """The arrays, loaded or built at the first access."""
        if self._contents is None:
            build_indexes([self])
        return self._contents

    @property
    def is_loaded(self) -> bool:
        """Whether it can be used without reading a file."""
        return self._contents is not None

    def load(self) -> bool:
        """Take the index from its file, if there is one that fits the data as it is now.

        Raises:
            DataError: if the data file cannot be read.
        """
        self.state = FileState.of(self.path)
        self._contents = self.sidecar.read(_identity(self.state))
        return self._contents is not None

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
        return state, None if self.sidecar.write(_identity(state), contents) else contents

    def adopt(self, state: FileState, contents: Contents | None) -> None:
        """Take over what :meth:`build` returned, perhaps in another process."""
        if contents is not None:
            self.sidecar.keep(_identity(state), contents)
            self.state, self._contents = state, contents
        elif not self.load():
            raise self._changing()

    def _changing(self) -> DataError:
        return DataError(f"{self.path}: changes while it is being indexed; start again when it is complete.")

    @abstractmethod
    def _find(self, state: FileState, progress: Progress) -> Contents:
        """Read the data file once."""


def _identity(state: FileState) -> dict[str, int]:
    return dict(zip(("size", "mtime_ns", "ctime_ns", "sample"), state.stamp, strict=True))


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
    workers = workers_for(len(firsts)) if total >= _PARALLEL_FROM else 1
    with tqdm(total=total, desc="Indexing data", unit="B", unit_scale=True, delay=SECONDS_WITHOUT_A_BAR) as bar:
        build = map_in_processes(lambda index, progress: index.build(progress), firsts, workers, bar)
        with closing(build) as built:
            for same, found in zip(missing.values(), built, strict=True):
                for index in same:
                    index.adopt(*found)
    warn_uncached("indexes", [index.path for index in firsts if not index.contents.is_mapped])
