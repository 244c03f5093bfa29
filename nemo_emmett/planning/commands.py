"""``nemo-emmett oomptimize`` and ``nemo-emmett plan``: a recipe's batch sizes, and the bins that go with them.

Both build the training of the recipe and begin its fit, in which the :class:`~nemo_emmett.callbacks.OOMptimizer`
callback finds the batch sizes; the fit ends before the first batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig
from rich.console import Console

from nemo_emmett.callbacks.oomptimizer import OOMptimizer
from nemo_emmett.data.bucketing.length_stats import Lengths
from nemo_emmett.oomptimizer import Profile
from nemo_emmett.oomptimizer.memory import MemoryFraction, budget_of, parse_memory, shown
from nemo_emmett.planning.bins_and_sizes import examples_per_bucket
from nemo_emmett.planning.checkpointing import check_has_checkpointing, with_fastest_share
from nemo_emmett.planning.lengths import lengths_of_groups
from nemo_emmett.planning.needed import check_memory_is_given, check_new_profile
from nemo_emmett.planning.picture import draw_profile
from nemo_emmett.planning.planner import DataOfRecipe, Planner, fit, with_fastest_bins, with_own_bins
from nemo_emmett.planning.recipe import Build, sharding_of, without_training
from nemo_emmett.planning.report import LiveTable, duration
from nemo_emmett.planning.timing import Rate
from nemo_emmett.run_log import plain_console
from nemo_emmett.typed_config import PositiveWhole, parse_value

SAFETY_MARGIN = 0.03
"""Share of the budget that stays free; the callback's default."""


def oomptimize(
    cfg: DictConfig,
    build: Build,
    *,
    profile: str | Path,
    memory_fraction: float = 0.9,
    memory_budget: int | str | None = None,
    safety_margin: float = SAFETY_MARGIN,
    modality_share: float | str = 0.5,
    predict_epoch: bool = False,
    limit: int | None = None,
    output: str | Path | None = None,
    console: Console | None = None,
) -> Profile:
    """Find the batch sizes of a recipe on this machine's device.

    Args:
        cfg: a recipe.
        build: builds its training.
        profile: path of the profile to write.
        memory_fraction: share of the device's memory that a step may take.
        memory_budget: what it may take instead: bytes, or such as ``72GiB``.
        safety_margin: share of that which stays free.
        modality_share: of speech, if each step holds speech and text; or ``auto``.
        predict_epoch: measure the lengths of the data, and put the predicted time of an epoch into the profile.
        limit: examples to measure of each group; by default each example once.
        output: PNG to draw the batch sizes and the memory in.
        console: where to print; the terminal unless given.

    Raises:
        EmmettError: for a mistake in the recipe, or if a bucket does not fit.
    """
    check_new_profile(profile)
    console = console or plain_console(quiet=bool(rank_zero_only.rank))
    training = build(without_training(cfg))
    optimizer = OOMptimizer(
        mode="calibrate",
        memory_fraction=memory_fraction,
        memory_budget=memory_budget,
        profile=profile,
        safety_margin=safety_margin,
        modality_share=modality_share,
        guard=False,
    )

    def budget() -> float:
        return budget_of(training.trainer.strategy.root_device, memory_fraction, memory_budget) * (1 - safety_margin)

    fit(training, optimizer, LiveTable("Batch sizes on this device", budget, console))
    found = optimizer.profile
    if training.trainer.is_global_zero:
        if predict_epoch:
            two_dimensional = {name: isinstance(b.bucket_duration_bins[0], tuple) for name, b in found.groups.items()}
            found = _with_epoch(found, lengths_of_groups(training.datamodule, two_dimensional, limit))
        _finish(found, profile, found.settings["budget"] * (1 - safety_margin), output, console)
    return found


