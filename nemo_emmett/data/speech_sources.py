"""Speech manifests, read so that one bad record costs one record.

The cuts are those that NeMo's own readers make (``LazyNeMoIterator``, ``LazyNeMoTarredIterator``): same ids, same
recordings, same supervisions, same custom fields. What differs: a record that cannot be used is noted and skipped, and
each cut says where it comes from (custom fields ``manifest_origin`` and ``manifest_place``).
"""

from __future__ import annotations

import io
import json
import math
import random
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import BinaryIO, NamedTuple

import soundfile
from lhotse import AudioSource, Recording, SupervisionSegment
from lhotse.cut import Cut, MixedCut, PaddingCut
from lhotse.dataset.dataloading import resolve_seed
from lhotse.lazy import LazyIteratorChain
from lhotse.serialization import deserialize_item
from nemo.collections.common.data.lhotse.cutset import resolve_relative_paths
from nemo.collections.common.data.lhotse.nemo_adapters import (
    ExtraField,
    LazyNeMoIterator,
    make_cut_with_subset_inmemory_recording,
    validate_extra_fields,
)
from nemo.collections.common.parts.preprocessing.manifest import get_full_path
from nemo.utils.data_utils import is_datastore_path

from nemo_emmett.data.audio import TRUNCATION_TOLERANCE, AudioFault, check_file
from nemo_emmett.data.bad_records import BadRecords, Unusable
from nemo_emmett.data.examples import mark_origin
from nemo_emmett.data.files import count_lines, decoded, expand_paths, open_bytes, open_lines
from nemo_emmett.errors import ConfigError


class Record(NamedTuple):
    """One JSON object of a file, and where it stands."""

    path: str
    number: int  # of its line, from 1
    data: dict

    @property
    def place(self) -> str:
        """How a report names it."""
        return f"line {self.number}"

    @property
    def is_left_out(self) -> bool:
        """Whether it is marked as not to be used, as NeMo's tools do."""
        return bool(self.data.get("_skipme", False))


class JsonRecords:
    """The JSON objects of a file, one a line. Lines that hold something else are noted; blank ones are no records."""

    def __init__(self, path: str, bad_records: BadRecords) -> None:
        self.path = path
        self.bad_records = bad_records

    def __iter__(self) -> Iterator[Record]:
        for number, line in enumerate(open_lines(self.path), start=1):
            if (record := self.parse(number, line)) is not None:
                yield record

    def parse(self, number: int, line: bytes) -> Record | None:
        """The record in a line, counted from 1; None where there is none."""
        if not line.strip():
            return None
        self.bad_records.read(self.path)
        note = partial(self.bad_records.add, self.path, f"line {number}")
        if (text := decoded(line, note)) is None:
            return None
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):  # the latter where it is nested too deeply
            note("not JSON")
            return None
        if not isinstance(data, dict):
            note("not a JSON object")
            return None
        return Record(self.path, number, data)

    def __len__(self) -> int:
        return count_lines(self.path)


def _check_times(data: Mapping) -> None:
    """Refuse a manifest record without a length in seconds, or with an offset that is none."""
    duration, offset = data.get("duration"), data.get("offset")
    if duration is None:
        raise Unusable("no duration")
    if not _is_seconds(duration) or duration <= 0:
        raise Unusable("invalid duration")
    if offset is not None and (not _is_seconds(offset) or offset < 0):
        raise Unusable("invalid offset")


def _is_seconds(value: object) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False


def _check_sampling_rate(rate: object) -> None:
    """Refuse a sampling rate that is not a number of samples."""
    if not _is_seconds(rate) or rate <= 0 or rate != int(rate):
        raise Unusable("invalid sampling_rate")


def _check_alternatives(data: Mapping) -> None:
    """Refuse what NeMo could not make further examples of: ``alt_text`` maps to texts and their languages."""
    texts = data.get("alt_text")
    if texts is not None and not (
        isinstance(texts, dict) and all(isinstance(t, dict) and {"text", "lang"} <= t.keys() for t in texts.values())
    ):
        raise Unusable("alt_text is not a mapping of texts")


class _ExtraFields:
    """NeMo's ``extra_fields``: values from other files, attached to the records in turn."""

    def __init__(self, fields: Sequence[Mapping] | None, seed: int) -> None:
        self.fields = [ExtraField.from_dict({"seed": seed, **field}) for field in fields or ()]

    def attach_to(self, cut: Cut) -> Cut:
        for field in self.fields:
            field.attach_to(cut)
        return cut

    def skip(self) -> None:
        """A skipped record takes its values with it, so that the next ones stay with their records."""
        self.attach_to(SimpleNamespace())


