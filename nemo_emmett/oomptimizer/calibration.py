"""From groups of buckets to batch sizes, on steps of the training itself or on fake tensors, in three phases.

1. Warm-up: two whole steps of one example. The first allocates the optimizer's state; the second reads the floor, what
   the optimizer's step takes whatever the batch. A floor above the budget ends the calibration.
2. Search: for each group alone (:class:`~nemo_emmett.oomptimizer.search.Search`), or for all groups in the same steps
   (:class:`~nemo_emmett.oomptimizer.zip_search.ZipSearch`). Each probe is a forward and backward pass.
3. Times: where steps are computed, the times of all probes give each bucket's time per example.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from nemo.utils import logging

from nemo_emmett.errors import ConfigError, Help
from nemo_emmett.modules.loss import world_size
from nemo_emmett.oomptimizer.adapters import Adapter, adapter_for
from nemo_emmett.oomptimizer.buckets import Bucket, Group
from nemo_emmett.oomptimizer.cost_model import TimedStep, fit_times
from nemo_emmett.oomptimizer.cuda_meter import meter_for
from nemo_emmett.oomptimizer.fake import fake_model
from nemo_emmett.oomptimizer.memory import CPU_BUDGET, budget_of, is_cpu_default, parse_memory, shown
from nemo_emmett.oomptimizer.meter import Meter, Reading, TensorMeter
from nemo_emmett.oomptimizer.options import AUTO_SHARE, Options
from nemo_emmett.oomptimizer.profile import Buckets, Measure, Profile, TimeLine
from nemo_emmett.oomptimizer.search import Result, Search
from nemo_emmett.oomptimizer.steps import TrainingSteps
from nemo_emmett.oomptimizer.zip_search import ZipSearch, best_share

Listener = Callable[[Result], None]
"""Called with each bucket's result as soon as it is found."""


def calibrate(
    trainer: Trainer,
    module: LightningModule,
    groups: Mapping[str, Group],
    options: Options,
    *,
    zipped: bool,
    fingerprint: dict[str, Any],
    listener: Listener | None = None,
) -> Profile:
    """Find the batch sizes of a training that is about to begin.

    Args:
        trainer: in ``on_fit_start``.
        module: that it trains.
        groups: of the training data.
        options: OOMptimizer's; the mode is ``calibrate`` or ``plan``.
        zipped: each step holds a batch of every group.
        fingerprint: of the run, for the profile.
        listener: called with each result.

    Raises:
        ConfigError: if the optimizer's step alone, or one example of a bucket, exceeds the budget.
    """
    adapter, device = adapter_for(module), trainer.strategy.root_device
    total = memory_budget(options, device)
    budget = round(total * (1 - options.safety_margin))
    logging.info(
        f"OOMptimizer: finding batch sizes for {sum(len(group.buckets) for group in groups.values())} buckets in "
        f"{shown(budget)} ({options.mode})."
    )
    with _meter(trainer, module, adapter, options) as meter:
        calibration = Calibration(trainer, module, adapter, meter, options, budget, zipped and len(groups) > 1)
        for result in calibration.run(list(groups.values())):
            if listener is not None:
                listener(result)
    sizes = {bucket: result.batch_size for bucket, result in calibration.results.items()}
    return Profile(
        {name: Buckets(g.bins, tuple(sizes[b] for b in g.buckets), g.limit_key) for name, g in groups.items()},
        settings={"mode": options.mode, "budget": total, **options.settings},
        fingerprint=fingerprint,
        measures={name: calibration.measures(group) for name, group in groups.items()},
    )


def memory_budget(options: Options, device: torch.device) -> int:
    """Bytes that a step may take, the same on all ranks: the least of theirs.

    Raises:
        ConfigError: if that is more than a device has.
    """
    if options.mode == "plan":
        return parse_memory(options.memory_budget, "OOMptimizer.memory_budget")
    budget = budget_of(device, options.memory_fraction, options.memory_budget)
    if is_cpu_default(device, options.memory_fraction, options.memory_budget):
        logging.info(
            f"OOMptimizer: training runs on the CPU and no memory_budget is given: a step may take {shown(budget)} "
            f"(a quarter of the memory that is available, at most {shown(CPU_BUDGET)}); set memory_budget for another "
            "amount."
        )
    least = torch.tensor(budget, device=device)
    if world_size() > 1:
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return int(least)


@contextmanager
def _meter(trainer: Trainer, module: LightningModule, adapter: Adapter, options: Options) -> Iterator[Meter]:
    """The meter of the device; for a plan, one of fake tensors, which the model consists of meanwhile."""
    if options.mode != "plan":
        yield meter_for(trainer.strategy.root_device)
        return
    with fake_model(module, trainer.optimizers), adapter.planning():
        yield TensorMeter(trainer.strategy.root_device)


