"""What a worker sends to the training loop: a batch, with what was skipped, the sampler's state, and errors."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.dataset import IterableDatasetWrapper
from lhotse.dataset.sampling.base import CutSampler
from nemo.collections.common.data.fallback import FallbackDataset
from nemo.collections.common.data.lhotse.text_adapters import AudioTurn, NeMoMultimodalConversation

from nemo_emmett.audio_file import RUNS_A_COMMAND, AudioFault
from nemo_emmett.data.checks import TRAIN_SALM_GPT
from nemo_emmett.data.dataset import SpeechTextDataset, note_audio_fault, recordings_of
from nemo_emmett.data.io.audio import load_waveform, with_checked_audio
from nemo_emmett.data.io.commands import commands_allowed, is_refused
from nemo_emmett.data.io.skipped_records import RecordsDelta, SkippedRecords
from nemo_emmett.data.readers.examples import ExampleKind, note_example
from nemo_emmett.data.sampling.sampler import SamplingPlan, WorkerSampler
from nemo_emmett.data.sampling.source_iterator import WorkerInfo
from nemo_emmett.errors import ConfigError, EmmettError, Help


class WorkerBatch(NamedTuple):
    """One item of a loader's queue."""

    batch: Any  # None where all of its examples were skipped
    records: RecordsDelta  # read and skipped in this process since its last item
    error: EmmettError | None = None  # to be raised in the main process: torch would wrap it in a worker's traceback
    worker: int = 0  # number of the worker, with our own samplers
    state: bytes | None = None  # of the worker's sampler after this batch, pickled
    is_last: bool = False  # the worker's data has ended; there is no batch
    filtered: Mapping[str, int] = {}  # examples that NeMo's filters left out since the last item, by the filters' keys
    end_of_data_message: str = ""  # for the log: examples that were left out when finite data ended


class WorkerBatchDataset(torch.utils.data.Dataset):
    """Makes a :class:`WorkerBatch` of the examples of a batch.

    Args:
        dataset: maps the examples of a batch to the batch; may have ``skipped_records`` of its own.
        skipped_records: counts of the sources that are read in the same process.
        allow_commands: examples may run commands when they are loaded. Otherwise such examples are skipped, by the
            dataset if it is one of ours, which check each cut before they read it, else here.
    """

    def __init__(
        self, dataset: torch.utils.data.Dataset, skipped_records: SkippedRecords, allow_commands: bool = False
    ) -> None:
        self.dataset = dataset
        self.skipped_records = skipped_records
        self.allow_commands = allow_commands
        self._checks_commands = type(dataset) not in (SpeechTextDataset, CheckedConversations, CheckedCuts)

    def __getitem__(self, examples: CutSet) -> WorkerBatch:
        if len(examples) == 0:  # transforms of the batch failed on all of its examples
            return self.worker_batch(None)
        with commands_allowed(self.allow_commands):
            if self._checks_commands:
                examples = CutSet([example for example in examples if not skip_command(self.skipped_records, example)])
                if not examples:
                    return self.worker_batch({})
            try:
                batch = self.dataset[examples]
            except EmmettError as error:
                return self.worker_batch(None, error)
        if batch is None:
            for example in examples:
                note_example(self.skipped_records, example, "refused by the dataset")
        return self.worker_batch(batch)

    def worker_batch(self, batch: Any, error: EmmettError | None = None) -> WorkerBatch:
        """A batch, with what this process has read and skipped since the last one."""
        records = self.skipped_records.drain()
        if isinstance(of_dataset := getattr(self.dataset, "skipped_records", None), SkippedRecords):
            more = of_dataset.drain()
            records = RecordsDelta(records.read + more.read, records.skipped + more.skipped)
        return WorkerBatch(batch, records, error)


