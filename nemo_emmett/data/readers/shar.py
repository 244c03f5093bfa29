"""lhotse Shar with its data in local, uncompressed tar files, read by number."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from lhotse import Recording
from lhotse.cut import Cut
from lhotse.serialization import deserialize_item
from lhotse.shar.readers.lazy import LazySharIterator
from lhotse.shar.utils import fill_shar_placeholder

from nemo_emmett.audio_file import AudioFault
from nemo_emmett.data.io.channels import select_channel
from nemo_emmett.data.io.files import expand_paths
from nemo_emmett.data.io.index import INDEX_SUFFIX, Index
from nemo_emmett.data.io.line_index import Lines, open_numbered_lines
from nemo_emmett.data.io.sidecar import hidden_place
from nemo_emmett.data.io.skipped_records import InvalidRecord, SkippedRecords
from nemo_emmett.data.io.tar_index import TarIndex
from nemo_emmett.data.readers.base import Records
from nemo_emmett.data.readers.examples import mark_origin
from nemo_emmett.data.readers.json_records import Record
from nemo_emmett.data.readers.lhotse_manifest import check_cut, lhotse_cut
from nemo_emmett.data.readers.tar_audio import AudioInTar, note_damage
from nemo_emmett.errors import DataError


class SharRecords(Records):
    """The cuts of lhotse Shar by number: line n of the cuts belongs to entry n of each tar file.

    A cut lacks lhotse's count of passes (``shar_epoch``): read by number, there are none.

    Args:
        shards: for each shard, the file of each field, ``cuts`` among them. With ``cuts`` alone, no audio is read.
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
        super().__init__(name, [[path] for path in cuts], partial(_open_lines, index_dir=index_dir), tags)
        self.shards = list(shards)
        self.skipped_records = skipped_records
        self.channel_selector = channel_selector
        self.tars = [
            {
                field: TarIndex(str(path), index_dir, _index_place(str(path)))
                for field, path in sorted(shard.items())
                if field != "cuts"
            }
            for shard in shards
        ]

    @property
    def audio_indexes(self) -> list[Index]:
        """See :attr:`Records.audio_indexes`."""
        return [tar for tars in self.tars for tar in tars.values()]

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
                    note_damage(tar, self.skipped_records, as_read)
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
    """Name of a field of a cut in reports."""
    return "audio" if field == "recording" else field


def _open_lines(path: str, index_dir: str | None) -> Lines:
    return open_numbered_lines(path, index_dir, _index_place(path))


def _index_place(path: str) -> str:
    """Place of an index: in a hidden folder next to the folder, since lhotse takes all that is in it for data."""
    folder = os.path.dirname(os.path.abspath(path))
    return os.path.join(hidden_place(folder, ""), os.path.basename(path) + INDEX_SUFFIX)


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
    """The value of a field of a cut, from two members: its data, and lhotse's description of it; None: no value."""
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


def shar_shards(name: str, **paths) -> list[dict[str, str | Path]]:
    """For each shard, the file of each field, as lhotse finds them."""
    try:
        return LazySharIterator(**paths).shards
    except AssertionError as error:
        what = str(error) or "there are no cuts"
        raise DataError(
            f"shar_path: {name} is not lhotse Shar with one file of each field a shard ({what})."
        ) from error


def cuts_of_shar(shar_path: str | Sequence | Mapping) -> list[str]:
    """The files of cuts of a ``shar_path``: a folder, several (perhaps with weights), or the files of each field."""
    if isinstance(shar_path, Mapping):
        return expand_paths(shar_path["cuts"])
    entries = [shar_path] if isinstance(shar_path, str) else shar_path
    folders = [entry if isinstance(entry, str) else entry[0] for entry in entries]
    return [str(shard["cuts"]) for folder in folders for shard in shar_shards(folder, in_dir=folder)]
