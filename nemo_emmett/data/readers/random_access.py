"""The records of a source by number, so that a loader can take them in any order and go on anywhere.

:func:`open_records` opens a source by the same readers that stream it (``text_sources``, ``speech_sources``): a line
makes the same examples, and gets the same notes in the ledger, whichever way it is reached. Audio in tar files is read
when it is decoded, in the process that needs it; only its header is looked at before.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice, repeat
from pathlib import Path

from lhotse import Recording
from lhotse.cut import Cut
from lhotse.serialization import deserialize_item
from lhotse.shar.readers.lazy import LazySharIterator
from lhotse.shar.utils import fill_shar_placeholder
from nemo.collections.common.data.lhotse.cutset import attach_tags
from nemo.collections.common.data.lhotse.text_adapters import SourceTargetTextExample

from nemo_emmett.audio_file import AudioFault, read_header
from nemo_emmett.data.config.sources import Source
from nemo_emmett.data.io.channels import select_channel
from nemo_emmett.data.io.files import expand_paths, is_local
from nemo_emmett.data.io.line_index import (
    INDEX_SUFFIX,
    Index,
    Lines,
    is_compressed,
    open_numbered_lines,
)
from nemo_emmett.data.io.line_index import build_indexes as build_all
from nemo_emmett.data.io.skipped_records import InvalidRecord, SkippedRecords
from nemo_emmett.data.io.tar_index import Member, TarIndex
from nemo_emmett.data.readers.examples import ExampleKind, mark_origin
from nemo_emmett.data.readers.json_records import JsonRecords, Record, times_of
from nemo_emmett.data.readers.parallel_text import AlignedText, JsonlText, TsvText, open_parallel_text
from nemo_emmett.data.readers.registry import (
    is_lhotse_jsonl,
    is_nemo,
    manifest_and_weight,
    nemo_reader,
    reads_pairs_ourselves,
)
from nemo_emmett.data.readers.speech_sources import (
    LhotseManifest,
    NeMoManifest,
    NeMoTarredManifest,
    check_cut,
    lhotse_cut,
)
from nemo_emmett.data.readers.tar_audio import AudioInTar, SegmentInTar, cut_of_encoded, member_names
from nemo_emmett.errors import DataError

Example = Cut | SourceTargetTextExample

_RECORDS_TO_LOOK_FOR = 1000
"""If none of so many first records of a manifest has its audio in the tar file, this is reported."""

_FORWARD_SHARDS = 4
"""So many shards that can only be read forward are kept open at once; each holds a file and a stretch of lines."""


class Records(ABC):
    """The records of a source, by shard and number.

    Args:
        name: of the source, for reports.
        shards: the text files of each shard, in the order of the config. Files of a shard belong together line by line.
        tags: are attached to each example.
    """

    def __init__(self, name: str, shards: Sequence[Sequence[Lines]], tags: Mapping | None) -> None:
        self.name = name
        self.is_sequential = [any(lines.is_sequential for lines in files) for files in shards]
        self.tags = dict(tags or {})
        self._files = [tuple(files) for files in shards]
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
            self._sizes = [_common_length(files) for files in self._files]
        return self._sizes

    @property
    def indexes(self) -> list[Index]:
        """All indexes that reading needs."""
        return [lines for files in self._files for lines in files]

    def prepare(self, shard: int, start: int, stop: int) -> None:
        """Expect the records from ``start`` to before ``stop`` to be read next. This saves time and changes nothing.

        Shards that can only be read forward read them into memory, and forget what came before.
        """
        if self.is_sequential[shard]:
            self._go_forward_in(shard)
            for lines in self._files[shard]:
                lines.prepare(start, stop)

    def read(self, shard: int, number: int) -> list[Example]:
        """The examples made from one record; none, and a note in the ledger, if it cannot be used.

        Args:
            shard: number of the shard, from 0.
            number: of the record in its shard, from 0.

        Raises:
            IndexError: if there is no such record.
            DataError: if a file has changed since it was indexed.
        """
        if self.is_sequential[shard]:
            self._go_forward_in(shard)
        lines = [lines.read(number) for lines in self._files[shard]]
        examples = list(self._examples(shard, number + 1, lines))
        for example in examples:
            attach_tags(example, self.tags)
        return examples

    def _go_forward_in(self, shard: int) -> None:
        if self._forward[-1:] == [shard]:
            return
        self._forward = [*(other for other in self._forward if other != shard), shard]
        if len(self._forward) > _FORWARD_SHARDS:
            for lines in self._files[self._forward.pop(0)]:
                lines.release()

    @abstractmethod
    def _examples(self, shard: int, number: int, lines: Sequence[bytes]) -> Iterator[Example]:
        """What the lines of a record make; its number is from 1 here, as reports have it."""


def _common_length(files: Sequence[Lines]) -> int:
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


class AlignedTextRecords(Records):
    """Line-aligned text: a record is one line of each side."""

    def __init__(self, name: str, text: AlignedText, index_dir: str | None, tags: Mapping | None) -> None:
        super().__init__(
            name, [[open_numbered_lines(path, index_dir) for path in shard.values()] for shard in text.shards], tags
        )
        self.text = text

    def _examples(self, shard: int, number: int, lines: Sequence[bytes]) -> Iterator[Example]:
        return self.text.examples_of(self.text.shards[shard], number, lines)


class TextRecords(Records):
    """Text with both sides of an example in one line: TSV (whose header makes none) or JSONL."""

    def __init__(self, name: str, text: TsvText | JsonlText, index_dir: str | None, tags: Mapping | None) -> None:
        super().__init__(name, [[open_numbered_lines(path, index_dir)] for path in text.paths], tags)
        self.text = text

    def _examples(self, shard: int, number: int, lines: Sequence[bytes]) -> Iterator[Example]:
        example = self.text.example_of(self.text.paths[shard], number, *lines)
        return iter([] if example is None else [example])


class ManifestRecords(Records):
    """Speech manifests, NeMo's or lhotse's, whose audio lies in separate files.

    Args:
        shards: for each file, its reader and the manifest that makes cuts of its records.
    """

    def __init__(
        self,
        name: str,
        shards: Sequence[tuple[JsonRecords, NeMoManifest | LhotseManifest]],
        index_dir: str | None,
        tags: Mapping | None,
    ) -> None:
        super().__init__(name, [[open_numbered_lines(records.path, index_dir)] for records, _ in shards], tags)
        self.shards = list(shards)

    def _examples(self, shard: int, number: int, lines: Sequence[bytes]) -> Iterator[Cut]:
        records, manifest = self.shards[shard]
        record = records.parse(number, *lines)
        if record is None or (isinstance(manifest, NeMoManifest) and record.is_left_out):
            return
        if (cut := manifest.cut_of(record)) is not None:
            yield cut


def _cut_in_tar(name: str, member: Member, offset: float, duration: float) -> Cut:
    """The cut that the tarred reader makes of a member, but its audio is read later.

    Raises:
        AudioFault: if the header tells that the audio cannot be used.
    """
    try:
        header = read_header(member.open())
    except OSError as error:
        raise AudioFault("unreadable audio") from error
    whole = AudioInTar(member, range(header.num_channels))
    return cut_of_encoded(name, header, offset, duration, whole, partial(SegmentInTar, member, header, offset))


class TarredRecords(Records):
    """NeMo manifests whose audio lies in local, uncompressed tar files. A record is a line of a manifest.

    Members that no manifest names are not looked for.
    """

    def __init__(
        self, name: str, manifests: Sequence[NeMoTarredManifest], index_dir: str | None, tags: Mapping | None
    ) -> None:
        self.shards = [
            (JsonRecords(path, manifest.skipped_records), manifest)
            for manifest in manifests
            for path in manifest.manifests
        ]
        super().__init__(name, [[open_numbered_lines(records.path, index_dir)] for records, _ in self.shards], tags)
        tars = [path for manifest in manifests for path in manifest.tars.values()]
        self.tars = {path: TarIndex(path, index_dir) for path in tars}
        self._with_members: set[str] = set()  # tar files that hold audio of the manifest, or were reported

    @property
    def indexes(self) -> list[Index]:
        """All indexes that reading needs."""
        return [*super().indexes, *self.tars.values()]

    def _examples(self, shard: int, number: int, lines: Sequence[bytes]) -> Iterator[Cut]:
        records, manifest = self.shards[shard]
        record = records.parse(number, *lines)
        if record is None or record.is_left_out:
            return
        try:
            yield self._cut(record, manifest)
        except (InvalidRecord, AudioFault) as cause:
            records.skipped_records.add(record.path, record.place, str(cause))

    def _cut(self, record: Record, manifest: NeMoTarredManifest) -> Cut:
        tar = self.tars[manifest.tars[manifest.shard_of(record)]]
        for name in member_names(record):
            if (member := tar.find(name)) is not None:
                self._with_members.add(tar.path)
                return manifest.labelled(_cut_in_tar(name, member, *times_of(record)), record, tar.path)
        _note_damage(tar, manifest.skipped_records, (record.path, record.place))
        self._look_for_any_member(tar, manifest, record)
        raise AudioFault("missing audio")

    def _look_for_any_member(self, tar: TarIndex, manifest: NeMoTarredManifest, record: Record) -> None:
        """Where a record's audio is missing, report if that of the first other records is missing as well."""
        if tar.path in self._with_members:
            return
        self._with_members.add(tar.path)
        wanted = []
        for other in islice(JsonRecords(record.path, SkippedRecords()), _RECORDS_TO_LOOK_FOR):
            with suppress(InvalidRecord):
                if manifest.tars[manifest.shard_of(other)] == tar.path:
                    wanted += [(name, other) for name in member_names(other)[:1]]
                    if any(tar.find(name) is not None for name in member_names(other)):
                        return
        manifest.note_no_member(tar.path, wanted, [tar.name(n) for n in range(min(len(tar), 3))])