class NeMoManifest(LazyNeMoIterator):
    """A NeMo manifest whose audio lies in separate files, as cuts.

    Args:
        path: the manifest; may be sharded (``manifest__OP_0..7_CL_.json``).
        bad_records: ledger for the records that cannot be used.
        kwargs: what NeMo's ``LazyNeMoIterator`` takes.
    """

    def __init__(self, path: str, bad_records: BadRecords, **kwargs) -> None:
        paths = expand_paths(path)
        super().__init__(paths, **kwargs)  # a list, since NeMo takes any bracket in a path for a pattern
        self.bad_records = bad_records
        self.shards = [JsonRecords(shard, bad_records) for shard in paths]
        self.source = LazyIteratorChain(*self.shards, shuffle_iters=self.shuffle_shards, seed=self.shard_seed)

    def __iter__(self) -> Iterator[Cut]:
        extra_fields = _ExtraFields(self.extra_fields, resolve_seed(self.shard_seed))
        for record in self.source:
            if record.is_left_out:
                continue
            if (cut := self.cut_of(record)) is not None:
                yield extra_fields.attach_to(cut)
            else:
                extra_fields.skip()

    def cut_of(self, record: Record) -> Cut | None:
        """The cut of one record, without extra fields; None, and a note of the cause, where there is none."""
        try:
            return self._cut(record)
        except (Unusable, AudioFault) as cause:
            self.bad_records.add(record.path, record.place, str(cause))
            return None

    def _cut(self, record: Record) -> Cut:
        data = dict(record.data)
        if not isinstance(data.get("audio_filepath"), str):
            raise Unusable("no audio_filepath")
        _check_times(data)
        audio_path = get_full_path(data.pop("audio_filepath"), record.path, force_cache=False)
        duration, offset = data.pop("duration"), data.pop("offset", None)
        sampling_rate = data.pop("sampling_rate", None)
        if sampling_rate is None:
            sampling_rate = data.pop("sample_rate", None)
        if sampling_rate is not None:
            _check_sampling_rate(sampling_rate)
        _check_alternatives(data)
        if self.metadata_only:
            data.pop("alt_text", None)  # expanding it reads the audio
        cut = self._cut_of_audio(audio_path, offset, duration, sampling_rate)
        cut.supervisions.append(self._supervision(cut, data))
        cut.custom = {**data, "manifest_origin": record.path, "manifest_place": record.place}
        return cut

    def _cut_of_audio(self, path: str, offset: float | None, duration: float, sampling_rate: int | None) -> Cut:
        if sampling_rate is None and not self.metadata_only and not is_datastore_path(path):
            check_file(path, (offset or 0.0) + duration)  # without a rate in the manifest, the file is opened here
        try:
            if offset is not None and sampling_rate is not None and not self.metadata_only:
                return self._segment(path, offset, duration, sampling_rate)
            return self._create_cut(path, offset, duration, sampling_rate)
        except Exception as error:  # each decoder raises its own kind
            raise AudioFault("unreadable audio") from error

    def _segment(self, path: str, offset: float, duration: float, sampling_rate: int) -> Cut:
        """A part of a recording whose length the manifest does not tell, except that it reaches to the part's end.

        NeMo takes the part's length for that of the recording, so that parts lose their end, or are nothing at all.
        """
        recording = self._create_recording(path, offset + duration + _BEYOND_A_PART, sampling_rate)
        cut = recording.to_cut().truncate(offset=offset, duration=duration, preserve_id=True)
        cut.id = f"{cut.id}-{round(offset * 1e2):06d}-{round(duration * 1e2):06d}"
        return cut

    def _supervision(self, cut: Cut, data: Mapping) -> SupervisionSegment:
        return SupervisionSegment(
            id=cut.id,
            recording_id=cut.recording_id,
            start=0,  # relative to the cut
            duration=cut.duration,
            channel=cut.channel,
            text=data.get(self.text_field),
            language=data.get(self.lang_field),
        )


_BEYOND_A_PART = 0.01
"""Seconds by which a recording is taken to go on after its part: of one that ends with the part lhotse reads the whole
file, and refuses what is longer."""

