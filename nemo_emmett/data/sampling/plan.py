"""From a dataset to what its samplers are made of."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from lhotse.dataset.dataloading import resolve_seed
from nemo.collections.common.prompts import PromptFormatter
from nemo.utils import logging, logging_mode
from omegaconf import DictConfig

from nemo_emmett.data.blending.weights import blend_of
from nemo_emmett.data.bucketing.length_stats import auto_bins
from nemo_emmett.data.checks import nothing_is_left
from nemo_emmett.data.config.dataset_config import DatasetConfig, GroupConfig
from nemo_emmett.data.config.nemo_config import sampler_config, with_keys_of_dataset
from nemo_emmett.data.config.sources import SPEECH_TSV, Source
from nemo_emmett.data.io.index import build_indexes as build
from nemo_emmett.data.io.skipped_records import SkippedRecords
from nemo_emmett.data.lengths.building import open_length_indexes
from nemo_emmett.data.lengths.index import LengthIndex
from nemo_emmett.data.lengths.notes import Recorder
from nemo_emmett.data.lengths.packing import Packing
from nemo_emmett.data.lengths.selection import Selection, filter_of_text
from nemo_emmett.data.readers.base import Records, build_indexes
from nemo_emmett.data.readers.examples import ExampleKind
from nemo_emmett.data.readers.random_access import open_records
from nemo_emmett.data.readers.registry import ReaderContext, defaults_of, reader_context
from nemo_emmett.data.sampling.example_reader import ExampleReader, SourceReader
from nemo_emmett.data.sampling.global_batches import GroupOrder, ends_with
from nemo_emmett.data.sampling.nemo_sampler import tarred_noise_reason
from nemo_emmett.data.sampling.proportional_mixing import ProportionalMixer
from nemo_emmett.data.sampling.sampler import GroupPlan, SamplingPlan
from nemo_emmett.data.sampling.schedule import ScheduleOrder
from nemo_emmett.data.sampling.shuffle import SHUFFLE_BLOCK_SIZE
from nemo_emmett.data.sampling.source_iterator import ChunkReader, WorkerInfo, chunks_to_open, make_reader
from nemo_emmett.data.sampling.source_order import SourceOrder
from nemo_emmett.data.sampling.transforms import TransformPipeline
from nemo_emmett.errors import ConfigError
from nemo_emmett.modules.packing import ENCODER_PADDING
from nemo_emmett.prompts.families import forbidden_text
from nemo_emmett.prompts.seq2seq import Seq2SeqPrompt


@dataclass
class _OpenGroup:
    """A group with its sources opened.

    Args:
        group: of the dataset.
        structured: NeMo's config of its sampler.
        sources: with the keys that they inherit.
        records: of each source, by number; None: it can only be streamed.
        notes: what the records of each source report to.
        seeds: of each source.
    """

    group: GroupConfig
    structured: DictConfig
    sources: list[Source]
    records: list[Records | None]
    notes: list[SkippedRecords]
    seeds: list[list[int]]

    @property
    def group_size(self) -> int:
        """What is shuffled together, at least."""
        return max(SHUFFLE_BLOCK_SIZE, self.structured.shuffle_buffer_size or 0)


@dataclass
class _Opened:
    """A dataset with its groups opened."""

    groups: list[_OpenGroup]
    seed: int
    finite: bool

    @property
    def records(self) -> list[Records]:
        """Of all sources that have some."""
        return [records for group in self.groups for records in group.records if records is not None]


def _open(dataset: DatasetConfig, kind: ExampleKind, notes: Callable[[], SkippedRecords]) -> _Opened:
    """Open the sources of a dataset, each with what it reports to."""
    if (reason := tarred_noise_reason(dataset)) is not None:
        raise ConfigError(
            f"{dataset.place}.noise_path: {reason}; give a manifest of audio files, or set sampling: nemo."
        )
    seed = _agreed_seed(dataset.seed, dataset.shard_seed)
    opened = []
    for group in dataset.groups:
        structured = sampler_config(group, shard_seed=seed, seed=seed)
        sources = [with_keys_of_dataset(source, structured) for source in group.sources]
        index_dir = group.index_dir or dataset.index_dir
        reports_to = [notes() for _ in sources]
        records = [open_records(source, to, kind, index_dir) for source, to in zip(sources, reports_to, strict=True)]
        seeds = [[seed, number] for number in _numbers_of_sources(group.name, sources)]
        opened.append(_OpenGroup(group, structured, sources, records, reports_to, seeds))
    finite = dataset.force_finite or (not dataset.groups[0].name and _nemo_ends(dataset.sources))
    return _Opened(opened, seed, finite)


_READ_BY_US = ("nemo", "nemo_tarred", "lhotse", "lhotse_shar", SPEECH_TSV, "parallel_text", "txt_pair")
"""Types of sources whose records we read; all others are read by NeMo."""

_BLOCKS_AT_A_TIME = 64
"""Of a length index, while an example is looked for that is selected."""


def plan_sampling(
    dataset: DatasetConfig, tokenizer: Any, kind: ExampleKind, skipped_records: SkippedRecords, world_size: int
) -> SamplingPlan:
    """Open the sources of a dataset, weigh them, and build NeMo's chains, for samplers that read records in a stream.

    Args:
        dataset: to sample from.
        tokenizer: NeMo tokenizer.
        kind: what the dataset takes.
        skipped_records: for records that cannot be used.
        world_size: number of ranks.

    Raises:
        ConfigError: if a key has a value that cannot work.
        DataError: if a source holds nothing.
    """
    for group in dataset.groups:
        for key in ("batch_ratio", "packing"):
            if getattr(group, key):
                raise ConfigError(
                    f"{group.place}.{key}: needs data that can be read at any place, and here all data is streamed; "
                    "leave the key out, or give sources with a length index."
                )
    opened = _open(dataset, kind, lambda: skipped_records)
    build_indexes(opened.records)
    plans = []
    for group in opened.groups:
        shares = _shares(dataset, group, tokenizer, kind)
        readers = _readers(group, tokenizer, kind, skipped_records, opened.finite)
        chain = _chain(group, tokenizer, kind, skipped_records, _Sample(lambda r=readers: r, shares, group))
        num_open = [chunks_to_open(reader, chain, group.structured.shuffle) for reader in readers]
        skipped_records.drain()  # what was read here is read again by the workers
        names = [source.name for source in group.sources]
        more = {"every_n_steps": group.group.every_n_steps, "ends_with": ends_with(group.sources)}
        plans.append(GroupPlan(group.group.name, readers, names, group.seeds, num_open, shares, chain, **more))
    return SamplingPlan(
        groups=plans,
        fusion=_fusion(dataset),
        weights=_weights_of_groups(dataset),
        world_size=world_size,
        shuffle=dataset.shuffle,
        finite=opened.finite,
        seed=opened.seed,
    )


@dataclass
class SchedulePlan:
    """What a schedule is computed from, and what reads its examples.

    Args:
        order: of the examples.
        readers: of each group.
        indexes: of all sources.
    """

    order: ScheduleOrder
    readers: list[ExampleReader]
    indexes: list[LengthIndex]


def plan_schedule(
    dataset: DatasetConfig,
    tokenizer: Any,
    kind: ExampleKind,
    skipped_records: SkippedRecords,
    world_size: int,
) -> SchedulePlan | None:
    """Open the sources of a dataset and their length indexes, weigh them, and build NeMo's chains, for a schedule.

    Args:
        dataset: to sample from.
        tokenizer: NeMo tokenizer.
        kind: what the dataset takes.
        skipped_records: for records that cannot be used.
        world_size: number of ranks.

    Returns:
        The plan; None if a source can only be streamed, which is logged.

    Raises:
        ConfigError: if a key has a value that cannot work.
        DataError: if a source holds nothing.
    """
    opened = _open(dataset, kind, Recorder)
    by_place = {}
    if (reason := _reason_to_stream(opened, kind)) is None:
        by_place = open_length_indexes(dataset.groups, tokenizer, kind, dataset.index_dir, world_size)
        reason = next((f"{place} has no length index" for place, index in by_place.items() if index is None), None)
    if reason is not None:
        logging.info(
            f"{dataset.place}: {reason}, so all data is streamed: each rank reads the records of all ranks, and "
            "batches depend on the numbers of ranks and workers.",
            mode=logging_mode.ONCE,
        )
        return None
    # Those of lines are there, since the length index was built by them; those of tar files may not be.
    build([index for records in opened.records for index in records.audio_indexes if not index.sidecar.exists])
    orders, readers, indexes = [], [], []
    for group in opened.groups:
        shares = _shares(dataset, group, tokenizer, kind)
        of_group = [by_place[source.place] for source in group.sources]
        sample = _Sample(lambda g=group: _readers(g, tokenizer, kind, skipped_records, opened.finite), shares, group)
        chain = _chain(group, tokenizer, kind, skipped_records, sample, by_place)
        skipped_records.drain()
        packing = _packing(group.group, kind)
        options = {"has_tokenizer": tokenizer is not None, "packing": packing}
        selection = Selection(group.structured, chain.constraint, chain.duration_bins, **options)
        for source, index in zip(group.sources, of_group, strict=True):
            if not _has_any(index, selection):
                index.report(skipped := SkippedRecords())
                raise nothing_is_left(source, group.group, skipped)
        names = [source.name for source in group.sources]
        sizes = selection.batch_sizes
        if sizes is None and group.group.batch_ratio is not None:
            raise ConfigError(
                f"{group.group.place}.batch_ratio: counts examples, but these batches are full at a measured limit; "
                "give the most examples by batch_size, or by bucket_batch_size."
            )
        orders.append(
            GroupOrder(
                name=group.group.name,
                sources=[
                    SourceOrder(index, selection, name, group.structured.shuffle, seed, group.group_size)
                    for index, name, seed in zip(of_group, names, group.seeds, strict=True)
                ],
                names=names,
                shares=shares,
                global_batch_sizes=None if sizes is None else [size * world_size for size in sizes],
                drop_last=chain.drop_last,
                ends_with=ends_with(group.sources),
                every_n_steps=group.group.every_n_steps,
                ratio=group.group.batch_ratio,
                packing=packing,
            )
        )
        forbidden = forbidden_text(group.structured.prompt_format, tokenizer)
        of_sources = [
            SourceReader(records, notes, index, kind, defaults_of(source), skipped_records, seed, forbidden)
            for source, records, notes, index, seed in zip(
                group.sources, group.records, group.notes, of_group, group.seeds, strict=True
            )
        ]
        readers.append(ExampleReader(of_sources, chain, packing))
        indexes += of_group
    order = ScheduleOrder(orders, _fusion(dataset), _weights_of_groups(dataset), opened.seed, opened.finite)
    return SchedulePlan(order, readers, indexes)


def _packing(group: GroupConfig, kind: ExampleKind) -> Packing | None:
    """The rows of a group's batches; None if its examples are not packed."""
    if not group.packing:
        return None
    if kind is not ExampleKind.TRANSLATION:
        raise ConfigError(
            f"{group.place}.packing: makes batches for the models of nemo_emmett (SpeechTextDataset); leave it out."
        )
    is_joint = not issubclass(PromptFormatter.resolve(group.prompt_format), Seq2SeqPrompt)
    sizes = group.row_tokens if isinstance(group.row_tokens, list) else [group.row_tokens] * 2
    if is_joint and isinstance(group.row_tokens, list):
        raise ConfigError(
            f"{group.place}.row_tokens: {group.row_tokens} is for an encoder-decoder, and {group.prompt_format} is for "
            "decoder-only models, whose rows hold contexts and answers together; give one number."
        )
    frame, seconds = group.token_equivalent_duration, math.inf
    if group.batch_duration is not None:
        seconds = group.batch_duration / group.batch_size
    elif frame is not None:
        seconds = ENCODER_PADDING * sizes[0] * frame
    elif any(not source.is_text for source in group.sources):
        raise ConfigError(
            f"{group.place}.packing: needs token_equivalent_duration for speech, the seconds of a position of the "
            "language model's input; or, where recordings have no positions there, batch_duration, the most seconds of "
            "a batch."
        )
    return Packing(group.batch_size, *sizes, is_joint, frame, seconds)


