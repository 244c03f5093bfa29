"""NeMo manifests with audio in separate files, read so that one bad record costs one record.

The cuts are those of NeMo's own reader (``LazyNeMoIterator``): same ids, same recordings, same supervisions, same
custom fields. The differences: a record that cannot be used is skipped and its cause counted, and each cut names its
origin (custom fields ``manifest_origin`` and ``manifest_place``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace

from lhotse import SupervisionSegment
from lhotse.cut import Cut
from lhotse.dataset.dataloading import resolve_seed
from lhotse.lazy import LazyIteratorChain
from nemo.collections.common.data.lhotse.nemo_adapters import ExtraField, LazyNeMoIterator
from nemo.collections.common.parts.preprocessing.manifest import get_full_path
from nemo.utils.data_utils import is_datastore_path

from nemo_emmett.audio_file import AudioFault, fitted, open_recording
from nemo_emmett.data.io.audio import with_checked_audio
from nemo_emmett.data.io.channels import channel_of, is_chosen, select_channel
from nemo_emmett.data.io.files import expand_paths
from nemo_emmett.data.io.skipped_records import InvalidRecord, SkippedRecords
from nemo_emmett.data.readers.json_records import (
    JsonRecords,
    Record,
    check_alternatives,
    check_sampling_rate,
    check_times,
    sampling_rate_of,
)

_BEYOND_A_PART = 0.01
"""Seconds by which a recording is assumed to continue after its part: of one that ends with the part lhotse reads the
whole file, and refuses what is longer."""


class ExtraFields:
    """NeMo's ``extra_fields``: values from other files, attached to the records in turn."""

    def __init__(self, fields: Sequence[Mapping] | None, seed: int) -> None:
        self.fields = [ExtraField.from_dict({"seed": seed, **field}) for field in fields or ()]

    def attach_to(self, cut: Cut) -> Cut:
        """Give a cut its values."""
        for field in self.fields:
            field.attach_to(cut)
        return cut

    def skip(self) -> None:
        """Draw the values of a skipped record, so that the next values go to the records that they belong to."""
        self.attach_to(SimpleNamespace())


class NeMoManifest(LazyNeMoIterator):
    """A NeMo manifest whose audio is in separate files, as cuts.

    Args:
        path: the manifest; may be sharded (``manifest__OP_0..7_CL_.json``).
        skipped_records: receives the records that cannot be used.
        channel_selector: see :func:`~nemo_emmett.data.io.channels.select_channel`.
        kwargs: what NeMo's ``LazyNeMoIterator`` takes.
    """

    def __init__(
        self,
        path: str | Sequence[str],
        skipped_records: SkippedRecords,
        channel_selector: int | str | None = None,
        **kwargs,
    ) -> None:
        paths = expand_paths(path)
        super().__init__(paths, **kwargs)  # NeMo would expand brackets in a single path
        self.skipped_records = skipped_records
        self.channel_selector = channel_selector
        self.shards = [self._records_of(shard) for shard in paths]
        self.source = LazyIteratorChain(*self.shards, shuffle_iters=self.shuffle_shards, seed=self.shard_seed)

    def __iter__(self) -> Iterator[Cut]:
        extra_fields = ExtraFields(self.extra_fields, resolve_seed(self.shard_seed))
        for record in self.source:
            if record.is_left_out:
                continue
            if (cut := self.cut_of(record)) is not None:
                yield extra_fields.attach_to(cut)
            else:
                extra_fields.skip()

    def _records_of(self, path: str) -> JsonRecords:
        return JsonRecords(path, self.skipped_records)

    def cut_of(self, record: Record) -> Cut | None:
        """The cut of one record, without extra fields; None if it cannot be used, which is counted as skipped."""
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
        audio_path = data.pop("audio_filepath")
        if not self.metadata_only:  # it looks for the file
            audio_path = get_full_path(audio_path, record.path, force_cache=False)
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
            channel_of(cut, self.channel_selector)
            return cut
        cut = select_channel(cut, self.channel_selector)
        return with_checked_audio(cut) if data.get("alt_text") else cut  # NeMo reads the audio of such a record next

    def _cut_of_audio(self, path: str, offset: float | None, duration: float, sampling_rate: int | None) -> Cut:
        """The part of a file from ``offset``, which is opened where the manifest lacks its sampling rate."""
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
            if sampling_rate is not None:  # NeMo's ids distinguish these
                recording.id = cut.id = path
        else:
            # The length of the file is only known once it is read; a part is not the end of it.
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