_MANIFEST_SHARD = re.compile(r"manifest[^/]*_(\d+)[^/]*\.json")
_TAR_SHARD = re.compile(r"audio[^/]*_(\d+)[^/]*\.tar")
_SEGMENT = re.compile(r"^(?P<stem>.+)-sub\d+(?P<ext>\.\w+)?$")
"""A recording with several segments has one tar member, and manifest records named ``<member>-sub1.wav``, ..."""


class NeMoTarredManifest:
    """A NeMo manifest whose audio lies in tar files, as cuts with their audio in memory.

    Args:
        manifest_path: one manifest for all shards, or a sharded one (``manifest__OP_0..7_CL_.json``).
        tar_paths: the tar files (``audio__OP_0..7_CL_.tar``).
        bad_records: ledger for the records that cannot be used.
        shuffle_shards: take the shards in another order at each pass.
        shard_seed: of that order: an integer, ``trng`` or ``randomized``.
        text_field: key of the transcript.
        lang_field: key of its language.
        skip_missing_manifest_entries: the manifest names a subset of the tar files' members, on purpose.
        extra_fields: as in NeMo.
        slice_length: read so many members of each shard only, from a random one on.
    """

    def __init__(
        self,
        manifest_path: str,
        tar_paths: str | Sequence[str],
        bad_records: BadRecords,
        shuffle_shards: bool = False,
        shard_seed: int | str = "trng",
        text_field: str = "text",
        lang_field: str = "lang",
        skip_missing_manifest_entries: bool = False,
        extra_fields: Sequence[Mapping] | None = None,
        slice_length: int | None = None,
    ) -> None:
        validate_extra_fields(extra_fields)
        self.manifests = expand_paths(manifest_path)
        self.tars = _by_shard_number(expand_paths(tar_paths), _TAR_SHARD, "tarred_audio_filepaths")
        self.bad_records = bad_records
        self.shuffle_shards = shuffle_shards
        self.shard_seed = shard_seed
        self.text_field = text_field
        self.lang_field = lang_field
        self.skip_missing_manifest_entries = skip_missing_manifest_entries
        self.extra_fields = extra_fields
        self.slice_length = slice_length
        self._passes = 0
        if len(self.manifests) > 1:
            numbers = _by_shard_number(self.manifests, _MANIFEST_SHARD, "manifest_filepath")
            if set(numbers) != set(self.tars):
                raise ConfigError(
                    f"manifest_filepath has the shards {sorted(numbers)}, tarred_audio_filepaths {sorted(self.tars)}; "
                    "each manifest needs its tar file."
                )

    def __len__(self) -> int:
        return sum(count_lines(path) for path in self.manifests)

    def to_shards(self) -> list[NeMoTarredManifest]:
        """One reader per shard; a manifest that is not sharded stays whole."""
        if len(self.manifests) == 1:
            return [self]
        numbers = _by_shard_number(self.manifests, _MANIFEST_SHARD, "manifest_filepath")
        settings = {
            "bad_records": self.bad_records,
            "shard_seed": self.shard_seed,
            "text_field": self.text_field,
            "lang_field": self.lang_field,
            "skip_missing_manifest_entries": self.skip_missing_manifest_entries,
            "extra_fields": self.extra_fields,
            "slice_length": self.slice_length,
        }
        return [NeMoTarredManifest(path, self.tars[number], **settings) for number, path in numbers.items()]

    def __iter__(self) -> Iterator[Cut]:
        seed = resolve_seed(self.shard_seed) + self._passes
        rng = random.Random(seed)
        extra_fields = _ExtraFields(self.extra_fields, seed)
        for tar_path, records in self._shards(rng):
            yield from self._cuts_of_shard(tar_path, records, rng, extra_fields)
        self._passes += 1

    def _shards(self, rng: random.Random) -> Iterator[tuple[str, list[Record]]]:
        numbers = sorted(self.tars)
        if self.shuffle_shards:
            rng.shuffle(numbers)
        if len(self.manifests) > 1:
            paths = _by_shard_number(self.manifests, _MANIFEST_SHARD, "manifest_filepath")
            for number in numbers:
                yield self.tars[number], list(JsonRecords(paths[number], self.bad_records))
            return
        of_shard = defaultdict(list)
        for record in JsonRecords(self.manifests[0], self.bad_records):
            try:
                of_shard[self.shard_of(record)].append(record)
            except Unusable as cause:
                self.bad_records.add(record.path, record.place, str(cause))
        for number in numbers:
            yield self.tars[number], of_shard[number]

    def shard_of(self, record: Record) -> int:
        """Number of the tar file that a record's audio lies in.

        Raises:
            Unusable: if the record names none that there is.
        """
        if len(self.manifests) > 1:
            return int(_MANIFEST_SHARD.search(record.path)[1])
        number = record.data.get("shard_id", next(iter(self.tars)) if len(self.tars) == 1 else None)
        if not isinstance(number, (int, float)) or number not in self.tars:
            raise Unusable("no such shard_id")
        return int(number)

    def _cuts_of_shard(
        self, tar_path: str, records: Sequence[Record], rng: random.Random, extra_fields: _ExtraFields
    ) -> Iterator[Cut]:
        of_member = self._group_by_member(records)
        found = set()
        for name, audio in self._members(tar_path, of_member, rng):
            found.add(name)
            cuts = []
            for record in sorted(of_member[name], key=lambda record: record.data["audio_filepath"]):
                if record.is_left_out:
                    continue
                try:
                    cuts.append(extra_fields.attach_to(self._cut(tar_path, name, audio, record)))
                except (Unusable, AudioFault) as cause:
                    self.bad_records.add(record.path, record.place, str(cause))
                    extra_fields.skip()
            del audio  # the cuts hold what they need of it
            yield from cuts
        if self.slice_length is None:
            for name in of_member.keys() - found:
                for record in of_member[name]:
                    self.bad_records.add(record.path, record.place, "missing audio")

    def _group_by_member(self, records: Sequence[Record]) -> dict[str, list[Record]]:
        of_member = defaultdict(list)
        for record in records:
            try:
                of_member[member_of(record)].append(record)
            except Unusable as cause:
                self.bad_records.add(record.path, record.place, str(cause))
        return dict(of_member)

    def _members(
        self, tar_path: str, of_member: Mapping[str, Sequence[Record]], rng: random.Random
    ) -> Iterator[tuple[str, bytes]]:
        """The tar members that the manifest names, in the tar's order, or ``slice_length`` of them."""
        first = 0
        if self.slice_length is not None and self.slice_length < len(of_member):
            first = rng.randint(0, len(of_member) - self.slice_length)
        taken, name = 0, "its start"
        try:
            with tarfile.open(fileobj=open_bytes(tar_path), mode="r|*") as tar:
                for index, member in enumerate(tar):
                    if taken == self.slice_length:
                        break
                    if index < first or not member.isfile():
                        continue
                    name = member.name
                    if name in of_member:
                        yield name, tar.extractfile(member).read()
                        taken += 1
                    elif not self.skip_missing_manifest_entries:
                        self.bad_records.add(tar_path, name, "not in the manifest")
        except (tarfile.ReadError, EOFError):
            self.bad_records.add(tar_path, f"after {name}", "unreadable tar")

    def _cut(self, tar_path: str, name: str, audio: bytes, record: Record) -> Cut:
        offset, duration = times_of(record)
        header = read_header(io.BytesIO(audio), len(audio), offset + duration)
        try:
            recording = recording_in_memory(name, audio, header)
            cut = make_cut_with_subset_inmemory_recording(recording, offset=offset, duration=duration)
        except Exception as error:  # each decoder raises its own kind
            raise AudioFault("unreadable audio") from error
        return self.labelled(cut, record, tar_path)

    def labelled(self, cut: Cut, record: Record, tar_path: str) -> Cut:
        """The cut of a record's audio with what its manifest says of it."""
        data = record.data
        cut.supervisions.append(
            SupervisionSegment(
                id=cut.id,
                recording_id=cut.recording_id,
                start=0,  # relative to the cut
                duration=cut.duration,
                text=data.get(self.text_field),
                language=data.get(self.lang_field),
            )
        )
        cut.custom = {key: value for key, value in data.items() if key not in ("duration", "audio_filepath")}
        cut.manifest_origin, cut.manifest_place, cut.tar_origin = record.path, record.place, tar_path
        return cut


