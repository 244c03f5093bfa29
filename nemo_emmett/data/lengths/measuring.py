"""A range of records, read and measured: what a process does of the building of an index."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
from lhotse.cut import Cut, MixedCut
from lhotse.cut.data import DataCut
from lhotse.utils import fastcopy
from omegaconf import DictConfig

from nemo_emmett.data.config.sources import Source
from nemo_emmett.data.io.sidecar import Contents
from nemo_emmett.data.io.skipped_records import SkippedRecords
from nemo_emmett.data.lengths.counting import Size, TokenCounter, size_of
from nemo_emmett.data.lengths.measures import TYPES, measure
from nemo_emmett.data.lengths.notes import Names, Recorder, encode_skips
from nemo_emmett.data.readers.examples import ExampleKind, Examples
from nemo_emmett.data.readers.random_access import open_records
from nemo_emmett.data.readers.registry import ReaderContext, defaults_of, reader_context
from nemo_emmett.data.sampling.transforms import TransformPipeline

RECORDS_READ_AHEAD = 1_000
"""Records whose examples are in memory at a time, and whose texts are tokenised together."""

ARRAYS = {"examples": np.int64, "made": np.int64, **TYPES}
"""The arrays of an index: the examples of each record, what NeMo's maps make of each example, the lengths of that."""


class Piece(NamedTuple):
    """A range of the records of a shard, from ``start`` to before ``stop``."""

    shard: int
    start: int
    stop: int


class SourceMeasurer:
    """Reads the records of a source, without their audio, and measures what NeMo's maps make of them.

    Args:
        source: with the keys of its dataset.
        structured: NeMo's config, whose chain has maps only.
        counter: has the tokenizer.
        kind: what the dataset takes.
        forbidden: what no text may hold.
        index_dir: folder for indexes that cannot be written next to the data.
    """

    def __init__(
        self,
        source: Source,
        structured: DictConfig,
        counter: TokenCounter,
        kind: ExampleKind,
        forbidden: re.Pattern | None,
        index_dir: str | None,
    ) -> None:
        self.source, self.structured, self.counter, self.kind = source, structured, counter, kind
        self.recorder = Recorder()
        self.records = open_records(source, self.recorder, kind, index_dir, metadata_only=True)
        defaults = replace(defaults_of(source), transcripts=False)  # they have no part in the lengths
        self._examples = Examples((), kind, defaults, self.recorder, forbidden)

    @cached_property
    def pipeline(self) -> TransformPipeline:
        """NeMo's maps."""
        with reader_context(ReaderContext(SkippedRecords(), self.kind)):
            return TransformPipeline(self.structured, self.counter.tokenizer, (), self.recorder)

    def measure(self, pieces: Sequence[Piece], progress: Callable[[int], Any]) -> Contents:
        """The arrays of several pieces, and in the facts what was read, skipped and left out in each of them."""
        columns: dict[str, list] = {name: [] for name in (*ARRAYS, "skips")}
        rows = []
        for piece in pieces:
            arrays, row = self._measure_piece(piece, progress)
            rows.append({"shard": piece.shard, "records": piece.stop - piece.start, **row})
            for name, array in arrays.items():
                columns[name].append(array)
        arrays = {name: compact(np.concatenate(parts)) for name, parts in columns.items()}
        return Contents(arrays, {"pieces": rows})

    def _measure_piece(
        self, piece: Piece, progress: Callable[[int], Any]
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        self.recorder.clear()
        self.pipeline.filtered.clear()
        columns: dict[str, list] = {name: [] for name in ARRAYS}
        size = Size()
        for first in range(piece.start, piece.stop, RECORDS_READ_AHEAD):
            behind = min(first + RECORDS_READ_AHEAD, piece.stop)
            read = self._read(piece.shard, first, behind)
            examples = [example for of_record in read for example in of_record]
            size += size_of(examples, self.counter)
            with _without_audio():
                made = self.pipeline.run_each(examples, [0])
            measures = measure([one for of_example in made for one in of_example])
            columns["examples"].append(np.array(list(map(len, read)), np.int64))
            columns["made"].append(np.array(list(map(len, made)), np.int64))
            for name in TYPES:
                columns[name].append(getattr(measures, name))
            progress(behind - first)
        arrays = {name: np.concatenate(parts) for name, parts in columns.items()}
        names = Names([lines.path for lines in self.records.shard_lines[piece.shard]], self.source.name)
        arrays["skips"] = np.frombuffer(encode_skips(self.recorder.skips, names), np.uint8)
        row = {
            "skips": len(arrays["skips"]),
            "reads": [[names.encode(name), count] for name, count in self.recorder.reads.items()],
            "filtered": _left_out(self.pipeline.filtered),
            "size": [size.examples, size.seconds, size.tokens],
        }
        return arrays, row

    def _read(self, shard: int, start: int, stop: int) -> list[list]:
        self.records.prepare(shard, start, stop)
        read = []
        for number in range(start, stop):
            found = self.records.read(shard, number)
            if self.kind is not ExampleKind.AS_READ:
                self._examples.records = found
                found = list(self._examples)
            read.append(found)
        return read


def _left_out(filtered: Counter[str]) -> list[list]:
    return [[key, count] for key, count in sorted(filtered.items()) if key]


def compact(array: np.ndarray) -> np.ndarray:
    """Whole numbers from 0 in the smallest type that holds them."""
    if array.dtype.kind not in "iub":
        return array
    return array.astype(smallest_type(int(array.max(initial=0))), copy=False)


def smallest_type(largest: int) -> np.dtype:
    """The smallest type of whole numbers from 0 to this one."""
    return next(np.dtype(kind) for kind in (np.uint8, np.uint16, np.uint32, np.int64) if largest <= np.iinfo(kind).max)


@contextmanager
def _without_audio() -> Iterator[None]:
    """Inside this context, NeMo's map of ``alt_text`` does not read the audio into memory."""

    def keep(cut: Cut, **_: Any) -> Cut:
        custom: Mapping | None = getattr(cut, "custom", None)
        return cut if custom is None or isinstance(cut, MixedCut) else fastcopy(cut, custom=dict(custom))

    with patch.object(DataCut, "move_to_memory", keep), patch.object(MixedCut, "move_to_memory", keep):
        yield
