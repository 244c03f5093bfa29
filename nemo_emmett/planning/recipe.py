"""A recipe, changed so that its training ends where batch sizes are known, before the first batch of data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from lightning.pytorch import LightningModule, Trainer
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from nemo_emmett.data import MultimodalDataModule
from nemo_emmett.data.config.dataset_config import parse_dataset
from nemo_emmett.errors import ConfigError
from nemo_emmett.oomptimizer.buckets import configs_of_groups
from nemo_emmett.planning.architecture import architecture_only
from nemo_emmett.typed_config import PositiveWhole, parse_value

_NO_TRAINING = {
    "limit_train_batches": 0,  # the fit begins, with all its hooks, and ends before a loader is built
    "limit_val_batches": 0,
    "num_sanity_val_steps": 0,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""Keys of ``trainer`` that keep a fit from training, and from writing anything."""

_HERE = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto"}
"""Keys of ``trainer`` for a plan, which is made by one process without a device."""

_PLACE = "trainer.strategy"

_DEFAULT_SIZES = {
    "ModelParallelStrategy": {"data_parallel_size": "auto", "tensor_parallel_size": "auto", "replicas": 1},
    "HybridShardedStrategy": {"data_parallel_size": "auto", "tensor_parallel_size": 1, "replicas": "auto"},
}
"""Strategies that shard a model by FSDP2: Lightning's, and ours for HSDP."""

_OTHER_SHARDING = ("fsdp", "automodel", "deepspeed", "megatron")
"""What the names of other strategies hold that put parts of the model on each device."""


class Training(Protocol):
    """All that a recipe names, ready to fit (:class:`nemo_emmett.training.Training`)."""

    trainer: Trainer
    model: LightningModule
    datamodule: MultimodalDataModule


class Build(Protocol):
    """Builds what a recipe names (:func:`nemo_emmett.training.build_training`)."""

    def __call__(self, cfg: DictConfig, construction: AbstractContextManager[Any] | None = None) -> Training:
        """Build it; ``construction`` is entered while the model is built."""


def without_training(cfg: DictConfig) -> DictConfig:
    """The same recipe, whose fit neither trains nor writes, and needs no data but ``train_ds``.

    Raises:
        ConfigError: if there is no ``data.train_ds``, or a key of it is misspelt or cannot have its value.
    """
    if OmegaConf.select(cfg, "data.train_ds") is None:
        raise ConfigError("data.train_ds: the recipe has none, so there are no buckets to find batch sizes for.")
    parse_dataset(cfg.data.train_ds, "data.train_ds")
    # Resolved as a whole: sections may refer to one another.
    changed = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    for key in ("exp_manager", "export_dir"):
        changed.pop(key, None)
    changed.data = {"train_ds": changed.data.train_ds}
    changed.trainer.pop("callbacks", None)
    changed.trainer.update(_NO_TRAINING)
    return changed


def without_device(cfg: DictConfig) -> DictConfig:
    """The same recipe for a plan: one process on the CPU, and the model's architecture without its weights.

    Where FSDP2 shards the model, the process is the first of as many ranks (:func:`sharding_of`).

    Raises:
        ModelError: if the config of a pretrained part cannot be read.
    """
    changed = cfg.copy()
    changed.trainer.update(_HERE)
    if (sharding := sharding_of(cfg.trainer)).devices > 1:
        sizes = {"data_parallel_size": sharding.data_ranks, "tensor_parallel_size": sharding.tensor_parallel}
        changed.trainer.strategy = {**cfg.trainer.strategy, **sizes}
        changed.trainer.devices = sharding.devices
    if "pretrained_llm" in cfg.model:  # an ASR model of NeMo is built from its config alone
        changed.model = {**architecture_only(changed.model), "_target_": changed.model.get("_target_")}
    return changed


@dataclass(frozen=True)
class Sharding:
    """How a strategy shards a model.

    Args:
        data_ranks: the ranks with different data.
        tensor_parallel: the ranks that share each layer, and read the same data.
        replicas: groups of data ranks, in each of which the model is sharded.
    """

    data_ranks: int = 1
    tensor_parallel: int = 1
    replicas: int = 1

    @property
    def devices(self) -> int:
        """All ranks."""
        return self.data_ranks * self.tensor_parallel

    def __str__(self) -> str:
        parts = [
            f"Weights, gradients and optimizer state are sharded over {self.data_ranks // self.replicas:,} devices"
        ]
        parts += [f"of which there are {self.replicas:,} groups"] * (self.replicas > 1)
        parts += [f"and each layer over {self.tensor_parallel:,} more"] * (self.tensor_parallel > 1)
        return ", ".join(parts) + "."


