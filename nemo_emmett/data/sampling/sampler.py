"""One worker's sampler: groups of sources, each with its blend and its buckets, fused into steps.

All ranks run the same sampler on the same data, and each takes its own batch of every step. So they agree on group and
bucket without communication, no example goes to two ranks, and the state of one rank is the state of all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lhotse import CutSet
from nemo.utils import logging

from nemo_emmett.data.sampling.buckets import Buckets, SampledExample
from nemo_emmett.data.sampling.group_scheduler import GroupScheduler, what_was_left_out
from nemo_emmett.data.sampling.proportional_mixing import ProportionalMixer
from nemo_emmett.data.sampling.source_iterator import ChunkReader, SourceIterator, WorkerInfo
from nemo_emmett.data.sampling.transforms import TransformPipeline


@dataclass
class GroupPlan:
    """What a group's samplers are built from, the same in every process.

    Args:
        name: of the group; empty if a dataset has no groups.
        readers: one for each source.
        names: of the sources, by which a state is matched to them.
        seeds: for each source, of its random transforms and of the order of its examples.
        num_open: chunks of each source that are open at a time.
        shares: of the examples, one for each source.
        pipeline: NeMo's maps and filters.
        ends_with: of each source the number of the source with which it ends, though it has more; None: at its own end.
        every_n_steps: under ``zip``, it is in every n-th step.
    """

    name: str
    readers: list[ChunkReader]
    names: list[str]
    seeds: list[list[int]]
    num_open: list[int]
    shares: list[float]
    pipeline: TransformPipeline
    ends_with: Sequence[int | None] = ()
    every_n_steps: int = 1

    def __post_init__(self) -> None:
        for reader in self.readers:  # planning has read examples, without counting their records
            reader.restart()


@dataclass
class SamplingPlan:
    """What the samplers of all workers and ranks are built from.

    Args:
        groups: at least one.
        fusion: ``zip``, ``round_robin`` or ``randomized_round_robin``; has no effect with one group.
        weights: of the groups under ``randomized_round_robin``.
        world_size: number of ranks.
        shuffle: whether the mixing of sources starts with a random shift.
        finite: whether an epoch is one pass over the data.
        seed: of all random draws.
    """

    groups: list[GroupPlan]
    fusion: str
    weights: list[float]
    world_size: int
    shuffle: bool
    finite: bool
    seed: int


class GroupSampler:
    """Steps of one group: a batch for each rank, all from one bucket.

    Args:
        plan: of the group.
        number: of the group, for its seeds.
        of_all: the plan of the dataset.
        worker: whose steps these are.
        epoch: number of the pass over finite data.
    """

    def __init__(self, plan: GroupPlan, number: int, of_all: SamplingPlan, worker: WorkerInfo, epoch: int) -> None:
        self.plan = plan
        self.world_size = of_all.world_size
        self.sources = [
            SourceIterator(reader, plan.pipeline, seed, worker, epoch, name, num_open)
            for reader, seed, name, num_open in zip(plan.readers, plan.seeds, plan.names, plan.num_open, strict=True)
        ]
        self.mixer = ProportionalMixer(plan.shares, [of_all.seed, number, worker.id, epoch] if of_all.shuffle else None)
        pipeline = plan.pipeline
        self.buckets = Buckets(pipeline.constraint, pipeline.duration_bins, of_all.world_size, pipeline.drop_last)
        self.left_out = 0  # examples that fit into no step when the data ended
        self._ready: list[list[list[SampledExample]]] = []  # complete steps
        self._has_ended = False

    def next_step(self) -> list[list[Any]]:
        """The examples of a batch for each rank.

        Raises:
            StopIteration: at the end of finite data.
        """
        while not self._ready:
            if self._has_ended:
                raise StopIteration
            if self.mixer.is_empty:
                self._ready, self.left_out = self.buckets.flush()
                self._has_ended = True
                continue
            number = self.mixer.next()
            try:
                example, (chunk, index) = self.sources[number].next()
            except StopIteration:
                self.mixer.remove(number)
                for other, ends_with in enumerate(self.plan.ends_with):
                    if ends_with == number:
                        self.mixer.remove(other)
                continue
            self._put_into_buckets([SampledExample(example, number, chunk, index)])
        return [[sampled.example for sampled in batch] for batch in self._ready.pop(0)]

    def _put_into_buckets(self, examples: Sequence[SampledExample]) -> None:
        for sampled in examples:
            if (step := self.buckets.add(sampled)) is not None:
                self._ready.append(step)

    def state_dict(self) -> dict[str, Any]:
        """The positions in the sources, the state of their mixing, and the examples that wait in the buckets."""
        return {  # `leaves` and `draws` are the names of checkpoints
            "sources": list(self.plan.names),
            "sizes": [reader.records_in_a_pass() for reader in self.plan.readers],
            "shares": list(self.plan.shares),
            "leaves": [source.state_dict() for source in self.sources],
            "draws": self.mixer.state_dict(),
            "waiting": _places(self.buckets.waiting()),
            "ready": [[_places(batch) for batch in step] for step in self._ready],
            "has_ended": self._has_ended,
            "left_out": self.left_out,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state. Sources that it does not contain start at their beginning, which is logged."""
        numbers = self._numbers_of(state["sources"])
        for old, number in numbers.items():
            size, now = state["sizes"][old], self.plan.readers[number].records_in_a_pass()
            if now != size:
                logging.warning(
                    f"{self.plan.names[number]} has {now} records, {size} when the checkpoint was written: its order "
                    "is another, so records may repeat or be left out in this pass."
                )
            self.sources[number].load_state_dict(state["leaves"][old])
        if list(state["shares"]) == list(self.plan.shares) and numbers == dict(enumerate(range(len(self.sources)))):
            self.mixer.load_state_dict(state["draws"])
        else:
            logging.info(
                f"{self.plan.name or 'The data'}: sources or weights differ from the checkpoint's; the mixing of the "
                "blend starts over, and sources that were there before continue where they were."
            )
        self._ready = [[self._read_again(batch, numbers) for batch in step] for step in state["ready"]]
        # Other numbers of ranks or smaller batches than the checkpoint's may complete other steps.
        if any(len(step) != self.world_size for step in self._ready):
            steps, self._ready = self._ready, []
            self._put_into_buckets([sampled for step in steps for batch in step for sampled in batch])
        self._put_into_buckets(self._read_again(state["waiting"], numbers))
        self._has_ended, self.left_out = state["has_ended"], state["left_out"]
        if self._has_ended and self.buckets.waiting():
            steps, left_out = self.buckets.flush()
            self._ready, self.left_out = self._ready + steps, self.left_out + left_out

    def _numbers_of(self, names: Sequence[str]) -> dict[int, int]:
        """Maps the numbers of a state's sources to their numbers here, by name."""
        here: dict[str, list[int]] = {}
        for number, name in enumerate(self.plan.names):
            here.setdefault(name, []).append(number)
        return {old: here[name].pop(0) for old, name in enumerate(names) if here.get(name)}

    def _read_again(self, places: Sequence[Sequence[int]], numbers: Mapping[int, int]) -> list[SampledExample]:
        """Read the examples of a state, without those that are no longer in the data."""
        wanted: dict[int, list[tuple[int, int]]] = {}
        for old, chunk, index in places:
            if old in numbers:
                wanted.setdefault(old, []).append((chunk, index))
        found = {old: iter(self.sources[numbers[old]].examples_at(of_source)) for old, of_source in wanted.items()}
        again = [
            SampledExample(next(found[old]), numbers[old], chunk, index)
            for old, chunk, index in places
            if old in numbers
        ]
        return [sampled for sampled in again if sampled.example is not None]


