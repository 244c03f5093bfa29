"""The length indexes of sources: opened, or built by all processes of all ranks, each of which measures a part.

The records that must be measured are divided into stretches, always in the same way. A stretch that has been measured
is written, so that a build that is ended goes on where it was, and no rank measures what another one does. One rank
puts the stretches together.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch.distributed as dist
from nemo.utils import logging
from tqdm import tqdm

from nemo_emmett.audio_file import FAULTS_OF_FILES
from nemo_emmett.data.agreement import ranks_load_data
from nemo_emmett.data.config.dataset_config import GroupConfig
from nemo_emmett.data.config.nemo_config import with_keys_of_dataset
from nemo_emmett.data.io.files import SECONDS_WITHOUT_A_BAR, is_local
from nemo_emmett.data.io.index import build_indexes
from nemo_emmett.data.io.line_index import Lines
from nemo_emmett.data.io.sidecar import Contents, Sidecar, warn_uncached
from nemo_emmett.data.lengths.counting import TokenCounter
from nemo_emmett.data.lengths.identity import identity_of, maps_config
from nemo_emmett.data.lengths.index import LengthIndex
from nemo_emmett.data.lengths.measuring import Piece, SourceMeasurer
from nemo_emmett.data.lengths.notes import Names, decode_skips
from nemo_emmett.data.lengths.writing import DataFiles, Segment, copied, write_index
from nemo_emmett.data.readers.base import Records, common_length
from nemo_emmett.data.readers.examples import ExampleKind
from nemo_emmett.data.readers.registry import register_data_types
from nemo_emmett.errors import DataError, EmmettError
from nemo_emmett.processes import map_in_processes, workers_for
from nemo_emmett.prompts.families import forbidden_text
from nemo_emmett.prompts.translation import register_prompt_formats

SUFFIX = ".lengths"

VERSION = 3
"""Raised when other records are usable or lengths are measured in another way: older indexes are built again."""

STRETCH = 40 * 256
"""Records that are measured and written at a time; a multiple of the records of a block."""

_RECORDINGS_LOOKED_AT = 1000
"""Skipped records of a shard that are tried again when an index is opened."""

_BLOCKS_COPIED = 4096
"""Blocks of an older index that are in memory at a time."""

_PARALLEL_FROM = 30_000
"""Records. Fewer are measured faster than processes start."""

Stretch = tuple[Piece, ...]


def open_length_indexes(
    groups: Sequence[GroupConfig],
    tokenizer: Any,
    kind: ExampleKind,
    index_dir: str | None = None,
    world_size: int = 1,
    places: Collection[str] | None = None,
    build: bool = True,
) -> dict[str, LengthIndex | None]:
    """The length index of each source, by its place in the recipe; what is missing or out of date is built.

    Args:
        groups: with the sources.
        tokenizer: NeMo tokenizer; without one, texts measure 0 tokens, and sizes are in words.
        kind: what the dataset takes.
        index_dir: folder for indexes that cannot be written next to the data; by default the group's own.
        world_size: number of ranks that call this together, and then share the work.
        places: of the sources to open; by default all.
        build: False: open only what is there and up to date.

    Returns:
        None for a source whose records cannot be read by number, or that has no index yet and none is to be built.

    Raises:
        ConfigError: if keys do not fit together, or ``index_dir`` cannot be written.
        DataError: if a file cannot be read, or changes.
    """
    register_data_types()
    register_prompt_formats()
    counter, ranks = TokenCounter(tokenizer), _Ranks(world_size)
    opened, builds = {}, {}
    for group in groups:
        structured = maps_config(group, tokenizer)
        forbidden = None if tokenizer is None else forbidden_text(group.prompt_format, tokenizer)
        folder = index_dir or group.index_dir
        for source in group.sources:
            if places is not None and source.place not in places:
                continue
            in_dataset = with_keys_of_dataset(source, structured)
            measurer = SourceMeasurer(in_dataset, structured, counter, kind, forbidden, folder)
            opened[source.place] = None
            if measurer.records is not None and measurer.records.shard_files:
                found = _Build(measurer, forbidden and forbidden.pattern, folder)
                opened[source.place] = builds.setdefault((found.sidecar, found.identity["identity"]), found)
    _complete(list(builds.values()), ranks, build)
    return {place: None if found is None else found.index for place, found in opened.items()}


class _Ranks:
    """The ranks that build indexes together."""

    def __init__(self, world_size: int) -> None:
        self.is_shared = ranks_load_data(world_size)
        self.size = world_size if self.is_shared else 1
        self.number = dist.get_rank() if self.is_shared else 0
        self._group = dist.new_group(backend="gloo") if self.is_shared else None

    def gather(self, value: Any) -> list:
        """This value of every rank, once all have called this."""
        values = [value]
        if self.is_shared:
            values = [None] * self.size
            dist.all_gather_object(values, value, group=self._group)
        return values

    def together(self, work: Callable[[], Any]) -> Any:
        """Do a part of the work; if it fails on any rank, it fails on all, since none must wait for another."""
        result = error = None
        try:
            result = work()
        except Exception as caught:
            error = caught
        sent = error if error is None or isinstance(error, EmmettError) else DataError(f"a rank failed: {error!r}.")
        for of_rank in [error, *self.gather(sent)]:
            if of_rank is not None:
                raise of_rank
        return result

    def share(self, items: Sequence) -> Sequence:
        """What this rank does of the work."""
        return items[self.number :: self.size]


class _Build:
    """The index of a source, and what is missing of it.

    Args:
        measurer: of the source.
        forbidden: pattern of what no text may hold.
        index_dir: folder for the index if it cannot be written next to the data.
    """

    def __init__(self, measurer: SourceMeasurer, forbidden: str | None, index_dir: str | None) -> None:
        self.measurer = measurer
        self.records: Records = measurer.records
        self.files = self.records.shard_files
        self.paths = [path for shard in self.files for path in shard]
        self.first_files = np.cumsum([0, *map(len, self.files)])
        of_source = (measurer.source, self.files, measurer.structured, measurer.kind, forbidden, measurer.counter)
        self.identity = {"lengths": VERSION, **identity_of(*of_source)}
        first, suffix = self.records.shard_lines[0][0], f".{self.identity['identity'][:16]}{SUFFIX}"
        place = None
        if is_local(first.path):  # lhotse takes all files in a folder of Shar for data
            place = os.path.join(os.path.dirname(first.sidecar.places[0]), os.path.basename(first.path) + suffix)
        self.sidecar = Sidecar(first.path, suffix, f"lengths {suffix}", index_dir, place)
        self.index: LengthIndex | None = None
        self.older: LengthIndex | None = None
        self.doubtful = np.arange(0)  # numbers of files whose content must be looked at
        self.data: DataFiles | None = None
        self.changed: list[int] = []  # shards to measure
        self.results: dict[Stretch, Contents] = {}  # measured here, and not written
        self.measured = [0, 0.0]
        self.is_written = True

    def open(self) -> bool:
        """Open the index if it is there and the files have the size and times that they had."""
        self.older = self._read()
        stamps = _stamps_of(self.paths)
        if self.older is None:
            self.doubtful = np.arange(len(self.paths))
            return False
        self.doubtful = np.flatnonzero((self._known_stamps() != stamps).any(1))
        if not len(self.doubtful):
            self.changed = self._mended_shards()
            self.index = None if self.changed else self.older
        return self.index is not None

    def _mended_shards(self) -> list[int]:
        """Shards with a record whose recording could not be opened for its length, and now can be."""
        shards = []
        for shard, skips in enumerate(self.older.skips_of_shards()) if self.records.opens_recordings else ():
            skipped = decode_skips(skips, Names(self.files[shard], self.measurer.source.name))
            of_recordings = (place for _, place, cause, *_ in skipped if cause in FAULTS_OF_FILES)
            numbers = (int(place.removeprefix("line ")) - 1 for place in islice(of_recordings, _RECORDINGS_LOOKED_AT))
            if any(self.records.read(shard, number) for number in numbers):
                shards.append(shard)
        return shards

    def _read(self) -> LengthIndex | None:
        if (contents := self.sidecar.read(self.identity)) is None:
            return None
        try:
            return LengthIndex(contents, self.sidecar, self.files, self.measurer.source.name, self.identity)
        except (ValueError, LookupError, TypeError, AttributeError):
            logging.info(f"{' or '.join(self.sidecar.places)} is damaged: it is written again.")
            return None

    def _known_stamps(self) -> np.ndarray:
        return self.older.contents.arrays["file_stamps"].reshape(len(self.paths), 3)

    def doubtful_lines(self) -> list[Lines]:
        """The line indexes that show whether content has changed."""
        lines = [of_file for shard in self.records.shard_lines for of_file in shard]
        return [lines[number] for number in self.doubtful]

    def compare(self) -> None:
        """Find the shards whose content has changed; if there are none, only the times of files are written again."""
        stamps, digests = np.full((len(self.paths), 3), -1), np.zeros(len(self.paths), np.uint32)
        sizes = [0] * len(self.files)
        if self.older is not None:
            stamps[:], digests[:] = self._known_stamps(), self.older.contents.arrays["file_digests"]
            sizes = self.older.shard_sizes.tolist()
        shard_of_file = np.repeat(np.arange(len(self.files)), np.diff(self.first_files))
        changed = set(self.changed) if self.older is not None else set(range(len(self.files)))
        if self.changed:
            self.sidecar.remove()  # else it would be taken for the new one, whose files have the same times
        for number, lines in zip(self.doubtful.tolist(), self.doubtful_lines(), strict=True):
            if lines.digest != digests[number]:
                changed.add(int(shard_of_file[number]))
            stamps[number], digests[number] = lines.state.stamp[:3], lines.digest
        self.changed = sorted(changed)
        build_indexes([lines for shard in self.changed for lines in self.records.shard_lines[shard]])
        for shard in self.changed:
            sizes[shard] = common_length(self.records.shard_lines[shard])
        self.data = DataFiles(sizes, stamps, digests)
        if not self.changed:
            contents = self.older.contents
            arrays = {**contents.arrays, "file_stamps": stamps.ravel()}
            self.sidecar.write(self.identity, Contents(arrays, contents.facts, contents.large))
            self.index = self._read()

    def tasks(self) -> Iterator[list[Stretch]]:
        """The stretches to measure: one a task, but all of a shard together that can only be read forward."""
        waiting: list[Piece] = []
        for shard in self.changed:
            size = self.data.shard_sizes[shard]
            pieces = [Piece(shard, start, min(start + STRETCH, size)) for start in range(0, size, STRETCH)]
            if self.records.is_sequential[shard] and len(pieces) > 1:
                if waiting:
                    yield [tuple(waiting)]
                    waiting = []
                yield [(piece,) for piece in pieces]
                continue
            for piece in pieces:
                is_next = not waiting or piece.shard - waiting[-1].shard <= 1
                if not is_next or sum(p.stop - p.start for p in waiting) + piece.stop - piece.start > STRETCH:
                    yield [tuple(waiting)]
                    waiting = []
                waiting.append(piece)
        if waiting:
            yield [tuple(waiting)]

    def part(self, stretch: Stretch) -> tuple[Sidecar, dict[str, str]]:
        """The file of a stretch, and what it is identified by."""
        first_files = self.first_files
        digests = [self.data.digests[first_files[p.shard] : first_files[p.shard + 1]].tolist() for p in stretch]
        identity = hashlib.sha256(json.dumps([self.identity, stretch, digests]).encode()).hexdigest()
        first = stretch[0]
        sidecar = Sidecar(
            self.sidecar.path,
            self.sidecar.suffix,
            "part of lengths",
            self.sidecar.index_dir,
            self.sidecar.place,
            f"{first.shard}-{first.start}",
        )
        return sidecar, {"part": identity}

    def measure(self, stretches: Sequence[Stretch], progress: Callable[[int], Any]) -> list[Contents | None]:
        """Measure stretches that are not written yet, and write them.

        Returns:
            For each, what was measured if it could not be written.
        """
        results: list[Contents | None] = []
        for stretch in stretches:
            sidecar, identity = self.part(stretch)
            result = None
            if sidecar.read(identity) is None:
                contents = self.measurer.measure(stretch, progress)
                if not sidecar.write_file(identity, contents):
                    result = contents
            else:
                progress(sum(piece.stop - piece.start for piece in stretch))
            results.append(result)
        return results

    def reopen(self) -> bool:
        """Open the index that another rank has put together."""
        index = self._read()
        if index is not None and np.array_equal(index.contents.arrays["file_stamps"], self.data.stamps.ravel()):
            self.index = index
        return self.index is not None

    def assemble(self) -> None:
        """Put the index together; what was not measured by any rank that is seen here is measured now."""
        segments: list[tuple[tuple[int, int], Segment]] = []
        for task in self.tasks():
            segments += [(stretch[0][:2], partial(self._measured, stretch)) for stretch in task]
        if self.older is not None:
            kept = np.flatnonzero(~np.isin(self.older.block_shards, self.changed))
            # A run of blocks ends where a changed shard comes next, which may have had no blocks before.
            runs = np.searchsorted(self.changed, self.older.block_shards[kept])
            for run in np.split(kept, np.flatnonzero(np.diff(runs)) + 1):
                for blocks in np.split(run, range(_BLOCKS_COPIED, len(run), _BLOCKS_COPIED)) if len(run) else ():
                    key = (int(self.older.block_shards[blocks[0]]), int(self.older.block_records[blocks[0]]))
                    segments.append((key, partial(copied, self.older, int(blocks[0]), int(blocks[-1]))))
        segments.sort(key=lambda segment: segment[0])
        in_order = [segment for _, segment in segments]
        self.is_written = write_index(self.sidecar, self.identity, self.data, in_order)
        self.index = self._read()
        self.results.clear()
        self.remove_parts()

    def remove_parts(self) -> None:
        """Remove the files of stretches, which a finished index does not need."""
        for place in self.sidecar.places:
            shutil.rmtree(f"{place}.parts", ignore_errors=True)

    def _measured(self, stretch: Stretch) -> Contents:
        if (result := self.results.get(stretch)) is not None:
            return result
        sidecar, identity = self.part(stretch)
        if (contents := sidecar.read(identity)) is None:  # another rank's disk is not seen here
            contents = self.measurer.measure(stretch, lambda _: None)
            if not sidecar.write_file(identity, contents):
                self.results[stretch] = contents
        return contents


def _complete(builds: Sequence[_Build], ranks: _Ranks, may_build: bool) -> None:
    """Open indexes, and build those that are missing or out of date."""
    is_open = ranks.together(lambda: [build.open() for build in builds])
    # Another training may be writing them: what one rank has not found, all look at.
    missing = [build for build, *found in zip(builds, *ranks.gather(is_open), strict=True) if not all(found)]
    if not may_build:
        for build in missing:
            build.index = None
        return
    if ranks.number == 0:
        for build in builds:
            if build not in missing:
                build.remove_parts()  # of a build that was killed once its index was written
    if not missing:
        return
    lines = [of_file for build in missing for of_file in build.doubtful_lines()]
    ranks.together(lambda: build_indexes(ranks.share(lines)))
    ranks.together(lambda: build_indexes(lines))
    ranks.together(lambda: [build.compare() for build in missing if build.index is None])
    ranks.together(lambda: _measure(missing, ranks))
    for is_first in (True, False):  # rank 0, then those that see no file of its, and those without a folder to write to
        takes_part = is_first == (ranks.number == 0)
        assemble = partial(_assemble, missing if takes_part else [])
        ranks.together(assemble)
    if ranks.number == 0:
        warn_uncached("length indexes", [build.sidecar.path for build in missing if not build.is_written])
    for build in missing:
        build.index.measured = tuple(build.measured)


def _assemble(builds: Sequence[_Build]) -> None:
    for build in builds:
        if build.index is None and not build.reopen():
            build.assemble()


def _measure(builds: Sequence[_Build], ranks: _Ranks) -> None:
    """Measure this rank's share of what is missing."""
    tasks = [(number, task) for number, build in enumerate(builds) if build.index is None for task in build.tasks()]
    tasks = ranks.share(tasks)
    with logging.temp_verbosity(logging.ERROR):  # NeMo's chain describes batches, of which none is made
        for number in {number for number, _ in tasks}:
            builds[number].measurer.pipeline  # noqa: B018  # built before processes are forked

    def measure(task: tuple[int, list[Stretch]], progress: Callable[[int], Any]) -> tuple[list, float]:
        number, stretches = task
        start = time.perf_counter()
        return builds[number].measure(stretches, progress), time.perf_counter() - start

    records = [sum(p.stop - p.start for stretch in stretches for p in stretch) for _, stretches in tasks]
    workers = workers_for(len(tasks)) if sum(records) >= _PARALLEL_FROM else 1
    shown = {"desc": "Measuring the data", "unit": " records", "unit_scale": True, "delay": SECONDS_WITHOUT_A_BAR}
    is_quiet = os.environ.get("LOCAL_RANK", "0") != "0"
    with (
        tqdm(total=sum(records), disable=is_quiet, **shown) as bar,
        closing(map_in_processes(measure, tasks, workers, bar)) as results,
    ):
        for (number, stretches), count, (of_task, seconds) in zip(tasks, records, results, strict=True):
            build = builds[number]
            build.results |= {s: found for s, found in zip(stretches, of_task, strict=True) if found is not None}
            build.measured = [build.measured[0] + count, build.measured[1] + seconds / workers]


def _stamps_of(paths: Sequence[str]) -> np.ndarray:
    """Size and times of each file; -1 for remote ones, which are taken to stay as they are."""
    try:
        states = [os.stat(path) if is_local(path) else None for path in paths]
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror}).") from error
    stamps = [(-1, -1, -1) if s is None else (s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in states]
    return np.array(stamps, np.int64).reshape(-1, 3)
