"""The file of a length index, put together from parts that were measured and from an older file.

It depends on the data alone, not on the parts: every array has the smallest type that holds its values, and one whose
values are equal, or follow from others, is left out.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from nemo_emmett.data.io.sidecar import Contents, LargeArray, Sidecar
from nemo_emmett.data.lengths.index import BLOCK, LengthIndex, level_of, ranges
from nemo_emmett.data.lengths.measuring import ARRAYS, compact, smallest_type

Segment = Callable[[], Contents]
"""Returns consecutive pieces of a source, as :meth:`SourceMeasurer.measure` does."""


@dataclass(frozen=True)
class DataFiles:
    """The data files as they were measured.

    Args:
        shard_sizes: records of each shard.
        stamps: (F, 3) size and times of each file, as ``stamp_of`` has it.
        digests: (F,) checksums of their content.
    """

    shard_sizes: Sequence[int]
    stamps: np.ndarray
    digests: np.ndarray


@dataclass
class _Range:
    """The values of an array, looked at once."""

    least: float = np.inf
    largest: float = -np.inf
    has_nan: bool = False

    def add(self, values: np.ndarray) -> None:
        if values.dtype.kind == "f" and (is_nan := np.isnan(values)).any():
            self.has_nan, values = True, values[~is_nan]
        if len(values):
            self.least, self.largest = min(self.least, values.min().item()), max(self.largest, values.max().item())

    @property
    def is_constant(self) -> bool:
        return (self.least == self.largest and not self.has_nan) or self.least > self.largest

    @property
    def constant(self) -> float | None:
        """The one value; None is NaN."""
        if self.least > self.largest:
            return None if self.has_nan else 0
        return self.least


@dataclass
class _Tables:
    """What is found by looking at all segments once."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    block_examples: list[np.ndarray] = field(default_factory=list)
    block_outputs: list[np.ndarray] = field(default_factory=list)
    ranges: dict[str, _Range] = field(default_factory=lambda: {name: _Range() for name in ARRAYS})
    is_total_a_sum: bool = True

    def add(self, segment: Contents) -> None:
        arrays, rows = segment.arrays, segment.facts["pieces"]
        self.rows += rows
        records = np.array([row["records"] for row in rows])
        blocks = -(-records // BLOCK)
        ends = np.minimum(ranges(np.ones_like(blocks), blocks) * BLOCK, np.repeat(records, blocks))
        ends += np.repeat(np.cumsum(records) - records, blocks)
        examples = np.append(0, np.cumsum(arrays["examples"], dtype=np.int64))[ends]
        outputs = np.append(0, np.cumsum(arrays["made"], dtype=np.int64))[examples]
        self.block_examples.append(np.diff(examples, prepend=0))
        self.block_outputs.append(np.diff(outputs, prepend=0))
        for name, found in self.ranges.items():
            found.add(arrays[name])
        sums = arrays["inputs"].astype(np.int64) + arrays["outputs"]
        self.is_total_a_sum &= bool((sums == arrays["totals"]).all())


def write_index(sidecar: Sidecar, identity: dict[str, str], data: DataFiles, segments: Sequence[Segment]) -> bool:
    """Put an index together and write it.

    Args:
        sidecar: the index's file.
        identity: of the index.
        data: the data files.
        segments: all of the source, in its order.

    Returns:
        Whether it is written; otherwise it is kept in memory.
    """
    tables = _Tables()
    for segment in segments:
        tables.add(segment())
    is_stored = {name: not found.is_constant for name, found in tables.ranges.items()}
    is_total_a_sum = tables.is_total_a_sum and is_stored["totals"]
    is_stored["totals"] &= not is_total_a_sum
    bounds = {
        "examples": np.append(0, np.cumsum(_concatenated(tables.block_examples))),
        "outputs": np.append(0, np.cumsum(_concatenated(tables.block_outputs))),
    }
    lengths = {level: int(of_level[-1]) for level, of_level in bounds.items()} | {"records": sum(data.shard_sizes)}
    large = {}
    for name in ARRAYS:
        if is_stored[name]:
            kind = np.dtype(ARRAYS[name])
            dtype = kind if kind.kind == "f" else smallest_type(int(tables.ranges[name].largest))
            chunks = partial(_chunks, segments, name, dtype)
            large[name] = LargeArray(dtype, lengths[level_of(name)], chunks)
    skips = partial(_chunks, segments, "skips", np.dtype(np.uint8))
    large["skips"] = LargeArray(np.dtype(np.uint8), sum(row["skips"] for row in tables.rows), skips)
    arrays, facts = _tables_of_shards(tables.rows, len(data.shard_sizes))
    arrays |= {
        "shard_sizes": np.array(data.shard_sizes, np.int64),
        "file_stamps": data.stamps.ravel(),
        "file_digests": data.digests,
        "block_examples": bounds["examples"],
        "block_outputs": bounds["outputs"],
        "block_checksums": _block_checksums(large, bounds, data.shard_sizes),
    }
    facts |= {
        "one_to_one": tables.ranges["made"].largest <= 1,
        "constants": {name: found.constant for name, found in tables.ranges.items() if found.is_constant},
        "is_total_a_sum": is_total_a_sum,
        "skips_checksum": _checksum(skips()),
    }
    return sidecar.write(identity, Contents(arrays, facts, large))


def _concatenated(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, np.int64), *parts])


