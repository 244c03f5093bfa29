"""The schedule: which examples form the global batch of each step, computed from length indexes.

Every rank computes the same schedule, and reads only its own examples. A global batch holds examples of one bucket; it
is divided among the ranks in the order of the examples. So global batches depend neither on the number of workers nor,
where batch sizes times ranks stay the same, on the number of ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from nemo.utils import logging

from nemo_emmett.data.sampling.global_batches import GroupOrder, GroupSchedule, Snapshot, Step
from nemo_emmett.data.sampling.group_scheduler import GroupScheduler, what_was_left_out


class RankBatch(NamedTuple):
    """The examples of one group in a rank's batch."""

    group: int
    examples: np.ndarray  # (M,) EXAMPLE


@dataclass
class ScheduleOrder:
    """What the schedule of a dataset is computed from, the same in all processes.

    Args:
        groups: at least one.
        fusion: ``zip``, ``round_robin`` or ``randomized_round_robin``; has no effect with one group.
        weights: of the groups under ``randomized_round_robin``.
        seed: of all random draws.
        finite: whether an epoch is one pass over the data.
    """

    groups: list[GroupOrder]
    fusion: str
    weights: list[float]
    seed: int
    finite: bool


class Schedule:
    """The steps of a dataset, for one rank.

    Args:
        order: what they are computed from.
        rank: whose batches to yield.
        world_size: number of ranks.
        epoch: number of the pass over finite data.
    """

    def __init__(self, order: ScheduleOrder, rank: int, world_size: int, epoch: int = 0) -> None:
        self.order = order
        self.rank = rank
        self.world_size = world_size
        self.epoch = epoch
        self.steps = 0
        self.end_of_data_message = ""  # for the log: examples that were left out when finite data ended
        only_pass = epoch if order.finite else None
        self.groups = [GroupSchedule(group, world_size, only_pass) for group in order.groups]
        weights = order.weights if order.fusion == "randomized_round_robin" else None
        self.scheduler = GroupScheduler(weights, len(self.groups), [order.seed, 7, epoch])

    def next(self) -> list[RankBatch]:
        """This rank's examples of the next step, by group.

        Raises:
            StopIteration: at the end of finite data.
        """
        batches = self._of_each_group() if self.order.fusion == "zip" else [self._of_next_group()]
        self.steps += 1
        return batches

    def _of_each_group(self) -> list[RankBatch]:
        steps: dict[int, Step] = {}
        # Groups without a ratio first: those with one follow the first of them.
        for number, group in sorted(enumerate(self.groups), key=lambda item: item[1].order.ratio is not None):
            if self.steps % group.order.every_n_steps:
                continue
            try:
                if group.order.ratio is None:
                    steps[number] = group.next_step()
                else:
                    leader = next(iter(steps.values()))
                    steps[number] = group.next_step_of(round(group.order.ratio * len(leader.examples)))
            except StopIteration:
                self._end_of_data(group, sum(len(step.examples) for step in steps.values()))
                raise
        return [RankBatch(number, steps[number].of_rank(self.rank, self.world_size)) for number in sorted(steps)]

    def _of_next_group(self) -> RankBatch:
        while len(self.scheduler.ended) < len(self.groups):
            number = self.scheduler.next()
            try:
                return RankBatch(number, self.groups[number].next_step().of_rank(self.rank, self.world_size))
            except StopIteration:
                self.scheduler.end(number)
        self._end_of_data()
        raise StopIteration

    def _end_of_data(self, ended: GroupSchedule | None = None, unused: int = 0) -> None:
        unused += sum(group.waiting() for group in self.groups if group is not ended)
        left_out = {group.order.name: group.left_out for group in self.groups}
        self.end_of_data_message = what_was_left_out(left_out, ended and ended.order.name, unused)

    def take_left_out(self) -> Counter[str]:
        """The examples left out by filters since the last call, by the keys of the filter; "" for those kept."""
        left_out: Counter[str] = Counter()
        for group in self.groups:
            for source in group.sources:
                left_out += source.left_out
                source.left_out.clear()
        return left_out

    def snapshot(self) -> ScheduleSnapshot:
        """Where the schedule is, after the last step taken."""
        groups = tuple(group.snapshot() for group in self.groups)
        return ScheduleSnapshot(self.steps, self.epoch, groups, self.scheduler.state_dict())

    def state_dict(self, snapshot: ScheduleSnapshot) -> dict[str, Any]:
        """A snapshot as plain numbers and strings."""
        return {
            "epoch": snapshot.epoch,
            "steps": snapshot.steps,
            "groups": {
                group.order.name: group.state_dict(of_group)
                for group, of_group in zip(self.groups, snapshot.groups, strict=True)
            },
            "scheduler": dict(snapshot.scheduler),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        for group in self.groups:
            if group.order.name in state["groups"]:
                group.load_state_dict(state["groups"][group.order.name])
            else:
                logging.info(
                    f"{group.order.name}: the checkpoint's data has no such group; it starts at its beginning."
                )
        self.steps = state["steps"]
        if set(state["groups"]) == {group.order.name for group in self.groups}:
            self.scheduler.load_state_dict(state["scheduler"])

    def count_steps(self) -> int:
        """The number of steps that are left; computes all of them, and ends this schedule."""
        before = self.steps
        with suppress(StopIteration):
            while True:
                self.next()
        return self.steps - before


class ScheduleSnapshot(NamedTuple):
    """Where a schedule is."""

    steps: int
    epoch: int
    groups: tuple[Snapshot, ...]
    scheduler: Mapping[str, Any]