def _note_damage(tar: TarIndex, skipped_records: SkippedRecords, record: tuple[str, str]) -> None:
    """What is missing may lie behind a damage; it is told under the record, which is bad once."""
    if tar.damage is not None:
        skipped_records.add(tar.path, f"after {tar.damage}", "unreadable tar", record=record)


class SharRecords(Records):
    """lhotse Shar whose data lies in local, uncompressed tar files: line n of the cuts belongs to entry n of each tar.

    A cut does not tell lhotse's count of passes (``shar_epoch``): read by number, there are none.

    Args:
        shards: for each shard, the file of each field, ``cuts`` among them.
        channel_selector: see :func:`~nemo_emmett.data.io.channels.select_channel`.
    """

    def __init__(
        self,
        name: str,
        shards: Sequence[Mapping[str, str | Path]],
        skipped_records: SkippedRecords,
        index_dir: str | None,
        tags: Mapping | None,
        channel_selector: int | str | None = None,
    ) -> None:
        cuts = [str(shard["cuts"]) for shard in shards]
        super().__init__(name, [[open_numbered_lines(p, index_dir, _beside_shar(p))] for p in cuts], tags)
        self.shards = list(shards)
        self.skipped_records = skipped_records
        self.channel_selector = channel_selector
        self.tars = [
            {
                field: TarIndex(str(path), index_dir, _beside_shar(str(path)))
                for field, path in sorted(shard.items())
                if field != "cuts"
            }
            for shard in shards
        ]

    @property
    def indexes(self) -> list[Index]:
        """All indexes that reading needs."""
        return [*super().indexes, *(tar for tars in self.tars for tar in tars.values())]

    def _examples(self, shard: int, number: int, lines: Sequence[bytes]) -> Iterator[Cut]:
        if not lines[0].strip():
            return
        origin, place = self.shards[shard]["cuts"], f"line {number}"
        as_read = (self.name, f"{origin}, {place}")
        self.skipped_records.read(self.name)
        try:
            cut = lhotse_cut(Record(str(origin), number, _json(*lines)))
            for field, tar in self.tars[shard].items():
                if 2 * number > len(tar):  # two members each
                    _note_damage(tar, self.skipped_records, as_read)
                    raise InvalidRecord(f"missing {_spoken(field)}")
                if (value := _shar_value(tar, number - 1, cut.id, field)) is not None:
                    setattr(cut, field, value)
            check_cut(cut)
            cut = select_channel(cut, self.channel_selector)
        except (InvalidRecord, AudioFault) as cause:
            self.skipped_records.add(str(origin), place, str(cause), record=as_read)
            return
        cut.shard_origin = origin
        mark_origin(cut, self.name, cut.id)
        yield cut


