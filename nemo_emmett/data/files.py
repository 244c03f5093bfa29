"""Reading text files line by line: sharded, plain or gzipped, and without stopping at a line that cannot be decoded."""

from __future__ import annotations

import codecs
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import zip_longest
from pathlib import Path

from lhotse.dataset.dataloading import resolve_seed
from lhotse.serialization import open_best
from nemo.collections.common.data.lhotse.nemo_adapters import expand_sharded_filepaths
from tqdm import tqdm

from nemo_emmett.errors import DataError

SECONDS_WITHOUT_A_BAR = 5.0
"""Counting that takes no longer than this shows nothing."""


def expand_paths(paths: str | Path | Sequence[str | Path]) -> list[str]:
    """All files that a config names: one path, a list of them, or a sharded one (``train__OP_0..7_CL_.de``)."""
    if isinstance(paths, (str, Path)):
        return [str(path) for path in expand_sharded_filepaths(paths)]
    return [str(shard) for path in paths for shard in expand_sharded_filepaths(path)]


def is_local(path: str) -> bool:
    """Whether ``path`` is a file of this machine: not a URL, an object store, or the output of a command."""
    return "://" not in path and not path.startswith("pipe:")


def open_lines(path: str) -> Iterator[bytes]:
    """Yield the lines of a text file, gzipped if its name ends in ``.gz``, without their line ends.

    Lines end at a newline only: other separators that Unicode knows may stand inside a sentence, and splitting there
    would shift one side of a parallel text.
    """
    with open_best(path, "rb") as file:
        for line in file:
            yield line.rstrip(b"\r\n")


def zip_lines(paths: Sequence[str]) -> Iterator[tuple[int, tuple[bytes, ...]]]:
    """Yield the line number (from 1) and the lines of several files that belong line by line together.

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
                    f"{short} ends after {number - 1} lines, but a file parallel to it ({', '.join(paths)}) goes on; "
                    "parallel files must have the same number of lines."
                )
            yield number, lines


def count_lines(path: str) -> int:
    """Number of lines in a local text file, gzipped or not; a file that did not change is counted once."""
    return count_lines_of([path])[path]


def count_lines_of(paths: Sequence[str]) -> dict[str, int]:
    """Number of lines of each local text file; counting for long shows a bar, a file that did not change is quick."""
    stamps = {path: _stamp(path) for path in paths}
    new = [path for path, stamp in stamps.items() if stamp not in _counted]
    total = sum(os.path.getsize(path) for path in new)
    with tqdm(total=total, desc="Counting lines", unit="B", unit_scale=True, delay=SECONDS_WITHOUT_A_BAR) as bar:
        for path in new:
            _counted[stamps[path]] = _count_lines(path, bar)
    return {path: _counted[stamp] for path, stamp in stamps.items()}


_counted: dict[tuple[str, int, int], int] = {}
"""Number of lines of the files counted in this process, by their stamps."""


def _stamp(path: str) -> tuple[str, int, int]:
    """What stays the same as long as a file does."""
    status = os.stat(path)
    return path, status.st_size, status.st_mtime_ns


def _count_lines(path: str, bar: tqdm) -> int:
    count, last = 0, b"\n"
    is_compressed = path.endswith(".gz")
    with open_best(path, "rb") as file:
        while block := file.read(1 << 20):
            count += block.count(b"\n")
            last = block[-1:]
            bar.update(0 if is_compressed else len(block))
    if is_compressed:
        bar.update(os.path.getsize(path))
    return count + (last != b"\n")  # the last line may lack its newline


class ShardOrder:
    """The order in which one reader takes its shards: as given, or reshuffled at each pass.

    Args:
        shuffle: whether to shuffle at all.
        seed: an integer, or lhotse's ``trng`` and ``randomized`` (each worker its own order).
    """

    def __init__(self, shuffle: bool, seed: int | str) -> None:
        self.shuffle = shuffle
        self.seed = seed
        self._passes = 0

    def __call__(self, shards: Sequence) -> list:
        """The shards in the order of the next pass."""
        shards = list(shards)
        if self.shuffle:
            random.Random(resolve_seed(self.seed) + self._passes).shuffle(shards)
            self._passes += 1
        return shards


def is_unicode(text: str) -> bool:
    """Whether a string can be written: JSON may hold halves of surrogate pairs, which are no characters."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def without_mark(line: bytes) -> bytes:
    """The line without the byte order mark that programs under Windows put at the beginning of a file."""
    return line.removeprefix(codecs.BOM_UTF8)


def decoded(line: bytes, note: Callable[[str], None]) -> str | None:
    """The line as text; None, and a note of the cause, if it is not UTF-8."""
    try:
        return without_mark(line).decode("utf-8")
    except UnicodeDecodeError:
        note("not UTF-8")
        return None
