"""Optimizer and learning-rate schedule: faults of their sections are found when the model is built.

Training would meet them after the data is opened, or, of a schedule, when its warm-up ends.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from hydra.errors import InstantiationException
from nemo.core.classes.common import safe_instantiate
from omegaconf import OmegaConf
from torch import nn
from torch.optim import Optimizer

from nemo_emmett.errors import ConfigError
from nemo_emmett.models.config import ModelConfig
from nemo_emmett.models.targets import BUILD_FAULTS, class_of, first_line, parse_arguments

_OPTIMIZER, _SCHEDULER = "model.optimizer", "model.lr_scheduler"
_NUMBERS = (bool, int, float)


def parse_optimization(config: ModelConfig) -> dict[str, dict[str, Any]]:
    """The sections ``optimizer`` and ``lr_scheduler``, those that there are.

    Each is built once on a parameter of one element, as NeMo builds it on the model's.

    Raises:
        ConfigError: for a class that does not exist, or an argument that it does not take.
    """
    sections: dict[str, dict[str, Any]] = {}
    if config.optimizer is None:
        return sections
    parsed = parse_arguments(class_of(config.optimizer, _OPTIMIZER), config.optimizer, _OPTIMIZER, ["params"], _NUMBERS)
    sections["optimizer"] = parsed
    optimizer = _built(parsed, _OPTIMIZER, _new_optimizer)
    if config.lr_scheduler is not None:
        section = config.lr_scheduler
        parsed = parse_arguments(class_of(section, _SCHEDULER), section, _SCHEDULER, ["optimizer"], _NUMBERS)
        sections["lr_scheduler"] = parsed
        _built(parsed, _SCHEDULER, partial(_check_schedule, optimizer=optimizer))
    return sections


def _new_optimizer(section: Mapping[str, Any]) -> Optimizer:
    # Muon takes matrices only.
    optimizer = safe_instantiate(OmegaConf.create(dict(section)), [nn.Parameter(torch.zeros(1, 1))], _convert_="all")
    if not isinstance(optimizer, Optimizer):
        raise TypeError("it is no optimizer")
    return optimizer


def _check_schedule(section: Mapping[str, Any], optimizer: Optimizer) -> None:
    scheduler = safe_instantiate(OmegaConf.create(dict(section)), optimizer)
    # Only beyond the warm-up NeMo's schedules look at `min_lr`.
    if (warmup := getattr(scheduler, "warmup_steps", None)) is not None:
        scheduler.last_epoch = warmup + 1
        scheduler.get_lr()


def _built(section: Mapping[str, Any], place: str, build: Callable[[Mapping[str, Any]], Any]) -> Any:
    """What ``build`` makes of a section.

    Raises:
        ConfigError: naming the argument without which it can be built, or else the section.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a schedule that is asked for a learning rate
            return build(section)
    except BUILD_FAULTS as error:
        fault = error
    arguments = [key for key in section if not key.startswith("_")]
    culprits = [key for key in arguments if _can_be_built({k: v for k, v in section.items() if k != key}, build)]
    if len(culprits) == 1:
        place, value = f"{place}.{culprits[0]}", repr(section[culprits[0]])
    else:
        value = str({key: section[key] for key in arguments})
    cause = fault.__cause__ if isinstance(fault, InstantiationException) and fault.__cause__ else fault
    target = section["_target_"]
    raise ConfigError(f"{place}: {target} cannot be built with {value} ({first_line(cause)}); correct it.") from fault


def _can_be_built(section: Mapping[str, Any], build: Callable[[Mapping[str, Any]], Any]) -> bool:
    try:
        build(section)
    except BUILD_FAULTS:
        return False
    return True