@dataclass
class Calibration:
    """Finds the batch sizes of a training that is about to begin.

    Args:
        trainer: in ``on_fit_start``.
        module: that it trains.
        adapter: of the module.
        meter: of its device.
        options: OOMptimizer's.
        budget: bytes that a step may take, without the safety margin.
        zipped: each step holds a batch of every group.
    """

    trainer: Trainer
    module: LightningModule
    adapter: Adapter
    meter: Meter
    options: Options
    budget: int
    zipped: bool
    results: dict[Bucket, Result] = field(default_factory=dict, init=False)
    _timed_steps: list[TimedStep] = field(default_factory=list, init=False)
    _fillers: dict[Bucket, int] = field(default_factory=dict, init=False)

    @property
    def _computes(self) -> bool:
        """Whether steps are computed: their times mean something, and those above the budget may fail."""
        return self.options.mode != "plan"

    def run(self, groups: Sequence[Group]) -> Iterator[Result]:
        """Find the batch size of every bucket.

        Raises:
            ConfigError: if the optimizer's step alone, or one example of a bucket, exceeds the budget.
        """
        if self.zipped:
            self._fillers = self._speech_for_text(groups)
        else:
            for group in groups:
                self.adapter.check_alone(group.modality)
        with TrainingSteps(self.trainer, self.module, self.meter) as steps:
            self._steps = steps
            floor = steps.warm_up(self._batch({group.buckets[0]: 1 for group in groups[: None if self.zipped else 1]}))
            if floor.out_of_memory or floor.peak > self.budget:
                needs = "runs out of memory" if floor.out_of_memory else f"needs {shown(floor.peak)}"
                raise ConfigError(
                    f"OOMptimizer: the optimizer's step alone {needs} for weights, gradients and its state, but "
                    f"the budget is {shown(self.budget)}; raise the budget, freeze parameters, use LoRA, or shard the "
                    "model.",
                    page=Help.OUT_OF_MEMORY,
                )
            # What is alive throughout a step; gradients are dropped and made again within it.
            gradients = sum(p.numel() * p.element_size() for p in self.module.parameters() if p.requires_grad)
            base = max(0, floor.resident - gradients)
            for result in self._zip_search(groups, base) if self.zipped else self._searches(groups, base):
                self.results[result.bucket] = result
                yield result

    def measures(self, group: Group) -> tuple[Measure, ...]:
        """What was found of a group's buckets, for a profile."""
        times = fit_times(self._timed_steps) if self._computes and len(self._timed_steps) > 1 else {}
        return tuple(_measure(self.results[bucket], times.get(bucket)) for bucket in group.buckets)

    def _searches(self, groups: Sequence[Group], base: float) -> Iterator[Result]:
        for group in groups:
            search = Search(
                lambda bucket, size: self._probe({bucket: size}), self.budget, base, **self._search_options()
            )
            yield from search.run(group.buckets)

    def _zip_search(self, groups: Sequence[Group], base: float) -> Iterator[Result]:
        share = self.options.modality_share
        search = ZipSearch(
            groups,
            self._probe,
            self.budget,
            base,
            self._steps.floor.resident,
            best_share(list(self._searches(groups, base))) if share == AUTO_SHARE else share,
            padded_together=self.adapter.pads_together,
            **self._search_options(),
        )
        yield from search.run()

    def _search_options(self) -> dict[str, Any]:
        return {
            "precision": self.options.precision,
            "max_batch_size": self.options.max_batch_size,
            "floor": self._steps.floor.peak,
            "careful": self._computes,
        }

    def _probe(self, sizes: Mapping[Bucket, int]) -> Reading:
        reading = self._steps.run(self._batch(sizes))
        if not reading.out_of_memory:
            self._timed_steps.append(TimedStep(dict(sizes), reading.seconds))
        return reading

    def _batch(self, sizes: Mapping[Bucket, int]) -> object:
        if all(bucket.shape.modality == "text" for bucket in sizes):
            sizes = {**self._fillers, **sizes}
        device = self.trainer.strategy.root_device
        return self.adapter.join(
            [self.adapter.synthetic_batch(bucket.shape, size, device) for bucket, size in sizes.items()]
        )

    def _speech_for_text(self, groups: Sequence[Group]) -> dict[Bucket, int]:
        """What is added to a batch of text for models that cannot train on text alone: the longest recording.

        Such models put all examples into one batch, which is as wide as the longest.
        """
        try:
            self.adapter.check_alone("text")
        except ConfigError:
            speech = [bucket for group in groups if group.modality == "audio" for bucket in group.buckets]
            return {max(speech, key=lambda bucket: bucket.shape.seconds): 1}
        return {}


def _measure(result: Result, time: TimeLine | None) -> Measure:
    reading = result.confirmed
    return Measure(
        bin=result.bucket.bin,
        batch_size=result.batch_size,
        predicted_peak=round(result.predicted_peak),
        confirmed_peak=reading.peak if result.measured else None,
        reserved=reading.reserved if result.measured else None,
        seconds=reading.seconds if result.measured and time is not None else None,
        memory=result.line,
        time=time,
    )
