"""Searches batch sizes without a device, and bins for them."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback
from nemo.collections.common.data.lhotse.dataloader import LhotseDataLoadingConfig
from nemo.utils import logging
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from nemo_emmett.callbacks.oomptimizer import OOMptimizer
from nemo_emmett.data.bucketing.length_stats import Lengths, solve
from nemo_emmett.data.config.dataset_config import parse_dataset
from nemo_emmett.data.config.schema import AUTO
from nemo_emmett.oomptimizer import Profile
from nemo_emmett.oomptimizer.adapters import adapter_for
from nemo_emmett.oomptimizer.buckets import configs_of_groups, is_zip, read_groups
from nemo_emmett.oomptimizer.profile import Measure, TimeLine
from nemo_emmett.planning.bins_and_sizes import BinPlan, Probed, TimeModel, epoch_seconds, plan_bins
from nemo_emmett.planning.fake_training import fake_training
from nemo_emmett.planning.lengths import lengths_of_groups, numbers_of_buckets
from nemo_emmett.planning.recipe import (
    Build,
    Training,
    ddp_bucket_bytes,
    with_bins,
    with_groups,
    without_device,
)
from nemo_emmett.planning.report import LiveTable, comparison
from nemo_emmett.planning.sharded import CheckSharded, fake_ranks
from nemo_emmett.planning.timing import Rate, operations_per_example

LEAST_PADDING, SHORTEST_EPOCH = "least padding", "shortest epoch"
"""Names of the two plans in the report."""


def fit(training: Training, optimizer: OOMptimizer, table: LiveTable, *others: Callback) -> None:
    """Begin a training, in which the callback finds batch sizes, and show them as they are found."""
    optimizer.listener = table.add
    training.trainer.callbacks += [optimizer, *others]
    # The table shows what the callback would log, and a line of the log would break it.
    with logging.temp_verbosity(logging.WARNING), table.shown():
        training.trainer.fit(training.model, training.datamodule)


@dataclass
class Planner:
    """Plans the batch sizes of a recipe, with its own bins or others.

    Args:
        cfg: recipe without its training (:func:`~nemo_emmett.planning.recipe.without_training`).
        build: builds its training.
        budget: bytes that a step may take on each device.
        safety_margin: share of the budget that stays free.
        modality_share: of speech, in steps that hold speech and text.
        title: above the table of results.
        console: that it is drawn on.
    """

    cfg: DictConfig
    build: Build
    budget: int
    safety_margin: float
    modality_share: float
    title: str
    console: Console
    operations: dict[str, tuple[list, list[float]]] = field(default_factory=dict)
    ddp_bytes: int = 0  # of the buckets in which gradients are averaged; set once a model was built
    _found: dict[str, Profile] = field(default_factory=dict, init=False, repr=False)

    @property
    def search_budget(self) -> float:
        """Bytes that a step may take in the search."""
        return (self.budget - self.ddp_bytes) * (1 - self.safety_margin)

    def built(self) -> Training:
        """What the recipe names; the model is one of fake tensors."""
        with fake_training():
            return self.build(without_device(self.cfg))

    def solve_for_bins(self) -> None:
        """Replace ``bucket_duration_bins: auto`` by bins, which takes the data, and so real tensors."""
        if any(group.has_auto_bins for group in parse_dataset(self.cfg.data.train_ds, "data.train_ds").groups):
            datamodule = self.built().datamodule
            datamodule.resolve_bins()
            self.cfg.data.train_ds = datamodule.cfg.train_ds

    def search(
        self, bins: Mapping[str, Sequence] | None = None, only: str | None = None, *, count_operations: bool = False
    ) -> Profile:
        """Find batch sizes; those of bins that were searched before are cached.

        Args:
            bins: of groups, instead of the recipe's.
            only: search this group alone, whose batches must have steps of their own.
            count_operations: also count the operations of steps of each group, into :attr:`operations`.

        Raises:
            ConfigError: if a bucket does not fit, or if an operation cannot be planned.
        """
        cfg = with_bins(self.cfg, bins or {})
        cfg = cfg if only is None else with_groups(cfg, [only])
        key = OmegaConf.to_yaml(cfg.data)
        if key not in self._found:
            self._found[key] = self._search(cfg, count_operations)
        return self._found[key]

    def _search(self, cfg: DictConfig, count_operations: bool) -> Profile:
        # The model itself consists of fake tensors: it would not fit into most machines that plan.
        cfg = without_device(cfg)
        with tempfile.TemporaryDirectory() as folder, fake_ranks(cfg.trainer.devices), fake_training():
            training = self.build(cfg)
            training.trainer.callbacks.append(CheckSharded())
            self.ddp_bytes = ddp_bucket_bytes(self.cfg.trainer, training.model)
            path = Path(folder, "profile.yaml")
            optimizer = OOMptimizer(
                mode="plan",
                memory_budget=self.budget - self.ddp_bytes,
                profile=path,
                safety_margin=self.safety_margin,
                modality_share=self.modality_share,
            )

            def count(trainer: Trainer, module: LightningModule) -> None:
                """At the start of the fit, when the bins are known."""
                groups = read_groups(trainer.datamodule.cfg.train_ds)
                with adapter_for(module).planning():
                    self.operations.update(operations_per_example(trainer, module, groups))

            counting = [LambdaCallback(on_fit_start=count)] if count_operations else []
            table = LiveTable(self.title, lambda: self.search_budget, self.console, is_timed=False)
            fit(training, optimizer, table, *counting)
            return Profile.read(path)


@dataclass(frozen=True)
class DataOfRecipe:
    """What a recipe's training data is to the bins.

    Args:
        lengths: of each group's examples.
        numbers: strips of input lengths of each group's bins, and buckets of output lengths in each (None: bins in one
            dimension).
    """

    lengths: Mapping[str, Lengths]
    numbers: Mapping[str, tuple[int, int | None]]

    @classmethod
    def measured(
        cls, planner: Planner, num_buckets: int | None, num_sub_buckets: int | None, limit: int | None
    ) -> DataOfRecipe:
        """Measure it.

        Args:
            planner: of the recipe.
            num_buckets: strips of input lengths; by default as the recipe has them.
            num_sub_buckets: buckets of output lengths in each; by default as the recipe has them.
            limit: examples to measure of each group; by default each example once.
        """
        configs = configs_of_groups(planner.cfg.data.train_ds)
        numbers = {name: _numbers(config, num_buckets, num_sub_buckets) for name, config in configs.items()}
        two_dimensional = {name: sub_buckets is not None for name, (_, sub_buckets) in numbers.items()}
        return cls(lengths_of_groups(planner.built().datamodule, two_dimensional, limit), numbers)


def with_own_bins(planner: Planner, rate: Rate, data: DataOfRecipe) -> Profile:
    """The profile of the recipe's bins, with the predicted time of an epoch.

    Args:
        planner: finds batch sizes.
        rate: of the device.
        data: of the recipe.
    """
    found = planner.search(count_operations=True)
    times = {name: rate.time_model(*counts) for name, counts in planner.operations.items()}
    return _with_times(found, times, data.lengths)


def with_fastest_bins(planner: Planner, rate: Rate, data: DataOfRecipe) -> Profile:
    """The profile of the bins with the shortest predicted epoch; prints a comparison with those of least padding.

    Args:
        planner: finds batch sizes.
        rate: of the device.
        data: of the recipe.
    """
    train_ds, lengths, numbers = planner.cfg.data.train_ds, data.lengths, data.numbers
    bins = {name: solve(lengths[name], *numbers[name]) for name in numbers}
    first = planner.search(bins, count_operations=True)
    times = {name: rate.time_model(*counts) for name, counts in planner.operations.items()}
    for name in bins:
        only = None if is_zip(train_ds) else name
        start = _probed(first, name)
        # In steps that groups share, each may take as much as its largest batch.
        peaks = (measure.confirmed_peak or measure.predicted_peak for measure in first.measures[name])
        best = plan_bins(
            lengths[name],
            *numbers[name],
            start,
            lambda others, name=name, only=only: _probed(planner.search({**bins, name: others}, only), name),
            times[name],
            max(peaks) if is_zip(train_ds) else planner.search_budget,
        )
        bins[name] = best.bins
        plans = {LEAST_PADDING: BinPlan.of(start.bins, start.sizes, lengths[name], times[name]), SHORTEST_EPOCH: best}
        planner.console.print("", comparison(plans, f"data.train_ds.{name}".rstrip(".")), sep="\n")
    return _with_times(planner.search(bins), times, lengths)


def _numbers(config: DictConfig, num_buckets: int | None, num_sub_buckets: int | None) -> tuple[int, int | None]:
    """The numbers of strips and of sub-buckets of a group's bins."""
    bins = config.get("bucket_duration_bins")
    if bins is None or bins == AUTO:
        own = config.get("num_buckets") or LhotseDataLoadingConfig.num_buckets, config.get("num_sub_buckets")
    else:
        own = numbers_of_buckets([list(b) if not isinstance(b, (int, float)) else b for b in bins])
    return num_buckets or own[0], num_sub_buckets or own[1]


def _probed(profile: Profile, name: str) -> Probed:
    bins = [list(b) if isinstance(b, tuple) else b for b in profile.groups[name].bucket_duration_bins]
    lines = tuple(measure.memory for measure in profile.measures[name])
    return Probed(bins, profile.groups[name].bucket_batch_size, lines)


def _with_times(profile: Profile, times: Mapping[str, TimeModel], lengths: Mapping[str, Lengths]) -> Profile:
    measures = {name: tuple(_timed(m, times[name]) for m in of_group) for name, of_group in profile.measures.items()}
    seconds = sum(
        epoch_seconds(buckets.bucket_duration_bins, buckets.bucket_batch_size, lengths[name], times[name])
        for name, buckets in profile.groups.items()
    )
    return replace(profile, measures=measures, epoch_seconds=float(f"{seconds:.6g}"))


def _timed(measure: Measure, time: TimeModel) -> Measure:
    seconds = time.of_step(measure.batch_size, measure.bin)
    line = TimeLine(time.overhead, (seconds - time.overhead) / measure.batch_size)
    return replace(measure, seconds=float(f"{seconds:.6g}"), time=line)
