"""From groups of buckets to batch sizes: the search, on steps of the training itself or on fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from lightning.pytorch import LightningModule, Trainer

from nemo_emmett.errors import ConfigError
from nemo_emmett.oomptimizer.adapters import Adapter
from nemo_emmett.oomptimizer.buckets import Bucket, Group
from nemo_emmett.oomptimizer.lines import TimedStep, fit_times
from nemo_emmett.oomptimizer.memory import shown
from nemo_emmett.oomptimizer.meter import Meter, Reading
from nemo_emmett.oomptimizer.profile import Measure, TimeLine
from nemo_emmett.oomptimizer.search import Result, Search
from nemo_emmett.oomptimizer.steps import TrainingSteps
from nemo_emmett.oomptimizer.zip import ZipSearch, best_share

AUTO_SHARE = "auto"
"""``modality_share: auto``: the share with the most tokens per second."""

Listener = Callable[[Result], None]
"""Is told of each bucket as soon as its batch size is known."""


@dataclass(frozen=True)
class SearchOptions:
    """How batch sizes are searched.

    Args:
        budget: bytes that a step may take.
        zipped: each step holds a batch of every group.
        modality_share: of speech, of the memory above what is always there; only where ``zipped``; or ``AUTO_SHARE``.
        precision: a batch size is good enough when none fits that is larger by more than this share.
        max_batch_size: no bucket gets more.
        timed: steps are really computed: their times mean something, and those over the budget may run out of memory.
    """

    budget: int
    zipped: bool
    modality_share: float | str
    precision: float
    max_batch_size: int
    timed: bool


@dataclass
class Calibration:
    """Finds the batch sizes of a training that is about to begin.

    Args:
        trainer: in ``on_fit_start``.
        module: that it trains.
        adapter: of the module.
        meter: of its device.
        options: how to search.
        listener: is told of each result.
    """

    trainer: Trainer
    module: LightningModule
    adapter: Adapter
    meter: Meter
    options: SearchOptions
    listener: Listener | None = None
    results: dict[Bucket, Result] = field(default_factory=dict)
    steps: list[TimedStep] = field(default_factory=list)
    _fillers: dict[Bucket, int] = field(default_factory=dict, init=False)

    def run(self, groups: Sequence[Group]) -> dict[Bucket, Result]:
        """Find the batch size of every bucket.

        Raises:
            ConfigError: if the optimizer's step alone, or one example of a bucket, exceeds the budget.
        """
        zipped = self.options.zipped and len(groups) > 1
        self._fillers = self._needed_beside(groups) if zipped else {}
        for group in groups if not zipped else ():
            self.adapter.check_alone(group.modality)
        with TrainingSteps(self.trainer, self.module, self.meter) as steps:
            self._steps = steps
            held = groups if zipped else groups[:1]
            floor = steps.warm_up(self._batch({group.buckets[0]: 1 for group in held}))
            self._check_floor(floor)
            for result in self._search(groups, floor):
                self.results[result.bucket] = result
                if self.listener is not None:
                    self.listener(result)
        return self.results

    def measures(self, group: Group) -> tuple[Measure, ...]:
        """What was found out about a group's buckets, for a profile."""
        times = fit_times(self.steps) if self.options.timed and len(self.steps) > 1 else {}
        return tuple(_measure(self.results[bucket], times.get(bucket)) for bucket in group.buckets)

    def _search(self, groups: Sequence[Group], floor: Reading) -> Iterator[Result]:
        base = max(0, floor.resident - self._gradient_bytes())
        if self.options.zipped and len(groups) > 1:
            yield from self._zip_search(groups, floor, base).run()
            return
        for group in groups:
            yield from self._alone(group, base)

    def _alone(self, group: Group, base: float) -> Iterator[Result]:
        options = self.options
        search = Search(
            lambda bucket, size: self._probe({bucket: size}),
            options.budget,
            base,
            precision=options.precision,
            max_batch_size=options.max_batch_size,
            floor=self._steps.floor.peak,
            careful=options.timed,
        )
        yield from search.run(group.buckets)

    def _zip_search(self, groups: Sequence[Group], floor: Reading, base: float) -> ZipSearch:
        share = self.options.modality_share
        if share == AUTO_SHARE:
            share = best_share([result for group in groups for result in self._alone(group, base)])
        return ZipSearch(
            groups,
            self._probe,
            self.options.budget,
            base,
            floor.resident,
            float(share),
            padded_together=self.adapter.pads_together,
            precision=self.options.precision,
            max_batch_size=self.options.max_batch_size,
            floor=floor.peak,
            careful=self.options.timed,
        )

    def _probe(self, sizes: Mapping[Bucket, int]) -> Reading:
        reading = self._steps.run(self._batch(sizes))
        if not reading.out_of_memory:
            self.steps.append(TimedStep(dict(sizes), reading.seconds))
        return reading

    def _batch(self, sizes: Mapping[Bucket, int]) -> object:
        device = self.trainer.strategy.root_device
        sizes = {**self._fillers, **sizes} if self._lacks_speech(sizes) else sizes
        batches = [self.adapter.synthetic_batch(bucket.shape, size, device) for bucket, size in sizes.items()]
        return self.adapter.join(batches)

    def _needed_beside(self, groups: Sequence[Group]) -> dict[Bucket, int]:
        """What a batch of text needs beside it, for models that cannot train on text alone.

        An example of the longest speech: such models put all into one batch, which is as wide as its longest row.
        """
        try:
            self.adapter.check_alone("text")
        except ConfigError:
            speech = [bucket for group in groups if group.modality == "audio" for bucket in group.buckets]
            return {max(speech, key=lambda bucket: bucket.shape.seconds): 1}
        return {}

    def _lacks_speech(self, sizes: Mapping[Bucket, int]) -> bool:
        return all(bucket.shape.modality == "text" for bucket in sizes)

    def _gradient_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.module.parameters() if p.requires_grad)

    def _check_floor(self, floor: Reading) -> None:
        if floor.out_of_memory or floor.peak > self.options.budget:
            needs = "runs out of memory" if floor.out_of_memory else f"needs {shown(floor.peak)}"
            raise ConfigError(
                f"OOMptimizer: the optimizer's step alone {needs} for weights, gradients and its state, but the budget "
                f"is {shown(self.options.budget)}; raise the budget, freeze parameters, use LoRA, or shard the model."
            )


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
