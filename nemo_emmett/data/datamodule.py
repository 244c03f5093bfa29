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

from nemo_emmett.callbacks.resumable_data import ResumableData
from nemo_emmett.data.bucketing.length_stats import bins_awaiting_sizes
from nemo_emmett.data.checks import check_dataset_names
from nemo_emmett.data.config.dataset_config import parse_dataset
from nemo_emmett.data.config.section import keys_within, plain
from nemo_emmett.data.dataloader import MultimodalDataLoader, get_multimodal_dataloader
from nemo_emmett.data.io.commands import commands_allowed
from nemo_emmett.data.lengths.building import open_length_indexes
from nemo_emmett.data.sampling.nemo_sampler import nemo_sampler_reason
from nemo_emmett.data.worker_batches import prepare_dataset
from nemo_emmett.errors import ConfigError
from nemo_emmett.modules.random_state import random_state, restore_random_state

EVALUATION_SETS = ("validation_ds", "test_ds", "predict_ds")

MODEL_DEFINED_KEYS = {
    "sample_rate": "the speech encoder reads {model} samples per second, not {data}; leave the key out, and recordings "
    "are resampled",
    "audio_locator_tag": "the model takes {model} for speech, not {data}; leave the key out, or say the same in "
    "model.audio_locator_tag",
    "prompt_format": "the model translates with {model}, but this data would train it on {data}; leave the key out, or "
    "say the same in model.prompt_format",
}
"""Keys in which data and model must not differ, and what to say of those that do."""


TRAINING_KEYS = ("transcripts",)
"""Keys that only ``train_ds`` gets by default."""


