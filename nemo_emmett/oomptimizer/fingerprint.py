"""The fingerprint of a run: what the memory of its training steps, and so a profile, depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib import metadata
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf
from torch.distributed.tensor import DTensor

from nemo_emmett.errors import ConfigError, Help
from nemo_emmett.oomptimizer.buckets import Group
from nemo_emmett.oomptimizer.profile import ONLY_GROUP, shown

LIBRARIES = ("torch", "nemo_toolkit", "lightning", "transformers")
"""Distributions whose versions affect the memory of a step."""

RUN_SPECIFIC_KEYS = frozenset(
    {
        "train_ds",
        "validation_ds",
        "test_ds",
        "predict_ds",
        "pretrained_weights",
        "tokenizer",  # its vocabulary shows in the parameters
        "tokenizer_path",
        "lr",
        "sched",
        "lr_scheduler",
        "modality_loss_weights",
        "max_new_tokens",
        "validation_bleu",
        "cache_encoder",  # counted as if there were none
        "log_prediction",
        "nemo_version",
    }
)
"""Keys of a model's config that may change from run to run without effect on the memory of training."""

OBJECTIVES_KEY = "objectives"
"""Key of our models' config for further terms of the loss."""

OBJECTIVE_SCHEDULE_KEYS = frozenset({"weight", "start_step", "warmup_steps", "end_step", "temperature"})
"""Keys of an objective without effect on the memory of the largest step, in which all are active."""

CLASS_KEYS = ("_target_", "target")
"""Keys of a model's config that name its class, which is a field of the fingerprint: a model is the same without such a
key, with a short name and with a full one."""

HASH_DIGITS = 12
SHORT_HASH_DIGITS = 8


def fingerprint_of(
    trainer: Trainer, module: LightningModule, groups: Mapping[str, Group], *, planned: bool = False
) -> dict[str, Any]:
    """The fingerprint of a run, in plain values for a profile.

    Args:
        trainer: with its optimizers set up, as it is at the start of the fit.
        module: the model, not wrapped.
        groups: buckets of the training data (:func:`~nemo_emmett.oomptimizer.buckets.read_groups`).
        planned: without device, strategy and world size, which are those of the machine that plans; a training
            compares only the rest.
    """
    fingerprint = {
        "model": {"class": _class_name(module), "config": config_hash(getattr(module, "cfg", None))},
        "parameters": _parameters(module),
        "sharded_over": _ranks_of_shards(module),
        "optimizers": [_optimizer(optimizer) for optimizer in trainer.optimizers],
        "precision": str(trainer.precision),
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        # Without the label of a local build ("2.13.0+cpu").
        "versions": {library: metadata.version(library).partition("+")[0] for library in LIBRARIES},
        "bins": _by_group({name: shown(group.bins) for name, group in groups.items()}),
        # Equal bins may bound seconds or tokens, of speech or of text, with or without the output.
        "longest_example": _by_group({name: asdict(group.buckets[-1].shape) for name, group in groups.items()}),
    }
    if not planned:
        fingerprint |= {
            "strategy": type(trainer.strategy).__name__,
            "world_size": trainer.world_size,
            "device": _device(trainer.strategy.root_device),
        }
    return fingerprint


def check_fingerprint(stored: Mapping[str, Any], actual: Mapping[str, Any], path: str) -> None:
    """Refuse a profile that was measured on something else.

    Only what is stored is compared: a profile written by hand has no fingerprint, one that was planned no device.

    Raises:
        ConfigError: naming every field that differs, with both values.

    Example:
        >>> check_fingerprint({"world_size": 1}, {"world_size": 1, "precision": "bf16"}, "profile.yaml")
    """
    actual_values = dict(_flat(actual))
    differing = [
        f"{field} was {_shown(value)} and is {_shown(actual_values.get(field))}"
        for field, value in _flat(stored)
        if value != actual_values.get(field)
    ]
    if differing:
        raise ConfigError(
            f"{path}: the profile was made for something else ({'; '.join(differing)}); delete the file to measure "
            "again, or name another profile.",
            page=Help.OTHER_PROFILE,
        )


