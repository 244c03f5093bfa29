"""Records by number: what all formats share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence

from lhotse.cut import Cut
from nemo.collections.common.data.lhotse.cutset import attach_tags
from nemo.collections.common.data.lhotse.text_adapters import SourceTargetTextExample

from nemo_emmett.data.io.index import Index
from nemo_emmett.data.io.index import build_indexes as build_all
from nemo_emmett.data.io.line_index import Lines, is_read_forward
from nemo_emmett.errors import DataError

Example = Cut | SourceTargetTextExample

_FORWARD_SHARDS = 4
"""Number of shards that can only be read forward and are open at the same time; each holds a file and some lines."""


class Records(ABC):
    """The records of a source, by shard and number.

    Args:
        name: of the source, for reports.
        shards: the text files of each shard, in the order of the config. Files of a shard belong together line by line.
        open_lines: the lines of a file by number.
        tags: are attached to each example.

    Attributes:
        shard_files: the text files of each shard.
        shard_lines: their lines.
    """

    opens_recordings = False
    """Whether recordings are opened for lengths that the records do not have."""

    def __init__(
        self,
        name: str,
        shards: Sequence[Sequence[str]],
        open_lines: Callable[[str], Lines],
        tags: Mapping | None,
    ) -> None:
        self.name = name
        self.shard_files = [tuple(files) for files in shards]
        self.shard_lines = _LinesOfShards(self.shard_files, open_lines)
        self.is_sequential = [any(map(is_read_forward, files)) for files in shards]
        self.tags = dict(tags or {})
        self._sizes: list[int] | None = None
        self._forward: list[int] = []  # the shards that are being read forward, the latest last

    @property
    def shard_sizes(self) -> list[int]:
        """Number of lines of each shard, blank and bad ones included; builds or loads the indexes.

        Raises:
            DataError: if a file cannot be read, or files that belong together have different numbers of lines.
        """
        if self._sizes is None:
            build_all(self.indexes)
            self._sizes = [common_length(files) for files in self.shard_lines]
        return self._sizes

    @property
    def indexes(self) -> list[Index]:
        """All indexes that reading needs."""
        return [*(lines for files in self.shard_lines for lines in files), *self.audio_indexes]

    @property
    def audio_indexes(self) -> list[Index]:
        """Those of files other than text."""
        return []

    def prepare(self, shard: int, start: int, stop: int) -> None:
        """Announce that the records from ``start`` to before ``stop`` are read next. This saves time, no more.

        Shards that can only be read forward read them into memory, and forget what came before.
        """
        if self.is_sequential[shard]:
            self._go_forward_in(shard)
            for lines in self.shard_lines[shard]:
                lines.prepare(start, stop)

    def read(self, shard: int, number: int) -> list[Example]:
        """The examples of one record; if it cannot be used none, and the cause is added to the skipped records.

        Args:
            shard: number of the shard, from 0.
            number: of the record in its shard, from 0.

        Raises:
            IndexError: if there is no such record.
            DataError: if a file has changed since it was indexed.
        """
        examples = list(self._examples(shard, number + 1, self._lines(shard, number, self.shard_lines[shard])))
        for example in examples:
            attach_tags(example, self.tags)
        return examples

    @property
    def examples_of_complete(self) -> int | None:
        """How many examples a record makes of which no part is missing, where :meth:`read_one` can make one of them."""
        return None

    def read_one(self, shard: int, number: int, k: int) -> Example | None:
        """Example ``k`` of a complete record, made without the others; None if it cannot be made like this.

        Nothing is counted as read or skipped. Raises as :meth:`read` does.
        """
        return None

    def _lines(self, shard: int, number: int, files: Sequence[Lines]) -> list[bytes]:
        if self.is_sequential[shard]:
            self._go_forward_in(shard)
        return [lines.read(number) for lines in files]

    def _go_forward_in(self, shard: int) -> None:
        if self._forward[-1:] == [shard]:
            return
        self._forward = [*(other for other in self._forward if other != shard), shard]
        if len(self._forward) > _FORWARD_SHARDS:
            for lines in self.shard_lines[self._forward.pop(0)]:
                lines.release()

    @abstractmethod
    def _examples(self, shard: int, number: int, lines: Sequence[bytes]) -> Iterator[Example]:
        """The examples that the lines of a record yield; its number is from 1 here, as in reports."""


class _LinesOfShards(Sequence[tuple[Lines, ...]]):
    """The lines of the files of each shard, opened when they are needed: of ten thousand shards few are, at first."""

    def __init__(self, files: Sequence[Sequence[str]], open_lines: Callable[[str], Lines]) -> None:
        self._files = files
        self._open = open_lines
        self._opened: dict[int, tuple[Lines, ...]] = {}

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, shard: int) -> tuple[Lines, ...]:
        if (opened := self._opened.get(shard)) is None:
            opened = self._opened[shard] = tuple(map(self._open, self._files[shard]))
        return opened


def common_length(files: Sequence[Lines]) -> int:
    """Number of lines of files that belong together.

    Raises:
        DataError: if it differs.
    """
    shortest = min(files, key=len)
    if len(max(files, key=len)) > len(shortest):
        raise DataError(
            f"{shortest.path} ends after {len(shortest)} lines, but a file parallel to it "
            f"({', '.join(lines.path for lines in files)}) goes on; parallel files must have the same number of lines."
        )
    return len(shortest)


def build_indexes(records: Sequence[Records]) -> None:
    """Load the indexes of many sources, and build those that are missing or out of date, in several processes.

    Raises:
        DataError: if a file cannot be read.
        ConfigError: if ``index_dir`` is given, but cannot be written.
    """
    build_all([index for one in records for index in one.indexes])
