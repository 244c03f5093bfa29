"""The size of sources that have no length index: counted once by streaming them, then looked up in sidecars.

What is counted is what is trained on: an example counts if the source's reader yields it for the dataset. Manifests and
text are read, never audio. So the causes that only the audio can show (missing, truncated or unreadable files, members
that a tar file lacks, a channel that a recording lacks) are not known here, and seconds are those of the manifest.

The counts of some files are in ``train.de.sizes.json``, next to the first of them, one entry for each set of reader's
settings and tokenizer. They are used while the files have the same content: by size, times and sampled content, or
where these differ, as after a move or a copy, by all of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from operator import attrgetter
from typing import Any

from nemo.collections.common.data.lhotse.dataloader import LhotseDataLoadingConfig
from omegaconf import OmegaConf
from tqdm import tqdm

from nemo_emmett.data.config.nemo_config import with_keys_of_dataset
from nemo_emmett.data.config.sources import SPEECH_TSV, TEXT_TYPES, Source
from nemo_emmett.data.io.files import SECONDS_WITHOUT_A_BAR, FileState, content_checksum, is_local
from nemo_emmett.data.io.sidecar import Contents, Sidecar, is_unchanged, warn_uncached
from nemo_emmett.data.io.skipped_records import SkippedRecords
from nemo_emmett.data.lengths.counting import Example, Size, TokenCounter, size_of
from nemo_emmett.data.lengths.identity import NOT_READ
from nemo_emmett.data.readers.examples import ExampleKind, Examples
from nemo_emmett.data.readers.registry import (
    ReaderContext,
    defaults_of,
    open_source,
    reader_context,
    register_data_types,
)
from nemo_emmett.data.readers.shar import cuts_of_shar
from nemo_emmett.errors import ConfigError, DataError

SIDECAR_SUFFIX = ".sizes.json"

_VERSION = 4
"""Raised when other records are usable or sizes are measured in another way: older counts are not used."""


class _NoReport(SkippedRecords):
    """Training reports the records that it skips; counting skips the same ones without a report."""

    def read(self, *_: Any, **__: Any) -> None:
        """Ignore a record."""

    def add(self, *_: Any, **__: Any) -> None:
        """Ignore a skipped record."""


@dataclass(frozen=True)
class _Reading:
    """How training reads: the kind of its dataset, and what no text may hold."""

    kind: ExampleKind
    forbidden: re.Pattern | None


@dataclass(frozen=True, eq=False)
class _Part:
    """Files of a source that are counted together.

    Args:
        source: that they belong to.
        settings: of the source's reader, as JSON.
        files: whose content decides what is counted.
        home: path next to which the counts are kept.
    """

    source: Source
    settings: str
    files: tuple[str, ...]
    home: str

    def key(self, reading: _Reading, counter: TokenCounter) -> str:
        """Identifies a count, apart from the content of the files; it stays the same when a folder is moved."""
        forbidden = reading.forbidden and reading.forbidden.pattern
        identity = [self.settings, self.names, reading.kind.value, forbidden, counter.fingerprint]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]

    @property
    def names(self) -> list[str]:
        """The files as seen from the folder of the first."""
        folder = os.path.dirname(self.home) or "."
        return [os.path.relpath(path, folder) if is_local(path) else path for path in self.files]

    def examples(self, reading: _Reading) -> Iterator[Example]:
        """The examples that a dataset gets of the files."""
        examples = self._streamed(reading)
        if reading.kind is ExampleKind.AS_READ:
            return examples
        return iter(Examples(examples, reading.kind, defaults_of(self.source), _NoReport(), reading.forbidden))

    def _streamed(self, reading: _Reading) -> Iterator[Example]:
        register_data_types()
        source = with_keys_of_dataset(self.source, OmegaConf.structured(LhotseDataLoadingConfig))
        once = {"metadata_only": True, "force_finite": True, "slice_length": None, "shuffle": False, "shard_seed": 0}
        try:
            with reader_context(ReaderContext(_NoReport(), reading.kind)):
                cuts, _ = open_source(source.with_keys(**once), _NoReport(), reading.kind)
            yield from cuts
        except (ConfigError, DataError):
            raise
        except Exception as error:  # NeMo's readers do not skip a bad record
            reason = str(error).partition("\n")[0]
            raise DataError(f"{source.place}: {self.home} cannot be read to its end ({reason}).") from error


def _parts_of(source: Source) -> list[_Part] | None:
    """The parts of a source; None if it cannot be counted.

    Raises:
        ConfigError: if its keys do not fit together.
    """
    if not is_countable(source):
        return None
    settings = _settings_of(source)
    if source.type in ("txt", "txt_jsonl"):
        paths = _named_files(source, "paths")
        return [_Part(source.with_keys(paths=[path]), settings, (path,), path) for path in paths]
    if not (files := tuple(_metadata_files(source))):
        return []
    # lhotse takes every file in a folder of Shar for one of its fields: the counts are kept next to the folder.
    in_folders = isinstance(source.shar_path, (str, list))
    return [_Part(source, settings, files, os.path.dirname(files[0]) if in_folders else files[0])]


def is_countable(source: Source) -> bool:
    """Whether we read what its type holds, or NeMo does in a way that is known to need no audio."""
    is_conversation = source.type.endswith("_as_conversation")
    if source.members:
        return all(map(is_countable, source.members))
    if source.type in TEXT_TYPES:
        return source.type != "nemo_sft_jsonl"
    if source.type == SPEECH_TSV:
        return True
    if source.type not in ("nemo", "nemo_tarred", "lhotse", "lhotse_shar") and not is_conversation:
        return False
    if source.shar_path is not None:
        return all(map(is_local, _named_files(source, "shar_path")))
    if source.cuts_path is not None:
        return all(path.removesuffix(".gz").endswith(".jsonl") for path in _named_files(source, "cuts_path"))
    return bool(_named_files(source, "manifest_filepath"))


def _named_files(source: Source, key: str) -> list[str]:
    """The files that a key of a source names."""
    if not (paths := [path for of_key, path in source.files() if of_key == key]):
        raise ConfigError(f"{source.place}.{key}: missing; a source of type '{source.type}' needs it.")
    return paths


def _metadata_files(source: Source) -> list[str]:
    """The manifests and texts of a source that can only be streamed."""
    if source.members:
        return [path for inner in source.members for path in _metadata_files(inner)]
    if source.shar_path is not None:
        return cuts_of_shar(source.shar_path)
    files = [path for key, path in source.files() if key != "tarred_audio_filepaths"]
    return [*files, *(str(extra["path"]) for extra in source.extra_fields or () if "path" in extra)]


def _settings_of(source: Source) -> str:
    """The settings of a source's reader, apart from the place of its files."""
    settings: dict[str, Any] = {key: value for key, value in source.keys.items() if key not in NOT_READ}
    settings["languages"] = list(source.paths) if isinstance(source.paths, Mapping) else None
    settings["tars"] = [os.path.basename(path) for key, path in source.files() if key == "tarred_audio_filepaths"]
    return json.dumps(settings, sort_keys=True, default=str)


