"""NeMo's speechlm2 ``DataModule`` with our dataloader behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import CombinedLoader
from nemo.collections.common.data.lhotse.broadcasting import BroadcastingDataLoader, is_dp_source_rank
from nemo.collections.speechlm2.data.datamodule import DataModule
from nemo.core.classes.common import Serialization
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_emmett.data.bins import bins_awaiting_sizes, groups_with_auto_bins
from nemo_emmett.data.check import check_dataset_names
from nemo_emmett.data.dataloader import get_multimodal_dataloader
from nemo_emmett.data.delivery import prepare_dataset
from nemo_emmett.data.resumable import ResumableData
from nemo_emmett.data.sources import plain
from nemo_emmett.modules.random_state import random_state, restore_random_state

EVALUATION_SETS = ("validation_ds", "test_ds", "predict_ds")


class MultimodalDataModule(DataModule, Serialization):
    """Drop-in for ``nemo.collections.speechlm2.DataModule``.

    Also a NeMo ``Serialization``: so NeMo's allow-list admits it where a recipe names it by ``_target_``.

    Args:
        cfg: the recipe's ``data`` section: ``train_ds``, and ``validation_ds``, ``test_ds`` and ``predict_ds`` with
            their ``datasets``.
        tokenizer: NeMo tokenizer.
        dataset: examples to batches; :class:`~nemo_emmett.data.SpeechTextDataset`, or NeMo's ``SALMDataset``.
        defaults: keys that every dataset gets unless it sets them, such as what the model knows anyway
            (``SALMT5.data_defaults``).

    Raises:
        ConfigError: if a dataset has the name of a modality.
    """

    def __init__(
        self,
        cfg: Mapping | DictConfig,
        tokenizer: Any,
        dataset: torch.utils.data.Dataset,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        cfg = cfg if isinstance(cfg, DictConfig) else OmegaConf.create(cfg)
        with open_dict(cfg):
            for name in ("train_ds", *EVALUATION_SETS):
                for key, value in (defaults or {}).items():
                    if cfg.get(name) is not None:
                        cfg[name].setdefault(key, value)
        for name in EVALUATION_SETS:
            if cfg.get(name) is not None:
                check_dataset_names(cfg[name].get("datasets") or {}, f"data.{name}")
        super().__init__(cfg, tokenizer, dataset)

    def train_dataloader(self) -> BroadcastingDataLoader | None:
        """The loader of ``train_ds``; a trainer gets the callback that counts what was trained on."""
        if self.cfg.get("train_ds") is None:
            return None
        if self.trainer is not None and not any(isinstance(c, ResumableData) for c in self.trainer.callbacks):
            self.trainer.callbacks.insert(0, ResumableData())  # before those that write checkpoints
        return self._loader(self.cfg.train_ds, "data.train_ds")

    def resolve_bins(self) -> None:
        """Solve for ``bucket_duration_bins: auto`` now, in ``cfg.train_ds`` and its groups, and write the bins there.

        Who needs the bins before the loader is built (OOMptimizer) asks for it; otherwise the loader solves for them.

        Raises:
            ConfigError: if the config lacks what is needed.
            DataError: if no example is left to measure.
        """
        train_ds = self.cfg.get("train_ds")
        if train_ds is None:
            return
        _, kind = prepare_dataset(self.dataset)
        where = "data.train_ds"
        for name, settings in groups_with_auto_bins(plain(train_ds), where).items():
            states = random_state()  # measuring is no part of the training
            try:
                bins = bins_awaiting_sizes(settings, self.tokenizer, kind, f"{where}.{name}".rstrip("."))
            finally:
                restore_random_state(states)
            config = train_ds[name] if name else train_ds
            with open_dict(config):
                config.bucket_duration_bins = bins

    def val_dataloader(self) -> CombinedLoader | BroadcastingDataLoader | list:
        """The loaders of ``validation_ds``, side by side: a batch is ``{dataset: batch or None}``."""
        return self._evaluation_loaders("validation_ds", mode="max_size")

    def test_dataloader(self) -> CombinedLoader | BroadcastingDataLoader | list:
        """The loaders of ``test_ds``, side by side."""
        return self._evaluation_loaders("test_ds", mode="max_size")

    def predict_dataloader(self) -> CombinedLoader | BroadcastingDataLoader | list:
        """The loaders of ``predict_ds``, one after another, as Lightning's ``predict`` wants them."""
        return self._evaluation_loaders("predict_ds", mode="sequential")

    def _evaluation_loaders(self, name: str, mode: str) -> CombinedLoader | BroadcastingDataLoader | list:
        if self.cfg.get(name) is None:
            return []  # Lightning refuses None where the method exists
        # Each rank gets its share of one pass over the data.
        common = self.cfg[name].copy()
        with open_dict(common):  # a recipe composed by Hydra takes no new keys otherwise
            common.force_finite = common.force_map_dataset = True
            datasets = common.pop("datasets", None)
        if datasets is None:
            return self._loader(common, f"data.{name}")
        loaders = {
            dataset: self._loader(_merged(common, config), f"data.{name}.datasets.{dataset}")
            for dataset, config in datasets.items()
        }
        return CombinedLoader(loaders, mode=mode)

    def _loader(self, config: DictConfig, where: str) -> BroadcastingDataLoader:
        mesh = self._get_device_mesh()
        loader = None
        if is_dp_source_rank(mesh):
            loader = get_multimodal_dataloader(
                config, self._get_dp_rank(), self._get_world_size(), self.dataset, self.tokenizer, where=where
            )
        return _Loader(source=loader, device_mesh=mesh)


class _Loader(BroadcastingDataLoader):
    """NeMo's wrapper, which hides from Lightning the sampler whose epoch it sets."""

    @property
    def sampler(self) -> Any:
        """That of the loader inside, None on ranks that are sent their batches."""
        return getattr(self._source, "sampler", None)


def _merged(common: DictConfig, config: DictConfig) -> DictConfig:
    with open_dict(common):
        return OmegaConf.merge(common, config)
