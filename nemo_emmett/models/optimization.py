"""Optimizer and learning-rate schedule: faults of their sections are found when the model is built.

In training they would appear after the data is opened, or, those of a schedule, when its warm-up ends.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from nemo.core.classes.common import safe_instantiate
from omegaconf import OmegaConf
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from nemo_emmett.models.config import ModelConfig
from nemo_emmett.models.learning_rates import parse_param_groups
from nemo_emmett.models.targets import build, class_of, parse_arguments
from nemo_emmett.typed_config import Count, NonNegative, PositiveWhole, Share

_SCHEDULE_TYPES = {
    "max_steps": PositiveWhole,
    "min_lr": NonNegative,
    **dict.fromkeys(("warmup_steps", "hold_steps", "constant_steps"), Count),
    **dict.fromkeys(("warmup_ratio", "hold_ratio", "constant_ratio"), Share),
}
"""Of NeMo's schedules, which have no annotations, and take a negative number of steps for one that has passed."""


def parse_optimization(config: ModelConfig) -> dict[str, dict[str, Any]]:
    """The sections ``optimizer``, ``optim_param_groups`` and ``lr_scheduler``, those that there are.

    Each is built once on a parameter of one element, as NeMo builds it on the model's.

    Raises:
        ConfigError: for a class that does not exist, or an argument that it does not take.
    """
    sections: dict[str, dict[str, Any]] = {}
    if config.optimizer is not None:
        place, section = "model.optimizer", config.optimizer
        kind = class_of(section, place, Optimizer)
        sections["optimizer"] = parse_arguments(kind, section, place, ["params"], numbers_by_default=True)
        optimizer = build(sections["optimizer"], place, _new_optimizer)
        if (groups := config.optim_param_groups) is not None:
            sections["optim_param_groups"] = parse_param_groups(groups, kind, sections["optimizer"], _new_optimizer)
        if config.lr_scheduler is not None:
            place, section = "model.lr_scheduler", config.lr_scheduler
            kind = class_of(section, place, LRScheduler)
            parsed = parse_arguments(kind, section, place, ["optimizer"], _SCHEDULE_TYPES, numbers_by_default=True)
            sections["lr_scheduler"] = parsed
            build(parsed, place, partial(_check_schedule, optimizer=optimizer))
    return sections


def _new_optimizer(section: Mapping[str, Any]) -> Optimizer:
    # Muon takes matrices only.
    optimizer = safe_instantiate(OmegaConf.create(dict(section)), [nn.Parameter(torch.zeros(1, 1))], _convert_="all")
    if not isinstance(optimizer, Optimizer):
        raise TypeError("it gives no optimizer")
    return optimizer


def _check_schedule(section: Mapping[str, Any], optimizer: Optimizer) -> None:
    scheduler = safe_instantiate(OmegaConf.create(dict(section)), optimizer)
    if (warmup := getattr(scheduler, "warmup_steps", None)) is not None:
        scheduler.last_epoch = warmup + 1  # `min_lr` has no effect before
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NeMo advises another method for the last learning rate
            scheduler.get_lr()