def _reason_to_stream(opened: _Opened, kind: ExampleKind) -> str | None:
    """Why a dataset cannot have a schedule; None if it can."""
    for group in opened.groups:
        if (key := filter_of_text(group.group, kind)) is not None:
            return f"{key} compares tokens of text alone, which the length index of conversations does not have"
        for source, records in zip(group.sources, group.records, strict=True):
            if source.type in _READ_BY_US and (records is None or any(records.is_sequential)):
                return f"{source.name} can only be read from its beginning"
            if records is None:
                remedy = f" (type: {of_records} has an index)" if (of_records := _type_of_records(source)) else ""
                return f"{source.name} is of the type {source.type}, which NeMo reads from its beginning{remedy}"
    return None


def _type_of_records(source: Source) -> str | None:
    """The type by which we read the same records as a type of NeMo's; None if there is none."""
    if source.type != "lhotse_as_conversation":
        return None
    if source.manifest_filepath is not None:
        return "nemo" if source.tarred_audio_filepaths is None else "nemo_tarred"
    return "lhotse" if source.shar_path is None else "lhotse_shar"


def _has_any(index: LengthIndex, selection: Selection) -> bool:
    """Whether any example of a source is selected."""
    blocks = np.arange(len(index.block_shards))
    return any(
        (selection.buckets(index.read_blocks(blocks[first : first + _BLOCKS_AT_A_TIME])[1]) >= 0).any()
        for first in range(0, len(blocks), _BLOCKS_AT_A_TIME)
    )