class IterableWorkerBatches(IterableDatasetWrapper):
    """Worker batches of one of NeMo's samplers that runs in the worker.

    After the last batch follows an item without a batch, with the records that were skipped since.
    """

    def __init__(self, dataset: WorkerBatchDataset, sampler: CutSampler) -> None:
        super().__init__(dataset=dataset, sampler=sampler)
        self._ended = False

    def __iter__(self) -> IterableWorkerBatches:
        self._ended = False
        return super().__iter__()

    def __next__(self) -> WorkerBatch:
        if self._ended:
            raise StopIteration
        try:
            return super().__next__()
        except StopIteration:
            self._ended = True
            return self.dataset.worker_batch(None)
        except EmmettError as error:
            self._ended = True
            return self.dataset.worker_batch(None, error)


@dataclass(frozen=True)
class ResumePoint:
    """Where the workers start.

    Args:
        states: of each worker's sampler, pickled; None: at the beginning of the epoch.
        first_worker: number of the worker that makes the first batch.
        epoch: of finite data.
    """

    states: tuple[bytes | None, ...] = ()
    first_worker: int = 0
    epoch: int = 0


class ResumableWorkerBatches(torch.utils.data.IterableDataset):
    """Worker batches of our own samplers: each worker runs its part of a plan, and sends its state with each batch.

    Args:
        dataset: makes the batches.
        plan: of the samplers.
        rank: whose batches to make.
    """

    def __init__(self, dataset: WorkerBatchDataset, plan: SamplingPlan, rank: int) -> None:
        self.dataset = dataset
        self.plan = plan
        self.rank = rank
        self.start = ResumePoint()

    def __iter__(self) -> Iterator[WorkerBatch]:
        info = torch.utils.data.get_worker_info()
        num_workers = 1 if info is None else info.num_workers
        if info is not None:  # the workers run in parallel already; tokenizers would start threads in each of them
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        # torch takes its first batch from worker 0, which therefore runs the sampler whose turn it is.
        worker = ((0 if info is None else info.id) + self.start.first_worker) % num_workers
        sampler = WorkerSampler(self.plan, WorkerInfo(worker, num_workers), self.rank, self.start.epoch)
        state = self.start.states[worker] if self.start.states else None
        is_over = False
        while not is_over:
            with commands_allowed(self.dataset.allow_commands):
                batch = self._next(sampler, state)
            state = None
            is_over = batch.is_last or batch.error is not None
            yield batch._replace(worker=worker, filtered=sampler.take_filtered())

    def _next(self, sampler: WorkerSampler, state: bytes | None) -> WorkerBatch:
        try:
            if state is not None:
                sampler.load_state_dict(pickle.loads(state))
                self.dataset.skipped_records.drain()  # records that are read again were counted before
            examples = sampler.next()
        except StopIteration:
            last = self.dataset.worker_batch(None)._replace(
                is_last=True, end_of_data_message=sampler.end_of_data_message
            )
            return last._replace(state=pickle.dumps(sampler.state_dict()))
        except EmmettError as error:
            return self.dataset.worker_batch(None, error)
        return self.dataset[examples]._replace(state=pickle.dumps(sampler.state_dict()))


class CheckedConversations(torch.utils.data.Dataset):
    """NeMo's ``SALMDataset``, with counts of the conversations that it leaves out.

    It leaves out conversations whose audio cannot be read without a message. Its model cannot take a batch without
    speech, which raises a ConfigError here instead of an error in the preprocessor.

    Args:
        dataset: a ``SALMDataset``.
    """

    def __init__(self, dataset: torch.utils.data.Dataset) -> None:
        self.dataset = dataset
        self.skipped_records = SkippedRecords()

    def __getitem__(self, conversations: CutSet) -> dict:
        """Collate the conversations of one batch; an empty one if all of its speech was skipped.

        Raises:
            ConfigError: if there was no speech in it in the first place.
        """
        if not any(isinstance(c, NeMoMultimodalConversation) and c.has_audio_turns for c in conversations):
            raise ConfigError(f"NeMo's SALM cannot take a batch without speech; {TRAIN_SALM_GPT}.", page=Help.NO_SPEECH)
        readable = [c for c in conversations if self._has_its_audio(c)]
        _make_cut_ids_unique(readable)
        batch = self.dataset[CutSet(readable)] if any(c.has_audio_turns for c in readable) else None
        if batch is None or batch["audios"].numel() == 0:
            batch = {}
        kept = {key for conversation in batch.get("conversations", ()) for key in _identity(conversation)}
        for conversation in readable:
            if not kept.issuperset(_identity(conversation)):
                self._note_dropped(conversation)
        return batch

    def _has_its_audio(self, conversation: NeMoMultimodalConversation) -> bool:
        try:
            for turn in _audio_turns(conversation):
                turn.cut = with_checked_audio(turn.cut)
        except AudioFault as fault:
            note_audio_fault(self.skipped_records, conversation, fault)
            return False
        return True

    def _note_dropped(self, conversation: NeMoMultimodalConversation) -> None:
        """Note why NeMo has left a conversation out."""
        if not conversation.has_audio_turns:
            note_example(self.skipped_records, conversation, "left without speech in its batch")
            return
        try:
            for cut in conversation.list_cuts():
                load_waveform(cut)
        except AudioFault as fault:
            note_audio_fault(self.skipped_records, conversation, fault)
        else:
            note_example(self.skipped_records, conversation, "unreadable audio")