def plan(
    cfg: DictConfig,
    build: Build,
    *,
    memory: str | None,
    profile: str | Path,
    memory_fraction: float = 0.9,
    safety_margin: float = SAFETY_MARGIN,
    modality_share: float = 0.5,
    optimise_bins: bool = False,
    choose_checkpointing: bool = False,
    num_buckets: int | None = None,
    num_sub_buckets: int | None = None,
    limit: int | None = None,
    output: str | Path | None = None,
    console: Console | None = None,
) -> Profile:
    """Find the batch sizes of a recipe for a device that this machine need not have.

    Args:
        cfg: a recipe.
        build: builds its training.
        memory: of the device: an amount (``80GiB``), or its name (``H100``), which also determines its speed.
        profile: path of the profile to write.
        memory_fraction: share of the memory that a step may take.
        safety_margin: share of that which stays free.
        modality_share: of speech, if each step holds speech and text.
        optimise_bins: find bins as well: those with the shortest predicted epoch.
        choose_checkpointing: plan several shares of ``model.activation_checkpointing``, and keep the one with the
            shortest predicted epoch.
        num_buckets: with ``optimise_bins``, strips of input lengths; by default as many as the recipe's bins have.
        num_sub_buckets: with ``optimise_bins``, buckets of output lengths in each; by default as in the recipe.
        limit: where the data is measured, examples to measure of each group; by default each example once.
        output: PNG to draw the batch sizes and the memory in.
        console: where to print; the terminal unless given.

    Raises:
        EmmettError: for a mistake in the recipe, if a bucket does not fit, or if an operation cannot be planned.
    """
    check_memory_is_given(memory)
    memory_fraction = parse_value(MemoryFraction, memory_fraction, "--memory-fraction")
    numbers = {"--num-buckets": num_buckets, "--num-sub-buckets": num_sub_buckets, "--limit": limit}
    num_buckets, num_sub_buckets, limit = (parse_value(PositiveWhole | None, *item[::-1]) for item in numbers.items())
    budget = int(parse_memory(memory, "--memory") * memory_fraction)
    sharding = sharding_of(cfg.trainer)
    check_new_profile(profile)
    planner = Planner(
        without_training(cfg),
        build,
        budget,
        safety_margin,
        modality_share,
        title=f"Batch sizes planned for {memory}",
        console=console or plain_console(),
    )
    if choose_checkpointing:
        check_has_checkpointing(planner.built().model)
    if not optimise_bins:
        planner.solve_for_bins()
    if optimise_bins or choose_checkpointing:
        rate, data = Rate.of(memory), DataOfRecipe.measured(planner, num_buckets, num_sub_buckets, limit)
        find = partial(with_fastest_bins if optimise_bins else with_own_bins, rate=rate, data=data)
        planner, found = with_fastest_share(planner, find) if choose_checkpointing else (planner, find(planner))
        planner.console.print(f"Times are predicted, not measured ({rate}); an epoch is one device's.", highlight=False)
    else:
        found = planner.search()
    if sharding.devices > 1:
        planner.console.print(f"\n{sharding}")
    if planner.ddp_bytes:
        planner.console.print(f"\nDDP takes {shown(planner.ddp_bytes)} in addition to the steps, to average gradients.")
    found = replace(found, settings={**found.settings, "memory": memory, "memory_fraction": memory_fraction})
    _finish(found, profile, planner.search_budget, output, planner.console)
    return found


def _with_epoch(profile: Profile, lengths: Mapping[str, Lengths]) -> Profile:
    """Add the time of an epoch, by the measured time of each bucket's steps."""
    seconds = 0.0
    for name, measures in profile.measures.items():
        buckets = profile.groups[name]
        if buckets.limit_key is not None or any(measure.seconds is None for measure in measures):
            return profile  # without buckets nothing is known of the lengths in a batch
        counts = examples_per_bucket(buckets.bucket_duration_bins, lengths[name])
        seconds += sum(
            count / measure.batch_size * measure.seconds for count, measure in zip(counts, measures, strict=True)
        )
    return replace(profile, epoch_seconds=float(f"{seconds:.6g}"))


def _finish(profile: Profile, path: str | Path, budget: float, output: str | Path | None, console: Console) -> None:
    """Write the profile, and print the block to paste."""
    profile.write(path)
    console.print("\nTo be pasted into a recipe, under `data`:", highlight=False)
    # Lines to be pasted must not be wrapped.
    console.print(profile.block(), highlight=False, soft_wrap=True, markup=False)
    if profile.epoch_seconds is not None:
        console.print(
            f"An epoch is predicted to take {duration(profile.epoch_seconds)} on one device.", highlight=False
        )
    console.print(f"The profile is {path}.", highlight=False)
    if output is not None:
        draw_profile(profile, budget, output)
        console.print(f"The picture is {output}.", highlight=False)
