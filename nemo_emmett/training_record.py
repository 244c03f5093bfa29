"""What an exported model says of its training: the value of ``training`` in its ``config.json``.

It holds names of files, not their paths: an export may be given to others.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_emmett import __version__
from nemo_emmett.callbacks.trained_examples import Direction, TrainedExamples, counts_of
from nemo_emmett.early_checks import SOURCE_PATHS
from nemo_emmett.models.exported import MAX_DURATION_KEY
from nemo_emmett.typed_config import is_number

_SHOWN_FILES = 8
"""Files that are named of a group of sources."""


def record_of_trainer(trainer: Trainer, cfg: DictConfig) -> dict[str, Any]:
    """The record of the last weights of a training in this process.

    Args:
        trainer: whose fit has ended, or broke off.
        cfg: the recipe.
    """
    found = [one for one in trainer.callbacks if isinstance(one, TrainedExamples)]
    counts = (found[0].of_all_ranks or found[0].before + found[0].counts) if found else Counter()
    return _record(cfg, counts) | {"steps": trainer.global_step, "processes": trainer.world_size}


def record_of_checkpoint(checkpoint: Mapping[str, Any], cfg: DictConfig) -> dict[str, Any]:
    """The record of a training up to one of its checkpoints.

    Args:
        checkpoint: Lightning's, or what of it is not in the shards.
        cfg: the recipe.
    """
    state = (checkpoint.get("callbacks") or {}).get(TrainedExamples.__qualname__) or {}
    known = {"steps": checkpoint.get("global_step"), "processes": state.get("processes")}
    return _record(cfg, counts_of(state)) | {key: value for key, value in known.items() if value is not None}


def _record(cfg: DictConfig, counts: Counter[Direction]) -> dict[str, Any]:
    examples: Counter[str] = Counter()
    directions: defaultdict[str, list[list[str | None]]] = defaultdict(list)
    for (modality, source, target), count in sorted(counts.items(), key=lambda item: tuple(map(str, item[0]))):
        examples[modality] += count
        if target is not None:
            directions[modality].append([source, target])
    optimizer = OmegaConf.select(cfg, "model.optimizer") or {}
    section = _train_ds(cfg)
    return {
        "nemo_emmett": __version__,
        "precision": str(OmegaConf.select(cfg, "trainer.precision") or "32-true"),
        "optimizer": {"name": str(optimizer.get("_target_", "")).rpartition(".")[2], "lr": optimizer.get("lr")},
        "examples": dict(examples),
        "directions": dict(directions),
        "data": _data(section),
        **_max_duration(section),
    }


def _train_ds(cfg: DictConfig) -> dict[str, Any]:
    """The section of the training data; empty where it cannot be resolved."""
    try:
        return OmegaConf.to_container(OmegaConf.select(cfg, "data.train_ds") or OmegaConf.create(), resolve=True)
    except OmegaConfBaseException:
        return {}


def _groups(section: dict[str, Any]) -> dict[str, dict[str, Any]]:
    groups = {key: value for key, value in section.items() if isinstance(value, dict) and "input_cfg" in value}
    return groups or {"train": section}


def _max_duration(section: dict[str, Any]) -> dict[str, float]:
    """Seconds of the longest recordings that are trained on, where a group of sources limits them."""
    limits = [group.get("max_duration", section.get("max_duration")) for group in _groups(section).values()]
    finite = [float(limit) for limit in limits if is_number(limit) and 0 < limit < float("inf")]
    return {MAX_DURATION_KEY: max(finite)} if finite else {}


def _data(section: dict[str, Any]) -> dict[str, list[str]]:
    """The names of the training data's files, by the group of sources."""
    files = {name: list(dict.fromkeys(_files(group))) for name, group in _groups(section).items()}
    return {
        name: [*found[:_SHOWN_FILES], *([f"{len(found) - _SHOWN_FILES} more"] if len(found) > _SHOWN_FILES else [])]
        for name, found in files.items()
    }


def _files(value: Any, key: str = "") -> Iterator[str]:
    """The names of files below a section."""
    if isinstance(value, dict):
        for name, below in value.items():
            yield from _files(below, key if key in SOURCE_PATHS else name)
    elif isinstance(value, list):
        for below in value:
            yield from _files(below, key)
    elif isinstance(value, str) and key in SOURCE_PATHS:
        yield PurePath(value).name
