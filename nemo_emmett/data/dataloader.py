"""The dataloader: batches from our samplers or NeMo's, and a loop that reports what was skipped.

Drop-in for NeMo's ``get_lhotse_dataloader_from_config``: it takes every config that NeMo takes.
"""

from __future__ import annotations

import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import copy
from multiprocessing.util import Finalize, is_exiting
from typing import Any

import torch
from lhotse.dataset import make_worker_init_fn
from lhotse.dataset.sampling.base import CutSampler
from nemo.collections.common.data.lhotse.dataloader import maybe_set_cuda_expandable_segments
from nemo.utils import logging
from omegaconf import DictConfig
from torch.utils.data._utils import signal_handling

from nemo_emmett.data.agreement import RanksInStep, ranks_load_data
from nemo_emmett.data.checks import check_dataset, check_records
from nemo_emmett.data.config.dataset_config import DatasetConfig, parse_dataset
from nemo_emmett.data.config.section import place_of
from nemo_emmett.data.config.sources import source_of_files
from nemo_emmett.data.dataset import SpeechTextDataset
from nemo_emmett.data.io.commands import commands_allowed
from nemo_emmett.data.io.skipped_records import RecordsDelta, SkippedRecords
from nemo_emmett.data.loader_state import VERSION as STREAM_VERSION
from nemo_emmett.data.loader_state import LoaderState, ScheduleState
from nemo_emmett.data.readers.examples import ExampleKind
from nemo_emmett.data.sampling.nemo_sampler import nemo_sampler, nemo_sampler_reason
from nemo_emmett.data.sampling.plan import plan_sampling, plan_schedule
from nemo_emmett.data.sampling.shard_batches import ShardedBatches
from nemo_emmett.data.scheduled_batches import ScheduledBatches, ScheduledSteps
from nemo_emmett.data.worker_batches import (
    IterableWorkerBatches,
    ResumableWorkerBatches,
    WorkerBatch,
    WorkerBatchDataset,
    is_empty,
    prepare_dataset,
)
from nemo_emmett.errors import ConfigError, DataError
from nemo_emmett.modules.random_state import random_state, restore_random_state

EMPTY_BATCHES_IN_A_ROW = 100
"""After so many batches of which nothing could be read, endless data would only spin: the run stops."""


