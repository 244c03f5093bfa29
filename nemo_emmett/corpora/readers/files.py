"""A publisher's files, in a folder or in the archive that one downloads: listed, and read as streams."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from nemo_emmett.errors import DataError

_TAR_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz")

WRONG_COLUMNS = "wrong number of columns"
"""Cause of a skipped row of a table: a tab in a text, or a missing cell, shifts the cells after it."""

_DAMAGED = (EOFError, OSError, tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)
"""Raised by the standard library's archives for wrong or missing bytes."""


@dataclass(frozen=True)
class SourceFiles:
    """The files below a folder, or in a .zip or .tar archive (gzipped, bzip2ed or neither).

    Names are relative, with slashes: ``dev/deu_Latn.dev``. An archive is read from its beginning for each file that is
    opened: quick for zip, and for tar while it is small. Recordings in tars are unpacked by ``preparing`` instead.
    """

    path: Path  # the folder or the archive
    below: str = ""  # the folder in it where names begin

    @cached_property
    def names(self) -> tuple[str, ...]:
        """All files, sorted.

        Raises:
            DataError: if the path does not exist, or is an archive that cannot be read.
        """
        if not self.path.exists():
            raise DataError(f"'{self.path}' does not exist; give the folder or archive of the corpus.")
        with _readable(self.path):
            every = (PurePosixPath(name) for name in _list(self.path))
        return tuple(sorted(str(name.relative_to(self.below)) for name in every if name.is_relative_to(self.below)))

    def has(self, name: str) -> bool:
        """Whether there is a file of that name."""
        return name in self._name_set

    def matching(self, *patterns: str) -> list[str]:
        """The names that match any of some glob patterns, folder by folder: ``dev/*.dev``."""

        def matches(name: str, pattern: str) -> bool:
            path = PurePosixPath(name)
            return len(path.parts) == len(PurePosixPath(pattern).parts) and path.match(pattern)

        return [name for name in self.names if any(matches(name, pattern) for pattern in patterns)]

    def rooted(self, *patterns: str) -> SourceFiles:
        """The same files, named from the folder in which one of ``patterns`` matches: this one, or the nearest below.

        So a user may give the archive, the folder that it was unpacked to, or a folder inside.
        """
        parents = {parent for name in self.names for parent in PurePosixPath(name).parents}
        folders = {"" if str(parent) == "." else str(parent) for parent in parents} | {""}
        for folder in sorted(folders, key=lambda folder: (folder.count("/"), folder)):
            inside = SourceFiles(self.path, str(PurePosixPath(self.below, folder)) if folder else self.below)
            if inside.matching(*patterns):
                return inside
        return self

    def need(self, name: str, what: str) -> str:
        """``name``, if there is such a file.

        Raises:
            DataError: if there is not; ``what`` describes it in the message.
        """
        if not self.has(name):
            raise DataError(f"{self.where(name)} is missing: {what}.")
        return name

    def where(self, name: str) -> str:
        """A file's place in words: its path, or its name and the archive."""
        inside = str(PurePosixPath(self.below, name))
        return f"'{self.path / inside}'" if self.path.is_dir() else f"'{inside}' in '{self.path}'"

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """A file as bytes; where its name ends in .gz or .bz2, what is compressed in it.

        Raises:
            DataError: if it is not there, or ends early.
        """
        with _readable(self.path, self.where(name)), _open(self.path, str(PurePosixPath(self.below, name))) as stream:
            if name.endswith((".gz", ".bz2")):
                with (gzip if name.endswith(".gz") else bz2).open(stream) as inside:
                    yield inside  # type: ignore[misc]
            else:
                yield stream

    def lines(self, name: str, errors: str = "surrogateescape") -> Iterator[str]:
        """The lines of a UTF-8 file without their ends, which are newlines only: a text may contain other separators.

        Args:
            name: of the file.
            errors: what to do with other bytes; by default they become halves of surrogate pairs, which no UTF-8 file
                can hold, so that ``preparing`` counts the sentence.

        Raises:
            DataError: if it is not there or ends early; with ``errors="strict"``, if it is not UTF-8.
        """
        with self.open(name) as stream:
            for number, line in enumerate(stream, start=1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8", errors)
                except UnicodeDecodeError:
                    raise DataError(f"{self.where(name)}: line {number} is not UTF-8; download it again.") from None
                yield text.rstrip("\r\n")

    @cached_property
    def _name_set(self) -> frozenset[str]:
        return frozenset(self.names)


def zipped_lines(files: Sequence[tuple[SourceFiles, str]]) -> Iterator[tuple[str, ...]]:
    """The lines of parallel files, together.

    Raises:
        DataError: if one ends before the others.
    """
    streams = [source.lines(name) for source, name in files]
    number = 0
    while True:
        lines = [next(stream, None) for stream in streams]
        if all(line is None for line in lines):
            return
        if None in lines:
            source, name = files[lines.index(None)]
            raise DataError(
                f"{source.where(name)} ends after {number} lines, a file parallel to it goes on; download both again."
            )
        number += 1
        yield tuple(lines)  # type: ignore[arg-type]


def _list(path: Path) -> list[str]:
    if path.is_dir():
        return [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
    if _is_zip(path):
        with zipfile.ZipFile(path) as archive:
            return [name for name in archive.namelist() if not name.endswith("/")]
    if path.name.endswith(_TAR_ENDINGS):
        with tarfile.open(path) as archive:
            return [str(PurePosixPath(member.name)) for member in archive if member.isfile()]
    return [path.name]  # a single file is a source of one


@contextmanager
def _open(path: Path, name: str) -> Iterator[BinaryIO]:
    if path.is_dir():
        with open(path / name, "rb") as stream:
            yield stream
    elif _is_zip(path):
        with zipfile.ZipFile(path) as archive, archive.open(name) as stream:
            yield stream  # type: ignore[misc]
    elif path.name.endswith(_TAR_ENDINGS):
        with tarfile.open(path) as archive:
            # Streams of a tar are views of it, and names in it may begin with "./", which PurePosixPath drops.
            member = next((member for member in archive if str(PurePosixPath(member.name)) == name), None)
            if member is None:
                raise FileNotFoundError(name)
            yield io.BufferedReader(archive.extractfile(member))  # type: ignore[arg-type]
    else:
        with open(path, "rb") as stream:
            yield stream


def _is_zip(path: Path) -> bool:
    # By its name too: an incomplete download lacks the end, by which is_zipfile recognises it.
    return path.name.endswith(".zip") or zipfile.is_zipfile(path)


@contextmanager
def _readable(path: Path, where: str | None = None) -> Iterator[None]:
    """Convert errors of reading into DataError with a remedy."""
    where = where or f"'{path}'"
    try:
        yield
    except (FileNotFoundError, KeyError):
        raise DataError(f"{where} is missing.") from None
    except _DAMAGED as error:
        raise DataError(f"{where} cannot be read ({error}); download or unpack it again.") from error
    except RuntimeError as error:  # of zipfile: a password, or an unknown compression
        raise DataError(f"{where} cannot be read ({error}); unpack it and give the folder.") from error