class CheckedCuts(torch.utils.data.Dataset):
    """Any other dataset of cuts, without the cuts whose audio is missing.

    Args:
        dataset: maps a CutSet to a batch.
    """

    def __init__(self, dataset: torch.utils.data.Dataset) -> None:
        self.dataset = dataset
        self.skipped_records = SkippedRecords()

    def __getitem__(self, examples: CutSet) -> Any:
        """The dataset's batch; an empty one if all examples were skipped."""
        checked = [self._checked(example) for example in examples]
        readable = [example for example in checked if example is not None]
        return self.dataset[CutSet(readable)] if readable else {}

    def _checked(self, example: Any) -> Any:
        if not isinstance(example, Cut):
            return None if skip_command(self.skipped_records, example) else example
        try:
            return with_checked_audio(example)
        except AudioFault as fault:
            note_audio_fault(self.skipped_records, example, fault)
            return None


def skip_command(skipped_records: SkippedRecords, example: Any) -> bool:
    """Whether loading an example would run a command that the recipe does not allow; such an example is noted."""
    refused = any(map(is_refused, recordings_of(example)))
    if refused:
        note_example(skipped_records, example, RUNS_A_COMMAND)
    return refused


def _make_cut_ids_unique(conversations: Sequence[NeMoMultimodalConversation]) -> None:
    """NeMo finds the audio of a turn by the id of its cut, which files of one name in several folders may share."""
    for number, turn in enumerate(turn for conversation in conversations for turn in _audio_turns(conversation)):
        turn.cut = turn.cut.with_id(f"{turn.cut.id}-{number}")


def _identity(conversation: NeMoMultimodalConversation) -> list[str]:
    """What identifies a conversation in its batch: the ids of its cuts, or its own if it has none."""
    return [turn.cut.id for turn in _audio_turns(conversation)] or [conversation.id]


def _audio_turns(conversation: NeMoMultimodalConversation) -> list[AudioTurn]:
    return [turn for turn in conversation.turns if isinstance(turn, AudioTurn)]


def prepare_dataset(dataset: torch.utils.data.Dataset) -> tuple[torch.utils.data.Dataset, ExampleKind]:
    """The dataset that collates the batches, with our checks, and the kind of examples that it takes.

    NeMo's ``FallbackDataset`` is removed: where a batch fails, it would return the previous one without a message.
    """
    from nemo.collections.speechlm2.data.salm_dataset import SALMDataset

    while isinstance(dataset, FallbackDataset):
        dataset = dataset.dataset
    if isinstance(dataset, SpeechTextDataset):
        return dataset, ExampleKind.TRANSLATION
    if isinstance(dataset, SALMDataset):
        return CheckedConversations(dataset), ExampleKind.CONVERSATION
    return CheckedCuts(dataset), ExampleKind.AS_READ


def is_empty(batch: Any) -> bool:
    """Whether all examples of a batch were skipped."""
    return batch is None or (isinstance(batch, Mapping) and not batch)