class MultimodalDataModule(DataModule, Serialization):
    """Drop-in for ``nemo.collections.speechlm2.DataModule``.

    Also a NeMo ``Serialization``: so NeMo's allow-list admits it where a recipe names it by ``_target_``.

    Args:
        cfg: the recipe's ``data`` section: ``train_ds``, and ``validation_ds``, ``test_ds`` and ``predict_ds`` with
            their ``datasets``.
        tokenizer: NeMo tokenizer.
        dataset: examples to batches; :class:`~nemo_emmett.data.SpeechTextDataset`, or NeMo's ``SALMDataset``.
        defaults: keys that every dataset gets unless it sets them, such as what the model defines
            (``SALMT5.data_defaults``). In the keys of :data:`MODEL_DEFINED_KEYS` no dataset, group or source may
            differ.

    Raises:
        ConfigError: if a dataset has the name of a modality, or says something else than the model.
    """

    def __init__(
        self,
        cfg: Mapping | DictConfig,
        tokenizer: Any,
        dataset: torch.utils.data.Dataset,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        cfg = cfg if isinstance(cfg, DictConfig) else OmegaConf.create(cfg)
        for name in ("train_ds", *EVALUATION_SETS):
            if cfg.get(name) is not None:
                for place, key, value in keys_within(plain(cfg[name]), f"data.{name}"):
                    _check_agreement(place, key, value, defaults or {})
        with open_dict(cfg):
            for name in EVALUATION_SETS:
                if name in cfg and cfg[name] is None:  # which NeMo's takes for a set
                    del cfg[name]
            for name in ("train_ds", *EVALUATION_SETS):
                for key, value in (defaults or {}).items():
                    if cfg.get(name) is not None and (name == "train_ds" or key not in TRAINING_KEYS):
                        cfg[name].setdefault(key, value)
        for name in EVALUATION_SETS:
            if cfg.get(name) is not None:
                check_dataset_names(plain(cfg[name]).get("datasets") or {}, f"data.{name}")
        self._needs_transcripts = bool((defaults or {}).get("transcripts"))
        super().__init__(cfg, tokenizer, dataset)

    def setup(self, stage: str) -> None:
        """Give the trainer the callback :class:`~nemo_emmett.callbacks.ResumableData`, unless it has one."""
        super().setup(stage)
        if stage == "fit" and not any(isinstance(c, ResumableData) for c in self.trainer.callbacks):
            callback = ResumableData()
            callback.is_asked_for = False
            self.trainer.callbacks.insert(0, callback)  # before those that write checkpoints

    def train_dataloader(self) -> BroadcastingDataLoader | None:
        """The loader of ``train_ds``."""
        if self.cfg.get("train_ds") is None:
            return None
        if self._needs_transcripts:
            speech = [
                source for source in parse_dataset(self.cfg.train_ds, "data.train_ds").sources if not source.is_text
            ]
            if speech and not any(source.transcripts for source in speech):
                raise ConfigError(
                    "data.train_ds.transcripts: is false, but model.objectives has some that need transcripts; leave "
                    "the key out, or set it to false for single sources without transcripts alone."
                )
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
        dataset = parse_dataset(train_ds, "data.train_ds")
        if not (groups := [group for group in dataset.groups if group.has_auto_bins]):
            return
        samples_ours = dataset.sampling == "emmett"
        samples_ours |= dataset.sampling == "auto" and nemo_sampler_reason(dataset, kind) is None
        states = random_state()  # measuring is no part of the training
        try:
            indexes = None
            if samples_ours:  # the loader will need them
                with commands_allowed(dataset.allow_commands):
                    of_ranks = dataset.index_dir, self._get_world_size()
                    indexes = open_length_indexes(groups, self.tokenizer, kind, *of_ranks)
            bins = [bins_awaiting_sizes(group, self.tokenizer, kind, indexes) for group in groups]
        finally:
            restore_random_state(states)
        for group, of_group in zip(groups, bins, strict=True):
            config = train_ds[group.name] if group.name else train_ds
            with open_dict(config):
                config.bucket_duration_bins = of_group

    def val_dataloader(self) -> CombinedLoader | BroadcastingDataLoader | list:
        """The loaders of ``validation_ds``, side by side: a batch is ``{dataset: batch or None}``."""
        return self._evaluation_loaders("validation_ds", mode="max_size")

    def test_dataloader(self) -> CombinedLoader | BroadcastingDataLoader | list:
        """The loaders of ``test_ds``, side by side."""
        return self._evaluation_loaders("test_ds", mode="max_size")

    def test_sets(self, rank: int = 0, world_size: int = 1) -> dict[str, MultimodalDataLoader]:
        """The loaders of ``test_ds.datasets`` by name, for an evaluation, whose processes share whole batches.

        Unlike :meth:`test_dataloader`, which keeps the ranks of a trainer in step, this gives each example once.
        Without a ``shard_seed`` of its own a set comes in the same order each time, on every rank.
        """
        _, datasets = self._evaluation_configs("test_ds")
        return {
            name: get_multimodal_dataloader(
                section,
                rank,
                world_size,
                self.dataset,
                self.tokenizer,
                place=f"data.test_ds.datasets.{name}",
                shard_batches=True,
            )
            for name, section in (datasets or {}).items()
        }

    def predict_dataloader(self) -> CombinedLoader | BroadcastingDataLoader | list:
        """The loaders of ``predict_ds``, one after another, as Lightning's ``predict`` wants them."""
        return self._evaluation_loaders("predict_ds", mode="sequential")

    def _evaluation_loaders(self, name: str, mode: str) -> CombinedLoader | BroadcastingDataLoader | list:
        if self.cfg.get(name) is None:
            return []  # Lightning refuses None where the method exists
        common, datasets = self._evaluation_configs(name)
        if datasets is None:
            return self._loader(common, f"data.{name}")
        loaders = {key: self._loader(section, f"data.{name}.datasets.{key}") for key, section in datasets.items()}
        return CombinedLoader(loaders, mode=mode)

    def _evaluation_configs(self, name: str) -> tuple[DictConfig, dict[str, DictConfig] | None]:
        """What the datasets of a section share, and the config of each; None where the section is itself one."""
        # Each rank gets its share of one pass over the data.
        common = self.cfg[name].copy()
        with open_dict(common):  # a recipe composed by Hydra takes no new keys otherwise
            common.force_finite = common.force_map_dataset = True
            # NeMo's default is another order in each process, and with it other sums in the last bit of a score.
            common.setdefault("shard_seed", 0)
            datasets = common.pop("datasets", None)
        if datasets is None:
            return common, None
        with open_dict(common):
            return common, {name: OmegaConf.merge(common, section) for name, section in datasets.items()}

    def _loader(self, section: DictConfig, place: str) -> BroadcastingDataLoader:
        mesh = self._get_device_mesh()
        loader = None
        if is_dp_source_rank(mesh):
            loader = get_multimodal_dataloader(
                section, self._get_dp_rank(), self._get_world_size(), self.dataset, self.tokenizer, place=place
            )
        return _Loader(source=loader, device_mesh=mesh)


class _Loader(BroadcastingDataLoader):
    """NeMo's wrapper, which hides from Lightning the sampler whose epoch it sets."""

    @property
    def sampler(self) -> Any:
        """That of the loader inside, None on ranks that are sent their batches."""
        return getattr(self._source, "sampler", None)


def _check_agreement(place: str, key: str, value: Any, defaults: Mapping[str, Any]) -> None:
    """Refuse data that would reach the model in another form than it expects, which no later check would find."""
    if key in MODEL_DEFINED_KEYS and value is not None and key in defaults and value != defaults[key]:
        reason = MODEL_DEFINED_KEYS[key].format(model=repr(defaults[key]), data=repr(value))
        raise ConfigError(f"{place}.{key}: {reason}.")