class _Counts:
    """The counts that are kept at one place, by key.

    Args:
        home: path next to which they are kept.
        index_dir: folder where they are kept if nothing can be written there.
    """

    def __init__(self, home: str, index_dir: str | None) -> None:
        self.sidecar = Sidecar(home, SIDECAR_SUFFIX, "counts", index_dir)
        self.entries = self._load()

    def get(self, key: str, states: Sequence[FileState]) -> Size | None:
        """What was counted under this key, if the files are unchanged."""
        if (entry := self.entries.get(key)) is None or not all(map(is_unchanged, entry["stamps"], states)):
            return None
        size = Size(**entry["size"])
        if [stamp[:-1] for stamp in entry["stamps"]] != [state.stamp for state in states]:
            self.put({key: (entry["names"], states, size)})  # the next look-up need not read the files
        return size

    def put(self, counted: Mapping[str, tuple[Sequence[str], Sequence[FileState], Size]]) -> bool:
        """Keep counts of files, given by their names and states; those of other versions of the files are dropped.

        Returns:
            Whether they are written, and do not end with the process.
        """
        new = {
            key: {"names": names, "stamps": [[*s.stamp, content_checksum(s)] for s in states], "size": asdict(size)}
            for key, (names, states, size) in counted.items()
        }
        now = {name: content for entry in new.values() for name, content in _contents_of(entry)}
        old = {
            key: entry
            for key, entry in self._load().items()
            if all(now.get(name, content) == content for name, content in _contents_of(entry))
        }
        self.entries = {**old, **new}
        return self.sidecar.write({"counts": _VERSION}, Contents(facts=self.entries))

    def _load(self) -> dict[str, dict[str, Any]]:
        contents = self.sidecar.read({"counts": _VERSION})
        return {} if contents is None else contents.facts


