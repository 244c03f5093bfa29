"""lhotse cut manifests, read so that one bad record costs one record."""

from __future__ import annotations

from collections.abc import Iterator

from lhotse.cut import Cut, MixedCut, PaddingCut
from lhotse.serialization import deserialize_item
from nemo.collections.common.data.lhotse.cutset import resolve_relative_paths

from nemo_emmett.data.io.channels import select_channel
from nemo_emmett.data.io.skipped_records import InvalidRecord, SkippedRecords
from nemo_emmett.data.readers.examples import mark_origin
from nemo_emmett.data.readers.json_records import JsonRecords, Record, check_sampling_rate, is_seconds


class LhotseManifest:
    """A lhotse cut manifest in JSONL (``cuts.jsonl`` or ``cuts.jsonl.gz``).

    Args:
        path: the manifest; relative audio paths are relative to it.
        skipped_records: receives the records that cannot be used.
        channel_selector: see :func:`~nemo_emmett.data.io.channels.select_channel`.
        metadata_only: do not look for the audio files.
    """

    def __init__(
        self,
        path: str,
        skipped_records: SkippedRecords,
        channel_selector: int | str | None = None,
        metadata_only: bool = False,
    ) -> None:
        self.path = path
        self.metadata_only = metadata_only
        self.skipped_records = skipped_records
        self.channel_selector = channel_selector
        self.shards = [JsonRecords(path, skipped_records)]

    def __len__(self) -> int:
        return len(self.shards[0])

    def __iter__(self) -> Iterator[Cut]:
        for record in self.shards[0]:
            if (cut := self.cut_of(record)) is not None:
                yield cut

    def cut_of(self, record: Record) -> Cut | None:
        """The cut of one record; None if it cannot be used, which is counted as skipped."""
        try:
            cut = lhotse_cut(record)
            check_cut(cut)
            cut = select_channel(cut, self.channel_selector)
        except InvalidRecord as cause:
            self.skipped_records.add(record.path, record.place, str(cause))
            return None
        if not self.metadata_only:
            cut = resolve_relative_paths(cut, manifest_path=self.path)
        mark_origin(cut, record.path, record.place)
        return cut


def lhotse_cut(record: Record) -> Cut:
    """The cut that a record describes.

    Raises:
        InvalidRecord: if it describes something else.
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
        InvalidRecord: if there is no audio, or its place and length are no numbers.
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
