"""OOMptimizer's arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import annotated_types

from nemo_emmett.errors import ConfigError
from nemo_emmett.oomptimizer.memory import MemoryFraction, parse_memory
from nemo_emmett.typed_config import Number, Positive, PositiveWhole, Switch, parse_section

AUTO_SHARE = "auto"
"""``modality_share: auto``: the share with the most tokens per second."""

Margin = Annotated[Number, annotated_types.Ge(0), annotated_types.Lt(1)]
"""A share of something that is not all of it."""

ModalityShare = Annotated[Number, annotated_types.Ge(0.01), annotated_types.Lt(1)]
"""What one of two modalities may have of the memory."""

_NO_SETTINGS = {"mode", "guard", "then_train", "settings"}
"""Fields that do not decide batch sizes."""


@dataclass(frozen=True)
class Options:
    """The checked arguments of :class:`~nemo_emmett.callbacks.OOMptimizer`, which describes them.

    Args:
        settings: the arguments that decide batch sizes, for the profile.
    """

    mode: Literal["calibrate", "plan", "guard"]
    memory_fraction: MemoryFraction
    memory_budget: Any
    safety_margin: Margin
    modality_share: ModalityShare | Literal["auto"]
    guard: Switch | None
    tokens_per_second: Positive
    precision: Margin
    max_batch_size: PositiveWhole
    then_train: Switch | None
    settings: Mapping[str, Any]

    @classmethod
    def parse(cls, arguments: Mapping[str, Any]) -> Options:
        """Check the arguments.

        Raises:
            ConfigError: naming the first that cannot be used.
        """
        options = parse_section(cls, arguments, "OOMptimizer", settings={})
        if options.mode == "plan" and options.memory_budget is None:
            raise ConfigError("OOMptimizer.memory_budget: is missing; a plan is for some memory: give 80GiB, or H100.")
        if options.memory_budget is not None:
            parse_memory(options.memory_budget, "OOMptimizer.memory_budget")
        if options.mode == "plan" and options.modality_share == AUTO_SHARE:
            raise ConfigError(
                "OOMptimizer.modality_share: 'auto' cannot be used in mode 'plan', which measures no time; give a "
                "number from 0.01 to below 1."
            )
        if options.then_train is not None and options.mode != "plan":
            raise ConfigError(f"OOMptimizer.then_train: means nothing in mode '{options.mode}'; remove it.")
        # As they are given: a hash of them is part of a profile's file name, and those of 1 and 1.0 differ.
        parsed = {name: value for name, value in vars(options).items() if name not in _NO_SETTINGS}
        options.settings.update(
            {name: arguments[name] if arguments[name] == value else value for name, value in parsed.items()}
        )
        if options.memory_budget is not None:
            options.settings["memory_fraction"] = None
        return options

    @property
    def guards(self) -> bool:
        """Whether training is guarded."""
        return self.mode != "plan" if self.guard is None else self.guard

    @property
    def requires_guard(self) -> bool:
        """Whether a model that cannot be guarded is refused."""
        return self.guard is True or self.mode == "guard"

    @property
    def ends_after_planning(self) -> bool:
        """Whether the fit ends without a training step."""
        return self.mode == "plan" and not self.then_train
