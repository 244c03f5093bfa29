"""From a dataset's config to what its samplers are made of."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from lhotse.dataset.dataloading import resolve_seed
from nemo.collections.common.data.lhotse.dataloader import LhotseDataLoadingConfig
from omegaconf import OmegaConf

from nemo_emmett.data.blending.weights import blend_of
from nemo_emmett.data.bucketing.length_stats import auto_bins
from nemo_emmett.data.config.schema import AUTO_BINS
from nemo_emmett.data.config.sources import (
    SHARED_BY_GROUPS,
    Source,
    groups_of,
    list_sources,
    merge_groups,
    structured_config,
    with_inherited,
    with_keys_of_dataset,
)
from nemo_emmett.data.io.skipped_records import SkippedRecords
from nemo_emmett.data.readers.base import build_indexes
from nemo_emmett.data.readers.examples import ExampleKind
from nemo_emmett.data.readers.random_access import open_records
from nemo_emmett.data.readers.registry import ReaderContext, reader_context
from nemo_emmett.data.sampling.proportional_mixing import ProportionalMixer
from nemo_emmett.data.sampling.sampler import GroupPlan, SamplingPlan
from nemo_emmett.data.sampling.shuffle import SHUFFLE_BLOCK_SIZE
from nemo_emmett.data.sampling.source_iterator import ChunkReader, WorkerInfo, chunks_to_open, make_reader
from nemo_emmett.data.sampling.transforms import TransformPipeline
from nemo_emmett.errors import ConfigError
from nemo_emmett.prompts.families import forbidden_text


def nemo_sampler_reason(settings: Mapping, kind: ExampleKind) -> str | None:
    """Why a dataset with ``sampling: auto`` gets NeMo's samplers; None if it gets ours."""
    if kind is ExampleKind.AS_READ:
        return "its dataset takes examples as NeMo reads them"
    if settings.get("force_map_dataset") or any(
        g.get("force_map_dataset") for g in (groups_of(settings) or {}).values()
    ):
        return "force_map_dataset is set"
    return _why_noise_needs_nemo(settings)


def _why_noise_needs_nemo(settings: Mapping) -> str | None:
    for group in (groups_of(settings) or {"": settings}).values():
        noise = group.get("noise_path")
        if isinstance(noise, Mapping) and (noise.get("tarred_audio_filepaths") or noise.get("shar_path")):
            return "noise_path names tar files, which cannot be read at any place"
    return None


def plan_sampling(
    settings: Mapping,
    where: str,
    tokenizer: Any,
    kind: ExampleKind,
    skipped_records: SkippedRecords,
    world_size: int,
    index_dir: str | None = None,
) -> SamplingPlan:
    """Open the sources of a dataset, weigh them, and build NeMo's chains.

    Args:
        settings: plain config of the dataset, with or without groups.
        where: its place in the recipe, for messages.
        tokenizer: NeMo tokenizer.
        kind: what the dataset takes.
        skipped_records: ledger for records that cannot be used.
        world_size: number of ranks.
        index_dir: folder for indexes that cannot be written beside the data.

    Raises:
        ConfigError: if a key has a value that cannot work.
        DataError: if a source holds nothing.
    """
    if (reason := _why_noise_needs_nemo(settings)) is not None:
        raise ConfigError(f"{where}.noise_path: {reason}; give a manifest of audio files, or set sampling: nemo.")
    settings = merge_groups(settings, where) if settings.get("sampler_fusion") == "mux" else settings
    groups = with_inherited(settings) if groups_of(settings) is not None else {"": dict(settings)}
    defaults = OmegaConf.structured(LhotseDataLoadingConfig)
    shared = {key: settings.get(key, defaults[key]) for key in SHARED_BY_GROUPS}
    seed = _agreed_seed(shared["seed"], shared["shard_seed"])
    finite = bool(shared["force_finite"]) or (len(groups) == 1 and "" in groups and _nemo_ends(groups[""], where))

    structured = {
        name: structured_config({**group, **shared, "shard_seed": seed, "seed": seed}, _place(where, name))
        for name, group in groups.items()
    }
    opened = {}
    for name, group in groups.items():
        sources = [with_keys_of_dataset(s, structured[name]) for s in list_sources(group, _place(where, name))]
        opened[name] = [
            (source, open_records(source, skipped_records, kind, group.get("index_dir") or index_dir))
            for source in sources
        ]
    build_indexes([records for group in opened.values() for _, records in group if records is not None])
    plans = []
    for name, group in groups.items():
        config = structured[name]
        blend = blend_of(group, _place(where, name), tokenizer=tokenizer, index_dir=index_dir, kind=kind)
        shares = [leaf.share for leaf in blend.leaves()]
        seeds = [[seed, number] for number in _numbers_of_sources(name, [source for source, _ in opened[name]])]
        group_size = max(SHUFFLE_BLOCK_SIZE, config.shuffle_buffer_size or 0)
        forbidden = forbidden_text(config.prompt_format, tokenizer)
        readers = [
            make_reader(
                source, records, kind, skipped_records, finite, config.shuffle, of_source, group_size, forbidden
            )
            for (source, records), of_source in zip(opened[name], seeds, strict=True)
        ]
        config.reweight_temperature = None  # it is in the shares
        sample = _Sample(readers, shares, config.num_cuts_for_bins_estimate)
        if config.bucket_duration_bins == AUTO_BINS:
            solved = {**group, **shared}
            config.bucket_duration_bins = auto_bins(solved, tokenizer, kind, _place(where, name), sample)
        with reader_context(ReaderContext(skipped_records, kind)):
            chain = TransformPipeline(config, tokenizer, sample, skipped_records)
        num_open = [chunks_to_open(reader, chain, config.shuffle) for reader in readers]
        skipped_records.drain()  # what was read here is read again by the workers
        names = [source.name for source, _ in opened[name]]
        plans.append(GroupPlan(name, readers, names, seeds, num_open, shares, chain))
    weights = shared["sampler_weights"] or dict.fromkeys(groups, 1.0)
    return SamplingPlan(
        groups=plans,
        fusion="round_robin" if len(plans) == 1 else shared["sampler_fusion"],
        weights=[float(weights[name]) for name in groups] if len(plans) > 1 else [1.0],
        world_size=world_size,
        shuffle=bool(shared["shuffle"]),
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
    """A number for each source, to seed its shuffling: the same wherever it lies and whatever else is in the blend."""
    met: Counter[str] = Counter()
    numbers = []
    for source in sources:
        file = source.name.rpartition("/")[2]
        numbers.append(zlib.crc32(f"{group} {file} {met[file]}".encode()))
        met[file] += 1
    return numbers


def _place(where: str, name: str) -> str:
    return f"{where}.{name}" if name else where


def _nemo_ends(settings: Mapping, where: str) -> bool:
    """Whether NeMo reads the data once in an epoch: a single source of plain manifests."""
    sources = list_sources(settings, where)
    if len(sources) != 1 or sources[0].is_tarred or sources[0].is_text:
        return False
    return isinstance(sources[0].config.get("manifest_filepath", ""), str)


def _agreed_seed(seed: int | str, shard_seed: int | str) -> int:
    """One seed for all ranks and workers: ``shard_seed`` where it is a number, else ``seed``."""
    if isinstance(shard_seed, int):
        return shard_seed
    agreed = [resolve_seed(seed)]
    if isinstance(seed, str) and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(agreed, src=0)
    return int(agreed[0])