def sharding_of(trainer: DictConfig) -> Sharding:
    """How a recipe's strategy shards the model.

    Raises:
        ConfigError: if that cannot be planned: for a strategy other than Lightning's for FSDP2 and ours, or if the
            recipe does not say how many devices there are.
    """
    name = strategy_name(trainer)
    if name not in _DEFAULT_SIZES:
        if any(word in name.lower().replace("_", "") for word in _OTHER_SHARDING):
            raise ConfigError(
                f"trainer.strategy: '{name}' puts parts of the model on each device in a way that cannot be planned "
                "without them; run `nemo-emmett oomptimize` on the devices, or plan for emmett_strategy=fsdp2."
            )
        return Sharding()
    devices, sizes = trainer.get("devices", "auto"), dict(_DEFAULT_SIZES[name])
    sizes.update({key: trainer.strategy[key] for key in sizes if trainer.strategy.get(key) is not None})
    if str(devices) != "auto":  # what Lightning and our strategy make of `auto`
        of_node = len(devices) if isinstance(devices, ListConfig) else int(devices)
        if sizes["tensor_parallel_size"] == "auto":
            sizes["tensor_parallel_size"] = of_node
        if sizes["data_parallel_size"] == "auto":
            parallel = parse_value(PositiveWhole, sizes["tensor_parallel_size"], f"{_PLACE}.tensor_parallel_size")
            sizes["data_parallel_size"] = max(1, of_node * int(trainer.get("num_nodes", 1)) // parallel)
    for key, value in sizes.items():
        if value == "auto":
            raise ConfigError(
                f"{_PLACE}.{key}: is needed to plan for a model that is sharded; give it a number of devices, or plan "
                "with --devices."
            )
        sizes[key] = parse_value(PositiveWhole, value, f"{_PLACE}.{key}")
    return Sharding(sizes["data_parallel_size"], sizes["tensor_parallel_size"], sizes["replicas"])


def strategy_name(trainer: DictConfig) -> str:
    """Of the trainer's strategy, its alias or the name of its class."""
    strategy = trainer.get("strategy", "auto")
    if isinstance(strategy, DictConfig):
        strategy = str(strategy.get("_target_", "auto")).rpartition(".")[2]
    return str(strategy)


def ddp_bucket_bytes(trainer: DictConfig, model: LightningModule) -> int:
    """Bytes that each rank takes to average gradients (``DistributedDataParallel``); 0 on one device.

    The buckets hold a copy of every gradient, unless gradients live in them (``gradient_as_bucket_view``).
    """
    if strategy_name(trainer) in _DEFAULT_SIZES:  # gradients are scattered, and in shards from then on
        return 0
    strategy = trainer.get("strategy", "auto")
    in_buckets = isinstance(strategy, DictConfig) and strategy.get("gradient_as_bucket_view", False)
    devices = trainer.get("devices", "auto")
    count = len(devices) if isinstance(devices, ListConfig) else devices
    has_several_devices = str(count) not in ("1", "auto") or int(trainer.get("num_nodes", 1)) > 1
    if in_buckets or not (has_several_devices or "ddp" in strategy_name(trainer).lower()):
        return 0
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def with_bins(cfg: DictConfig, bins: Mapping[str, Sequence]) -> DictConfig:
    """The same recipe with other bins for some groups of ``data.train_ds``."""
    changed = cfg.copy()
    groups = configs_of_groups(changed.data.train_ds)
    for name, of_group in bins.items():
        with open_dict(groups[name]):
            groups[name].bucket_duration_bins = [list(b) if isinstance(b, (list, tuple)) else b for b in of_group]
            groups[name].pop("bucket_batch_size", None)
    return changed


def with_groups(cfg: DictConfig, names: Iterable[str]) -> DictConfig:
    """The same recipe with some groups of ``data.train_ds`` only; for those whose batches have steps of their own."""
    changed, kept = cfg.copy(), set(names)
    train_ds = changed.data.train_ds
    for name in set(configs_of_groups(train_ds)) - kept:
        train_ds.pop(name)
    train_ds.pop("sampler_weights", None)
    return changed