def member_of(record: Record) -> str:
    """Name of the tar member that a record's audio lies in, which it may share with other segments.

    Raises:
        Unusable: if the record names none.
    """
    name = record.data.get("audio_filepath")
    if not isinstance(name, str):
        raise Unusable("no audio_filepath")
    if (segment := _SEGMENT.match(name)) is not None:
        return segment["stem"] + (segment["ext"] or "")
    return name


def times_of(record: Record) -> tuple[float, float]:
    """Offset and duration of a record in its recording, in seconds.

    Raises:
        Unusable: if they are missing, or no times.
    """
    _check_times(record.data)
    _check_alternatives(record.data)
    return record.data.get("offset") or 0.0, record.data["duration"]


class Header(NamedTuple):
    """What a recording says of itself before any of it is decoded."""

    sampling_rate: int
    num_samples: int
    num_channels: int

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.num_samples / self.sampling_rate


def read_header(audio: BinaryIO, size: int, end: float) -> Header:
    """Read the header of encoded audio of ``size`` bytes, and refuse what does not reach to ``end`` seconds.

    Raises:
        AudioFault: its text is the cause.
    """
    if size == 0:
        raise AudioFault("empty audio")
    try:
        info = soundfile.info(audio)
    except soundfile.SoundFileError as error:
        raise AudioFault("unreadable audio") from error
    header = Header(int(info.samplerate), info.frames, info.channels)
    if header.num_samples == 0:
        raise AudioFault("empty audio")
    if end > header.duration + TRUNCATION_TOLERANCE:
        raise AudioFault("truncated audio")
    return header


