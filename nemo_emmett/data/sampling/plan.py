"""From a dataset to what its samplers are made of."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from lhotse.dataset.dataloading import resolve_seed

from nemo_emmett.data.blending.weights import blend_of
from nemo_emmett.data.bucketing.length_stats import auto_bins
from nemo_emmett.data.config.dataset_config import DatasetConfig
from nemo_emmett.data.config.nemo_config import sampler_config, with_keys_of_dataset
from nemo_emmett.data.config.sources import Source
from nemo_emmett.data.io.skipped_records import SkippedRecords
from nemo_emmett.data.readers.base import build_indexes
from nemo_emmett.data.readers.examples import ExampleKind
from nemo_emmett.data.readers.random_access import open_records
from nemo_emmett.data.readers.registry import ReaderContext, reader_context
from nemo_emmett.data.sampling.nemo_sampler import tarred_noise_reason
from nemo_emmett.data.sampling.proportional_mixing import ProportionalMixer
from nemo_emmett.data.sampling.sampler import GroupPlan, SamplingPlan
from nemo_emmett.data.sampling.shuffle import SHUFFLE_BLOCK_SIZE
from nemo_emmett.data.sampling.source_iterator import ChunkReader, WorkerInfo, chunks_to_open, make_reader
from nemo_emmett.data.sampling.transforms import TransformPipeline
from nemo_emmett.errors import ConfigError
from nemo_emmett.prompts.families import forbidden_text


def plan_sampling(
    dataset: DatasetConfig, tokenizer: Any, kind: ExampleKind, skipped_records: SkippedRecords, world_size: int
) -> SamplingPlan:
    """Open the sources of a dataset, weigh them, and build NeMo's chains.

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
    if (reason := tarred_noise_reason(dataset)) is not None:
        raise ConfigError(
            f"{dataset.place}.noise_path: {reason}; give a manifest of audio files, or set sampling: nemo."
        )
    seed = _agreed_seed(dataset.seed, dataset.shard_seed)
    finite = dataset.force_finite or (not dataset.groups[0].name and _nemo_ends(dataset.sources))
    structured = [sampler_config(group, shard_seed=seed, seed=seed) for group in dataset.groups]
    opened = []
    for group, config in zip(dataset.groups, structured, strict=True):
        sources = [with_keys_of_dataset(source, config) for source in group.sources]
        index_dir = group.index_dir or dataset.index_dir
        opened.append([(source, open_records(source, skipped_records, kind, index_dir)) for source in sources])
    build_indexes([records for group in opened for _, records in group if records is not None])
    plans = []
    for group, config, in_group in zip(dataset.groups, structured, opened, strict=True):
        blend = blend_of(group, tokenizer=tokenizer, index_dir=group.index_dir or dataset.index_dir, kind=kind)
        shares = [leaf.share for leaf in blend.leaves()]
        seeds = [[seed, number] for number in _numbers_of_sources(group.name, [source for source, _ in in_group])]
        group_size = max(SHUFFLE_BLOCK_SIZE, config.shuffle_buffer_size or 0)
        forbidden = forbidden_text(config.prompt_format, tokenizer)
        readers = [
            make_reader(
                source, records, kind, skipped_records, finite, config.shuffle, of_source, group_size, forbidden
            )
            for (source, records), of_source in zip(in_group, seeds, strict=True)
        ]
        config.reweight_temperature = None  # it is in the shares
        sample = _Sample(readers, shares, config.num_cuts_for_bins_estimate)
        if group.has_auto_bins:
            config.bucket_duration_bins = auto_bins(group, tokenizer, kind, sample)
        with reader_context(ReaderContext(skipped_records, kind)):
            chain = TransformPipeline(config, tokenizer, sample, skipped_records)
        num_open = [chunks_to_open(reader, chain, config.shuffle) for reader in readers]
        skipped_records.drain()  # what was read here is read again by the workers
        names = [source.name for source, _ in in_group]
        plans.append(GroupPlan(group.name, readers, names, seeds, num_open, shares, chain))
    weights = dataset.sampler_weights or dict.fromkeys((plan.name for plan in plans), 1.0)
    return SamplingPlan(
        groups=plans,
        fusion="round_robin" if len(plans) == 1 else dataset.sampler_fusion,
        weights=[float(weights[plan.name]) for plan in plans] if len(plans) > 1 else [1.0],
        world_size=world_size,
        shuffle=dataset.shuffle,
        finite=finite,
        seed=seed,
    )


class _Sample:
    """The first examples of the blend, by which bins are found where the config names none; not prompted yet."""

    def __init__(self, readers: Sequence[ChunkReader], shares: Sequence[float], limit: int) -> None:
        self.readers = readers
        self.shares = shares
        self.limit = limit

    def __iter__(self) -> Iterator:
        return islice(self._all(), self.limit)

    def _all(self) -> Iterator:
        draws = ProportionalMixer(self.shares)
        streams = [self._examples_of(reader) for reader in self.readers]
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
