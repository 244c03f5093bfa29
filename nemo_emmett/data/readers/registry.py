"""Our readers as data types of NeMo's ``input_cfg``, so that NeMo can sample from them.

A loader of ours hands NeMo an ``input_cfg`` in which every source has the type ``emmett_source``. So NeMo keeps what it
is good at (groups, weights, mixing, filters, samplers), while every record is read, judged and given its languages
here, before it is tokenised.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat

from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.cut.set import is_cut
from nemo.collections.asr.data import audio_to_text
from nemo.collections.common.data.lhotse.cutset import (
    attach_tags,
    data_type_parser,
    get_parser_fn,
    mux,
)
from nemo.collections.common.data.lhotse.text_adapters import Formattable
from omegaconf import DictConfig

from nemo_emmett.data.config.nemo_config import unwrap, wrap
from nemo_emmett.data.config.section import config_of, plain
from nemo_emmett.data.config.sources import CLASSIC_KEYS, FEED_TYPE, SOURCE_TYPE, SPEECH_TSV, Source, parse_source
from nemo_emmett.data.io import commands
from nemo_emmett.data.io.channels import is_chosen, select_channel
from nemo_emmett.data.io.files import expand_paths
from nemo_emmett.data.io.skipped_records import SkippedRecords
from nemo_emmett.data.readers.examples import ExampleKind, Examples, SourceDefaults, mark_origin, origin_of
from nemo_emmett.data.readers.lhotse_manifest import LhotseManifest
from nemo_emmett.data.readers.nemo_manifest import NeMoManifest
from nemo_emmett.data.readers.nemo_tarred import NeMoTarredManifest
from nemo_emmett.data.readers.parallel_text import open_parallel_text
from nemo_emmett.data.readers.speech_tsv import SpeechTsv
from nemo_emmett.data.sampling.tolerance import TolerantMapper


@dataclass(frozen=True)
class ReaderContext:
    """How sources are read while a loader is being built.

    Args:
        skipped_records: counts the records that cannot be used.
        kind: what the loader's dataset takes.
        endless: start sources over when they end, since they are fused with others that do.
        forbidden: what no text may hold, where it is prompted (:func:`~nemo_emmett.prompts.families.forbidden_text`).
    """

    skipped_records: SkippedRecords = field(default_factory=partial(SkippedRecords, announce=True))
    kind: ExampleKind = ExampleKind.AS_READ
    endless: bool = False
    forbidden: re.Pattern | None = None


_reading: ContextVar[ReaderContext | None] = ContextVar("nemo_emmett_reading", default=None)


@contextmanager
def reader_context(how: ReaderContext) -> Iterator[ReaderContext]:
    """Read the sources that NeMo parses inside this context in this way."""
    token = _reading.set(how)
    try:
        yield how
    finally:
        _reading.reset(token)


_fed: ContextVar[Iterable | None] = ContextVar("nemo_emmett_fed", default=None)


@contextmanager
def injected_examples(examples: Iterable) -> Iterator[list[dict]]:
    """An ``input_cfg`` that NeMo, inside this context, takes to be these examples."""
    token = _fed.set(examples)
    try:
        yield [{"type": FEED_TYPE}]
    finally:
        _fed.reset(token)


def read_feed(_: DictConfig) -> tuple[CutSet, bool]:
    """NeMo parser of the type ``emmett_feed``."""
    return CutSet(_fed.get()), True


def register_data_types() -> None:
    """Make our data types known to NeMo: ``parallel_text`` and ``speech_tsv`` for everyone, the others for our loaders.

    Calling it again changes nothing.
    """
    data_type_parser("parallel_text")(read_parallel_text)
    data_type_parser(SPEECH_TSV)(read_speech_tsv)
    data_type_parser(SOURCE_TYPE)(read_source)
    data_type_parser(FEED_TYPE)(read_feed)


def read_parallel_text(config: DictConfig) -> tuple[CutSet, bool]:
    """NeMo parser of the type ``parallel_text``: examples, and that they are read in the workers (True)."""
    how = _reading.get() or ReaderContext()
    source = parse_source(plain(config), "input_cfg", allow_commands=True)
    cuts = CutSet(open_parallel_text(source, how.skipped_records))
    return _repeated(cuts, source), True


def read_speech_tsv(config: DictConfig) -> tuple[CutSet, bool]:
    """NeMo parser of the type ``speech_tsv``: cuts, and that they are not read in the workers (False)."""
    how = _reading.get() or ReaderContext()
    source = parse_source(plain(config), "input_cfg", allow_commands=True)
    return CutSet(SpeechTsv(source, how.skipped_records, bool(source.metadata_only))), False


def read_source(config: DictConfig) -> tuple[CutSet, bool]:
    """NeMo parser of the type ``emmett_source``: examples, and whether they are read in the workers."""
    how = _reading.get() or ReaderContext()
    source = unwrap(config)
    kind = ExampleKind(config.get("examples", how.kind))
    cuts, is_tarred = open_source(source, how.skipped_records, kind)
    if kind is not ExampleKind.AS_READ:
        cuts = CutSet(Examples(cuts, kind, defaults_of(source), how.skipped_records, how.forbidden))
    if how.endless:
        cuts = cuts.repeat(preserve_id=True)
    return cuts, is_tarred


def defaults_of(source: Source) -> SourceDefaults:
    """What a source says for its records."""
    tags = source.tags or {}
    return SourceDefaults(
        name=source.name,
        audio_locator_tag=source.audio_locator_tag,
        token_equivalent_duration=source.token_equivalent_duration,
        context=None if source.is_transcription else tags.get("context"),
        system_prompt=tags.get("system_prompt"),
        source_lang=source.source_lang,
        target_lang=source.target_lang,
        transcripts=bool(source.transcripts),
        is_transcription=bool(source.is_transcription),
    )


def open_source(source: Source, skipped_records: SkippedRecords, kind: ExampleKind) -> tuple[CutSet, bool]:
    """Open one source with our reader where we have one, with NeMo's own otherwise.

    Args:
        source: where the data is.
        skipped_records: counts the records that cannot be used.
        kind: what the dataset takes; text for a dataset that is not ours is read by NeMo.

    Returns:
        What it holds, with the source's tags attached, and whether it is read in the workers.
    """
    if is_nemo(source):
        cuts, is_tarred = _open_nemo(source, skipped_records)
    elif is_lhotse_jsonl(source):
        manifest = LhotseManifest(source.cuts_path, skipped_records, source.channel_selector)
        cuts, is_tarred = CutSet(manifest), False
    elif source.type == SPEECH_TSV:
        cuts, is_tarred = CutSet(SpeechTsv(source, skipped_records, bool(source.metadata_only))), False
    elif reads_text_ourselves(source, kind):
        cuts, is_tarred = _repeated(CutSet(open_parallel_text(source, skipped_records)), source), True
    else:
        inside = _with_our_reader_inside(source)
        with nullcontext() if commands.are_allowed() else commands.without_commands(), _paths_expanded_by_us():
            cuts, is_tarred = get_parser_fn(source.type)(config_of(inside))
        if not commands.are_allowed():
            cuts = CutSet(commands.WithoutCommands(cuts))
        counted_by = skipped_records if inside == source.keys else None  # otherwise the reader inside counts
        cuts = cuts.map(partial(_with_origin, source=source.name, skipped_records=counted_by), apply_fn=None)
        if inside == source.keys and is_chosen(source.channel_selector):
            select = partial(select_channel, selector=source.channel_selector)
            cuts = CutSet(TolerantMapper(cuts, select, is_cut, skipped_records=skipped_records))
    if source.tags:
        cuts = cuts.map(partial(attach_tags, tags=source.tags), apply_fn=None)
    return cuts, is_tarred


def is_nemo(source: Source) -> bool:
    """Whether we read a source as NeMo manifests, plain or tarred."""
    # NeMo's batched reads from AIStore bypass the tar files; only its own reader can.
    from_aistore = os.environ.get("USE_AIS_GET_BATCH", "False").lower() == "true"
    return source.type in ("nemo", "nemo_tarred") and not (from_aistore and source.tarred_audio_filepaths)


def is_lhotse_jsonl(source: Source) -> bool:
    """Whether a source is a lhotse manifest of lines."""
    return (
        source.type in ("lhotse", "lhotse_shar")
        and source.shar_path is None
        and (source.cuts_path or "").removesuffix(".gz").endswith(".jsonl")
    )


def reads_text_ourselves(source: Source, kind: ExampleKind) -> bool:
    """Whether we read a source as parallel text: a ``txt_pair`` not for datasets of others, nor with questions."""
    is_ours = kind is not ExampleKind.AS_READ and source.questions_path is None
    return source.type == "parallel_text" or (source.type == "txt_pair" and is_ours)


def _with_our_reader_inside(source: Source) -> dict:
    """NeMo's conversion types (``lhotse_as_conversation``, ...) read a manifest: let it be read by us, tolerantly."""
    keys = dict(source.keys)
    if not source.type.endswith("_as_conversation") or "input_cfg" in keys:
        return keys
    manifest = {key: keys.pop(key) for key in (*CLASSIC_KEYS, "extra_fields", "channel_selector") if key in keys}
    inner = {"type": "lhotse" if "cuts_path" in manifest or "shar_path" in manifest else "nemo", **manifest}
    return {**keys, "input_cfg": [wrap(inner, source.place, examples=ExampleKind.AS_READ.value)]}


