"""The files of a dataset and their lines: paths with patterns, shards, plain and gzipped files, invalid UTF-8."""

from __future__ import annotations

import codecs
import os
import random
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import BinaryIO, NamedTuple

from braceexpand import braceexpand
from lhotse.dataset.dataloading import resolve_seed
from lhotse.serialization import open_best
from lhotse.workarounds import gzip_open_robust
from tqdm import tqdm

from nemo_emmett.errors import DataError

SECONDS_WITHOUT_A_BAR = 5.0
"""Shorter counting shows no progress bar."""

_OPENING, _CLOSING = ("_OP_", "{", "(", "[", "<"), ("_CL_", "}", ")", "]", ">")
_OPENING_BRACKET = re.compile("|".join(map(re.escape, _OPENING)))
_BRACKET_OR_COMMA = re.compile("|".join(map(re.escape, (*_OPENING, *_CLOSING, ","))))
_RANGE = re.compile(r"-?\d+\.\.-?\d+(\.\.-?\d+)?|[A-Za-z]\.\.[A-Za-z](\.\.-?\d+)?")

_SAMPLES, _SAMPLE_BYTES = 8, 4096
"""Number and size of the blocks of a file that are compared to detect a change; smaller files are read completely."""


def expand_paths(paths: str | Path | Sequence[str | Path]) -> list[str]:
    """The files of a path, a list of paths, or a pattern (``train__OP_0..7_CL_.de``).

    A path that exists is taken literally, whatever characters it contains. In any other, a range (``0..7``,
    ``00..30..2``, ``a..c``) or a list (``a,b``) between ``_OP_`` and ``_CL_``, braces, parentheses, square or angle
    brackets is expanded, as in NeMo. Brackets in the names of existing folders, or around anything else, are literal.
    """
    if isinstance(paths, (str, Path)):
        return list(_expanded(str(paths), 0))
    return [shard for path in paths for shard in _expanded(str(path), 0)]


def _expanded(path: str, known: int) -> Iterator[str]:
    """The files of one pattern, whose first ``known`` characters are an existing folder."""
    if _OPENING_BRACKET.search(path, known) is None:  # before the disk is asked, for thousands of files
        yield path
        return
    if is_local(path):
        if os.path.lexists(path):
            yield path
            return
        while (end := path.find("/", known) + 1) and os.path.isdir(path[:end]):
            known = end
    for opening in _OPENING_BRACKET.finditer(path, known):
        if (found := _choices(path, opening.end())) is not None:
            choices, end = found
            if not any(map(_OPENING_BRACKET.search, (path[known : opening.start()], path[end:], *choices))):
                yield from (path[: opening.start()] + choice + path[end:] for choice in choices)
                return
            for choice in choices:
                yield from _expanded(path[: opening.start()] + choice + path[end:], known)
            return
    yield path


def _choices(path: str, start: int) -> tuple[list[str], int] | None:
    """The values of the bracket whose content begins at ``start``, and its end; None if it is no pattern."""
    depth, members = 1, []
    begin = start
    for token in _BRACKET_OR_COMMA.finditer(path, start):
        depth += (token[0] in _OPENING) - (token[0] in _CLOSING)
        if depth == 0 or (depth == 1 and token[0] == ","):
            members.append(path[begin : token.start()])
            begin = token.end()
        if depth == 0:
            if len(members) > 1:
                return members, begin
            is_range = _RANGE.fullmatch(members[0]) is not None
            return (list(braceexpand("{" + members[0] + "}")), begin) if is_range else None
    return None


def is_local(path: str) -> bool:
    """Whether a path is on this machine: not a URL, an object store, or the output of a command."""
    return "://" not in path and not path.startswith("pipe:")


def open_bytes(path: str) -> BinaryIO:
    """Open a file, gzipped if its name ends in ``.gz``, a URL, or the output of a command (``pipe:...``)."""
    if is_local(path):  # lhotse would open a folder whose name ends in .tar as a tar file
        return gzip_open_robust(path) if path.endswith(".gz") else open(path, "rb")
    return open_best(path, "rb")


def open_lines(path: str) -> Iterator[bytes]:
    """Yield the lines of a text file, gzipped if its name ends in ``.gz``, without their line ends.

    Lines end at a newline only: Unicode's other line separators may occur in a sentence, and splitting there would
    shift one side of a parallel text.
    """
    with open_bytes(path) as file:
        for line in file:
            yield line.rstrip(b"\r\n")


