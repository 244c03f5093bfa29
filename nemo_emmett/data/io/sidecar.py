"""Sidecars: cache files in a hidden folder next to the data, which hold what was found in it by reading it once.

A sidecar is one line of JSON, then arrays of numbers, mapped into memory so that all workers share one copy. The line
identifies what the contents are of, such as the state of a data file, and has a checksum of all contents but large
arrays, whose reader verifies what it reads of them. A file that is damaged, of another version or of other data is
ignored and written again.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from nemo.utils import logging

from nemo_emmett.data.io.files import FileState, content_checksum, is_local
from nemo_emmett.errors import ConfigError
from nemo_emmett.files import atomic_file

HIDDEN_FOLDER = ".nemo_emmett"
"""Name of the folder next to a data file that holds its sidecars."""

_VERSION = 3
"""Of the format; files of another version are written again."""

_LONGEST_HEADER = 1 << 26
"""Bytes. A longer first line is not that of a sidecar."""

_in_memory: dict[tuple[str, str], tuple[dict, Contents]] = {}
"""By kind and path of the data: contents that could not be written, and what they are of."""


@dataclass(frozen=True)
class LargeArray:
    """An array that is written chunk by chunk, so that it need not be in memory."""

    dtype: np.dtype
    length: int
    chunks: Callable[[], Iterator[np.ndarray]]

    def __len__(self) -> int:
        return self.length


@dataclass
class Contents:
    """Arrays by name, and facts that fit into the header.

    Args:
        large: arrays that are not verified when the file is opened; of a file that was opened, they are NumPy arrays.
        is_mapped: from a file, which any process can map.
    """

    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    large: dict[str, Any] = field(default_factory=dict)
    is_mapped: bool = False

    def layout(self) -> list[list]:
        """Name, type and length of each array, in the order of the file."""
        return [[name, array.dtype.str, len(array)] for name, array in (*self.arrays.items(), *self.large.items())]

    def checksum(self) -> int:
        """The same for the same contents."""
        checksum = zlib.crc32(json.dumps([self.facts, self.layout()], sort_keys=True).encode())
        for array in self.arrays.values():
            checksum = zlib.crc32(np.ascontiguousarray(array).data, checksum)
        return checksum

    def in_memory(self) -> Contents:
        """The same with all of its arrays in memory."""
        large = {
            name: np.concatenate([np.empty(0, array.dtype), *array.chunks()])
            if isinstance(array, LargeArray)
            else array
            for name, array in self.large.items()
        }
        return Contents(self.arrays, self.facts, large)


@dataclass(frozen=True)
class Sidecar:
    """The cache file of some data: in the hidden folder next to it, in ``index_dir`` where that cannot be written, else
    in memory.

    Args:
        path: the data file, or a URL.
        suffix: of the file's name.
        kind: what the file contains; a file of another kind is not used.
        index_dir: folder for the file where it cannot be written next to the data.
        place: where the file is written first of all; by default :func:`hidden_place`.
        parts: name of the file in a folder for parts of the file that this would otherwise be.
    """

    path: str
    suffix: str
    kind: str
    index_dir: str | None = None
    place: str | None = None
    parts: str | None = None

    @property
    def places(self) -> list[str]:
        """Where the file may be, in the order of preference."""
        places = [self.place or hidden_place(self.path, self.suffix)] if is_local(self.path) else []
        if self.index_dir is not None:
            name = os.path.abspath(self.path) if is_local(self.path) else self.path
            stem = "".join(c if c.isalnum() or c in "._-" else "_" for c in os.path.basename(name))[-80:]
            digest = hashlib.sha256(name.encode()).hexdigest()[:16]  # files of the same name in several folders
            places.append(os.path.join(self.index_dir, f"{stem}-{digest}{self.suffix}"))
        return places if self.parts is None else [os.path.join(f"{place}.parts", self.parts) for place in places]

    @property
    def exists(self) -> bool:
        """Whether there is a file, which may be damaged or out of date."""
        return (self.kind, self.path) in _in_memory or any(map(os.path.exists, self.places))

    def read(self, identity: Mapping[str, Any]) -> Contents | None:
        """The contents, if they are whole and of this identity."""
        kept, contents = _in_memory.get((self.kind, self.path), (None, None))
        if kept == identity:
            return contents
        header = {"version": _VERSION, "kind": self.kind, **identity}
        return next((found for place in self.places if (found := _read(place, header)) is not None), None)

    def write(self, identity: Mapping[str, Any], contents: Contents) -> bool:
        """Write the file, whole or not at all, also if other processes write it at the same time.

        Returns:
            Whether it is written; otherwise the contents last as long as the process (:func:`warn_uncached`).

        Raises:
            ConfigError: if ``index_dir`` is given, and the file cannot be written there either.
        """
        is_written = self.write_file(identity, contents)
        if is_written:
            _in_memory.pop((self.kind, self.path), None)
        else:
            self.keep(identity, contents.in_memory())
        return is_written

    def write_file(self, identity: Mapping[str, Any], contents: Contents) -> bool:
        """Write the file as :meth:`write` does, and keep nothing in memory where it cannot be written."""
        for place in self.places:
            try:
                with atomic_file(place) as unfinished, open(unfinished, "wb") as file:
                    file.write(_first_line({"version": _VERSION, "kind": self.kind, **identity}, contents))
                    for array in (*contents.arrays.values(), *contents.large.values()):
                        for chunk in array.chunks() if isinstance(array, LargeArray) else (array,):
                            file.write(np.ascontiguousarray(chunk).data)
                return True
            except OSError as error:
                if self.index_dir is not None and place == self.places[-1]:
                    raise ConfigError(
                        f"index_dir: cannot write to '{self.index_dir}' ({error.strerror}); name a folder that can "
                        "be written."
                    ) from error
        return False

    def keep(self, identity: Mapping[str, Any], contents: Contents) -> None:
        """Keep contents in memory that could not be written."""
        _in_memory[self.kind, self.path] = dict(identity), contents

    def remove(self) -> None:
        """Remove the files, so that the next start writes them again whatever the data file's times are."""
        _in_memory.pop((self.kind, self.path), None)
        for place in self.places:
            with suppress(OSError):
                os.remove(place)


