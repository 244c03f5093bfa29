"""NeMo manifests with audio in tar files, streamed or read by number, so that one bad record costs one record.

The cuts are those of NeMo's own reader (``LazyNeMoTarredIterator``), as :mod:`~nemo_emmett.data.readers.nemo_manifest`
has it.
"""

from __future__ import annotations

import io
import random
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from copy import copy
from functools import partial
from itertools import islice

from lhotse import AudioSource, Recording, SupervisionSegment
from lhotse.cut import Cut
from lhotse.dataset.dataloading import resolve_seed
from lhotse.utils import compute_num_samples
from nemo.collections.common.data.lhotse.nemo_adapters import validate_extra_fields

from nemo_emmett.audio_file import AudioFault, read_header
from nemo_emmett.data.io.audio import with_checked_audio
from nemo_emmett.data.io.channels import channel_of, select_channel
from nemo_emmett.data.io.files import count_lines, expand_paths, is_local, open_bytes
from nemo_emmett.data.io.index import Index
from nemo_emmett.data.io.line_index import open_numbered_lines
from nemo_emmett.data.io.skipped_records import InvalidRecord, SkippedRecords
from nemo_emmett.data.io.tar_index import TarIndex, normal_name
from nemo_emmett.data.readers.base import Records
from nemo_emmett.data.readers.json_records import JsonRecords, Record, times_of
from nemo_emmett.data.readers.nemo_manifest import ExtraFields
from nemo_emmett.data.readers.tar_audio import (
    cut_in_tar,
    cut_of_encoded,
    encoded_part,
    member_names,
    names_in,
    note_damage,
)
from nemo_emmett.errors import ConfigError

_RECORDS_TO_LOOK_FOR = 1000
"""If none of so many first records of a manifest has its audio in the tar file, this is reported."""

_MANIFEST_SHARD = re.compile(r"manifest[^/]*_(\d+)[^/]*\.json")
_TAR_SHARD = re.compile(r"audio[^/]*_(\d+)[^/]*\.tar")

_ANY_RATE = 16000
"""Hz. Sampling rate of a recording whose audio is not looked at."""

_NAMES_IN_REPORTS = 3
"""Number of names that the report of a tar file without any member of the manifest lists."""


class NeMoTarredManifest:
    """A NeMo manifest whose audio is in tar files, as cuts with their audio in memory.

    Args:
        manifest_path: one manifest for all shards, or a sharded one (``manifest__OP_0..7_CL_.json``).
        tar_paths: the tar files (``audio__OP_0..7_CL_.tar``).
        skipped_records: receives the records that cannot be used.
        shuffle_shards: take the shards in another order at each pass.
        shard_seed: of that order: an integer, ``trng`` or ``randomized``.
        text_field: key of the transcript.
        lang_field: key of its language.
        skip_missing_manifest_entries: the manifest names a subset of the tar files' members, on purpose.
        extra_fields: as in NeMo.
        slice_length: read so many members of each shard only, from a random one on.
        channel_selector: see :func:`~nemo_emmett.data.io.channels.select_channel`.
        metadata_only: make cuts of what the manifest says, and do not open the tar files.
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
        metadata_only: bool = False,
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
        self.metadata_only = metadata_only
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
        shards = [copy(self) for _ in numbers]
        for shard, (number, path) in zip(shards, numbers.items(), strict=True):
            shard.name, shard.manifests, shard.tars = path, [path], {number: self.tars[number]}
        return shards

    def __iter__(self) -> Iterator[Cut]:
        seed = resolve_seed(self.shard_seed) + self._passes
        rng = random.Random(seed)
        extra_fields = ExtraFields(self.extra_fields, seed)
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
        """Number of the tar file that holds a record's audio.

        Raises:
            InvalidRecord: if the record names none that there is.
        """
        if len(self.manifests) > 1:
            return int(_MANIFEST_SHARD.search(record.path)[1])
        number = record.data.get("shard_id", next(iter(self.tars)) if len(self.tars) == 1 else None)
        if not isinstance(number, (int, float)) or number not in self.tars:
            raise InvalidRecord("no such shard_id")
        return int(number)

    def _cuts_of_shard(
        self, tar_path: str, records: Sequence[Record], rng: random.Random, extra_fields: ExtraFields
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
        """Report once that a tar file has none of the audio that its manifest names.

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
        """The records of each member, by its normal name, with its name as the record has it."""
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
        """The names in a tar file, if they decide which member is a record's: one of its own name, or the recording of
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
        return self.with_labels(cut, record, tar_path)

    def cut_without_audio(self, record: Record) -> Cut:
        """The cut of a record as its manifest describes it. Its recording has a made-up sampling rate and no audio.

        Raises:
            InvalidRecord: if the record cannot be used, whatever its audio is.
        """
        tar_path, name = self.tars[self.shard_of(record)], member_names(record)[0]
        _, duration = times_of(record)
        num_samples = compute_num_samples(duration, _ANY_RATE)
        recording = Recording(name, [AudioSource("memory", [0], b"")], _ANY_RATE, num_samples, duration)
        cut = self._labelled(recording.to_cut(), record, tar_path)
        channel_of(cut, self.channel_selector)
        return cut

    def with_labels(self, cut: Cut, record: Record, tar_path: str) -> Cut:
        """The cut of a record's audio with the text and the fields of its manifest."""
        cut = select_channel(self._labelled(cut, record, tar_path), self.channel_selector)
        return with_checked_audio(cut) if record.data.get("alt_text") else cut  # NeMo reads its audio next

    def _labelled(self, cut: Cut, record: Record, tar_path: str) -> Cut:
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


def _by_shard_number(paths: Sequence[str], pattern: re.Pattern, key: str) -> dict[int, str]:
    numbered = {}
    for path in paths:
        if (match := pattern.search(path)) is None:
            raise ConfigError(f"{key}: '{path}' has no shard number; name it as in audio_12.tar, manifest_12.json.")
        numbered[int(match[1])] = path
    return numbered


class TarredRecords(Records):
    """The lines of NeMo manifests by number, with audio in local, uncompressed tar files.

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
        files = [[records.path] for records, _ in self.shards]
        super().__init__(name, files, partial(open_numbered_lines, index_dir=index_dir), tags)
        tars = [path for manifest in manifests if not manifest.metadata_only for path in manifest.tars.values()]
        self.tars = {path: TarIndex(path, index_dir) for path in tars}
        self._with_members: set[str] = set()  # tar files that hold audio of the manifest, or were reported

    @property
    def audio_indexes(self) -> list[Index]:
        """See :attr:`Records.audio_indexes`."""
        return list(self.tars.values())

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
        if manifest.metadata_only:
            return manifest.cut_without_audio(record)
        tar = self.tars[manifest.tars[manifest.shard_of(record)]]
        for name in member_names(record):
            if (member := tar.find(name)) is not None:
                self._with_members.add(tar.path)
                return manifest.with_labels(cut_in_tar(name, member, *times_of(record)), record, tar.path)
        note_damage(tar, manifest.skipped_records, (record.path, record.place))
        self._look_for_any_member(tar, manifest, record)
        raise AudioFault("missing audio")

    def _look_for_any_member(self, tar: TarIndex, manifest: NeMoTarredManifest, record: Record) -> None:
        """After a record whose audio is missing, report if that of the first other records is missing as well."""
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