class MultimodalDataLoader(torch.utils.data.DataLoader):
    """A torch ``DataLoader`` that counts what was skipped, and keeps the position of training in its data.

    A batch of which nothing is left is left out, unless ranks would fall out of step: then it is an empty dict.

    With our own samplers (:attr:`progress` is not None) each iteration over finite data is the next pass, in an order
    of its own, also where the last one was left before its end; data without end continues after the last batch trained
    on. :meth:`state_dict` makes another loader continue there, with the rest of the pass.

    Args:
        dataset: delivers batches with their notes; :class:`ResumableWorkerBatches` also with the state of the data.
        skipped_records: counts everything skipped so far, by all workers.
        max_bad_records: stop past so many bad records, or past this share of those read of any source; None: never.
        hands_out_empty: an empty dict for a batch of which nothing is left, so that a rank stays in step.
        stream: makes the dataset that streams what a schedule would sample, for checkpoints of versions that did.
        kwargs: of ``torch.utils.data.DataLoader``.
    """

    def __init__(
        self,
        dataset: WorkerBatchDataset | IterableWorkerBatches | ResumableWorkerBatches,
        skipped_records: SkippedRecords | None = None,
        max_bad_records: int | float | None = None,
        hands_out_empty: bool = False,
        stream: Callable[[], ResumableWorkerBatches] | None = None,
        **kwargs: Any,
    ) -> None:
        self._stream = None
        if stream is not None:
            how = {"max_bad_records": max_bad_records, "hands_out_empty": hands_out_empty}
            how |= {key: value for key, value in kwargs.items() if key != "sampler"}
            self._stream = lambda: MultimodalDataLoader(stream(), self.skipped_records, **how)
        self._streamed: MultimodalDataLoader | None = None  # takes the place of this one
        kwargs["worker_init_fn"] = WorkerInit(kwargs.get("worker_init_fn"))
        # Iterators draw a seed for their workers; drawn from torch's global generator, it would move the training's.
        super().__init__(dataset, generator=torch.Generator(), **kwargs)
        self.hands_out_empty = hands_out_empty
        self.skipped_records = SkippedRecords(announce=True) if skipped_records is None else skipped_records
        self.max_bad_records = max_bad_records
        self._reported: Counter[tuple[str, str]] = Counter()  # skipped records that the last report counts
        self.filtered: Counter[str] = Counter()  # examples that NeMo's filters left out, by their keys; "": those kept
        self._epoch_of_last_pass: int | None = None
        self.progress: LoaderState | None = None
        self._ranks: RanksInStep | None = None
        self._pass: int | None = None  # number of the pass over finite data that is under way
        self._reports_indexes = True  # what cannot be used of the sources is still to be counted
        world_size, finite = 1, False
        if isinstance(dataset, ResumableWorkerBatches):
            world_size, finite = dataset.plan.world_size, dataset.plan.finite
            self.progress = LoaderState(self.num_workers, world_size, dataset.plan.seed, finite)
        elif self._steps is not None:
            world_size, finite = self._steps.world_size, self._steps.order.finite
            self.progress = ScheduleState(self._steps, world_size, self._steps.order.seed, finite)
        if finite and not hands_out_empty and ranks_load_data(world_size):
            self._ranks = RanksInStep()

    @property
    def bad_records(self) -> SkippedRecords:
        """The older name of ``skipped_records``, which scripts read."""
        return self.skipped_records

    @property
    def _delivering(self) -> WorkerBatchDataset:
        return self.dataset if isinstance(self.dataset, WorkerBatchDataset) else self.dataset.dataset

    @property
    def _steps(self) -> ScheduledSteps | None:
        """The sampler, if a schedule is followed."""
        return self.sampler if isinstance(self.sampler, ScheduledSteps) else None

    def __len__(self) -> int:
        """The number of batches of a pass over finite data that is sampled by a schedule.

        Raises:
            TypeError: for any other data.
        """
        if self._streamed is not None:
            return len(self._streamed)
        if self._steps is None:
            return super().__len__()
        return self._steps.steps_of_epoch(self.progress.next_pass if self._pass is None else self._pass)

    def state_dict(self) -> dict[str, Any]:
        """Where training is in the data: behind the last batch trained on, as far as that is counted
        (:class:`~nemo_emmett.callbacks.ResumableData`), else behind the last one handed out. The same on all ranks.
        Empty with NeMo's samplers, which cannot go on.
        """
        return {} if self.progress is None else self.progress.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state when iteration begins.

        Raises:
            DataError: if this loader cannot go on from that state.
        """
        if not state_dict:
            logging.warning("The checkpoint has no position of training in its data: the epoch starts over.")
            return
        if self.progress is None:
            raise DataError(
                "the checkpoint has the position of training in its data, but this run's dataset is sampled by NeMo, "
                "which cannot go on there; set sampling: emmett, as it was."
            )
        if self._streamed is None and self._stream is not None and state_dict.get("version") == STREAM_VERSION:
            logging.warning(
                "The checkpoint was written by a version that streamed all data. This run continues in the order of "
                "that version, and more slowly; for the order and the speed of this one, train on from its weights."
            )
            self._streamed = self._stream()
            self.progress = self._streamed.progress
        self.progress.load_state_dict(state_dict)

    def __iter__(self) -> Iterator[Any]:
        """Yield batches.

        Raises:
            TooManyBadRecords: if more was skipped than ``max_bad_records`` allows.
            DataError: if nothing can be read any more.
        """
        if self._streamed is not None:
            yield from self._streamed
            return
        self._start_epoch()
        seed = torch.initial_seed()
        if self.progress is not None:
            start = self.progress.start()
            seed = self.progress.seed
            if self._steps is None:
                self.dataset.start = start
            else:
                self._steps.begin(start)
                self._pass = start.epoch
                self._report_indexes()
        self.generator.manual_seed(seed)
        empty_in_a_row, is_last = 0, False
        deliveries = super().__iter__()
        if not hasattr(deliveries, "end_workers"):  # one whose workers persist has them since the last iteration
            deliveries.end_workers = _end_of_workers(deliveries)
        try:
            for delivery in deliveries:
                if self._steps is not None:
                    state, is_last = self._steps.delivered()
                    delivery = delivery._replace(state=state, filtered=self._steps.take_left_out())
                self._account_for(delivery)
                empty_in_a_row = empty_in_a_row + 1 if is_empty(delivery.batch) else 0
                self._check_progress(empty_in_a_row)
                hand_out = not empty_in_a_row or (self.hands_out_empty and not delivery.is_last)
                if self._ranks is not None and not delivery.is_last:
                    hand_out = self._all_ranks_hand_out(hand_out)
                if self.progress is not None:
                    self.progress.yielded(delivery, is_batch=hand_out)
                if is_last:  # a trainer that counts the batches does not ask for another
                    self._end_schedule()
                if hand_out:
                    yield delivery.batch or {}
            if self._steps is not None:
                if not is_last:  # there was no step
                    self._end_schedule()
                self.progress.yielded(
                    WorkerBatch(None, RecordsDelta(), state=self._steps.snapshot(), is_last=True), False
                )
            self._merge_notes_of_this_process()
            self.skipped_records.check(self.max_bad_records, at_end=True)
        except GeneratorExit:  # given up; workers that persist are there for the next iteration
            if not self.persistent_workers:
                deliveries.end_workers()
            raise
        except BaseException:
            deliveries.end_workers()
            self._iterator = None
            raise
        finally:
            try:
                deliveries.end_workers.still_active()
            except TypeError:  # the interpreter closes this generator at its very end, when modules are gone
                return
            self._pass = None
            self._report_epoch()

    def _report_indexes(self) -> None:
        """Count what cannot be used of the sources, once for each pass over finite data, else at the start.

        Raises:
            TooManyBadRecords: if it is more than ``max_bad_records`` allows.
        """
        if self._reports_indexes:
            self._reports_indexes = self._steps.order.finite
            for index in self.dataset.indexes:
                index.report(self.skipped_records)
                self.filtered.update(index.filtered)
            self.skipped_records.drain()
        self.skipped_records.check(self.max_bad_records)

    def _end_schedule(self) -> None:
        """Finite data has ended.

        Raises:
            TooManyBadRecords: if more was skipped than ``max_bad_records`` allows.
        """
        if message := self._steps.end_of_data_message:
            logging.info(f"The data has ended: {message}.")
        self.skipped_records.check(self.max_bad_records, at_end=True)

    def _all_ranks_hand_out(self, hand_out: bool) -> bool:
        agreed = self._ranks.all_have(hand_out)
        if hand_out and not agreed:
            logging.warning(
                "A batch is left out on all ranks, since on one of them nothing of it could be read and the model "
                "cannot take an empty batch."
            )
        return agreed

    def _report_epoch(self) -> None:
        """Say what did not reach training, and why; "" counts what did."""
        report, counts = self.skipped_records.end_epoch(), Counter(self.skipped_records.counts)
        if report and counts != self._reported:
            logging.warning(f"Bad records skipped so far:\n{report}")
        self._reported = counts
        kept = self.filtered.pop("", 0)
        if self.filtered:
            total = kept + self.filtered.total()
            left_out = ", ".join(f"{count:,} by {keys}" for keys, count in self.filtered.most_common())
            logging.info(f"Of {total:,} examples {kept / total:.1%} passed NeMo's filters; left out were {left_out}.")
        self.filtered.clear()

    def _start_epoch(self) -> None:
        """Give the sampler a new epoch, by which it shuffles, unless Lightning has done so already."""
        if not isinstance(self.sampler, CutSampler):
            return  # it lives in the workers, and goes on where it was
        if self.sampler.epoch == self._epoch_of_last_pass:
            self.sampler.set_epoch(self.sampler.epoch + 1)
        self._epoch_of_last_pass = self.sampler.epoch

    def _account_for(self, delivery: WorkerBatch) -> None:
        self.skipped_records.merge(delivery.records)
        self.filtered.update(delivery.filtered)
        self._merge_notes_of_this_process()
        self.skipped_records.check(self.max_bad_records)
        if delivery.end_of_data_message:
            logging.info(f"The data has ended: {delivery.end_of_data_message}.")
        if delivery.error is not None:
            raise delivery.error

    def _merge_notes_of_this_process(self) -> None:
        """The map-style flavour samples here, while the workers only read audio."""
        self.skipped_records.merge(self._delivering.worker_batch(None).records)

    def _check_progress(self, empty_in_a_row: int) -> None:
        if empty_in_a_row >= EMPTY_BATCHES_IN_A_ROW:
            raise DataError(
                f"nothing could be read of the last {empty_in_a_row} batches; what was skipped so far:\n"
                f"{self.skipped_records.table()}"
            )


def _end_of_workers(iterator: Any) -> Finalize:
    """What ends an iterator's worker processes: when it is called, when the iterator is gone, or at exit.

    torch's iterator ends them itself, but with a message that is never sent where it is freed in a reference cycle,
    together with its queues, as after an exception; it then waits 5 s for each, and sends SIGTERM, of which they ignore
    the first. At exit, multiprocessing would do the same, and torch's handler for SIGCHLD would turn their end into an
    exception, and with it into another exit code.
    """
    return Finalize(iterator, _Workers(iterator).end, exitpriority=1)


class _Workers:
    """The worker processes of an iterator of torch, and the thread that pins the memory of what they send."""

    def __init__(self, iterator: Any) -> None:
        self.loader_id = id(iterator)
        self.processes = getattr(iterator, "_workers", ())
        self.pinning = getattr(iterator, "_pin_memory_thread", None)
        if self.pinning is not None:
            self.is_done, self.results = iterator._pin_memory_thread_done_event, iterator._worker_result_queue

    def end(self) -> None:
        """Kill them; the thread ends first, which would wait for the rest of what they have sent in part."""
        if self.pinning not in (None, threading.current_thread()) and not is_exiting():
            self.is_done.set()
            self.results.put((None, None))
            self.pinning.join()
        with suppress(ValueError):  # torch has done so
            signal_handling._remove_worker_pids(self.loader_id)
            signal_handling._set_worker_pids(self.loader_id, ())  # torch is going to remove them once more
        for process in self.processes:
            process.kill()


class WorkerInit:
    """Prepares a worker process: signals to the whole process group must not end it before the training's last step.

    A terminal sends SIGINT to every process, SLURM sends SIGTERM to every process of a job. The worker ignores the
    first SIGTERM and ends with the second; the loader ends its workers by a message at the end of an iteration, and
    with SIGKILL before it.

    Args:
        init: what else is to be done in a worker.
    """

    def __init__(self, init: Callable[[int], None] | None = None) -> None:
        self.init = init

    def __call__(self, worker_id: int) -> None:
        """Set the handlers, then do the rest."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))
        if self.init is not None:
            self.init(worker_id)