def _shares(dataset: DatasetConfig, group: _OpenGroup, tokenizer: Any, kind: ExampleKind) -> list[float]:
    index_dir = group.group.index_dir or dataset.index_dir
    return [leaf.share for leaf in blend_of(group.group, tokenizer=tokenizer, index_dir=index_dir, kind=kind).leaves()]


def _readers(
    group: _OpenGroup, tokenizer: Any, kind: ExampleKind, skipped_records: SkippedRecords, finite: bool
) -> list[ChunkReader]:
    config, forbidden = group.structured, forbidden_text(group.structured.prompt_format, tokenizer)
    return [
        make_reader(source, records, kind, skipped_records, finite, config.shuffle, seed, group.group_size, forbidden)
        for source, records, seed in zip(group.sources, group.records, group.seeds, strict=True)
    ]


def _chain(
    group: _OpenGroup,
    tokenizer: Any,
    kind: ExampleKind,
    skipped_records: SkippedRecords,
    sample: _Sample,
    indexes: Mapping[str, LengthIndex] | None = None,
) -> TransformPipeline:
    """NeMo's maps and filters of a group, with its bins found if they are to be: by length indexes, or by a sample."""
    config = group.structured
    config.reweight_temperature = None  # it is in the shares
    if group.group.has_auto_bins:
        of_sample = None if indexes is not None else sample
        config.bucket_duration_bins = auto_bins(group.group, tokenizer, kind, indexes=indexes, sample=of_sample)
    with reader_context(ReaderContext(skipped_records, kind)):
        return TransformPipeline(config, tokenizer, sample, skipped_records)