def zip_lines(paths: Sequence[str]) -> Iterator[tuple[int, tuple[bytes, ...]]]:
    """Yield the line number (from 1) and that line of each of several parallel files.

    Raises:
        DataError: if one file ends before the others.
    """
    with ExitStack() as stack:
        readers = [open_lines(path) for path in paths]
        for reader in readers:
            stack.callback(reader.close)
        for number, lines in enumerate(zip_longest(*readers), start=1):
            if None in lines:
                short = paths[lines.index(None)]
                raise DataError(
                    f"{short} ends after {number - 1} lines, but a file parallel to it ({', '.join(paths)}) has more; "
                    "parallel files must have the same number of lines."
                )
            yield number, lines


def count_lines(path: str) -> int:
    """Number of lines in a local text file, gzipped or not; counted again only if the file changes."""
    return count_lines_of([path])[path]


def count_lines_of(paths: Sequence[str]) -> dict[str, int]:
    """Number of lines of each local text file, with a progress bar; counted again only if a file changes."""
    states = {path: FileState.of(path) for path in paths}
    new = [path for path, state in states.items() if state not in _counted]
    total = sum(states[path].size for path in new)
    with tqdm(total=total, desc="Counting lines", unit="B", unit_scale=True, delay=SECONDS_WITHOUT_A_BAR) as bar:
        for path in new:
            _counted[states[path]] = _count_lines(path, bar)
    return {path: _counted[state] for path, state in states.items()}


class FileState(NamedTuple):
    """Size, times and a sample of a file's content, by which changes are detected. Of a remote file only the path.

    A file that is rewritten may keep its size, and tools such as rsync set its modification time. Its change time
    (ctime) cannot be set; on file systems without it the sample detects most changes.
    """

    path: str
    size: int = -1  # bytes
    mtime_ns: int = -1
    ctime_ns: int = -1
    sample: int = -1  # checksum of some blocks

    @classmethod
    def of(cls, path: str) -> FileState:
        """
        Raises:
            DataError: if a local file does not exist or cannot be read.
        """
        if not is_local(path):
            return cls(path)
        try:
            with open(path, "rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                sample = _sample(file.fileno(), status.st_size)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
        return cls(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, sample)

    @property
    def stamp(self) -> list[int]:
        """What a sidecar file stores: all but the path, since folders are moved."""
        return list(self[1:])


@lru_cache(maxsize=1 << 16)
def content_checksum(state: FileState) -> int:
    """Checksum of the content of a local file in this state; 0 for a remote file.

    Raises:
        OSError: if it cannot be read.
    """
    if not is_local(state.path):
        return 0
    checksum = 0
    with open(state.path, "rb", buffering=0) as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _sample(descriptor: int, size: int) -> int:
    """Checksum of evenly spaced blocks of an open file, including the first and the last."""
    if size <= _SAMPLES * _SAMPLE_BYTES:
        return zlib.crc32(os.pread(descriptor, size, 0))
    checksum = 0
    for number in range(_SAMPLES):
        offset = (size - _SAMPLE_BYTES) * number // (_SAMPLES - 1)
        checksum = zlib.crc32(os.pread(descriptor, _SAMPLE_BYTES, offset), checksum)
    return checksum


_counted: dict[FileState, int] = {}
"""Number of lines of the files that this process has counted."""


def _count_lines(path: str, bar: tqdm) -> int:
    count, last = 0, b"\n"
    is_compressed = path.endswith(".gz")
    with open_bytes(path) as file:
        while block := file.read(1 << 20):
            count += block.count(b"\n")
            last = block[-1:]
            bar.update(0 if is_compressed else len(block))
    if is_compressed:
        bar.update(os.path.getsize(path))
    return count + (last != b"\n")  # the last line may lack its newline


@dataclass
class ShardOrder:
    """The order in which a reader reads its shards: as given, or shuffled in each pass.

    Args:
        shuffle: whether to shuffle.
        seed: an integer, or lhotse's ``trng`` and ``randomized`` (another order in each worker).
    """

    shuffle: bool
    seed: int | str
    _passes: int = field(default=0, init=False)

    def __call__(self, shards: Sequence) -> list:
        """The shards in the order of the next pass."""
        shards = list(shards)
        if self.shuffle:
            random.Random(resolve_seed(self.seed) + self._passes).shuffle(shards)
            self._passes += 1
        return shards


def is_unicode(text: str) -> bool:
    """Whether a string can be encoded: JSON may contain halves of surrogate pairs, which are no characters."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def strip_bom(line: bytes) -> bytes:
    """The line without the byte order mark that Windows programs write at the beginning of a file."""
    return line.removeprefix(codecs.BOM_UTF8)


def decoded(line: bytes, note: Callable[[str], None]) -> str | None:
    """The line as text; None if it is not UTF-8, which is passed to ``note`` as the cause."""
    try:
        return strip_bom(line).decode("utf-8")
    except UnicodeDecodeError:
        note("not UTF-8")
        return None
