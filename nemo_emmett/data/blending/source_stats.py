"""What the sources of a blend hold: examples, seconds of speech, tokens of text; counted once, then looked up.

Only manifests and text are read, never audio. Lines that cannot be used are left out. The counts are kept beside the
data (``train.de.sizes.json``), or in ``index_dir`` where nothing can be written there. They are used as long as the
files stay the same and, for tokens, the tokenizer does: by size, times and sampled content, or where these differ, as
after a move or a copy, by all of their content.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import uuid
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from nemo.utils import logging
from tqdm import tqdm

from nemo_emmett.data.blending.counting import Measure, Size, SpeechMeasure, TextMeasure, TokenCounter
from nemo_emmett.data.config.sources import Source, languages_of
from nemo_emmett.data.io.files import (
    SECONDS_WITHOUT_A_BAR,
    FileState,
    content_checksum,
    expand_paths,
    is_local,
    open_lines,
    zip_lines,
)
from nemo_emmett.data.readers.parallel_text import aligned_shards, directions_of, text_layout
from nemo_emmett.errors import ConfigError, DataError
from nemo_emmett.processes import available_cores, forked_pool

INDEX_SUFFIX = ".sizes.json"

VERSION = 2
"""Of the index: raised when what is counted changes, so that older counts are not believed."""

BATCH_BYTES = 1 << 20
"""So much text is counted at a time: enough to outweigh handing it to another process."""

PARALLEL_FROM = 16 << 20
"""Bytes. Less is counted faster than processes start."""


@dataclass(frozen=True)
class Part:
    """Files of a source that are counted together: a shard.

    Args:
        files: paths; of aligned text one for each side.
        measure: what is counted in them.
        home: the path beside which the counts are kept.
        header_lines: lines at the beginning of each file that are no records.
    """

    files: tuple[str, ...]
    measure: Measure
    home: str
    header_lines: int = 0

    def lines(self) -> Iterator[tuple[bytes, ...]]:
        """The lines of the files, side by side.

        Raises:
            DataError: if a file cannot be read, or ends before those parallel to it.
        """
        try:
            for number, lines in zip_lines(self.files):
                if number > self.header_lines:
                    yield lines
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{self.home}: cannot be read to its end ({error}).") from error

    def key(self, counter: TokenCounter) -> str:
        """What identifies a count, apart from the state of the files; it stays the same when a folder is moved."""
        folder = os.path.dirname(self.home) or "."
        names = [os.path.relpath(file, folder) if is_local(file) else file for file in self.files]
        what = {"kind": type(self.measure).__name__, **asdict(self.measure), "files": names}
        what["header_lines"] = self.header_lines
        if self.measure.uses_tokens:
            what["tokenizer"] = counter.fingerprint
        return json.dumps(what, sort_keys=True)

    def states(self) -> list[FileState]:
        """The files as they are now.

        Raises:
            DataError: if a file does not exist or cannot be read.
        """
        return [FileState.of(file) for file in self.files]


def parts_of(source: Source) -> list[Part] | None:
    """The files of a source and what to count in them; None if there is no telling what its type holds.

    Raises:
        ConfigError: if its keys do not fit together.
        DataError: if a file that says how to read the others cannot be read.
    """
    config = source.config
    if source.type in ("parallel_text", "txt_pair"):
        try:
            return _parts_of_parallel_text(config)
        except ConfigError as error:
            raise ConfigError(f"{source.where}.{error}") from None
    if source.type in ("txt", "txt_jsonl"):
        fields = () if source.type == "txt" else (config.get("text_field", "text"),)
        measure = TextMeasure("jsonl" if fields else "aligned", fields, ((0,),))
        return _parts_of_files(_paths(source, "paths"), measure)
    if source.type in ("nemo", "nemo_tarred", "lhotse", "lhotse_shar") or source.type.endswith("_as_conversation"):
        return _parts_of_speech(source)
    return None


def _paths(source: Source, key: str) -> list[str]:
    """The files that a key of a source names."""
    if not (paths := [path for of_key, path in source.files() if of_key == key]):
        raise ConfigError(f"{source.where}.{key}: missing; a source of type '{source.type}' needs it.")
    return paths


def _parts_of_parallel_text(config: Mapping) -> list[Part]:
    layout = text_layout(config)
    if layout in ("pair", "many"):
        examples = ((0, 1),)
        if layout == "many":
            sides = [str(language) for language in config["paths"]]
            examples = tuple((sides.index(source), sides.index(target)) for source, target in directions_of(config))
        measure = TextMeasure("aligned", (), examples)
        return [Part(tuple(shard.values()), measure, next(iter(shard.values()))) for shard in aligned_shards(config)]
    paths = expand_paths(config["paths"])
    if layout == "jsonl":
        fields = config.get("source_field", "source"), config.get("target_field", "target")
        return _parts_of_files(paths, TextMeasure("jsonl", fields, ((0, 1),)))
    columns = config.get("source_column", 0), config.get("target_column", 1)
    if not any(isinstance(column, str) for column in columns):
        return _parts_of_files(paths, TextMeasure("tsv", columns, ((0, 1),)))
    parts = []
    for path in paths:
        measure = TextMeasure("tsv", _column_numbers(path, columns), ((0, 1),))
        parts.append(Part((path,), measure, path, header_lines=1))
    return parts


def _column_numbers(path: str, columns: Sequence[int | str]) -> tuple[int, ...]:
    try:
        header = next(open_lines(path), b"").decode("utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    names = [name.strip() for name in header.split("\t")]
    for column in columns:
        if isinstance(column, str) and column not in names:
            raise ConfigError(
                f"source_column/target_column: {path} has no column '{column}'; its columns are {', '.join(names)}."
            )
    return tuple(names.index(column) if isinstance(column, str) else column for column in columns)


def _parts_of_speech(source: Source) -> list[Part] | None:
    config = source.config
    if config.get("input_cfg") is not None:  # the sources of a conversation type
        inner = [parts_of(part) for part in source.members]
        return None if None in inner else [part for parts in inner for part in parts]
    if config.get("shar_path") is not None:
        return _parts_of_shar(config["shar_path"], _speech_measure(config, is_cuts=True))
    if config.get("cuts_path") is not None:
        paths = _paths(source, "cuts_path")
        if not all(path.removesuffix(".gz").endswith(".jsonl") for path in paths):
            return None
        return _parts_of_files(paths, _speech_measure(config, is_cuts=True))
    return _parts_of_files(_paths(source, "manifest_filepath"), _speech_measure(config, is_cuts=False))


def _speech_measure(config: Mapping, is_cuts: bool) -> SpeechMeasure:
    languages = languages_of(config)
    target = languages["target_lang"]
    return SpeechMeasure(
        is_cuts=is_cuts,
        source_lang=languages["source_lang"],
        target_lang=target if target is None or isinstance(target, str) else tuple(target),
        overrules=(config.get("tags") or {}).get("target_lang") is not None,
        is_tarred=config.get("tarred_audio_filepaths") is not None,
    )


def _parts_of_files(paths: Iterable[str], measure: Measure) -> list[Part]:
    return [Part((path,), measure, path) for path in paths]


def _parts_of_shar(value: Any, measure: Measure) -> list[Part]:
    """The cuts of Shar archives: a folder, several (perhaps with weights), or the files of each field."""
    if isinstance(value, Mapping):
        return _parts_of_files(expand_paths(value.get("cuts", ())), measure)
    folders = [value] if isinstance(value, (str, Path)) else [v if isinstance(v, (str, Path)) else v[0] for v in value]
    parts = []
    for folder in folders:
        cuts = sorted(str(path) for path in Path(folder).glob("cuts.*") if ".jsonl" in path.suffixes)
        # All that lies in a Shar folder is taken for one of its fields: the counts are kept beside it.
        parts += [Part((path,), measure, str(folder).rstrip("/")) for path in cuts]
    return parts


class SizeIndex:
    """The counts kept for the files of one place, by what was counted.

    Args:
        home: the path beside which they are kept.
        index_dir: folder where they are kept if nothing can be written there.
    """

    def __init__(self, home: str, index_dir: str | None = None) -> None:
        self.home = home
        self.places = [home + INDEX_SUFFIX] if is_local(home) else []
        if index_dir is not None:
            # Several files may have one name: the hash of where it lies tells them apart.
            place = os.path.abspath(home) if is_local(home) else home
            digest = hashlib.sha256(place.encode()).hexdigest()[:16]
            self.places.append(os.path.join(index_dir, f"{os.path.basename(home)}-{digest}{INDEX_SUFFIX}"))

    def get(self, key: str, states: Sequence[FileState]) -> Size | None:
        """What was counted under this key, if the files are still what they were then."""
        for entries in (_in_memory.get(self.home, {}), *(_read_entries(place) for place in self.places)):
            entry = entries.get(key)
            if entry is None:
                continue
            size = Size(**entry["size"])
            if [stamp[:-1] for stamp in entry["stamps"]] == [state.stamp for state in states]:
                return size
            if [_content(stamp) for stamp in entry["stamps"]] == [_content(_stamp(state)) for state in states]:
                self.put({key: (states, size)})  # the next look need not read the files
                return size
        return None

    def put(self, counted: Mapping[str, tuple[Sequence[FileState], Size]]) -> bool:
        """Keep counts, with the states of their files, by their keys; they replace those of files that have changed.

        Returns:
            Whether they could be written, and do not end with the process.
        """
        new = {
            key: {"stamps": [_stamp(state) for state in states], "size": asdict(size)}
            for key, (states, size) in counted.items()
        }
        for place in self.places:
            try:
                _write_entries(place, {**_still_valid(_read_entries(place), new), **new})
                return True
            except OSError:
                continue
        _in_memory.setdefault(self.home, {}).update(new)
        return False


def _stamp(state: FileState) -> list[int]:
    """What is kept of a file: its state, and a checksum of its content."""
    return [*state.stamp, content_checksum(state)]


def _content(stamp: Sequence[int]) -> tuple[int, int]:
    """Size and checksum: what does not change when a file is moved or copied."""
    return stamp[0], stamp[-1]


_in_memory: dict[str, dict[str, dict]] = {}
"""Counts that could not be written, by the path beside which they belong, for as long as the process lasts."""


def _read_entries(path: str) -> dict[str, dict]:
    """The counts in an index; none if it is missing, damaged, or of another version."""
    try:
        if not os.path.isfile(path) and os.path.exists(path):
            raise ValueError("no file")
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if content["version"] != VERSION or content["checksum"] != _checksum(content["counts"]):
            raise ValueError("damaged, or of another version")
        return content["counts"]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        logging.info(f"The counts in {path} are damaged or of another version: what they were of is counted again.")
        return {}


def _checksum(entries: Mapping[str, dict]) -> int:
    return zlib.crc32(json.dumps(entries, sort_keys=True).encode())


def _write_entries(path: str, entries: Mapping[str, dict]) -> None:
    """Write an index at once: whoever reads it meanwhile, or writes it too, sees the old one or the new one."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        content = {"version": VERSION, "checksum": _checksum(entries), "counts": entries}
        Path(temporary).write_text(json.dumps(content, indent=1), encoding="utf-8")
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            os.unlink(temporary)


