"""The length index of a source: how long each example is, read from its file by blocks of records."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from nemo_emmett.data.io.sidecar import Contents, Sidecar
from nemo_emmett.data.io.skipped_records import SkippedRecords
from nemo_emmett.data.lengths.counting import Size
from nemo_emmett.data.lengths.measures import NO_EXAMPLE, TYPES, Measures
from nemo_emmett.data.lengths.measuring import ARRAYS
from nemo_emmett.data.lengths.notes import Names, decode_skips
from nemo_emmett.errors import DataError

BLOCK = 256
"""Records of a shard that are looked up and verified together."""

OF_RECORDS, OF_EXAMPLES = ("examples",), ("made",)
"""Arrays with a value for each record, and for each example of the reader; all others have one for each output."""


class LengthIndex:
    """How many examples each record of a source makes, and how long they are.

    The **entries** of a source are numbered from 0 through its shards, their records, and the examples of each record.
    An entry is what NeMo's maps make of an example of the reader, in their order. If they make at most one of each,
    entry k of a record is example k of the reader, and an example of which they make none has an entry without an
    example (``inputs`` is -1).

    Args:
        contents: of the index's file, mapped.
        sidecar: the file.
        files: of each shard.
        name: of the source, for reports.
        identity: by which the file is found.

    Attributes:
        shard_sizes: (S,) records of each shard.
        block_shards: (K,) the shard of each block.
        block_records: (K,) number, in the shard, of its first record.
        block_entries: (K + 1,) number of its first entry.
        bounds: (K + 1,) the place of each block's first value in arrays of ``records``, ``examples`` and ``outputs``.
        is_one_to_one: NeMo's maps make at most one of each example.
        measured: records that were measured when it was opened, and how long that took, in seconds.
        filtered: examples that NeMo's filters of quality left out, by their keys.

    Raises:
        ValueError: if the arrays do not fit together.
    """

    def __init__(
        self,
        contents: Contents,
        sidecar: Sidecar,
        files: Sequence[Sequence[str]],
        name: str,
        identity: Mapping[str, Any],
    ) -> None:
        self.contents, self.sidecar, self.files, self.name, self.identity = contents, sidecar, files, name, identity
        arrays, facts = contents.arrays, contents.facts
        self.shard_sizes = arrays["shard_sizes"].astype(np.int64)
        self.is_one_to_one: bool = facts["one_to_one"]
        self._ends_of_shards = np.cumsum(self.shard_sizes)
        blocks = -(-self.shard_sizes // BLOCK)
        self.block_shards = np.repeat(np.arange(len(blocks), dtype=np.int32), blocks)
        first_blocks = np.cumsum(blocks) - blocks
        self.block_records = (np.arange(blocks.sum()) - first_blocks[self.block_shards]) * BLOCK
        first_records = np.cumsum(self.shard_sizes) - self.shard_sizes
        starts = first_records[self.block_shards] + self.block_records
        # By what an array has values of: the place of each block's first value in it, and the end.
        self.bounds = {
            "records": np.append(starts, self.shard_sizes.sum()),
            "examples": arrays["block_examples"],
            "outputs": arrays["block_outputs"],
        }
        self.block_entries: np.ndarray = self.bounds["examples" if self.is_one_to_one else "outputs"]
        self.measured = (0, 0.0)
        self._checksums, self._verified = arrays["block_checksums"], np.zeros(len(starts), bool)
        totals = [int(arrays[name].sum()) for name in ("shard_examples", "shard_tokens")]
        self.size = Size(totals[0], float(sum(arrays["shard_seconds"].tolist())), totals[1])
        of_key = arrays["shard_filtered"].reshape(len(blocks), len(facts["filters"])).sum(0).tolist()
        self.filtered: Counter[str] = Counter(dict(zip(facts["filters"], of_key, strict=True)))
        self._check_layout(len(starts))

    def __reduce__(self) -> tuple:
        """In a process that is spawned, the file is mapped again; contents that have no file are copied."""
        contents = None if self.contents.is_mapped else self.contents
        return _opened_again, (contents, self.sidecar, self.files, self.name, self.identity)

    def _check_layout(self, num_blocks: int) -> None:
        shards = len(self.shard_sizes)
        arrays, facts = self.contents.arrays, self.contents.facts
        fits = len(self.files) == shards and len(self._checksums) == num_blocks and self.shard_sizes.min(initial=0) >= 0
        fits &= all(len(arrays[f"shard_{name}"]) == shards for name in ("examples", "tokens", "seconds", "skips"))
        fits &= len(arrays["shard_reads"]) == shards * len(facts["readers"])
        for bounds in self.bounds.values():
            fits &= len(bounds) == num_blocks + 1 and bool((np.diff(bounds) >= 0).all())
        for name in ARRAYS:
            is_stored = name in self.contents.large
            fits &= is_stored or name in facts["constants"] or (name == "totals" and facts["is_total_a_sum"])
            fits &= not is_stored or len(self.contents.large[name]) == self.bounds[level_of(name)][-1]
        fits &= len(self.contents.large["skips"]) == arrays["shard_skips"].sum()
        if not fits:
            raise ValueError("its arrays do not fit together")

    @property
    def num_records(self) -> int:
        """Number of records that were read, good or bad; blank lines and headers are none."""
        return int(self.contents.arrays["shard_reads"].sum())

    @property
    def num_entries(self) -> int:
        """Number of entries."""
        return int(self.block_entries[-1])

    def read_blocks(self, blocks: np.ndarray) -> tuple[np.ndarray, Measures]:
        """The entries of some blocks.

        Args:
            blocks: (B,) numbers of blocks.

        Returns:
            (M,) their numbers, in the order of ``blocks``, ascending within each; and their measures.

        Raises:
            DataError: if the index is damaged there.
        """
        blocks = np.asarray(blocks, np.int64)
        self.verify(blocks)
        entries = self._places("examples" if self.is_one_to_one else "outputs", blocks)
        outputs = self._places("outputs", blocks)
        measures = self.values_of_outputs(outputs)
        if not self.is_one_to_one or len(outputs) == len(entries):
            return entries, Measures(**measures)
        is_made = self.values("made", entries) > 0
        filled = {name: np.full(len(entries), NO_EXAMPLE[name], dtype) for name, dtype in TYPES.items()}
        for name, values in measures.items():
            filled[name][is_made] = values
        return entries, Measures(**filled)

    def blocks_of(self, entries: np.ndarray) -> np.ndarray:
        """(M,) the block of each of these entries."""
        return np.searchsorted(self.block_entries, entries, side="right") - 1

    def locate(self, entries: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The records of some entries.

        Args:
            entries: (M,) numbers of entries.

        Returns:
            (M,) shard; number of the record in it, from 0; how many entries of the record come before; how many it has.

        Raises:
            IndexError: if there is no such entry.
            DataError: if the index is damaged there.
        """
        entries = np.asarray(entries, np.int64)
        if len(entries) and not (entries.min() >= 0 and entries.max() < self.num_entries):
            raise IndexError(f"{self.name} has {self.num_entries} entries, numbered from 0.")
        each = self.contents.facts["constants"].get("examples")
        if each and self.is_one_to_one:  # all records make as many
            records = entries // each
            shards = np.searchsorted(self._ends_of_shards, records, side="right")
            first_records = self._ends_of_shards[shards] - self.shard_sizes[shards]
            return shards, records - first_records, entries % each, np.full(len(entries), each)
        of_entry = self.blocks_of(entries)
        blocks, which = np.unique(of_entry, return_inverse=True)
        self.verify(blocks)
        counts = self._entries_of_records(blocks)
        # In a numbering of the entries of these blocks alone: the first of each record, and of each block.
        first = np.cumsum(counts) - counts
        of_blocks = np.diff(self.block_entries)[blocks]
        of_block = np.cumsum(of_blocks) - of_blocks
        numbers = entries - self.block_entries[of_entry] + of_block[which]
        records = np.searchsorted(first, numbers, side="right") - 1
        places = self._places("records", blocks)[records] - self.bounds["records"][of_entry]
        in_shard = self.block_records[of_entry] + places
        return self.block_shards[of_entry], in_shard, numbers - first[records], counts[records]

    def digests(self, shard: int) -> list[int]:
        """Checksums of the content of a shard's files."""
        first = sum(map(len, self.files[:shard]))
        return self.contents.arrays["file_digests"][first : first + len(self.files[shard])].tolist()

    def report(self, skipped_records: SkippedRecords) -> None:
        """Count what was read and skipped while the index was built, as reading all records would."""
        readers = self.contents.facts["readers"]
        reads = self.contents.arrays["shard_reads"].reshape(len(self.shard_sizes), len(readers))
        for shard, skips in enumerate(self.skips_of_shards()):
            names = Names(self.files[shard], self.name)
            for reader, count in zip(readers, reads[shard].tolist(), strict=True):
                if count:
                    skipped_records.read(names.decode(reader), count)
            for source, place, cause, *of_record in decode_skips(skips, names):
                record = {"record": (of_record[0], of_record[1]), "example": of_record[2]} if of_record else {}
                skipped_records.add(source, place, cause, **record)

    def skips_of_shards(self) -> Iterator[bytes]:
        """The skipped records of each shard, encoded.

        Raises:
            DataError: if the index is damaged there.
        """
        skips, sizes = self.contents.large["skips"], self.contents.arrays["shard_skips"]
        if zlib.crc32(np.ascontiguousarray(skips).data) != self.contents.facts["skips_checksum"]:
            raise self._damaged()
        ends = np.cumsum(sizes)
        for start, end in zip((ends - sizes).tolist(), ends.tolist(), strict=True):
            yield skips[start:end].tobytes()

    def verify(self, blocks: np.ndarray) -> None:
        """Compare blocks that have not been read yet with their checksums.

        Raises:
            DataError: if one is damaged.
        """
        for block in np.unique(blocks[~self._verified[blocks]]).tolist():
            checksum = 0
            for name in ARRAYS:
                if (array := self.contents.large.get(name)) is not None:
                    start, stop = self.bounds[level_of(name)][block : block + 2]
                    checksum = zlib.crc32(array[start:stop].data, checksum)
            if checksum != self._checksums[block]:
                raise self._damaged()
            self._verified[block] = True

    def _damaged(self) -> DataError:
        self.sidecar.remove()
        places = " or ".join(self.sidecar.places)
        return DataError(f"{self.name}: its length index is damaged; delete it ({places}) and start again.")

    def values(self, name: str, places: np.ndarray | slice, count: int | None = None) -> np.ndarray:
        """The values of an array at some places, whether it is stored or constant."""
        if (array := self.contents.large.get(name)) is not None:
            return array[places].astype(ARRAYS[name], copy=False)
        value = self.contents.facts["constants"][name]
        return np.full(len(places) if count is None else count, np.nan if value is None else value, ARRAYS[name])

    def values_of_outputs(self, places: np.ndarray | slice, count: int | None = None) -> dict[str, np.ndarray]:
        """The arrays of :class:`Measures` at some places."""
        is_sum = self.contents.facts["is_total_a_sum"]
        found: dict[str, Any] = {n: self.values(n, places, count) for n in TYPES if not (is_sum and n == "totals")}
        return {**found, "totals": found["inputs"] + found["outputs"]} if is_sum else found

    def _entries_of_records(self, blocks: np.ndarray) -> np.ndarray:
        """The number of entries of each record of some blocks."""
        examples = self.values("examples", self._places("records", blocks))
        if self.is_one_to_one:
            return examples
        made = np.append(0, np.cumsum(self.values("made", self._places("examples", blocks))))
        ends = np.cumsum(examples)
        return made[ends] - made[ends - examples]

    def _places(self, level: str, blocks: np.ndarray) -> np.ndarray:
        bounds = self.bounds[level]
        return ranges(bounds[blocks], bounds[blocks + 1] - bounds[blocks])


def _opened_again(contents: Contents | None, sidecar: Sidecar, *others: Any) -> LengthIndex:
    if contents is None and (contents := sidecar.read(others[-1])) is None:
        raise DataError(f"{others[1]}: its length index was removed or changed; start again.")
    return LengthIndex(contents, sidecar, *others)


def level_of(name: str) -> str:
    """What an array has values of."""
    return "records" if name in OF_RECORDS else "examples" if name in OF_EXAMPLES else "outputs"


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The whole numbers of several ranges, one range after the other."""
    if not len(starts):
        return np.empty(0, np.int64)
    before = np.cumsum(lengths) - lengths
    return np.arange(before[-1] + lengths[-1]) + np.repeat(starts - before, lengths)
