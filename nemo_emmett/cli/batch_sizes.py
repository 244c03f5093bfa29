"""``nemo-emmett oomptimize`` and ``nemo-emmett plan``: batch sizes of a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from nemo_emmett.cli.parameters import (
    BETWEEN_0_AND_1,
    FILE,
    bucket_options,
    limit_option,
    loading,
    recipe_arguments,
    together,
)
from nemo_emmett.corpora.commands import NumberRange

if TYPE_CHECKING:
    from omegaconf import DictConfig

_SPEECH_SHARE = "Share of the memory for speech, where each step holds speech and text."


class Share(click.ParamType):
    """A number between 0 and 1, or ``auto``."""

    name = "share|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        """Parse the option's value."""
        return value if value == "auto" else BETWEEN_0_AND_1.convert(value, param, ctx)


_search_options = together(
    recipe_arguments,
    click.option(
        "--profile", type=FILE, default="profile.yaml", help="Profile to write, for the OOMptimizer callback to read."
    ),
    click.option(
        "--memory-fraction",
        type=NumberRange(0, 1, min_open=True),
        default=0.9,
        help="Share of the device's memory that a step may take.",
    ),
    click.option(
        "--safety-margin",
        type=NumberRange(0, 1, max_open=True),
        default=0.03,
        help="Share of that which stays free.",
    ),
    limit_option,
    click.option("--output", type=FILE, help="PNG to draw batch sizes and memory in.  [default: none]"),
)


@click.command(short_help="Find the batch size of every bucket on the device of this machine.")
@_search_options
@click.option("--memory-budget", help="Memory of a step, instead of the fraction, such as 72GiB.  [default: none]")
@click.option("--modality-share", type=Share(), default=0.5, help=_SPEECH_SHARE)
@click.option("--predict-epoch", is_flag=True, help="Measure the data, and predict the time of an epoch.")
def oomptimize(config: str, overrides: Sequence[str], **options: Any) -> None:
    """Find the batch size of every bucket of the recipe CONFIG, on the device of this machine.

    CONFIG is a YAML file, or the name of a recipe of nemo_emmett; KEY=VALUE overrides a key of it, as for train. A few
    steps of the training are run on made-up batches, none on the data.
    """
    from nemo_emmett.planning.needed import check_new_profile

    recipe = _needed(config, overrides, reads_data=options["predict_epoch"])
    check_new_profile(options["profile"])
    with loading("the model"):
        from nemo_emmett.planning import oomptimize
        from nemo_emmett.training import build_training

        oomptimize(recipe, build_training, **options)


@click.command(short_help="Find the batch size of every bucket for a device that need not be here.")
@_search_options
@click.option("--memory", help="The device to plan for, such as H100, or its memory, such as 80GiB; required.")
@click.option("--devices", type=click.IntRange(1), help="Devices of all nodes together.  [default: the recipe's]")
@click.option(
    "--strategy",
    type=click.Choice(["ddp", "fsdp2"]),
    help="A model on each device, or one that is sharded over all.  [default: the recipe's]",
)
@click.option("--modality-share", type=BETWEEN_0_AND_1, default=0.5, help=_SPEECH_SHARE)
@click.option("--optimise-bins", is_flag=True, help="Measure the data, and find the bins with the shortest epoch.")
@click.option(
    "--choose-checkpointing",
    is_flag=True,
    help="Measure the data, and find the share of activation checkpointing with the shortest epoch.",
)
@bucket_options
def plan(config: str, overrides: Sequence[str], **options: Any) -> None:
    """Find the batch size of every bucket of the recipe CONFIG for a device that need not be here.

    CONFIG is a YAML file, or the name of a recipe of nemo_emmett; KEY=VALUE overrides a key of it, as for train. Steps
    are run without computing anything; no weights are read, and no data unless bins or a share of activation
    checkpointing are to be found.
    """
    from nemo_emmett.planning.needed import check_memory_is_given, check_new_profile

    others = options.pop("devices"), options.pop("strategy")
    recipe = _needed(config, overrides, options["optimise_bins"] or options["choose_checkpointing"], *others)
    check_memory_is_given(options["memory"])
    check_new_profile(options["profile"])
    with loading("the model's architecture"):
        from nemo_emmett.planning import plan
        from nemo_emmett.training import build_training

        plan(recipe, build_training, **options)


def _needed(
    config: str, overrides: Sequence[str], reads_data: bool, devices: int | None = None, strategy: str | None = None
) -> DictConfig:
    """What planning needs of the recipe, for other devices if they are given."""
    from nemo_emmett.early_checks import refuse_empty_paths
    from nemo_emmett.planning.needed import needed_for_planning, on_devices
    from nemo_emmett.runner import compose_incomplete

    composed = on_devices(compose_incomplete(config, overrides), devices, strategy)
    recipe = needed_for_planning(composed, reads_data=reads_data)
    refuse_empty_paths(recipe)
    return recipe
