"""The text of a recipe, and its validation on fake tensors."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from nemo.utils import logging
from omegaconf import DictConfig

from nemo_emmett.config import escape_interpolations
from nemo_emmett.data.checks import check_data_config
from nemo_emmett.planning.fake_training import fake_training
from nemo_emmett.planning.recipe import without_device, without_training
from nemo_emmett.training import build_training, check_data_section

NAMES_OF_MODELS = {"salm_t5": "SALM-T5", "salm_gpt": "SALM-GPT", "bestow_gpt": "BESTOW-GPT"}
"""The models that a recipe may have, and what they are called."""

MIN_DURATION, MAX_DURATION, MAX_TOKENS, NUM_SUB_BUCKETS = 0.3, 40.0, 512, 2
"""Limits and sub-buckets of the shipped recipes."""


@dataclass(frozen=True)
class RecipeSource:
    """An entry of ``input_cfg``, and what it holds, for a comment."""

    entry: dict[str, Any]
    holds: str = ""


@dataclass(frozen=True)
class RecipeGroup:
    """The speech or the text of a recipe.

    Args:
        name: of the group or validation set.
        is_speech: it holds recordings.
        sources: of the group.
        num_buckets: ranges of input lengths, while there are no bins.
        bins: as a recipe has them; None: to be found.
        sizes: batch sizes of the bins; None: to be found.
        rule: how the sizes were found, in lines of a comment.
        examples: number of examples that the bins were found by.
        counts: of them in each bin.
        left_out: examples by the key that leaves them out (``max_duration``).
    """

    name: str
    is_speech: bool
    sources: tuple[RecipeSource, ...]
    num_buckets: int = 1
    bins: str | None = None
    sizes: list[int] | None = None
    rule: tuple[str, ...] = ()
    examples: int = 0
    counts: tuple[int, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class RecipeContent:
    """All that the text of a recipe depends on.

    Args:
        target: short name of the model.
        backbone: folder or name of the language model.
        encoder: ``.nemo`` file or name of the speech encoder; None: the data is text alone.
        encoder_width: width of its output.
        num_heads: of the language model's attention.
        groups: of the training data.
        dev: sets of the validation data.
        prompt_format: of the language model's family; None while it is not known.
        pass_steps: for each group the steps of a pass over its data on one device.
        interval: steps between checkpoints.
    """

    target: str
    backbone: str
    encoder: str | None
    encoder_width: int | None
    num_heads: int | None
    groups: tuple[RecipeGroup, ...]
    dev: tuple[RecipeGroup, ...] = ()
    prompt_format: str | None = None
    pass_steps: Mapping[str, float] = field(default_factory=dict)
    interval: int = 1

    @property
    def max_steps(self) -> int:
        """Of the training."""
        return NUM_INTERVALS * self.interval

    def passes(self) -> dict[str, float]:
        """For each group the passes over its data in the training, on one device."""
        return {name: self.max_steps / steps for name, steps in self.pass_steps.items()}


NUM_INTERVALS = 20
"""Checkpoints and validations of a training."""

MANY_PASSES = 50
"""A group that is read more often is memorised."""

WARMUP = 0.05
"""Share of the steps in which the learning rate rises."""


def recipe_text(content: RecipeContent, path: str | os.PathLike[str]) -> str:
    """The recipe as it is written to a file of this path."""
    environment = Environment(
        loader=PackageLoader("nemo_emmett.init", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters |= {"quoted": _quoted, "flow": _flow}
    return environment.get_template("recipe.yaml.j2").render(
        vars(content),
        model_name=NAMES_OF_MODELS[content.target],
        name=Path(path).stem,
        command_path=shlex.quote(str(path)),
        max_steps=content.max_steps,
        passes=" and ".join(f"{_passes(number)} over {name}" for name, number in content.passes().items()),
        warmup_steps=max(round(WARMUP * content.max_steps), 1),
        num_intervals=NUM_INTERVALS,
        min_duration=MIN_DURATION,
        max_duration=MAX_DURATION,
        max_tokens=MAX_TOKENS,
        num_sub_buckets=NUM_SUB_BUCKETS,
    )


def _passes(number: float) -> str:
    return f"{number:,.0f} passes" if number >= 1.5 else "a pass" if number >= 0.95 else f"{number:.0%} of a pass"


def _quoted(text: str) -> str:
    """A text in double quotes, for YAML that OmegaConf reads."""
    dumped = yaml.safe_dump(escape_interpolations(str(text)), default_style='"', allow_unicode=True, width=2**31)
    return dumped.strip()


def _flow(entry: dict[str, Any]) -> str:
    """A mapping in one line."""
    values = {
        key: _quoted(value) if isinstance(value, str) and key != "type" else value for key, value in entry.items()
    }
    return "{" + ", ".join(f"{key}: {value}" for key, value in values.items()) + "}"


def validate(cfg: DictConfig) -> None:
    """Build all that a recipe names, the model of fake tensors, and check all of its data.

    Raises:
        EmmettError: naming the key at fault.
    """
    check_data_section(cfg.data)
    with logging.temp_verbosity(logging.ERROR), fake_training():
        whole = without_device(without_training(cfg))
        whole.data = cfg.data
        training = build_training(whole)
    for name in ("train_ds", "validation_ds"):
        check_data_config(training.datamodule.cfg.get(name), training.datamodule.tokenizer, f"data.{name}")