def recording_from(name: str, source: AudioSource, header: Header) -> Recording:
    """A recording as long as its header says."""
    return Recording(name, [source], header.sampling_rate, header.num_samples, header.duration)


def recording_in_memory(name: str, audio: bytes, header: Header) -> Recording:
    """A recording that holds its encoded audio."""
    return recording_from(name, AudioSource("memory", list(range(header.num_channels)), audio), header)


def _by_shard_number(paths: Sequence[str], pattern: re.Pattern, key: str) -> dict[int, str]:
    numbered = {}
    for path in paths:
        if (match := pattern.search(path)) is None:
            raise ConfigError(f"{key}: '{path}' does not tell its shard; name it as in audio_12.tar, manifest_12.json.")
        numbered[int(match[1])] = path
    return numbered


class LhotseManifest:
    """A lhotse cut manifest in JSONL (``cuts.jsonl`` or ``cuts.jsonl.gz``).

    Args:
        path: the manifest; relative audio paths are relative to it.
        bad_records: ledger for the records that cannot be used.
    """

    def __init__(self, path: str, bad_records: BadRecords) -> None:
        self.path = path
        self.bad_records = bad_records
        self.records = JsonRecords(path, bad_records)

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Cut]:
        for record in self.records:
            if (cut := self.cut_of(record)) is not None:
                yield cut

    def cut_of(self, record: Record) -> Cut | None:
        """The cut of one record; None, and a note of the cause, where it is none."""
        try:
            cut = lhotse_cut(record)
            check_cut(cut)
        except Unusable as cause:
            self.bad_records.add(record.path, record.place, str(cause))
            return None
        cut = resolve_relative_paths(cut, manifest_path=self.path)
        mark_origin(cut, record.path, record.place)
        return cut


def lhotse_cut(record: Record) -> Cut:
    """The cut that a record describes.

    Raises:
        Unusable: if it describes something else.
    """
    try:
        cut = deserialize_item(record.data)
    except Exception as error:  # lhotse raises whatever its constructors trip over
        raise Unusable("not a lhotse cut") from error
    if not isinstance(cut, Cut):
        raise Unusable("not a lhotse cut")
    return cut


def check_cut(cut: Cut) -> None:
    """Refuse what lhotse's constructors let pass, since they look at no type.

    Raises:
        Unusable: if there is no audio, or its place and length are no numbers.
    """
    if isinstance(cut, MixedCut):
        for track in cut.tracks:
            check_cut(track.cut)
        return
    if not isinstance(cut.id, str):
        raise Unusable("not a lhotse cut")
    if isinstance(cut, PaddingCut):
        return
    if not cut.has_recording:
        raise Unusable("no audio")
    if not _is_seconds(cut.start) or cut.start < 0:
        raise Unusable("invalid start")
    if not _is_seconds(cut.duration) or cut.duration <= 0:
        raise Unusable("invalid duration")
    _check_sampling_rate(cut.recording.sampling_rate)
    if any(source.type == "file" and not isinstance(source.source, str) for source in cut.recording.sources):
        raise Unusable("not a lhotse cut")
