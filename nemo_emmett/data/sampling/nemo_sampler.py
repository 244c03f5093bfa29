"""NeMo's samplers over our sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lhotse.dataset import RoundRobinSampler, ZipSampler
from lhotse.dataset.dataloading import resolve_seed
from lhotse.dataset.sampling.base import CutSampler
from lhotse.utils import fix_random_seed
from nemo.utils import logging

from nemo_emmett.data.bucketing.length_stats import auto_bins
from nemo_emmett.data.config.dataset_config import DatasetConfig, GroupConfig
from nemo_emmett.data.config.nemo_config import sampler_config
from nemo_emmett.data.config.sources import Source
from nemo_emmett.data.io.skipped_records import SkippedRecords
from nemo_emmett.data.readers.examples import ExampleKind
from nemo_emmett.data.readers.registry import ReaderContext, reader_context
from nemo_emmett.data.sampling.tolerance import build_tolerant_sampler
from nemo_emmett.data.sampling.transforms import prompt_with_transcripts
from nemo_emmett.errors import ConfigError
from nemo_emmett.prompts.families import forbidden_text


def nemo_sampler_reason(dataset: DatasetConfig, kind: ExampleKind) -> str | None:
    """Why a dataset with ``sampling: auto`` gets NeMo's samplers; None if it gets ours."""
    if kind is ExampleKind.AS_READ:
        return "its dataset takes examples as NeMo reads them"
    if any(group.force_map_dataset for group in dataset.groups):
        return "force_map_dataset is set"
    return tarred_noise_reason(dataset)


def tarred_noise_reason(dataset: DatasetConfig) -> str | None:
    """Why the noise of a dataset needs NeMo's samplers; None if it does not."""
    if any(group.noise is not None and group.noise.is_tarred for group in dataset.groups):
        return "noise_path names tar files, which cannot be read at any place"
    return None


def nemo_sampler(
    dataset: DatasetConfig,
    global_rank: int,
    world_size: int,
    tokenizer: Any,
    kind: ExampleKind,
    skipped_records: SkippedRecords,
) -> tuple[CutSampler, bool, int]:
    """Build NeMo's sampler of a dataset; of groups, one that combines theirs.

    Args:
        dataset: to sample from.
        global_rank: this process's place among those that load data.
        world_size: how many load data.
        tokenizer: NeMo tokenizer.
        kind: what the dataset takes.
        skipped_records: for the records that cannot be used.

    Returns:
        The sampler, whether it lives in the workers, and its seed.

    Raises:
        ConfigError: for a key that only our own samplers can obey.
    """
    if dataset.weights is not None:
        raise ConfigError(
            f"{dataset.place}.weights: NeMo's samplers cannot weigh by {dataset.weights}; set sampling: emmett."
        )
    for group in dataset.groups:
        for key in ("every_n_steps", "batch_ratio", "packing"):
            if getattr(group, key) != getattr(GroupConfig, key):
                raise ConfigError(f"{group.place}.{key}: NeMo's samplers do not have it; set sampling: emmett.")
    if dataset.is_mux:
        raise ConfigError(f"{dataset.place}.sampler_fusion: NeMo's samplers have no mux; set sampling: emmett.")
    seed = resolve_seed(dataset.seed)
    # Fused with endless sources, a finite one would run dry and leave the rest of the training to the others.
    endless = dataset.is_multi_config and kind is not ExampleKind.AS_READ and not dataset.force_finite
    bins = {
        g.name: auto_bins(g, tokenizer, kind) if g.has_auto_bins else g.bucket_duration_bins for g in dataset.groups
    }
    fix_random_seed(seed)
    samplers, in_workers = {}, False
    for group in dataset.groups:
        flavour = _flavour(dataset.sources, group)
        overrides = {"seed": seed, "bucket_duration_bins": bins[group.name], **flavour}
        in_workers = flavour["force_iterable_dataset"] or all(source.is_tarred for source in dataset.sources)
        is_map_style = flavour["force_map_dataset"] or not in_workers
        if kind is not ExampleKind.AS_READ and world_size > 1 and is_map_style and dataset.shard_seed == "trng":
            # NeMo's default is for workers that each have an order of their own; here ranks divide the batches.
            logging.info(f"shard_seed: all ranks use the seed {seed}, so that they share out the same batches.")
            overrides["shard_seed"] = seed
        structured = sampler_config(group, **overrides)
        how = ReaderContext(skipped_records, kind, endless, forbidden_text(group.prompt_format, tokenizer))
        with reader_context(how):
            samplers[group.name], in_workers = build_tolerant_sampler(
                structured, global_rank, world_size, tokenizer, skipped_records
            )
        if any(source.transcripts for source in group.sources):
            prompt_with_transcripts(samplers[group.name])
    if not dataset.is_multi_config:
        return samplers[""], in_workers, seed
    return fuse(samplers, dataset.sampler_fusion, dataset.sampler_weights, seed), in_workers, seed


def fuse(samplers: Mapping[str, CutSampler], fusion: str, weights: Mapping[str, float] | None, seed: int) -> CutSampler:
    """Join the samplers of several groups into one.

    Args:
        samplers: by the groups' names.
        fusion: ``zip`` (each batch holds one batch of each group; ends with the first that ends), ``round_robin``
            (in turns) or ``randomized_round_robin`` (by weights).
        weights: the groups' shares of the batches under ``randomized_round_robin``; None: equal ones.
        seed: of the draws.
    """
    if fusion == "zip":
        return ZipSampler(*samplers.values())
    if fusion == "round_robin":
        return RoundRobinSampler(*samplers.values())
    shares = True if weights is None else [float(weights[name]) for name in samplers]
    return RoundRobinSampler(*samplers.values(), randomize=shares, seed=seed)


def _flavour(sources: Sequence[Source], group: GroupConfig) -> dict[str, bool]:
    """Where the samplers live: in the workers (iterable flavour), or here (map-style flavour).

    NeMo demands that all sources agree, and counts text as tarred. Here text follows the speech that it is mixed with.
    """
    forced = {
        "force_map_dataset": group.force_map_dataset,
        "force_iterable_dataset": group.force_iterable_dataset,
    }
    if any(forced.values()) or len({source.is_tarred for source in sources}) == 1:
        return forced
    speech_in_workers = any(source.is_tarred for source in sources if not source.is_text)
    return {"force_map_dataset": not speech_in_workers, "force_iterable_dataset": speech_in_workers}