def _spoken(field: str) -> str:
    """What a report calls a field of a cut."""
    return "audio" if field == "recording" else field


def _beside_shar(path: str) -> str:
    """Beside the folder, since lhotse takes every file in it for data."""
    return str(Path(f"{Path(path).absolute().parent}{INDEX_SUFFIX}", Path(path).name))


def _json(line: bytes) -> dict:
    try:
        data = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise InvalidRecord("not UTF-8") from None
    except (ValueError, RecursionError):  # the latter where it is nested too deeply
        raise InvalidRecord("not JSON") from None
    if not isinstance(data, dict):
        raise InvalidRecord("not a JSON object")
    return data


def _shar_value(tar: TarIndex, number: int, cut_id: str, field: str) -> object | None:
    """What a field of a cut holds, from two members: its data, and lhotse's description of it; None if nothing."""
    name, data, description = tar.name(2 * number), tar.member(2 * number), tar.member(2 * number + 1)
    if str(Path(name).with_suffix("")) != cut_id:
        raise InvalidRecord(f"{_spoken(field)} of another cut")
    if tar.name(2 * number + 1).endswith(".nometa"):
        return None
    try:
        value = deserialize_item(_json(description.read()))
        if not isinstance(value, Recording):
            fill_shar_placeholder(value, data=data.read(), tarpath=name)
    except DataError:  # the tar file has changed
        raise
    except Exception as error:  # lhotse raises whatever its constructors trip over
        raise InvalidRecord(f"unreadable {_spoken(field)}") from error
    if isinstance(value, Recording):
        if data.size == 0:
            raise AudioFault("empty audio")
        value.sources = [AudioInTar(data, value.channel_ids)]
    return value