def _fusion(dataset: DatasetConfig) -> str:
    return "round_robin" if len(dataset.groups) == 1 else dataset.sampler_fusion


def _weights_of_groups(dataset: DatasetConfig) -> list[float]:
    weights = dataset.sampler_weights or dict.fromkeys((group.name for group in dataset.groups), 1.0)
    return [float(weights[group.name]) for group in dataset.groups] if len(dataset.groups) > 1 else [1.0]


class _Sample:
    """The first examples of the blend, by which bins are found where the config names none; not prompted yet."""

    def __init__(
        self, readers: Callable[[], Sequence[ChunkReader]], shares: Sequence[float], group: _OpenGroup
    ) -> None:
        self.readers = readers
        self.shares = shares
        self.limit = group.structured.num_cuts_for_bins_estimate

    def __iter__(self) -> Iterator:
        return islice(self._all(), self.limit)

    def _all(self) -> Iterator:
        draws = ProportionalMixer(self.shares)
        streams = [self._examples_of(reader) for reader in self.readers()]
        while not draws.is_empty:
            number = draws.next()
            try:
                yield next(streams[number])
            except StopIteration:
                draws.remove(number)

    def _examples_of(self, reader: ChunkReader) -> Iterator:
        for chunk in range(self.limit):
            if (examples := reader.read(chunk, 0, WorkerInfo())) is None:
                return
            yield from examples


def _numbers_of_sources(group: str, sources: Sequence[Source]) -> list[int]:
    """A number for each source, to seed its shuffling: independent of its folder and of what else is in the blend."""
    met: Counter[str] = Counter()
    numbers = []
    for source in sources:
        file = source.name.rpartition("/")[2]
        numbers.append(zlib.crc32(f"{group} {file} {met[file]}".encode()))
        met[file] += 1
    return numbers


def _nemo_ends(sources: Sequence[Source]) -> bool:
    """Whether NeMo reads the data once in an epoch: a single source of plain manifests."""
    sources = [source for source in sources if not source.is_transcription]
    if len(sources) != 1 or sources[0].is_tarred or sources[0].is_text:
        return False
    return isinstance(sources[0].manifest_filepath or "", str)


def _agreed_seed(seed: int | str, shard_seed: int | str) -> int:
    """One seed for all ranks and workers: ``shard_seed`` where it is a number, else ``seed``."""
    if isinstance(shard_seed, int):
        return shard_seed
    agreed = [resolve_seed(seed)]
    if isinstance(seed, str) and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(agreed, src=0)
    return int(agreed[0])
