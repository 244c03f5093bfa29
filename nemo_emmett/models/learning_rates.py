"""Learning rates and other settings of the optimizer for each part of a model: ``model.optim_param_groups``.

The key is that of NeMo's ASR models (``ModelPT.setup_optimizer_param_groups``). Here a schedule scales the rates of all
parts in proportion, whatever its own minimum is: a part's rate is its share of ``model.optimizer.lr`` at every step.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lightning import LightningModule
from nemo.collections.speechlm2.parts.optim_setup import freeze_and_subset
from nemo.core.classes.common import safe_instantiate
from nemo.core.optim import patch_flashoptim_uneven_shard_support
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from nemo_emmett.config import check_keys
from nemo_emmett.errors import ConfigError
from nemo_emmett.models.config import PARTS
from nemo_emmett.models.targets import build, parse_arguments

OPTIMIZER_PARTS = {
    "encoder": PARTS["encoder"],
    "adapter": r"^(perception\.(?!preprocessor\.|encoder\.|encoder_multilayer\.)|cross_attention\.).+$",
    "llm": PARTS["llm"],
}
"""Keys of ``optim_param_groups``, with a regular expression of the parameters of each."""

KEY = "model.optim_param_groups"


def parse_param_groups(
    groups: Mapping[str, Any], kind: type[Optimizer], section: Mapping[str, Any], make: Any
) -> dict[str, dict[str, Any]]:
    """Check the settings of each part as those of ``model.optimizer`` are checked.

    Args:
        groups: part -> settings.
        kind: the optimizer's class.
        section: ``model.optimizer``, parsed.
        make: builds the optimizer of a section.

    Returns:
        The settings with their types.

    Raises:
        ConfigError: for a part that does not exist, or a setting that the optimizer does not have for each group.
    """
    defaults = make(section).defaults
    if not isinstance(defaults.get("lr"), float | int) or defaults["lr"] <= 0:
        raise ConfigError(
            f"model.optimizer.lr: {defaults.get('lr')!r} cannot be used with {KEY}, whose rates are scaled in "
            "proportion to it; give a number above 0."
        )
    for part in check_keys(groups, OPTIMIZER_PARTS, KEY):
        raise ConfigError(f"{KEY}.{part}: there is no such part; use {', '.join(OPTIMIZER_PARTS)}.")
    parsed: dict[str, dict[str, Any]] = {}
    for part, settings in groups.items():
        place = f"{KEY}.{part}"
        if not isinstance(settings, Mapping) or not settings:
            raise ConfigError(f"{place}: {settings!r} cannot be used; give settings of the optimizer, such as an lr.")
        for key in check_keys(settings, defaults, place):
            raise ConfigError(f"{place}.{key}: no setting of a group of {kind.__name__}; use {', '.join(defaults)}.")
        whole = parse_arguments(kind, {**section, **settings}, place, ["params"], numbers_by_default=True)
        build(whole, place, make)
        parsed[part] = {key: whole[key] for key in settings}
        if not parsed[part].get("lr", 1.0):
            raise ConfigError(f"{place}.lr: 0 trains nothing; write model.freeze, or give a number above 0.")
    return parsed


def configure_by_part(model: LightningModule, groups: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """NeMo's ``configure_optimizers``, with a parameter group for each part of the model that is trained.

    Args:
        model: with NeMo's ``cfg``.
        groups: part -> settings, parsed.

    Raises:
        ConfigError: for a trained parameter of no part, or a part of which nothing is trained.
    """
    frozen, thawed = model.cfg.get("freeze_params", []), model.cfg.get("prevent_freeze_params", [])
    trained = {id(parameter) for parameter in freeze_and_subset(model.named_parameters(), frozen, thawed)}
    members: dict[str, list[Parameter]] = {part: [] for part in OPTIMIZER_PARTS}
    for name, parameter in model.named_parameters():
        if id(parameter) in trained:
            members[part_of(name)].append(parameter)
    for part in groups:
        if not members[part]:
            raise ConfigError(f"{KEY}.{part}: nothing of this part is trained; leave it out, or do not freeze it.")
    sections: list[dict[str, Any]] = []
    for part, parameters in members.items():
        if parameters:
            settings = {key: value for key, value in groups.get(part, {}).items() if key != "lr"}
            sections.append({"params": parameters, "part": part, **settings})
    optimizer = safe_instantiate(model.cfg.optimizer, sections, _convert_="all")
    patch_flashoptim_uneven_shard_support(optimizer)
    base_lr = optimizer.defaults["lr"]
    for group in optimizer.param_groups:
        group["part_lr"] = groups.get(group["part"], {}).get("lr", base_lr)
        group["base_lr"] = base_lr
    configured: dict[str, Any] = {"optimizer": optimizer}
    if "lr_scheduler" in model.cfg:
        # Built on groups that all have the rate of `model.optimizer`: minima and the like mean that one.
        scheduler = in_proportion(safe_instantiate(model.cfg.lr_scheduler, optimizer))
        configured["lr_scheduler"] = {"scheduler": scheduler, "interval": "step", "frequency": 1}
    else:
        _scale(optimizer)
    return configured


def check_resumed_groups(has_parts: bool, checkpoint: Mapping[str, Any]) -> None:
    """Check that a checkpoint's optimizer has the groups of the recipe's.

    Args:
        has_parts: whether the recipe has ``optim_param_groups``.
        checkpoint: Lightning's; one whose optimizer is in other files (FSDP2) is not checked.

    Raises:
        ConfigError: if either has groups by part, and the other has not.
    """
    saved = [group for state in checkpoint.get("optimizer_states") or () for group in state.get("param_groups", ())]
    if saved and any("part" in group for group in saved) != has_parts:
        what = "does not have the groups of this key" if has_parts else "has groups of this key, and the recipe has not"
        raise ConfigError(
            f"{KEY}: the checkpoint's optimizer {what}; resume with the recipe as it was, or start from the "
            "checkpoint's weights (model.init_from_checkpoint)."
        )


def part_of(name: str) -> str:
    """The part that a parameter belongs to.

    Raises:
        ConfigError: if there is none.
    """
    parts = [part for part, pattern in OPTIMIZER_PARTS.items() if re.match(pattern, name)]
    if len(parts) != 1:
        raise ConfigError(
            f"{KEY}: the trained parameter '{name}' belongs to {' and '.join(parts) or 'none'} of the parts "
            f"{', '.join(OPTIMIZER_PARTS)}; freeze it, or leave {KEY} out."
        )
    return parts[0]


def learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """``learning_rate``, which is that of ``model.optimizer`` under its schedule, and ``learning_rate_<part>`` where
    parts have their own."""
    first, *_ = groups = optimizer.param_groups
    rates = {"learning_rate": first.get("schedule_lr", first["lr"])}
    return rates | {f"learning_rate_{group['part']}": group["lr"] for group in groups if "part" in group}


def in_proportion(scheduler: LRScheduler) -> LRScheduler:
    """Have a schedule compute the rate of ``model.optimizer`` alone, and give every group its share.

    Args:
        scheduler: newly made, of an optimizer whose groups have ``part_lr`` and ``base_lr``; it is changed.
    """
    kind = type(scheduler)
    scheduler.__class__ = type(kind.__name__, (_InProportion, kind), {})
    scheduler._last_lr = _scale(scheduler.optimizer)
    return scheduler


class _InProportion:
    """Mixin of a schedule: it computes the rate of ``model.optimizer``, and every group gets its share."""

    optimizer: Optimizer

    def step(self, *args: Any, **kwargs: Any) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group["schedule_lr"]
        super().step(*args, **kwargs)
        self._last_lr = _scale(self.optimizer)


def _scale(optimizer: Optimizer) -> list[float]:
    """Give groups of a rate of their own their share of what the schedule has set; returns the rates of all."""
    for group in optimizer.param_groups:
        group["schedule_lr"] = group["lr"]
        if group["part_lr"] != group["base_lr"]:
            # Where the schedule is at its peak, this is exactly the rate of the recipe.
            group["lr"] = group["part_lr"] * (group["lr"] / group["base_lr"])
    return [group["lr"] for group in optimizer.param_groups]
