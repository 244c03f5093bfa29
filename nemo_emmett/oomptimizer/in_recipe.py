"""What stands in a recipe: the config of the training data, and batch sizes that were written by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from omegaconf import DictConfig, ListConfig

from nemo_emmett.errors import ConfigError
from nemo_emmett.oomptimizer.buckets import Group
from nemo_emmett.oomptimizer.profile import Buckets, Profile


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


def profile_of_recipe(
    groups: Mapping[str, Group], where: str, fingerprint: dict[str, Any], settings: dict[str, Any]
) -> Profile:
    """The recipe's own batch sizes as a profile, which is written once guard lowers one of them.

    Raises:
        ConfigError: if a group's are missing, or are not one positive whole number for each bin.
    """
    buckets = {}
    for name, group in groups.items():
        sizes = group.config.get("bucket_batch_size")
        if not _are_sizes(sizes) or len(sizes) != len(group.buckets):
            raise ConfigError(
                f"{f'{where}.{name}'.rstrip('.')}.bucket_batch_size: one is needed for each of the "
                f"{len(group.buckets)} bins, since mode 'guard' measures nothing; write them, or use mode 'calibrate'."
            )
        buckets[name] = Buckets(group.bins, tuple(int(size) for size in sizes))
    return Profile(buckets, settings=settings, fingerprint=fingerprint)


def _are_sizes(sizes: Any) -> bool:
    return isinstance(sizes, (list, ListConfig)) and all(type(size) is int and size > 0 for size in sizes)