@contextmanager
def _paths_expanded_by_us() -> Iterator[None]:
    """NeMo's readers, built inside this context, find their files by our rule: NeMo takes any bracket for a pattern."""

    def expand(sharded_filepaths: str | list[str], **_) -> list[str]:
        return expand_paths(sharded_filepaths) if isinstance(sharded_filepaths, str) else sharded_filepaths

    nemos, audio_to_text.expand_sharded_filepaths = audio_to_text.expand_sharded_filepaths, expand
    try:
        yield
    finally:
        audio_to_text.expand_sharded_filepaths = nemos


def _with_origin(example: Cut | Formattable, source: str, skipped_records: SkippedRecords | None) -> Cut | Formattable:
    """Count an example that NeMo has read, and mark its origin unless it has one."""
    if skipped_records is not None:
        skipped_records.read(source)
    origin, place = origin_of(example)
    if origin is None:
        mark_origin(example, source, place)
    return example


def _repeated(cuts: CutSet, source: Source) -> CutSet:
    """As NeMo has it: text and tarred speech start over when they end, unless they are to be finite."""
    return cuts if source.force_finite else cuts.repeat(preserve_id=True)


def _open_nemo(source: Source, skipped_records: SkippedRecords) -> tuple[CutSet, bool]:
    """NeMo manifests, plain or tarred, one or many, as NeMo's ``nemo`` and ``nemo_tarred`` types combine them."""
    is_tarred = source.tarred_audio_filepaths is not None
    from_tar = is_tarred and not source.metadata_only
    manifests = source.manifest_filepath
    if isinstance(manifests, str):
        tars = source.tarred_audio_filepaths if from_tar else None
        cuts = CutSet(nemo_reader(source, manifests, tars, skipped_records))
        return (_repeated(cuts, source) if from_tar else cuts), is_tarred

    cutsets, weights = [], []
    for entry, tars in zip(manifests, source.tarred_audio_filepaths if is_tarred else repeat(None), strict=False):
        path, weight = manifest_and_weight(entry)
        if isinstance(tars, Sequence) and not isinstance(tars, str):
            (tars,) = tars
        reader = nemo_reader(source, path, tars if from_tar else None, skipped_records)
        weight = len(reader) if weight is None else weight
        split = source.max_open_streams is not None and from_tar
        for part in reader.to_shards() if split else [reader]:
            cutsets.append(CutSet(part))
            weights.append(weight)
    cuts = mux(
        *cutsets,
        weights=weights,
        max_open_streams=source.max_open_streams,
        seed="trng" if source.shard_seed is None else source.shard_seed,
        force_finite=bool(source.force_finite or source.metadata_only),
    )
    return cuts, is_tarred


def manifest_and_weight(entry: str | Sequence) -> tuple[str, float | None]:
    """NeMo's forms of a list of manifests: ``path``, ``[path]`` or ``[path, weight]``."""
    if isinstance(entry, str):
        return entry, None
    path, *weight = entry
    return path, weight[0] if weight else None


def nemo_reader(
    source: Source, manifest: str, tars: str | None, skipped_records: SkippedRecords
) -> NeMoManifest | NeMoTarredManifest:
    """The reader of one NeMo manifest, with tar files where they are given."""
    keys = ("text_field", "lang_field", "shard_seed", "extra_fields", "channel_selector")
    settings = {key: value for key in keys if (value := getattr(source, key)) is not None}
    settings |= {"shuffle_shards": bool(source.shuffle), "metadata_only": bool(source.metadata_only)}
    if tars is None:
        return NeMoManifest(manifest, skipped_records, **settings)
    return NeMoTarredManifest(
        manifest,
        tars,
        skipped_records,
        skip_missing_manifest_entries=bool(source.skip_missing_manifest_entries),
        slice_length=source.slice_length,
        **settings,
    )