def _contents_of(entry: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, int]]]:
    """The files of a count, each with the size and the checksum of its content."""
    for name, stamp in zip(entry["names"], entry["stamps"], strict=True):
        yield name, (stamp[0], stamp[-1])


def sizes_of(
    sources: Sequence[Source],
    tokenizer: Any = None,
    index_dir: str | None = None,
    kind: ExampleKind = ExampleKind.TRANSLATION,
    forbidden: re.Pattern | None = None,
) -> list[Size | None]:
    """The size of each source; None for those that cannot be counted.

    What has not been counted yet is read once; more than five seconds of it show a bar.

    Args:
        sources: that are counted.
        tokenizer: NeMo tokenizer that counts the tokens of text; without one, words are counted.
        index_dir: folder for the counts where they cannot be written next to the data.
        kind: what the dataset takes.
        forbidden: what no text may hold (:func:`~nemo_emmett.prompts.families.forbidden_text`).

    Raises:
        ConfigError: if the keys of a source do not fit together.
        DataError: if a file cannot be read, or parallel files have different lengths.
    """
    counter, reading = TokenCounter(tokenizer), _Reading(kind, forbidden)
    of_source = [_parts_of(source) for source in sources]
    keys = {part: (part.home, part.key(reading, counter)) for parts in of_source for part in parts or ()}
    distinct = {key: part for part, key in keys.items()}
    states = {path: FileState.of(path) for part in distinct.values() for path in part.files}
    counts = {home: _Counts(home, index_dir) for home, _ in distinct}
    sizes, missing = {}, []
    for (home, key), part in distinct.items():
        if (size := counts[home].get(key, [states[path] for path in part.files])) is None:
            missing.append(part)
        sizes[home, key] = size
    missing.sort(key=attrgetter("home"))
    for path in {path for part in missing for path in part.files}:
        content_checksum(states[path])  # before the counting: a file that is written to meanwhile is counted again
    uncached = []
    for home, members in groupby(missing, attrgetter("home")):
        new = {}
        for part in members:
            size = sizes[keys[part]] = _count(part, reading, counter)
            new[keys[part][1]] = part.names, [states[path] for path in part.files], size
        if not counts[home].put(new):
            uncached.append(home)
    warn_uncached("counts", uncached)
    return [None if parts is None else sum((sizes[keys[part]] for part in parts), Size()) for parts in of_source]


def _count(part: _Part, reading: _Reading, counter: TokenCounter) -> Size:
    is_quiet = os.environ.get("LOCAL_RANK", "0") != "0"  # the processes of a training count alike
    shown = {"desc": f"Counting {part.source.name}", "unit": " examples", "unit_scale": True}
    return size_of(tqdm(part.examples(reading), delay=SECONDS_WITHOUT_A_BAR, disable=is_quiet, **shown), counter)