def short_hash(fingerprint: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits, for a file name: the same for equal fingerprints, whatever the order of their keys."""
    return _hash(fingerprint)[:SHORT_HASH_DIGITS]


def config_hash(cfg: Any) -> str | None:
    """Hash of a model's config.

    It does not depend on the order of keys, on run-specific keys, on the name by which the config calls the model's
    class, or on the folders of files.
    """
    if cfg is None:
        return None
    plain = OmegaConf.to_container(cfg, resolve=True) if isinstance(cfg, DictConfig) else cfg
    described = {key: value for key, value in plain.items() if key not in (*CLASS_KEYS, OBJECTIVES_KEY)}
    if objectives := _computed(plain.get(OBJECTIVES_KEY) or {}):
        described[OBJECTIVES_KEY] = objectives
    return _hash(_essence(described))[:HASH_DIGITS]


def _computed(objectives: Mapping[str, Any]) -> dict[str, Any]:
    """The objectives that some step computes, without their weights and schedules."""
    return {
        name: {key: value for key, value in keys.items() if key not in OBJECTIVE_SCHEDULE_KEYS and value is not None}
        for name, keys in objectives.items()
        if keys is not None and keys.get("weight", 1.0)
    }


def _essence(value: Any) -> Any:
    """A config without run-specific keys and the folders of files."""
    if isinstance(value, Mapping):
        return {str(key): _essence(item) for key, item in value.items() if str(key) not in RUN_SPECIFIC_KEYS}
    if isinstance(value, (list, tuple)):
        return [_essence(item) for item in value]
    if isinstance(value, str):
        return value.rstrip("/").rpartition("/")[2]  # the same model may be in another folder on another machine
    return value


def _parameters(module: LightningModule) -> dict[str, Any]:
    parameters = list(module.named_parameters())
    described = sorted((name, list(p.shape), str(p.dtype), p.requires_grad) for name, p in parameters)
    return {
        "total": sum(p.numel() for _, p in parameters),
        "trainable": sum(p.numel() for _, p in parameters if p.requires_grad),
        "hash": _hash(described)[:HASH_DIGITS],
    }


def _ranks_of_shards(module: LightningModule) -> int | dict[str, int]:
    """The ranks over which parameters are sharded; 1: each has whole ones. Where they are sharded in several ways, the
    ranks of each."""
    if (mesh := module.device_mesh) is not None:
        sizes = dict(zip(mesh.mesh_dim_names, mesh.shape, strict=True))
        if sizes["tensor_parallel"] > 1 or len(sizes) > 2:
            return sizes
    return max((p.device_mesh.size() for p in module.parameters() if isinstance(p, DTensor)), default=1)


def _optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Its class, and what affects the size of its state: switches (``amsgrad``), and whether it has momentum."""
    settings = {
        name: value
        for name, value in sorted(optimizer.defaults.items())
        if isinstance(value, (bool, str, type(None))) and name not in RUN_SPECIFIC_KEYS
    }
    if "momentum" in optimizer.defaults:
        settings["momentum"] = bool(optimizer.defaults["momentum"])
    return {"class": _class_name(optimizer), **settings}


def _by_group(values: dict[str, Any]) -> Any:
    return values.get(ONLY_GROUP, values)


def _device(device: torch.device) -> dict[str, Any]:
    """Name and memory in bytes; of a CPU the name alone, since only the budget limits a step."""
    if device.type != "cuda":
        return {"name": device.type}
    properties = torch.cuda.get_device_properties(device)
    return {"name": properties.name, "memory": properties.total_memory}


def _class_name(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _flat(fields: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings and lists, each with its path: ``device.name``."""
    if isinstance(fields, Mapping):
        for key, value in fields.items():
            yield from _flat(value, f"{name}.{key}" if name else str(key))
    elif isinstance(fields, (list, tuple)):
        for number, value in enumerate(fields):
            yield from _flat(value, f"{name}[{number}]")
    else:
        yield name, fields


def _shown(value: Any) -> str:
    return "nothing" if value is None else str(value)
