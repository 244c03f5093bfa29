"""What stands in a recipe: the config of the training data, and batch sizes that were written by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lhotse.dataset.sampling.base import CutSampler
from lightning.pytorch import LightningModule, Trainer
from nemo.core.classes.modelPT import ModelPT
from omegaconf import DictConfig, ListConfig
from torch.utils.data import IterableDataset

from nemo_emmett.errors import ConfigError
from nemo_emmett.oomptimizer.buckets import Group
from nemo_emmett.oomptimizer.profile import Bin, Buckets, Profile, shown


def train_ds_of(trainer: Trainer, module: LightningModule) -> tuple[DictConfig, str]:
    """The config of the training data, and its place in the recipe.

    Raises:
        ConfigError: if there is none.
    """
    for section, owner in (("data", getattr(trainer, "datamodule", None)), ("model", module)):
        train_ds = getattr(getattr(owner, "cfg", None), "train_ds", None)
        if isinstance(train_ds, DictConfig):
            return train_ds, f"{section}.train_ds"
    raise ConfigError(
        "OOMptimizer: there is nowhere to put batch sizes: neither the datamodule nor the model has a cfg.train_ds."
    )


def check_batch_sizes_are_read(module: LightningModule) -> None:
    """Refuse a NeMo model whose loader makes batches by ``batch_size``, whatever its buckets are.

    Raises:
        ConfigError: naming the key with which NeMo's ASR models read their data by lhotse.
    """
    loader = module._train_dl if isinstance(module, ModelPT) else None  # which NeMo's models have from the beginning
    if loader is None:
        return
    sampled_by_lhotse = isinstance(getattr(loader, "sampler", None), CutSampler)
    in_workers = isinstance(getattr(loader, "dataset", None), IterableDataset) and loader.batch_size is None
    if sampled_by_lhotse or in_workers:
        return
    size = getattr(loader, "batch_size", None)
    raise ConfigError(
        "OOMptimizer: model.train_ds.use_lhotse is not set, so NeMo's older dataloader makes "
        f"{'its own batches' if size is None else f'batches of {size}'}, whatever bucket_batch_size is; set "
        "++model.train_ds.use_lhotse=true and ++model.train_ds.use_bucketing=true, or remove the callback."
    )


def profile_of_recipe(
    groups: Mapping[str, Group], where: str, fingerprint: dict[str, Any], settings: dict[str, Any]
) -> Profile:
    """The recipe's own batch sizes as a profile, which is written once guard lowers one of them.

    Raises:
        ConfigError: if a group's are missing, or are not one positive whole number for each bin.
    """
    buckets = {}
    for name, group in groups.items():
        if group.limit_key is not None:
            buckets[name] = _one_size(group, f"{where}.{name}".rstrip("."))
            continue
        sizes = group.config.get("bucket_batch_size")
        if not _are_sizes(sizes) or len(sizes) != len(group.buckets):
            raise ConfigError(
                f"{f'{where}.{name}'.rstrip('.')}.bucket_batch_size: one is needed for each of the "
                f"{len(group.buckets)} bins, since mode 'guard' measures nothing; write them, or use mode 'calibrate'."
            )
        buckets[name] = Buckets(group.bins, tuple(int(size) for size in sizes))
    return Profile(buckets, settings=settings, fingerprint=fingerprint)


def check_fits(buckets: Buckets, asked: Sequence[Bin] | None, config: DictConfig, where: str, path: str) -> None:
    """Refuse a profile's batch sizes for a group that bounds its examples otherwise.

    Args:
        buckets: of the profile.
        asked: the bins of the group; None where it has none.
        config: of the group.
        where: its place in the recipe.
        path: of the profile.

    Raises:
        ConfigError: if the group has other bins, or may hold longer examples than the profile was made for.
    """
    if buckets.limit_key is None:
        if asked is not None and asked != buckets.bucket_duration_bins:
            raise ConfigError(
                f"{where}.bucket_duration_bins: the recipe has {shown(asked)}, but the profile {path} is for "
                f"{shown(buckets.bucket_duration_bins)}; take the profile's bins, or a profile of these."
            )
        return
    longest, own = buckets.bucket_duration_bins[0], config.get(buckets.limit_key)
    if asked is not None:
        raise ConfigError(
            f"{where}.bucket_duration_bins: the recipe has {shown(asked)}, but the profile {path} has one batch_size "
            "for all lengths; remove the bins, or take a profile of these."
        )
    if own is not None and longest < own < math.inf:
        raise ConfigError(
            f"{where}.{buckets.limit_key}: is {own:g}, but the profile {path} is for examples up to {longest:g}; set "
            f"it to {longest:g}, or delete the profile to measure again."
        )


def described(buckets: Buckets) -> str:
    """The batch sizes of a group in a line of the log."""
    bins = buckets.bucket_duration_bins
    if buckets.limit_key is not None:
        return f"batch_size is {buckets.bucket_batch_size[0]} for {buckets.limit_key} {shown(bins[0])}"
    return f"bucket_batch_size is {list(buckets.bucket_batch_size)} for the bins {shown(bins)}"


def _one_size(group: Group, where: str) -> Buckets:
    size = group.config.get("batch_size")
    if not _are_sizes([size]):
        raise ConfigError(f"{where}.batch_size: a positive whole number is needed, not {size!r}.")
    return Buckets(group.bins, (size,), group.limit_key)


def _are_sizes(sizes: Any) -> bool:
    return isinstance(sizes, (list, ListConfig)) and all(type(size) is int and size > 0 for size in sizes)
