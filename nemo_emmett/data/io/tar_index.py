"""The position of each member of a tar file: an index (:mod:`~nemo_emmett.data.io.index`)."""

from __future__ import annotations

import io
import os
import posixpath
import tarfile
import zlib
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np

from nemo_emmett.data.io.files import FileState
from nemo_emmett.data.io.index import FileChanged, Index, Progress, read_at
from nemo_emmett.data.io.sidecar import Contents


def normal_name(name: str) -> str:
    """A member's name without what differs from one tar program to another: a leading ``./`` or ``/``."""
    return posixpath.normpath(name).lstrip("/")


class Member(NamedTuple):
    """The bytes of one member of a tar file, read on demand.

    Its header, which names it, is compared with the one that was indexed, so that no other audio is taken for it.
    """

    file: FileState
    offset: int
    size: int  # bytes
    header: int  # offset of its header, which ends where the member begins
    checksum: int  # of the header

    def read(self) -> bytes:
        """All of them.

        Raises:
            FileChanged: if the tar file has changed since it was indexed.
            OSError: if it cannot be read.
        """
        data = read_at(self.file, self.header, self.offset - self.header + self.size)
        self._check(data[: self.offset - self.header])
        return data[self.offset - self.header :]

    def open(self) -> BinaryIO:
        """The bytes as a file, of which only what is read of it is read from disk; errors are those of :meth:`read`."""
        self._check(read_at(self.file, self.header, self.offset - self.header))
        return io.BufferedReader(_MemberFile(self), buffer_size=4096)

    def _check(self, header: bytes) -> None:
        if zlib.crc32(header) != self.checksum:
            raise FileChanged.of(self.file.path)


class _MemberFile(io.RawIOBase):
    def __init__(self, member: Member) -> None:
        self.member = member
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.member.size}[whence]
        self.position = max(base + offset, 0)
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: memoryview) -> int:
        wanted = max(min(len(buffer), self.member.size - self.position), 0)
        data = read_at(self.member.file, self.member.offset + self.position, wanted)
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


class TarIndex(Index):
    """The members of a local, uncompressed tar file, by name and by number.

    It has no members behind a damage, whose place is :attr:`damage`.
    """

    kind = "tar"

    def __len__(self) -> int:
        return len(self.contents.arrays["offsets"])

    @property
    def damage(self) -> str | None:
        """The last member's name before the file breaks off, None if it is whole."""
        return self.contents.facts["damage"]

    def name(self, number: int) -> str:
        """Name of a member by its number, from 0, in the order of the file."""
        return self._name(number).decode("utf-8", "surrogateescape")

    def member(self, number: int) -> Member:
        """A member by its number, from 0, in the order of the file."""
        arrays = self.contents.arrays
        return Member(self.state, *(int(arrays[name][number]) for name in ("offsets", "sizes", "headers", "checksums")))

    def find(self, name: str) -> Member | None:
        """The first member of this name, or of one that differs in a leading ``./`` or ``/``; None if there is none."""
        plain = normal_name(name)
        found = (self._find_exactly(variant) for variant in dict.fromkeys((name, plain, f"./{plain}", f"/{plain}")))
        return next((member for member in found if member is not None), None)

    def _find_exactly(self, name: str) -> Member | None:
        try:
            wanted = name.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:  # no file can have such a name
            return None
        by_name = self.contents.arrays["by_name"]
        place = bisect_left(by_name, wanted, key=self._name)
        if place == len(by_name) or self._name(by_name[place]) != wanted:
            return None
        return self.member(int(by_name[place]))

    def _name(self, number: int) -> bytes:
        arrays = self.contents.arrays
        return arrays["names"][arrays["name_starts"][number] : arrays["name_starts"][number + 1]].tobytes()

    def _find(self, state: FileState, progress: Progress) -> Contents:
        names, offsets, sizes, headers = [], [], [], []
        damage, last = None, "its start"
        try:
            for member in _members(state, progress):
                last = member.name
                if member.offset_data + member.size > state.size:
                    raise tarfile.ReadError("the last member breaks off")
                names.append(member.name.encode("utf-8", "surrogateescape"))
                offsets.append(member.offset_data)
                sizes.append(member.size)
                headers.append(member.offset)
        except tarfile.ReadError:
            damage = last
        arrays = {
            "offsets": np.array(offsets, np.int64),
            "sizes": np.array(sizes, np.int64),
            "headers": np.array(headers, np.int64),
            "checksums": np.array(_checksums(state, headers, offsets), np.uint32),
            "name_starts": np.cumsum([0, *map(len, names)], dtype=np.int64),
            "by_name": np.array(sorted(range(len(names)), key=names.__getitem__), np.int64),
            "names": np.frombuffer(b"".join(names), np.uint8),
        }
        return Contents(arrays, {"damage": damage})


def _checksums(state: FileState, headers: Sequence[int], offsets: Sequence[int]) -> list[int]:
    """Of the headers of members, each from its own offset to that of the member's bytes."""
    with open(state.path, "rb", buffering=0) as file:
        parts = (os.pread(file.fileno(), end - start, start) for start, end in zip(headers, offsets, strict=True))
        return [zlib.crc32(part) for part in parts]


def _members(state: FileState, progress: Progress) -> Iterator[tarfile.TarInfo]:
    """The files in a tar file. Sparse ones are left out: their bytes do not lie together."""
    done = 0
    with tarfile.open(state.path, "r:") as tar:
        for member in tar:
            if member.isfile() and not member.issparse():
                yield member
            tar.members.clear()  # otherwise it keeps them all
            progress(tar.offset - done)
            done = tar.offset