def _as_it_is(delivery: WorkerBatch) -> WorkerBatch:
    return delivery


def get_multimodal_dataloader(
    config: Mapping | DictConfig,
    global_rank: int,
    world_size: int,
    dataset: torch.utils.data.Dataset,
    tokenizer: Any = None,
    *,
    place: str | None = None,
    shard_batches: bool = False,
) -> MultimodalDataLoader:
    """Build the dataloader of a dataset's config.

    Args:
        config: any NeMo dataloader config (``LhotseDataLoadingConfig``), with our keys
            (:class:`~nemo_emmett.data.DatasetConfig`) and data types (``parallel_text``).
        global_rank: this process's place among those that load data.
        world_size: how many load data.
        dataset: maps a ``CutSet`` to a batch: ours (:class:`SpeechTextDataset`), NeMo's ``SALMDataset``, or any NeMo
            dataset for lhotse cuts. A ``FallbackDataset`` around it is taken off.
        tokenizer: NeMo tokenizer, applied before batches are sampled.
        place: the config's place in the recipe, for messages; by default that of the ``DictConfig`` in its root.
        shard_batches: give each rank some of the batches that one process would get, whole, an empty one for each of
            which nothing could be read (:class:`~nemo_emmett.data.sampling.shard_batches.ShardedBatches`). For finite
            data of our dataset, with ``force_map_dataset``.

    Raises:
        ConfigError: if a key is misspelt or has a value that cannot work.
        DataError: if a file is missing, or the data of a source is filtered to nothing.

    Example:
        >>> loader = get_multimodal_dataloader(cfg.data.train_ds, 0, 1, SpeechTextDataset(tokenizer), tokenizer)
        >>> next(iter(loader)).keys()
        dict_keys(['audio', 'text'])
    """
    dataset, kind = prepare_dataset(dataset)
    data = parse_dataset(config, place or place_of(config, "model" if kind is ExampleKind.AS_READ else "data"))
    we_sample = not shard_batches and _we_sample(data, kind)
    check_dataset(data, tokenizer, kind, reads=not we_sample)  # length indexes show the same
    if shard_batches and data.sampling == "emmett":
        raise ConfigError(f"{data.place}.sampling: batches are dealt out from NeMo's samplers only; leave the key out.")
    maybe_set_cuda_expandable_segments(enabled=data.cuda_expandable_segments)
    if isinstance(dataset, SpeechTextDataset) and any(source.transcripts for source in data.sources):
        dataset = copy(dataset)  # other loaders have it, too
        dataset.has_transcripts = True

    skipped_records = SkippedRecords()
    dataset = WorkerBatchDataset(dataset, skipped_records, data.allow_commands)

    def stream() -> ResumableWorkerBatches:
        with _building_samplers(data.allow_commands):
            plan = plan_sampling(data, tokenizer, kind, skipped_records, world_size)
        return ResumableWorkerBatches(dataset, plan, global_rank)

    with _building_samplers(data.allow_commands):
        schedule = plan_schedule(data, tokenizer, kind, skipped_records, world_size) if we_sample else None

        if schedule is not None:
            order = schedule.order
            batches = ScheduledBatches(dataset, schedule.readers, schedule.indexes, order.seed, global_rank)
            flavour = {"dataset": batches, "sampler": ScheduledSteps(order, global_rank, world_size), "stream": stream}
            seed = order.seed
        elif we_sample:
            check_records(data, tokenizer, kind)
            flavour = {"dataset": (streamed := stream())}
            seed = streamed.plan.seed
        else:
            share = (0, 1) if shard_batches else (global_rank, world_size)
            sampler, is_iterable, seed = nemo_sampler(data, *share, tokenizer, kind, skipped_records)
            if shard_batches:
                sampler = ShardedBatches(sampler, global_rank, world_size)
            flavour = {"dataset": dataset, "sampler": sampler}
            if is_iterable:
                of_workers = IterableWorkerBatches(dataset, sampler)
                flavour = {"dataset": of_workers, "persistent_workers": data.num_workers > 0}
    if flavour["dataset"] is not dataset:
        # Seeds each worker of each rank differently: NeMo's samplers all read all data, each in its own order.
        flavour["worker_init_fn"] = make_worker_init_fn(rank=global_rank, world_size=world_size, seed=seed)
    return MultimodalDataLoader(
        **flavour,
        skipped_records=SkippedRecords(announce=True, source_of=source_of_files(data.sources)),
        max_bad_records=data.max_bad_records,
        # Only our models can take an empty batch; and samplers of NeMo's that live in workers share nothing out.
        hands_out_empty=shard_batches
        or (
            world_size > 1
            and kind is ExampleKind.TRANSLATION
            and not isinstance(flavour["dataset"], IterableWorkerBatches)
        ),
        batch_size=None,
        # These batches are all tensors already, which torch's own conversion would take apart for nothing.
        collate_fn=None if kind is ExampleKind.AS_READ else _as_it_is,
        num_workers=data.num_workers,
        pin_memory=data.pin_memory,
    )


@contextmanager
def _building_samplers(allow_commands: bool) -> Iterator[None]:
    """Samplers are seeded with the dataset's own seed: the generators of the training must not move."""
    states = random_state()
    try:
        with commands_allowed(allow_commands):
            yield
    finally:
        restore_random_state(states)


def _we_sample(data: DatasetConfig, kind: ExampleKind) -> bool:
    """Whether our own samplers are to be used."""
    if data.sampling != "auto":
        return data.sampling == "emmett"
    reason = nemo_sampler_reason(data, kind)
    if reason is not None and kind is not ExampleKind.AS_READ and not data.force_finite:
        logging.info(f"{data.place}: NeMo samples, so that training cannot resume where it was in the data: {reason}.")
    return reason is None
