"""Speech manifests, read so that one bad record costs one record.

The cuts are those that NeMo's own readers make (``LazyNeMoIterator``, ``LazyNeMoTarredIterator``): same ids, same
recordings, same supervisions, same custom fields. What differs: a record that cannot be used is noted and skipped, and
each cut says where it comes from (custom fields ``manifest_origin`` and ``manifest_place``).
"""

from __future__ import annotations

import io
import random
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace

from lhotse import AudioSource, SupervisionSegment
from lhotse.cut import Cut, MixedCut, PaddingCut
from lhotse.dataset.dataloading import resolve_seed
from lhotse.lazy import LazyIteratorChain
from lhotse.serialization import deserialize_item
from nemo.collections.common.data.lhotse.cutset import resolve_relative_paths
from nemo.collections.common.data.lhotse.nemo_adapters import ExtraField, LazyNeMoIterator, validate_extra_fields
from nemo.collections.common.parts.preprocessing.manifest import get_full_path
from nemo.utils.data_utils import is_datastore_path

from nemo_emmett.audio_file import AudioFault, fitted, open_recording, read_header
from nemo_emmett.data.io.audio import with_checked_audio
from nemo_emmett.data.io.channels import is_chosen, select_channel
from nemo_emmett.data.io.files import count_lines, expand_paths, is_local, open_bytes
from nemo_emmett.data.io.skipped_records import InvalidRecord, SkippedRecords
from nemo_emmett.data.io.tar_index import normal_name
from nemo_emmett.data.readers.examples import mark_origin
from nemo_emmett.data.readers.json_records import (
    JsonRecords,
    Record,
    check_alternatives,
    check_sampling_rate,
    check_times,
    is_seconds,
    sampling_rate_of,
    times_of,
)
from nemo_emmett.data.readers.tar_audio import cut_of_encoded, encoded_part, member_names, names_in
from nemo_emmett.errors import ConfigError


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
        skipped_records: ledger for the records that cannot be used.
        channel_selector: see :func:`~nemo_emmett.data.io.channels.select_channel`.
        kwargs: what NeMo's ``LazyNeMoIterator`` takes.
    """

    def __init__(
        self, path: str, skipped_records: SkippedRecords, channel_selector: int | str | None = None, **kwargs
    ) -> None:
        paths = expand_paths(path)
        super().__init__(paths, **kwargs)  # a list, since NeMo takes any bracket in a path for a pattern
        self.skipped_records = skipped_records
        self.channel_selector = channel_selector
        self.shards = [JsonRecords(shard, skipped_records) for shard in paths]
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
        except (InvalidRecord, AudioFault) as cause:
            self.skipped_records.add(record.path, record.place, str(cause))
            return None

    def _cut(self, record: Record) -> Cut:
        data = dict(record.data)
        if not isinstance(data.get("audio_filepath"), str):
            raise InvalidRecord("no audio_filepath")
        check_times(data)
        audio_path = get_full_path(data.pop("audio_filepath"), record.path, force_cache=False)
        duration, offset = data.pop("duration"), data.pop("offset", None)
        if (sampling_rate := sampling_rate_of(data)) is not None:
            check_sampling_rate(sampling_rate)
        if data.pop("sampling_rate", None) is None:  # as NeMo leaves the fields of a cut
            data.pop("sample_rate", None)
        check_alternatives(data)
        if self.metadata_only:
            data.pop("alt_text", None)  # expanding it reads the audio
        cut = self._cut_of_audio(audio_path, offset, duration, sampling_rate)
        cut.supervisions.append(self._supervision(cut, data))
        cut.custom = {**data, "manifest_origin": record.path, "manifest_place": record.place}
        if self.metadata_only:
            return cut
        cut = select_channel(cut, self.channel_selector)
        return with_checked_audio(cut) if data.get("alt_text") else cut  # NeMo reads the audio of such a record next

    def _cut_of_audio(self, path: str, offset: float | None, duration: float, sampling_rate: int | None) -> Cut:
        """The part of a file from ``offset``, which is opened where the manifest does not say enough of it."""
        if self.metadata_only or is_datastore_path(path):
            try:
                return self._create_cut(path, offset, duration, sampling_rate)
            except Exception as error:  # each decoder raises its own kind
                raise AudioFault("unreadable audio") from error
        start = offset or 0.0
        if sampling_rate is None or is_chosen(self.channel_selector):
            recording = open_recording(path)
            missing = recording.sources[0].header.missing
            cut = recording.to_cut()
            cut.duration = fitted(recording.duration, start, duration, missing)
            if sampling_rate is not None:  # NeMo's ids tell these apart
                recording.id = cut.id = path
        else:
            # How long the file is will be seen when it is read; it goes on behind a part of it.
            length = duration if offset is None else offset + duration + _BEYOND_A_PART
            cut = self._create_recording(path, length, sampling_rate).to_cut()
            cut.duration = duration
        cut.start = start
        if offset is not None:
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

_NAMES_IN_REPORTS = 3
"""Number of names that the report of a tar file without any member of the manifest lists."""


class NeMoTarredManifest:
    """A NeMo manifest whose audio lies in tar files, as cuts with their audio in memory.

    Args:
        manifest_path: one manifest for all shards, or a sharded one (``manifest__OP_0..7_CL_.json``).
        tar_paths: the tar files (``audio__OP_0..7_CL_.tar``).
        skipped_records: ledger for the records that cannot be used.
        shuffle_shards: take the shards in another order at each pass.
        shard_seed: of that order: an integer, ``trng`` or ``randomized``.
        text_field: key of the transcript.
        lang_field: key of its language.
        skip_missing_manifest_entries: the manifest names a subset of the tar files' members, on purpose.
        extra_fields: as in NeMo.
        slice_length: read so many members of each shard only, from a random one on.
        channel_selector: see :func:`~nemo_emmett.data.io.channels.select_channel`.
    """

    def __init__(
        self,
        manifest_path: str,
        tar_paths: str | Sequence[str],
        skipped_records: SkippedRecords,
        shuffle_shards: bool = False,
        shard_seed: int | str = "trng",
        text_field: str = "text",
        lang_field: str = "lang",
        skip_missing_manifest_entries: bool = False,
        extra_fields: Sequence[Mapping] | None = None,
        slice_length: int | None = None,
        channel_selector: int | str | None = None,
    ) -> None:
        validate_extra_fields(extra_fields)
        self.manifests = expand_paths(manifest_path)
        self.tars = _by_shard_number(expand_paths(tar_paths), _TAR_SHARD, "tarred_audio_filepaths")
        self.skipped_records = skipped_records
        self.shuffle_shards = shuffle_shards
        self.shard_seed = shard_seed
        self.text_field = text_field
        self.lang_field = lang_field
        self.skip_missing_manifest_entries = skip_missing_manifest_entries
        self.extra_fields = extra_fields
        self.slice_length = slice_length
        self.channel_selector = channel_selector
        self.name = manifest_path
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
            "skipped_records": self.skipped_records,
            "shard_seed": self.shard_seed,
            "text_field": self.text_field,
            "lang_field": self.lang_field,
            "skip_missing_manifest_entries": self.skip_missing_manifest_entries,
            "extra_fields": self.extra_fields,
            "slice_length": self.slice_length,
            "channel_selector": self.channel_selector,
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
                yield self.tars[number], list(JsonRecords(paths[number], self.skipped_records))
            return
        of_shard = defaultdict(list)
        for record in JsonRecords(self.manifests[0], self.skipped_records):
            try:
                of_shard[self.shard_of(record)].append(record)
            except InvalidRecord as cause:
                self.skipped_records.add(record.path, record.place, str(cause))
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
            raise InvalidRecord("no such shard_id")
        return int(number)

    def _cuts_of_shard(
        self, tar_path: str, records: Sequence[Record], rng: random.Random, extra_fields: _ExtraFields
    ) -> Iterator[Cut]:
        of_member = self._group_by_member(tar_path, records)
        found, unnamed = set(), []
        for name, audio in self._members(tar_path, of_member, rng, unnamed):
            found.add(name)
            cuts = []
            for record_name, record in sorted(of_member[name], key=lambda named: named[1].data["audio_filepath"]):
                if record.is_left_out:
                    continue
                try:
                    cuts.append(extra_fields.attach_to(self._cut(tar_path, record_name, audio, record)))
                except (InvalidRecord, AudioFault) as cause:
                    self.skipped_records.add(record.path, record.place, str(cause))
                    extra_fields.skip()
            del audio  # the cuts hold what they need of it
            yield from cuts
        if self.slice_length is None:
            for name in of_member.keys() - found:
                for _, record in of_member[name]:
                    self.skipped_records.add(record.path, record.place, "missing audio")
        if of_member and not found:
            self.note_no_member(tar_path, [named[0] for named in of_member.values()], unnamed)
        elif not self.skip_missing_manifest_entries:
            for name in unnamed:
                self.skipped_records.add(tar_path, name, "not in the manifest")

    def note_no_member(self, tar_path: str, wanted: Sequence[tuple[str, Record]], there: Sequence[str]) -> None:
        """Note once that none of the audio that a manifest names lies in its tar file.

        Args:
            tar_path: the tar file.
            wanted: names that were looked for, each with its record.
            there: names in the tar file.
        """
        looked_for = ", ".join(name for name, _ in wanted[:_NAMES_IN_REPORTS])
        holds = ", ".join(there[:_NAMES_IN_REPORTS]) or "nothing"
        first = wanted[0][1]
        self.skipped_records.add(
            str(self.name),
            f"{tar_path} holds {holds}, ...; the manifest names {looked_for}, ...",
            "no member of the tar file is in the manifest",
            record=(first.path, first.place),
        )

    def _group_by_member(self, tar_path: str, records: Sequence[Record]) -> dict[str, list[tuple[str, Record]]]:
        """By the normal name of each member the records whose audio it is, with its name as the record has it."""
        names = {}
        for record in records:
            try:
                names[record.number] = member_names(record)
            except InvalidRecord as cause:
                self.skipped_records.add(record.path, record.place, str(cause))
        there = self._names_to_choose_by(tar_path, records, names)
        of_member = defaultdict(list)
        for record in records:
            if of_record := names.get(record.number):
                name = next((name for name in of_record if normal_name(name) in there), of_record[-1])
                of_member[normal_name(name)].append((name, record))
        return dict(of_member)

    def _names_to_choose_by(
        self, tar_path: str, records: Sequence[Record], names: Mapping[int, Sequence[str]]
    ) -> set[str]:
        """What a tar file holds, if that decides which member is a record's: one of its own name, or the recording of
        which it is a segment.

        To look costs a reading of a remote tar file; there, records with an offset are taken for segments.
        """
        unclear = [record for record in records if len(names.get(record.number, ())) > 1]
        if not is_local(tar_path):
            unclear = [record for record in unclear if record.data.get("offset") is None]
        return names_in(tar_path) if unclear else set()

    def _members(
        self, tar_path: str, of_member: Mapping[str, Sequence], rng: random.Random, unnamed: list[str]
    ) -> Iterator[tuple[str, bytes]]:
        """The tar members that the manifest names, in the tar's order, or ``slice_length`` of them.

        The names of the others go to ``unnamed``.
        """
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
                    if normal_name(name) in of_member:
                        yield normal_name(name), tar.extractfile(member).read()
                        taken += 1
                    else:
                        unnamed.append(name)
        except (tarfile.ReadError, EOFError):
            self.skipped_records.add(tar_path, f"after {name}", "unreadable tar")

    def _cut(self, tar_path: str, name: str, audio: bytes, record: Record) -> Cut:
        offset, duration = times_of(record)
        header = read_header(io.BytesIO(audio))
        channels = list(range(header.num_channels))

        def part(seconds: float) -> AudioSource:
            return AudioSource("memory", channels, encoded_part(audio, header, offset, seconds))

        cut = cut_of_encoded(name, header, offset, duration, AudioSource("memory", channels, audio), part)
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
        cut = select_channel(cut, self.channel_selector)
        return with_checked_audio(cut) if record.data.get("alt_text") else cut  # NeMo reads its audio next


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
        skipped_records: ledger for the records that cannot be used.
        channel_selector: see :func:`~nemo_emmett.data.io.channels.select_channel`.
    """

    def __init__(self, path: str, skipped_records: SkippedRecords, channel_selector: int | str | None = None) -> None:
        self.path = path
        self.skipped_records = skipped_records
        self.channel_selector = channel_selector
        self.records = JsonRecords(path, skipped_records)

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
            cut = select_channel(cut, self.channel_selector)
        except InvalidRecord as cause:
            self.skipped_records.add(record.path, record.place, str(cause))
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
        raise InvalidRecord("not a lhotse cut") from error
    if not isinstance(cut, Cut):
        raise InvalidRecord("not a lhotse cut")
    return cut


def check_cut(cut: Cut) -> None:
    """Refuse what lhotse's constructors let pass, since they look at no type.

    Raises:
        Unusable: if there is no audio, or its place and length are no numbers.
    """
    if isinstance(cut, MixedCut):
        for track in cut.tracks:
            if not is_seconds(track.offset) or track.offset < 0:
                raise InvalidRecord("invalid start")
            check_cut(track.cut)
        return
    if not isinstance(cut.id, str):
        raise InvalidRecord("not a lhotse cut")
    if not is_seconds(cut.duration) or cut.duration <= 0:
        raise InvalidRecord("invalid duration")
    if isinstance(cut, PaddingCut):
        return
    if not cut.has_recording:
        raise InvalidRecord("no audio")
    if not is_seconds(cut.start) or cut.start < 0:
        raise InvalidRecord("invalid start")
    check_sampling_rate(cut.recording.sampling_rate)
    if any(source.type == "file" and not isinstance(source.source, str) for source in cut.recording.sources):
        raise InvalidRecord("not a lhotse cut")