def hidden_place(path: str, suffix: str) -> str:
    """Where the sidecar of a data file is."""
    return os.path.join(os.path.dirname(path), HIDDEN_FOLDER, os.path.basename(path) + suffix)


def is_unchanged(stamp: Sequence[int], state: FileState) -> bool:
    """Whether a file is what it was when ``stamp`` was taken: by its size, times and sampled content or, if the stamp
    ends with a checksum of all content, by that, since a move, a copy or a restored backup changes the times."""
    known = state.stamp
    if list(stamp[: len(known)]) == known:
        return True
    return len(stamp) > len(known) and (stamp[0], stamp[-1]) == (state.size, content_checksum(state))


def warn_uncached(what: str, paths: Sequence[str]) -> None:
    """Log once that sidecars are lost at the end of this process.

    Args:
        what: they contain, in the plural.
        paths: of the data files.
    """
    if paths:
        others = f" and {len(paths) - 1} more files" if len(paths) > 1 else ""
        logging.info(
            f"The {what} of {paths[0]}{others} cannot be written next to the data, and are lost when this process "
            "ends; set index_dir to a folder that can be written."
        )


def _first_line(header: Mapping[str, Any], contents: Contents) -> bytes:
    """One line of JSON, filled up with blanks so that the numbers after it are aligned."""
    layout = {"arrays": contents.layout(), "large": len(contents.large)}
    line = json.dumps({**header, "checksum": contents.checksum(), **layout, "facts": contents.facts}).encode()
    return line.ljust(-(-(len(line) + 1) // 64) * 64 - 1) + b"\n"


def _read(place: str, wanted: Mapping[str, Any]) -> Contents | None:
    """Map a sidecar; None if there is none, or it is not whole or not of the wanted header."""
    try:
        if not stat.S_ISREG(os.stat(place).st_mode):  # opening a pipe would block
            raise ValueError("not a file")
        with open(place, "rb") as file:
            line = file.readline(_LONGEST_HEADER)
            header = json.loads(line)
            if {key: header.get(key) for key in wanted} != wanted:
                raise ValueError("out of date")
            if len(line) % 64:
                raise ValueError("cut off")
            size = os.fstat(file.fileno()).st_size
        # Python's mmap would keep a descriptor open; ten thousand shards are more files than a process may have open.
        view = torch.from_file(place, shared=False, size=size, dtype=torch.uint8).numpy()
        view.flags.writeable = False
        arrays, offset = {}, len(line)
        for name, dtype, count in header["arrays"]:
            arrays[name] = np.frombuffer(view, dtype, count, offset)  # refuses objects, and what is not in the file
            offset += arrays[name].nbytes
        large = {name: arrays.pop(name) for name in list(arrays)[len(arrays) - header["large"] :]}
        contents = Contents(arrays, header["facts"], large, is_mapped=True)
        if offset != len(view) or contents.checksum() != header["checksum"]:
            raise ValueError("damaged")
        return contents
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RuntimeError):
        logging.info(f"{place} is damaged, or does not fit the data as it is now: it is written again.")
        return None
