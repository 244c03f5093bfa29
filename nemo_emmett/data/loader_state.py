"""The position of training in its data: after the last batch trained on, not after the last one prefetched."""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

from nemo.utils import logging

from nemo_emmett.data.scheduled_batches import ScheduledSteps
from nemo_emmett.data.worker_batches import ResumePoint, WorkerBatch
from nemo_emmett.errors import DataError

VERSION = 1
"""Of the layout of the state of streamed data. Checkpoints hold states, so keys keep their names, here and in
``sampling``."""

SCHEDULE_VERSION = 2
"""Of the layout of the state of a schedule."""


class _Item(NamedTuple):
    """What is needed of a worker batch that training has not reached yet."""

    is_batch: bool
    worker: int
    state: bytes
    is_last: bool


class LoaderState:
    """The state of every worker's sampler after the last batch trained on.

    Lightning fetches batches in advance. Until :meth:`count_trained` is called, a batch counts as trained on when the
    loader yields it; after that, when :meth:`trained` is called. The state is the same on all ranks, and needs no
    communication.

    Args:
        num_workers: processes that make batches, at least 1.
        world_size: number of ranks.
        seed: by which the data is shuffled.
        finite: a pass over the data has an end; then each iteration is a pass of its own.
    """

    def __init__(self, num_workers: int, world_size: int, seed: int = 0, finite: bool = False) -> None:
        self.num_workers = max(num_workers, 1)
        self.world_size = world_size
        self.seed = seed
        self.finite = finite
        self._states: list[bytes | None] = [None] * self.num_workers
        self._ended = [False] * self.num_workers
        self._next_worker = 0
        self._epoch = 0  # the number of the pass over finite data
        self._completes_pass = False  # the next iteration is the rest of a pass that was interrupted
        self._counts_trained = False
        self._pending: deque[_Item] = deque()  # yielded, but not trained on

    def count_trained(self) -> None:
        """From now on a batch counts when :meth:`trained` is called."""
        self._counts_trained = True

    def start(self) -> ResumePoint:
        """Where an iteration begins.

        Endless data continues after the last batch trained on. Finite data begins its next pass once a batch of the
        current one was trained on, even if the pass was not completed; only the first iteration after
        :meth:`load_state_dict` is the rest of the pass that was interrupted.
        """
        self._drop_pending()
        if all(self._ended):
            self._begin_next_pass()
        elif not self._completes_pass:
            self.end_epoch()
        self._completes_pass = False
        return ResumePoint(tuple(self._states), self._next_worker, self._epoch)

    def end_epoch(self) -> None:
        """The trainer's epoch is over: the next iteration over finite data is the next pass."""
        self._drop_pending()
        self._completes_pass = False
        has_begun = any(state is not None for state in self._states)  # the same on all ranks, as the states are
        if self.finite and has_begun:
            self._begin_next_pass()

    def _begin_next_pass(self) -> None:
        self._epoch += 1
        self._states = [None] * self.num_workers
        self._ended = [False] * self.num_workers
        self._next_worker = 0

    def yielded(self, item: WorkerBatch, is_batch: bool) -> None:
        """Record an item of a worker: a batch for training, or one that training does not get."""
        if not self._counts_trained:  # the last one stays pending, in case that `count_trained` is called next
            self._advance(len(self._pending))
        self._pending.append(_Item(is_batch, item.worker, item.state, item.is_last))
        if self._counts_trained:
            self._advance_past_non_batches()

    def trained(self) -> None:
        """One more of the batches has been trained on."""
        numbers = [number for number, item in enumerate(self._pending) if item.is_batch]
        if numbers:
            self._advance(numbers[0] + 1)
        self._advance_past_non_batches()

    def _drop_pending(self) -> None:
        self._advance_if_yielding_counts()
        self._pending.clear()

    def _advance_if_yielding_counts(self) -> None:
        if not self._counts_trained:
            self._advance(len(self._pending))

    def _advance_past_non_batches(self) -> None:
        while self._pending and not self._pending[0].is_batch:
            self._advance(1)

    def _advance(self, count: int) -> None:
        for _ in range(count):
            item = self._pending.popleft()
            self._states[item.worker] = item.state
            self._ended[item.worker] = item.is_last
            self._next_worker = (item.worker + 1) % self.num_workers

    def state_dict(self) -> dict[str, Any]:
        """The state, as plain numbers, strings and lists."""
        self._advance_if_yielding_counts()
        return {
            "version": VERSION,
            "num_workers": self.num_workers,
            "world_size": self.world_size,
            "seed": self.seed,
            "epoch": self._epoch,
            "epoch_ended": False,  # the trainer's epoch loop changes it where a checkpoint resumes with the next epoch
            "next_worker": self._next_worker,
            "ended": list(self._ended),
            "workers": [None if state is None else pickle.loads(state) for state in self._states],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state: with the rest of its pass, or, if ``epoch_ended`` is set, with the next one.

        With another number of ranks the same examples follow in the same order, in other batches. With another number
        of workers the data continues after the last record that any worker has read, which is logged.

        Raises:
            DataError: if the state has the layout of another version of nemo_emmett.
        """
        if state.get("version") == SCHEDULE_VERSION:
            raise DataError(
                "the checkpoint has a position in data that was read by its length index, but a source of this run can "
                "only be streamed; give the files that the checkpoint was trained on, or train on from its weights."
            )
        if state.get("version") != VERSION:
            raise _other_version(state, VERSION)
        self._compare_seed(state)
        workers, ended, next_worker = list(state["workers"]), list(state["ended"]), state["next_worker"]
        if state["num_workers"] != self.num_workers:
            logging.warning(
                f"The checkpoint was written with {state['num_workers']} data workers, this run has "
                f"{self.num_workers}: the batches will differ from those of an uninterrupted run. The data continues "
                "after what was read; examples that waited in a bucket come in the next pass."
            )
            workers = _redistributed(workers, self.num_workers)
            ended, next_worker = [all(ended)] * self.num_workers, 0
        elif state["world_size"] != self.world_size:
            logging.warning(
                f"The checkpoint was written by {state['world_size']} ranks, this run has {self.world_size}: the "
                "examples come in the same order, but in other batches than in an uninterrupted run."
            )
        self._states = [None if worker is None else pickle.dumps(worker) for worker in workers]
        self._ended, self._next_worker, self._epoch = ended, next_worker, state["epoch"]
        self._pending.clear()
        self._completes_pass = True
        if state.get("epoch_ended"):
            self.end_epoch()

    def _compare_seed(self, state: Mapping[str, Any]) -> None:
        if state["seed"] != self.seed:
            logging.warning(
                f"The checkpoint's data was shuffled by the seed {state['seed']}, this run's is by {self.seed}: "
                "sources continue in the checkpoint's order to the end of the epoch, but groups are mixed and batches "
                f"augmented by the new seed; for the same batches set seed and shard_seed to {state['seed']}."
            )


class ScheduleState(LoaderState):
    """The state of a schedule after the last batch trained on; the same for any number of workers.

    Args:
        steps: the sampler that computes the schedule.
        world_size: number of ranks.
        seed: by which the data is shuffled.
        finite: a pass over the data has an end; then each iteration is a pass of its own.
    """

    def __init__(self, steps: ScheduledSteps, world_size: int, seed: int = 0, finite: bool = False) -> None:
        super().__init__(1, world_size, seed, finite)
        self.steps = steps

    @property
    def next_pass(self) -> int:
        """Number of the pass over finite data that the next iteration is, or is the rest of."""
        has_begun = self._states[0] is not None and self.finite and not self._completes_pass
        return self._epoch + (has_begun or all(self._ended))

    def state_dict(self) -> dict[str, Any]:
        """The state, as plain numbers, strings and lists."""
        self._advance_if_yielding_counts()
        return {
            "version": SCHEDULE_VERSION,
            "world_size": self.world_size,
            "seed": self.seed,
            "epoch": self._epoch,
            "epoch_ended": False,  # the trainer's epoch loop changes it where a checkpoint resumes with the next epoch
            "ended": self._ended[0],
            "schedule": self.steps.state_dict(self._states[0]),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state: with the rest of its pass, or, if ``epoch_ended`` is set, with the next one.

        Any number of workers continues in the same way, and any number of ranks, where global batches are the same.

        Raises:
            DataError: if the state has the layout of another version of nemo_emmett.
        """
        if state.get("version") != SCHEDULE_VERSION:
            raise _other_version(state, SCHEDULE_VERSION)
        self._compare_seed(state)
        self._states, self._ended, self._epoch = [state["schedule"]], [state["ended"]], state["epoch"]
        self._pending.clear()
        self._completes_pass = True
        if state.get("epoch_ended"):
            self.end_epoch()


def _other_version(state: Mapping[str, Any], version: int) -> DataError:
    return DataError(
        f"the checkpoint's position in the data has the layout {state.get('version')!r}, this version reads {version}; "
        "resume with the nemo_emmett that wrote it, or train on from the weights alone."
    )


def _redistributed(workers: list[dict | None], num_workers: int) -> list[dict | None]:
    """States for another number of workers: each source continues after the last chunk that any worker has read."""
    known = [worker for worker in workers if worker is not None]
    if not known:
        return [None] * num_workers
    groups = {}
    for name, group in known[0]["groups"].items():
        leaves = []
        for number in range(len(group["leaves"])):
            next_chunk = max(worker["groups"][name]["leaves"][number]["next_chunk"] for worker in known)
            next_chunk = -(-next_chunk * len(workers) // num_workers)  # rounded up: workers take the chunks in turn
            seed = known[0]["groups"][name]["leaves"][number]["seed"]
            leaves.append({"seed": seed, "open": [], "next_chunk": next_chunk, "drawn": 0, "at_end": False})
        fresh = {**group["draws"], "counts": [0] * len(leaves), "drawn": 0}
        groups[name] = {**group, "leaves": leaves, "draws": fresh, "waiting": [], "ready": [], "left_out": 0}
    return [{**known[0], "groups": groups}] * num_workers
