"""The records of a source by number, so that a loader can take them in any order and continue anywhere.

:func:`open_records` opens a source by the same readers that stream it: a line yields the same examples, and is skipped
for the same causes, either way. Audio in tar files is read when it is decoded, in the process that needs it; only its
header is read before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import repeat

from lhotse.cut import Cut

from nemo_emmett.data.config.sources import SPEECH_TSV, Source
from nemo_emmett.data.io.files import expand_paths, is_local
from nemo_emmett.data.io.line_index import is_compressed, open_numbered_lines
from nemo_emmett.data.io.skipped_records import SkippedRecords
from nemo_emmett.data.readers.base import Records
from nemo_emmett.data.readers.examples import ExampleKind
from nemo_emmett.data.readers.lhotse_manifest import LhotseManifest
from nemo_emmett.data.readers.nemo_manifest import NeMoManifest
from nemo_emmett.data.readers.nemo_tarred import TarredRecords
from nemo_emmett.data.readers.parallel_text import TextRecords, open_parallel_text
from nemo_emmett.data.readers.registry import (
    is_lhotse_jsonl,
    is_nemo,
    manifest_and_weight,
    nemo_reader,
    reads_text_ourselves,
)
from nemo_emmett.data.readers.shar import SharRecords, shar_shards
from nemo_emmett.data.readers.speech_tsv import SpeechTsv


class ManifestRecords(Records):
    """The lines of speech manifests (NeMo's, lhotse's, TSV) by number, with audio in separate files.

    Args:
        keeps_alternatives: cuts have their ``alt_text`` although their audio is not looked at.
    """

    def __init__(
        self,
        name: str,
        manifests: Sequence[NeMoManifest | LhotseManifest],
        index_dir: str | None,
        tags: Mapping | None,
        keeps_alternatives: bool = False,
    ) -> None:
        self.keeps_alternatives = keeps_alternatives
        self.opens_recordings = any(isinstance(manifest, SpeechTsv) for manifest in manifests)
        self.shards = [(records, manifest) for manifest in manifests for records in manifest.shards]
        files = [[records.path] for records, _ in self.shards]
        super().__init__(name, files, partial(open_numbered_lines, index_dir=index_dir), tags)

    def _examples(self, shard: int, number: int, lines: Sequence[bytes]) -> Iterator[Cut]:
        records, manifest = self.shards[shard]
        record = records.parse(number, *lines)
        if record is None or (isinstance(manifest, NeMoManifest) and record.is_left_out):
            return
        if (cut := manifest.cut_of(record)) is not None:
            if self.keeps_alternatives and "alt_text" in record.data:
                cut.custom["alt_text"] = record.data["alt_text"]
            yield cut


def open_records(
    source: Source,
    skipped_records: SkippedRecords,
    kind: ExampleKind,
    index_dir: str | None = None,
    metadata_only: bool = False,
) -> Records | None:
    """Open a source for reading by number.

    Args:
        source: where the data is.
        skipped_records: receives the records that cannot be used.
        kind: what the dataset takes; text for a dataset that is not ours is read by NeMo.
        index_dir: folder for indexes that cannot be written next to the data.
        metadata_only: open manifests and text only. The examples are those of training, but for what only their audio
            can show; they cannot be loaded.

    Returns:
        Its records; None if it can only be streamed: data types that NeMo reads, ``extra_fields``; and, unless
        ``metadata_only``, remote or compressed tar files, ``slice_length``, lists of manifests with weights.

    Raises:
        ConfigError: if the source's keys do not fit together.
    """
    if source.extra_fields:
        return None
    how = {"index_dir": index_dir, "tags": source.tags}
    if is_nemo(source):
        return _nemo_records(source, skipped_records, metadata_only, **how)
    if source.type == SPEECH_TSV:
        return ManifestRecords(source.name, [SpeechTsv(source, skipped_records, metadata_only)], **how)
    if is_lhotse_jsonl(source):
        manifest = LhotseManifest(source.cuts_path, skipped_records, source.channel_selector, metadata_only)
        return ManifestRecords(source.name, [manifest], **how)
    if source.type in ("lhotse", "lhotse_shar") and source.shar_path is not None:
        return _shar_records(source, skipped_records, metadata_only, **how)
    if reads_text_ourselves(source, kind):
        return TextRecords(source.name, open_parallel_text(source, skipped_records), **how)
    return None


def _nemo_records(source: Source, skipped_records: SkippedRecords, metadata_only: bool, **how) -> Records | None:
    is_tarred = source.tarred_audio_filepaths is not None
    if is_tarred and not metadata_only and (source.metadata_only or source.slice_length is not None):
        return None
    if (entries := _paths_of(source.manifest_filepath, with_weights=metadata_only)) is None:
        return None
    tars = source.tarred_audio_filepaths if is_tarred else repeat(None)
    if isinstance(tars, str):
        tars = [tars]
    tars = [t if t is None or isinstance(t, str) else t[0] for t, _ in zip(tars, entries, strict=False)]
    as_read = source.with_keys(metadata_only=metadata_only or bool(source.metadata_only))
    readers = [nemo_reader(as_read, path, tar, skipped_records) for path, tar in zip(entries, tars, strict=True)]
    if not is_tarred:
        return ManifestRecords(source.name, readers, **how, keeps_alternatives=metadata_only)
    if not metadata_only and not _can_be_entered([path for reader in readers for path in reader.tars.values()]):
        return None
    return TarredRecords(source.name, readers, **how)


def _paths_of(entries: str | Sequence, with_weights: bool) -> list[str] | None:
    """The paths of a list that NeMo mixes by their sizes, as if they were shards; None if they have weights, unless
    these do not matter."""
    if isinstance(entries, str):
        return [entries]
    paths = [manifest_and_weight(entry) for entry in entries]
    if len(paths) > 1 and not with_weights and any(weight is not None for _, weight in paths):
        return None
    return [path for path, _ in paths]


def _can_be_entered(tars: Sequence[str]) -> bool:
    """Whether members can be read from the middle of these tar files."""
    return all(is_local(path) and not is_compressed(path) for path in tars)


def _shar_records(source: Source, skipped_records: SkippedRecords, metadata_only: bool, **how) -> Records | None:
    if not metadata_only and (source.metadata_only or source.slice_length is not None):
        return None
    shar_path = source.shar_path
    if isinstance(shar_path, Mapping):
        used = {field: paths for field, paths in shar_path.items() if field == "cuts" or not metadata_only}
        fields = {field: expand_paths(paths) for field, paths in used.items()}
        shards = shar_shards(source.name, fields=fields)
    elif (folders := _paths_of(shar_path, with_weights=metadata_only)) is None or not all(map(is_local, folders)):
        return None
    else:
        shards = [shard for folder in folders for shard in shar_shards(folder, in_dir=folder)]
    if metadata_only:
        shards = [{"cuts": shard["cuts"]} for shard in shards]
    data = [str(path) for shard in shards for field, path in shard.items() if field != "cuts"]
    if not all(path.endswith(".tar") for path in data) or not _can_be_entered(data):
        return None
    return SharRecords(source.name, shards, skipped_records, channel_selector=source.channel_selector, **how)
