"""The callback that gives every bucket its batch size."""

from __future__ import annotations

import os
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from nemo.core.classes.common import Serialization
from nemo.utils import logging
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_emmett.errors import ConfigError
from nemo_emmett.oomptimizer.profile import ONLY_GROUP, Bin, Buckets, Profile, as_bins, shown

PROFILE_VARIABLE = "NEMO_EMMETT_PROFILE"
"""Environment variable: the profile, where the callback is made without arguments (``NEMO_EMMETT_CALLBACKS``)."""


class OOMptimizer(Callback, Serialization):
    """Sets ``bucket_batch_size`` from a stored profile, before the training data loader is built.

    It does not measure: it neither finds batch sizes nor survives running out of memory. The profile is one that was
    written by hand or by NeMo's own scripts.

    The config it sets is ``train_ds`` of the datamodule's ``cfg``, or else of the model's. Recipes without
    ``bucket_duration_bins`` get those of the profile; in recipes that have them, they must be the profile's.

    Args:
        profile: path of the profile (:mod:`nemo_emmett.oomptimizer.profile`); by default, the environment variable
            ``NEMO_EMMETT_PROFILE``.

    Raises:
        ConfigError: if the profile cannot be read or used.

    Example:
        In a recipe::

            trainer:
              callbacks:
                - _target_: nemo_emmett.callbacks.OOMptimizer
                  profile: profile.yaml
    """

    def __init__(self, profile: str | os.PathLike | None = None) -> None:
        path = profile or os.environ.get(PROFILE_VARIABLE)
        if not path:
            raise ConfigError(
                f"OOMptimizer.profile: no profile is given; name its file here or in the variable {PROFILE_VARIABLE}."
            )
        self.path = str(path)
        self.profile = Profile.read(self.path)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the profile's batch sizes into ``train_ds``."""
        train_ds = self._train_ds(trainer, pl_module)
        if trainer.train_dataloader is not None:
            raise ConfigError(
                f"{self.path}: the profile comes too late, the training data loader has already been built; give the "
                "lr_scheduler its max_steps and the trainer its max_steps, so that nothing has to count the batches."
            )
        for name, config in self._groups(train_ds).items():
            self._apply(self.profile.groups[name], config, name)
        # NeMo's ASR models have their loader from the constructor on.
        if getattr(pl_module, "_train_dl", None) is not None:
            pl_module.setup_training_data(train_ds)

    def _train_ds(self, trainer: Trainer, pl_module: LightningModule) -> DictConfig:
        for owner in (getattr(trainer, "datamodule", None), pl_module):
            train_ds = getattr(getattr(owner, "cfg", None), "train_ds", None)
            if isinstance(train_ds, DictConfig):
                return train_ds
        raise ConfigError(
            f"{self.path}: there is nowhere to put the profile's batch sizes: neither the datamodule nor the model "
            "has a cfg.train_ds."
        )

    def _groups(self, train_ds: DictConfig) -> dict[str, DictConfig]:
        """The recipe's dataset groups by name; they must be those of the profile."""
        groups = {ONLY_GROUP: train_ds}
        if train_ds.get("multi_config", False):
            groups = {
                name: group
                for name, group in train_ds.items()
                if isinstance(group, DictConfig) and name != "sampler_weights"
            }
        if groups.keys() != self.profile.groups.keys():
            raise ConfigError(
                f"{self.path}: the profile is for {_named(self.profile.groups)}, the recipe's train_ds has "
                f"{_named(groups)}."
            )
        return groups

    def _apply(self, buckets: Buckets, config: DictConfig, name: str) -> None:
        where = f"train_ds.{name}".rstrip(".")
        asked = _bins(config, where)
        if asked is not None and asked != buckets.bucket_duration_bins:
            raise ConfigError(
                f"{where}.bucket_duration_bins: the recipe has {shown(asked)}, but the profile {self.path} is for "
                f"{shown(buckets.bucket_duration_bins)}; take the profile's bins, or a profile of these."
            )
        with open_dict(config):
            config.bucket_batch_size = list(buckets.bucket_batch_size)
            if asked is None:
                config.bucket_duration_bins = [_plain(item) for item in buckets.bucket_duration_bins]
        logging.info(
            f"OOMptimizer: {where}.bucket_batch_size is {list(buckets.bucket_batch_size)} for the bins "
            f"{shown(buckets.bucket_duration_bins)}, from {self.path}."
        )


def _bins(config: DictConfig, where: str) -> tuple[Bin, ...] | None:
    bins = config.get("bucket_duration_bins")
    return None if bins is None else as_bins(OmegaConf.to_container(bins, resolve=True), where)


def _plain(item: Bin) -> Any:
    return list(item) if isinstance(item, tuple) else item


def _named(groups: dict[str, Any]) -> str:
    if list(groups) == [ONLY_GROUP]:
        return "one dataset without groups"
    return "the groups " + ", ".join(f"'{name}'" for name in groups)