def _still_valid(old: Mapping[str, dict], new: Mapping[str, dict]) -> dict[str, dict]:
    """The old counts without those of files that have changed since."""
    now = dict(of_file for key, entry in new.items() for of_file in _content_by_file(key, entry))
    return {
        key: entry
        for key, entry in old.items()
        if all(now.get(file, content) == content for file, content in _content_by_file(key, entry))
    }


def _content_by_file(key: str, entry: Mapping) -> list[tuple[str, tuple[int, int]]]:
    return list(zip(json.loads(key)["files"], map(_content, entry["stamps"]), strict=True))


def sizes_of(sources: Sequence[Source], tokenizer: Any = None, index_dir: str | None = None) -> list[Size | None]:
    """What each source holds; None for those of which nobody can tell.

    What has not been counted yet is read once, by all cores; more than five seconds of it show a bar.

    Args:
        sources: whose files are looked at.
        tokenizer: NeMo tokenizer that counts the tokens of text; without one, words are counted.
        index_dir: folder for the counts where they cannot be written beside the data.

    Raises:
        ConfigError: if the keys of a source do not fit together.
        DataError: if a file cannot be read, or parallel files have different lengths.
    """
    counter = TokenCounter(tokenizer)
    of_source = [parts_of(source) for source in sources]
    parts = list(dict.fromkeys(part for parts in of_source for part in parts or ()))
    sizes = _sizes_of_parts(parts, counter, index_dir)
    return [None if parts is None else sum((sizes[part] for part in parts), Size()) for parts in of_source]


