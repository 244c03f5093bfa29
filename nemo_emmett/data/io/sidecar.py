"""The format of an index file: one line of JSON, then arrays of numbers, mapped into memory.

The line says of which data file the index is, in which state, and carries a checksum of all that follows. Whatever does
not fit is no index: it is built again.
"""

from __future__ import annotations

import json
import mmap
import os
import stat
import uuid
import zlib
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from nemo.utils import logging

from nemo_emmett.data.io.files import FileState

_VERSION = 2
"""Of the format of index files; files of another version are built again."""

_LONGEST_HEADER = 1 << 16
"""Bytes. A longer first line is no header of an index file."""


@dataclass
class Contents:
    """What an index holds: arrays by name, and facts that fit into its header."""

    arrays: dict[str, np.ndarray]
    facts: dict[str, Any] = field(default_factory=dict)

    def checksum(self) -> int:
        """The same for the same contents."""
        checksum = zlib.crc32(json.dumps(self.facts, sort_keys=True).encode())
        for name, array in self.arrays.items():
            checksum = zlib.crc32(np.ascontiguousarray(array).data, zlib.crc32(name.encode(), checksum))
        return checksum


def write_index(place: str, kind: str, state: FileState, contents: Contents) -> None:
    """Write an index file as a whole or not at all, whoever else does so at the same time."""
    os.makedirs(os.path.dirname(place) or ".", exist_ok=True)
    draft = f"{place}.{uuid.uuid4().hex}.tmp"
    try:
        with open(draft, "xb") as file:
            file.write(_header(kind, state, contents))
            for array in contents.arrays.values():
                file.write(np.ascontiguousarray(array).data)
        os.replace(draft, place)
    finally:
        with suppress(FileNotFoundError):
            os.remove(draft)


def _header(kind: str, state: FileState, contents: Contents) -> bytes:
    """One line of JSON, filled up with blanks so that the numbers behind it are aligned."""
    shapes = {name: [array.dtype.str, len(array)] for name, array in contents.arrays.items()}
    content = {"checksum": contents.checksum(), "arrays": shapes, "facts": contents.facts}
    line = json.dumps({**_identity(kind, state), **content}).encode()
    return line.ljust(-(-(len(line) + 1) // 64) * 64 - 1) + b"\n"


def _identity(kind: str, state: FileState) -> dict[str, Any]:
    keys = ("size", "mtime_ns", "ctime_ns", "sample")
    return {"version": _VERSION, "kind": kind, **dict(zip(keys, state.stamp, strict=True))}


def read_index(place: str, kind: str, state: FileState) -> Contents | None:
    """Map an index file; None if there is none, or it is not a whole one of the data as it is now."""
    try:
        if not stat.S_ISREG(os.stat(place).st_mode):  # opening a pipe would wait for ever
            raise ValueError("no file")
        with open(place, "rb") as file:
            line = file.readline(_LONGEST_HEADER)
            header = json.loads(line)
            if {key: header.get(key) for key in _identity(kind, state)} != _identity(kind, state):
                raise ValueError("out of date")
            if len(line) % 64:
                raise ValueError("cut off")
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        arrays, offset = {}, len(line)
        for name, (dtype, count) in header["arrays"].items():
            arrays[name] = np.frombuffer(view, dtype, count, offset)  # refuses objects, and what is not in the file
            offset += arrays[name].nbytes
        contents = Contents(arrays, header["facts"])
        if offset != len(view) or contents.checksum() != header["checksum"]:
            raise ValueError("damaged")
        return contents
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
        logging.info(f"The index {place} does not fit {state.path} as it is now: it is built again.")
        return None