def _chunks(segments: Sequence[Segment], name: str, dtype: np.dtype) -> Iterator[np.ndarray]:
    for segment in segments:
        yield segment().arrays[name].astype(dtype, copy=False)


def _checksum(chunks: Iterator[np.ndarray]) -> int:
    checksum = 0
    for chunk in chunks:
        checksum = zlib.crc32(np.ascontiguousarray(chunk).data, checksum)
    return checksum


def _block_checksums(
    large: dict[str, LargeArray], bounds: dict[str, np.ndarray], shard_sizes: Sequence[int]
) -> np.ndarray:
    """Of the values of each block in all arrays; no block lies in two segments."""
    sizes = np.array(shard_sizes, np.int64)
    ends = np.minimum(ranges(np.ones_like(sizes), -(-sizes // BLOCK)) * BLOCK, np.repeat(sizes, -(-sizes // BLOCK)))
    ends += np.repeat(np.cumsum(sizes) - sizes, -(-sizes // BLOCK))
    bounds = {**bounds, "records": np.append(0, ends)}
    checksums = [0] * len(ends)
    for name in ARRAYS:
        if name not in large:
            continue
        of_array, block, done = bounds[level_of(name)].tolist(), 0, 0
        for chunk in large[name].chunks():
            while block < len(ends) and of_array[block + 1] <= done + len(chunk):
                values = np.ascontiguousarray(chunk[of_array[block] - done : of_array[block + 1] - done])
                checksums[block] = zlib.crc32(values.data, checksums[block])
                block += 1
            done += len(chunk)
    return np.array(checksums, np.uint32)


def _tables_of_shards(rows: Sequence[dict], num_shards: int) -> tuple[dict[str, np.ndarray], dict[str, list]]:
    """Sums over the pieces of each shard, and the names by which they were read and left out."""
    readers = list(dict.fromkeys(_hashable(name) for row in rows for name, _ in row["reads"]))
    filters = sorted({key for row in rows for key, _ in row["filtered"]})
    reads = np.zeros((num_shards, len(readers)), np.int64)
    filtered = np.zeros((num_shards, len(filters)), np.int64)
    examples, tokens, skips = (np.zeros(num_shards, np.int64) for _ in range(3))
    seconds = np.zeros(num_shards)
    for row in rows:  # in the order of the records: sums of seconds depend on it
        shard = row["shard"]
        examples[shard] += row["size"][0]
        seconds[shard] += row["size"][1]
        tokens[shard] += row["size"][2]
        skips[shard] += row["skips"]
        for name, count in row["reads"]:
            reads[shard, readers.index(_hashable(name))] += count
        for key, count in row["filtered"]:
            filtered[shard, filters.index(key)] += count
    arrays = {
        "shard_examples": examples,
        "shard_tokens": tokens,
        "shard_seconds": seconds,
        "shard_skips": skips,
        "shard_reads": reads.ravel(),
        "shard_filtered": filtered.ravel(),
    }
    return arrays, {"readers": [list(n) if isinstance(n, tuple) else n for n in readers], "filters": filters}


def _hashable(name: str | list[str]) -> str | tuple[str]:
    return tuple(name) if isinstance(name, list) else name


def copied(index: LengthIndex, first: int, last: int) -> Contents:
    """The blocks of an older index from ``first`` to ``last``, as if they had been measured.

    What is known of a shard as a whole goes with its first block.

    Raises:
        DataError: if the index is damaged.
    """
    blocks = np.arange(first, last + 1)
    at = {level: slice(int(b[first]), int(b[last + 1])) for level, b in index.bounds.items()}
    counts = {level: of_level.stop - of_level.start for level, of_level in at.items()}
    index.verify(blocks)
    found = {name: index.values(name, at[level_of(name)], counts[level_of(name)]) for name in ("examples", "made")}
    found |= index.values_of_outputs(at["outputs"], counts["outputs"])
    arrays, facts = index.contents.arrays, index.contents.facts
    reads = arrays["shard_reads"].reshape(len(index.shard_sizes), len(facts["readers"]))
    filtered = arrays["shard_filtered"].reshape(len(index.shard_sizes), len(facts["filters"]))
    records = np.diff(index.bounds["records"])[blocks]
    ends = np.cumsum(arrays["shard_skips"])
    rows, skips = [], [np.empty(0, np.uint8)]
    for shard in np.unique(index.block_shards[blocks]).tolist():
        is_of_shard = index.block_shards[blocks] == shard
        row = {"shard": shard, "records": int(records[is_of_shard].sum()), "reads": [], "filtered": [], "skips": 0}
        row["size"] = [0, 0.0, 0]
        if index.block_records[blocks[is_of_shard][0]] == 0:
            row["size"] = [arrays[f"shard_{name}"][shard].item() for name in ("examples", "seconds", "tokens")]
            row["reads"] = [[n, c] for n, c in zip(facts["readers"], reads[shard].tolist(), strict=True) if c]
            row["filtered"] = [[k, c] for k, c in zip(facts["filters"], filtered[shard].tolist(), strict=True) if c]
            row["skips"] = int(arrays["shard_skips"][shard])
            skips.append(index.contents.large["skips"][ends[shard] - row["skips"] : ends[shard]])
        rows.append(row)
    return Contents({**{n: compact(v) for n, v in found.items()}, "skips": np.concatenate(skips)}, {"pieces": rows})