def _sizes_of_parts(parts: Sequence[Part], counter: TokenCounter, index_dir: str | None) -> dict[Part, Size]:
    """What each part holds: looked up, or counted and then kept, one place of counts after the other."""
    of_home = defaultdict(list)
    for part in parts:
        of_home[part.home].append(part)
    indexes = {home: SizeIndex(home, index_dir) for home in of_home}
    labels = {part: (part.key(counter), part.states()) for part in parts}
    kept = {part: indexes[part.home].get(*labels[part]) for part in parts}
    sizes = {part: size for part, size in kept.items() if size is not None}
    uncached = []
    missing = {home: [p for p in members if p not in sizes] for home, members in of_home.items()}
    for part in (part for members in missing.values() for part in members):
        for state in labels[part][1]:
            content_checksum(state)  # before the counting: what is written to meanwhile is counted again next time
    with _counting([part for members in missing.values() for part in members], counter) as counts:
        for home, members in missing.items():
            if members:
                new = {part: next(counts) for part in members}
                is_kept = indexes[home].put({labels[part][0]: (labels[part][1], size) for part, size in new.items()})
                sizes |= new
                if not is_kept:
                    uncached.append(home)
    if uncached:
        logging.info(
            f"The counts of {uncached[0]}{f' and {len(uncached) - 1} more' if uncached[1:] else ''} cannot be kept "
            "beside the data, nor in index_dir, and are made anew at each start; set index_dir to a folder that can be "
            "written."
        )
    return sizes