def open_records(
    source: Source, skipped_records: SkippedRecords, kind: ExampleKind, index_dir: str | None = None
) -> Records | None:
    """Open a source for reading by number.

    Args:
        source: where the data is.
        skipped_records: ledger for the records that cannot be used.
        kind: what the dataset takes; text for a dataset that is not ours is read by NeMo.
        index_dir: folder for indexes that cannot be written beside the data.

    Returns:
        Its records; None if it can only be streamed: data types that NeMo reads, remote or compressed tar files,
        ``extra_fields`` and ``slice_length``, lists of manifests with weights.

    Raises:
        ConfigError: if the source's keys do not fit together.
    """
    config = source.config
    if config.get("extra_fields"):
        return None
    how = {"index_dir": index_dir, "tags": config.get("tags")}
    if is_nemo(config):
        return _nemo_records(source, skipped_records, **how)
    if is_lhotse_jsonl(config):
        manifest = LhotseManifest(config["cuts_path"], skipped_records, config.get("channel_selector"))
        return ManifestRecords(source.name, [(manifest.records, manifest)], **how)
    if source.type in ("lhotse", "lhotse_shar") and config.get("shar_path") is not None:
        return _shar_records(source, skipped_records, **how)
    if source.type == "parallel_text" or (source.type == "txt_pair" and reads_pairs_ourselves(config, kind)):
        text = open_parallel_text(config, skipped_records)
        return (AlignedTextRecords if isinstance(text, AlignedText) else TextRecords)(source.name, text, **how)
    return None


def _nemo_records(source: Source, skipped_records: SkippedRecords, **how) -> Records | None:
    config = source.config
    is_tarred = config.get("tarred_audio_filepaths") is not None
    if is_tarred and (config.get("metadata_only") or config.get("slice_length") is not None):
        return None
    if (entries := _unweighted(config["manifest_filepath"])) is None:
        return None
    tars = config["tarred_audio_filepaths"] if is_tarred else repeat(None)
    if isinstance(tars, str):
        tars = [tars]
    tars = [t if t is None or isinstance(t, str) else t[0] for t, _ in zip(tars, entries, strict=False)]
    readers = [nemo_reader(config, path, tar, skipped_records) for path, tar in zip(entries, tars, strict=True)]
    if not is_tarred:
        return ManifestRecords(source.name, [(shard, reader) for reader in readers for shard in reader.shards], **how)
    if not _can_be_entered([path for reader in readers for path in reader.tars.values()]):
        return None
    return TarredRecords(source.name, readers, **how)


def _unweighted(entries: str | Sequence) -> list[str] | None:
    """The paths of a list that NeMo mixes by their sizes, as if they were shards; None if they have weights."""
    if isinstance(entries, str):
        return [entries]
    paths = [manifest_and_weight(entry) for entry in entries]
    if len(paths) > 1 and any(weight is not None for _, weight in paths):
        return None
    return [path for path, _ in paths]


def _can_be_entered(tars: Sequence[str]) -> bool:
    """Whether members can be read from the middle of these tar files."""
    return all(is_local(path) and not is_compressed(path) for path in tars)


def _shar_records(source: Source, skipped_records: SkippedRecords, **how) -> Records | None:
    config, where = source.config, source.config["shar_path"]
    if config.get("metadata_only") or config.get("slice_length") is not None:
        return None
    if isinstance(where, Mapping):
        fields = {field: expand_paths(paths) for field, paths in where.items()}
        shards = _shar_shards(source.name, fields=fields)
    elif (folders := _unweighted(where)) is None or not all(map(is_local, folders)):
        return None
    else:
        shards = [shard for folder in folders for shard in _shar_shards(folder, in_dir=folder)]
    data = [str(path) for shard in shards for field, path in shard.items() if field != "cuts"]
    if not all(path.endswith(".tar") for path in data) or not _can_be_entered(data):
        return None
    return SharRecords(source.name, shards, skipped_records, channel_selector=config.get("channel_selector"), **how)


def _shar_shards(name: str, **where) -> list[dict[str, str | Path]]:
    """For each shard, the file of each field, as lhotse finds them."""
    try:
        return LazySharIterator(**where).shards
    except AssertionError as error:
        what = str(error) or "there are no cuts"
        raise DataError(
            f"shar_path: {name} is not lhotse Shar with one file of each field a shard ({what})."
        ) from error
