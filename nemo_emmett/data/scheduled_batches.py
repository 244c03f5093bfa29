"""Batches of a schedule: the main process computes which examples a rank's batch holds, a worker reads them."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from lhotse import CutSet

from nemo_emmett.data.io.commands import commands_allowed
from nemo_emmett.data.io.skipped_records import RecordsDelta
from nemo_emmett.data.lengths.index import LengthIndex
from nemo_emmett.data.sampling.example_reader import ExampleReader
from nemo_emmett.data.sampling.schedule import RankBatch, Schedule, ScheduleOrder, ScheduleSnapshot
from nemo_emmett.data.worker_batches import ResumePoint, WorkerBatch, WorkerBatchDataset
from nemo_emmett.errors import EmmettError


class StepAddresses(NamedTuple):
    """What a worker is asked for: the examples of one rank in one step."""

    step: int
    epoch: int
    batches: list[RankBatch]


class ScheduledBatches(torch.utils.data.Dataset):
    """Reads the examples of a step and makes the batch of them.

    Args:
        dataset: makes the batches.
        readers: of the examples of each group.
        indexes: of all sources; with what cannot be used of them.
        seed: of the transforms of whole batches.
        rank: whose batches these are.
    """

    def __init__(
        self,
        dataset: WorkerBatchDataset,
        readers: Sequence[ExampleReader],
        indexes: Sequence[LengthIndex],
        seed: int,
        rank: int,
    ) -> None:
        self.dataset = dataset
        self.readers = list(readers)
        self.indexes = list(indexes)
        self.seed = seed
        self.rank = rank

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "indexes": []}  # a worker does not report them

    def __getitem__(self, addresses: StepAddresses) -> WorkerBatch:
        if torch.utils.data.get_worker_info() is not None:
            # The workers run in parallel already; tokenizers would start threads in each of them.
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        examples, first_row = [], 0
        try:
            with commands_allowed(self.dataset.allow_commands):
                for group, addressed in addresses.batches:
                    seed = [addresses.epoch, addresses.step, self.rank]
                    examples += self._examples_of(group, addressed, seed, first_row)
                    first_row += len(np.unique(addressed["bucket"]))  # rows of all groups of a step are numbered
        except EmmettError as error:
            return self.dataset.worker_batch(None, error)
        batch = self.dataset[CutSet(examples)]
        # What the sources hold is reported from their indexes; here only those count that turn out to be unusable.
        return batch._replace(records=RecordsDelta(skipped=batch.records.skipped))

    def _examples_of(self, group: int, addressed: Any, seed: Sequence[int], first_row: int) -> list:
        reader, packed = self.readers[group], {}
        if (packing := reader.packing) is not None:
            rows = first_row + addressed["bucket"] - addressed["bucket"][0]
            packed = {"rows": rows.tolist(), "row_size": packing.size}
        examples = reader.read(addressed["source"], addressed["entry"], addressed["number_of_pass"], **packed)
        return list(reader.pipeline.transform_batch(CutSet(examples), [self.seed, group, *seed]))


class ScheduledSteps:
    """The sampler of a loader: iterates over the addresses of the steps of a schedule.

    Args:
        order: of the examples.
        rank: whose batches these are.
        world_size: number of ranks.
    """

    def __init__(self, order: ScheduleOrder, rank: int, world_size: int) -> None:
        self.order = order
        self.rank = rank
        self.world_size = world_size
        self._start = ResumePoint()
        self._schedule = self._new_schedule(0)
        # Of the steps that were requested, and are not delivered yet.
        self._delivered: deque[tuple[ScheduleSnapshot, bool]] = deque()
        self._lengths: dict[int, int] = {}

    def _new_schedule(self, epoch: int) -> Schedule:
        return Schedule(self.order, self.rank, self.world_size, epoch)

    def begin(self, start: ResumePoint) -> None:
        """Where the next iteration starts."""
        self._start = start

    def __iter__(self) -> Iterator[StepAddresses]:
        self._delivered.clear()
        schedule = self._schedule = self._new_schedule(self._start.epoch)
        if self._start.states and (state := self._start.states[0]) is not None:
            schedule.load_state_dict(state if isinstance(state, Mapping) else self.state_dict(state))
        upcoming = self._next_step()
        while upcoming is not None:
            step, snapshot = upcoming
            upcoming = self._next_step()
            self._delivered.append((snapshot, upcoming is None))
            yield step

    def _next_step(self) -> tuple[StepAddresses, ScheduleSnapshot] | None:
        schedule = self._schedule
        try:
            batches = schedule.next()
        except StopIteration:
            return None
        return StepAddresses(schedule.steps, schedule.epoch, batches), schedule.snapshot()

    def delivered(self) -> tuple[ScheduleSnapshot, bool]:
        """Where the schedule was after the step that is delivered next, and whether this is the last one."""
        return self._delivered.popleft()

    def snapshot(self) -> ScheduleSnapshot:
        """Where the schedule is."""
        return self._schedule.snapshot()

    def state_dict(self, state: ScheduleSnapshot | Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        """A snapshot, or the state that it was loaded from, as plain numbers and strings."""
        return self._schedule.state_dict(state) if isinstance(state, ScheduleSnapshot) else state

    def take_left_out(self) -> Counter[str]:
        """See :meth:`Schedule.take_left_out`."""
        return self._schedule.take_left_out()

    @property
    def end_of_data_message(self) -> str:
        """Which examples were left out when finite data ended."""
        return self._schedule.end_of_data_message

    def steps_of_epoch(self, epoch: int) -> int:
        """The number of steps of a pass over finite data.

        Raises:
            TypeError: if the data has no end.
        """
        if not self.order.finite:
            raise TypeError("the data has no end, and so its loader has no length")
        if epoch not in self._lengths:
            self._lengths = {epoch: self._new_schedule(epoch).count_steps()}
        return self._lengths[epoch]