@contextmanager
def _counting(parts: Sequence[Part], counter: TokenCounter) -> Iterator[Iterator[Size]]:
    """An iterator over the sizes of parts; its reading and counting are done when the context is left."""
    total = sum(os.path.getsize(file) for part in parts for file in part.files if is_local(file))
    workers = _num_workers() if total >= PARALLEL_FROM else 1
    shown = {"desc": "Counting the data", "unit": "B", "unit_scale": True, "delay": SECONDS_WITHOUT_A_BAR}
    is_quiet = os.environ.get("LOCAL_RANK", "0") != "0"  # the processes of a training count alike
    with tqdm(total=total, disable=is_quiet, **shown) as bar, _pool(workers, counter) as submit:
        yield _counts(parts, submit, 2 * workers, bar)


def _counts(parts: Sequence[Part], submit: Callable[..., Future], ahead: int, bar: tqdm) -> Iterator[Size]:
    """The size of each part in turn, while up to ``ahead`` batches beyond the one awaited are being counted."""
    batches = ((number, part.measure, *batch) for number, part in enumerate(parts) for batch in _batches(part))
    counting: deque[tuple[int, int, Future]] = deque()
    for number in range(len(parts)):
        size = Size()
        while True:
            for of_part, measure, lines, progress in islice(batches, ahead + 1 - len(counting)):
                counting.append((of_part, progress, submit(measure, lines)))
            if not counting or counting[0][0] != number:
                break
            _, progress, future = counting.popleft()
            size += future.result()
            bar.update(progress)
        yield size


def _batches(part: Part) -> Iterator[tuple[list[tuple[bytes, ...]], int]]:
    """The lines of a part in batches, each with the bytes by which the bar advances."""
    compressed = sum(os.path.getsize(file) for file in part.files if is_local(file) and file.endswith(".gz"))
    plain = [number for number, file in enumerate(part.files) if is_local(file) and not file.endswith(".gz")]
    batch, size, progress = [], 0, 0
    for lines in part.lines():
        batch.append(lines)
        size += sum(map(len, lines))
        progress += sum(len(lines[number]) + 1 for number in plain)
        if size >= BATCH_BYTES:
            yield batch, progress
            batch, size, progress = [], 0, 0
    yield batch, progress + compressed


def _num_workers() -> int:
    """The processes of a training all count at once; a daemon, such as a loader's worker, may start no others."""
    if multiprocessing.current_process().daemon:
        return 1
    return max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


@contextmanager
def _pool(workers: int, counter: TokenCounter) -> Iterator[Callable[..., Future]]:
    """A function that has a batch counted: by one of several processes, or by this one."""
    if workers == 1:
        yield partial(_count_here, counter)
        return
    with forked_pool(workers, _prepare_worker, counter) as pool:
        yield partial(pool.submit, _count_in_worker)


def _count_here(counter: TokenCounter, measure: Measure, lines: Sequence[tuple[bytes, ...]]) -> Future:
    done: Future = Future()
    done.set_result(measure.count(lines, counter))
    return done


_counter_of_worker: TokenCounter | None = None


def _prepare_worker(counter: TokenCounter) -> None:
    global _counter_of_worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores already
    _counter_of_worker = counter


def _count_in_worker(measure: Measure, lines: Sequence[tuple[bytes, ...]]) -> Size:
    return measure.count(lines, _counter_of_worker)