def _places(batch: Sequence[SampledExample]) -> list[list[int]]:
    return [[sampled.source, sampled.chunk, sampled.index] for sampled in batch]


class WorkerSampler:
    """The steps of one worker process; yields one rank's batch of each.

    Args:
        plan: of the dataset.
        worker: whose steps these are.
        rank: whose batches to yield.
        epoch: number of the pass over finite data.
    """

    def __init__(self, plan: SamplingPlan, worker: WorkerInfo, rank: int, epoch: int = 0) -> None:
        self.plan = plan
        self.worker = worker
        self.rank = rank
        self.epoch = epoch
        self.groups = [GroupSampler(group, number, plan, worker, epoch) for number, group in enumerate(plan.groups)]
        weights = plan.weights if plan.fusion == "randomized_round_robin" else None
        self.scheduler = GroupScheduler(weights, len(self.groups), [plan.seed, 7, worker.id, epoch])
        self.steps = 0
        self.end_of_data_message = ""  # for the log: examples that were left out when finite data ended

    def next(self) -> CutSet:
        """This rank's examples of the next step.

        Raises:
            StopIteration: at the end of finite data.
        """
        examples = self._of_each_group() if self.plan.fusion == "zip" else self._of_next_group()
        self.steps += 1
        return CutSet(examples)

    def _of_each_group(self) -> list:
        taken = []
        for number, group in enumerate(self.groups):
            if (self.steps * self.worker.num_workers + self.worker.id) % group.plan.every_n_steps:
                continue
            try:
                taken.extend(self._batch_of(number, group.next_step()))
            except StopIteration:
                self._end_of_data(group, len(taken))
                raise
        return taken

    def _of_next_group(self) -> list:
        while len(self.scheduler.ended) < len(self.groups):
            number = self.scheduler.next()
            try:
                return list(self._batch_of(number, self.groups[number].next_step()))
            except StopIteration:
                self.scheduler.end(number)
        self._end_of_data()
        raise StopIteration

    def _batch_of(self, number: int, step: list[list[Any]]) -> CutSet:
        seed = [self.plan.seed, number, self.worker.id, self.epoch, self.steps, self.rank]
        return self.groups[number].plan.pipeline.transform_batch(CutSet(step[self.rank]), seed)

    def _end_of_data(self, ended: GroupSampler | None = None, unused: int = 0) -> None:
        unused += sum(len(group.buckets.waiting()) for group in self.groups if group is not ended)
        left_out = {group.plan.name: group.left_out for group in self.groups}
        self.end_of_data_message = what_was_left_out(left_out, ended and ended.plan.name, unused)

    def take_filtered(self) -> Counter[str]:
        """The examples left out by filters since the last call, by the keys of the filter; "" for those kept."""
        filtered: Counter[str] = Counter()
        for group in self.plan.groups:
            filtered += group.pipeline.filtered
            group.pipeline.filtered.clear()
        return filtered

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on, as plain numbers and strings."""
        return {
            "epoch": self.epoch,
            "steps": self.steps,
            "groups": {group.plan.name: group.state_dict() for group in self.groups},
            "turns": self.scheduler.state_dict(),  # the name of checkpoints
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        for group in self.groups:
            if group.plan.name in state["groups"]:
                group.load_state_dict(state["groups"][group.plan.name])
            else:
                logging.info(f"{group.plan.name}: the checkpoint's data has no such group; it starts at its beginning.")
        self.steps = state["steps"]
        if set(state["groups"]) == {group.plan.name for group in self.groups}:
            self.scheduler.load_state_dict(state["turns"])
