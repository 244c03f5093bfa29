"""What travels from a worker to the training loop: a batch, what was skipped on the way to it, and what went wrong."""

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
from nemo_emmett.data.io.skipped_records import Notes, SkippedRecords
from nemo_emmett.data.readers.examples import ExampleKind, note_example
from nemo_emmett.data.sampling.sampler import SamplingPlan, WorkerSampler
from nemo_emmett.data.sampling.source_iterator import WorkerInfo
from nemo_emmett.errors import ConfigError, EmmettError


class WorkerBatch(NamedTuple):
    """One item of a loader's queue."""

    batch: Any  # None where nothing is left of it
    notes: Notes  # what this process has read and skipped since its last delivery
    error: EmmettError | None = None  # raised in the main process, for its sentence to be seen
    worker: int = 0  # which of our own samplers made it
    state: bytes | None = None  # of that sampler after this batch, pickled
    is_last: bool = False  # the worker has come to the end of its data; there is no batch
    filtered: Mapping[str, int] = {}  # examples left out since the last delivery, by the keys of NeMo's filters
    end_of_data_message: str = ""  # what the log shall say of what was left when finite data ended


class DeliveringDataset(torch.utils.data.Dataset):
    """A dataset whose batches come with the notes of the process that made them.

    Args:
        dataset: maps the examples of a batch to the batch; may hold a ledger of its own, ``skipped_records``.
        skipped_records: ledger of the sources that live in the same process.
        allow_commands: examples may run commands when they are loaded; otherwise those are skipped: by the dataset
            where it is one of ours, which check each cut before they read it, else here.
    """

    def __init__(
        self, dataset: torch.utils.data.Dataset, skipped_records: SkippedRecords, allow_commands: bool = False
    ) -> None:
        self.dataset = dataset
        self.skipped_records = skipped_records
        self.allow_commands = allow_commands
        self._checks_commands = type(dataset) not in (SpeechTextDataset, SpeechConversations, CheckedCuts)

    def __getitem__(self, examples: CutSet) -> WorkerBatch:
        if len(examples) == 0:  # transforms of the batch have failed on all of it
            return self.deliver(None)
        with commands_allowed(self.allow_commands):
            if self._checks_commands:
                examples = CutSet([example for example in examples if not note_refused(self.skipped_records, example)])
                if not examples:
                    return self.deliver({})
            try:
                batch = self.dataset[examples]
            except EmmettError as error:
                return self.deliver(None, error)
        if batch is None:
            for example in examples:
                note_example(self.skipped_records, example, "refused by the dataset")
        return self.deliver(batch)

    def deliver(self, batch: Any, error: EmmettError | None = None) -> WorkerBatch:
        """A batch, with all notes made so far in this process."""
        notes = self.skipped_records.drain()
        if isinstance(ledger := getattr(self.dataset, "skipped_records", None), SkippedRecords):
            of_dataset = ledger.drain()
            notes = Notes(notes.read + of_dataset.read, notes.skipped + of_dataset.skipped)
        return WorkerBatch(batch, notes, error)


class DeliveringIterable(IterableDatasetWrapper):
    """The iterable flavour: the sampler lives in the worker, and its last notes come in a delivery without a batch."""

    def __init__(self, dataset: DeliveringDataset, sampler: CutSampler) -> None:
        super().__init__(dataset=dataset, sampler=sampler)
        self._ended = False

    def __iter__(self) -> DeliveringIterable:
        self._ended = False
        return super().__iter__()

    def __next__(self) -> WorkerBatch:
        if self._ended:
            raise StopIteration
        try:
            return super().__next__()
        except StopIteration:
            self._ended = True
            return self.dataset.deliver(None)
        except EmmettError as error:
            self._ended = True
            return self.dataset.deliver(None, error)


class ResumableDeliveries(torch.utils.data.IterableDataset):
    """Our own samplers' flavour: each worker runs its part of a plan, and each batch brings the state behind it.

    Args:
        dataset: makes the batches.
        plan: of the samplers.
        rank: whose batches to make.
    """

    def __init__(self, dataset: DeliveringDataset, plan: SamplingPlan, rank: int) -> None:
        self.dataset = dataset
        self.plan = plan
        self.rank = rank
        self.start = ResumePoint()

    def __iter__(self) -> Iterator[WorkerBatch]:
        info = torch.utils.data.get_worker_info()
        num_workers = 1 if info is None else info.num_workers
        if info is not None:  # the workers are the parallelism; tokenizers would start threads in each of them
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        worker = ((0 if info is None else info.id) + self.start.first_worker) % num_workers
        sampler = WorkerSampler(self.plan, WorkerInfo(worker, num_workers), self.rank, self.start.epoch)
        state = self.start.states[worker] if self.start.states else None
        goes_on = True
        while goes_on:
            delivery = self._next_of(sampler, state)
            state = None
            goes_on = not (delivery.is_last or delivery.error)
            yield delivery._replace(worker=worker, filtered=sampler.take_filtered())

    def _next_of(self, sampler: WorkerSampler, state: bytes | None) -> WorkerBatch:
        with commands_allowed(self.dataset.allow_commands):
            return self._sampled(sampler, state)

    def _sampled(self, sampler: WorkerSampler, state: bytes | None) -> WorkerBatch:
        try:
            if state is not None:
                sampler.load_state_dict(pickle.loads(state))
                self.dataset.skipped_records.drain()  # what is read again has been noted before
            examples = sampler.next()
        except StopIteration:
            last = self.dataset.deliver(None)._replace(is_last=True, end_of_data_message=sampler.end_of_data_message)
            return last._replace(state=pickle.dumps(sampler.state_dict()))
        except EmmettError as error:
            return self.dataset.deliver(None, error)
        return self.dataset[examples]._replace(state=pickle.dumps(sampler.state_dict()))


@dataclass(frozen=True)
class ResumePoint:
    """Where the workers begin.

    Args:
        states: of each worker's sampler, pickled; None: at the epoch's beginning.
        first_worker: the worker whose turn it is.
        epoch: of finite data.
    """

    states: tuple[bytes | None, ...] = ()
    first_worker: int = 0
    epoch: int = 0


class SpeechConversations(torch.utils.data.Dataset):
    """NeMo's ``SALMDataset``, its silences made audible.

    It drops conversations whose audio cannot be read, which are noted here; and its model cannot take a batch without
    speech, which is refused here instead of failing in the preprocessor.

    Args:
        dataset: a ``SALMDataset``.
    """

    def __init__(self, dataset: torch.utils.data.Dataset) -> None:
        self.dataset = dataset
        self.skipped_records = SkippedRecords()

    def __getitem__(self, conversations: CutSet) -> dict:
        """Collate the conversations of one batch; an empty one where no speech is left of it.

        Raises:
            ConfigError: if there was no speech in it to begin with.
        """
        if not any(isinstance(c, NeMoMultimodalConversation) and c.has_audio_turns for c in conversations):
            raise ConfigError(f"NeMo's SALM cannot take a batch without speech; {TRAIN_SALM_GPT}.")
        readable = [c for c in conversations if self._has_its_audio(c)]
        self._tell_cuts_apart(readable)
        batch = self.dataset[CutSet(readable)] if any(c.has_audio_turns for c in readable) else None
        if batch is None or batch["audios"].numel() == 0:
            batch = {}
        kept = {mark for conversation in batch.get("conversations", ()) for mark in _marks(conversation)}
        for conversation in readable:
            if not kept.issuperset(_marks(conversation)):
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

    def _tell_cuts_apart(self, conversations: Sequence[NeMoMultimodalConversation]) -> None:
        """NeMo finds the audio of a turn by the id of its cut, which files of one name in several folders may share."""
        for number, turn in enumerate(turn for conversation in conversations for turn in _audio_turns(conversation)):
            turn.cut = turn.cut.with_id(f"{turn.cut.id}-{number}")

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
    """Any other dataset of cuts, which gets those whose audio is there.

    Args:
        dataset: maps a CutSet to a batch.
    """

    def __init__(self, dataset: torch.utils.data.Dataset) -> None:
        self.dataset = dataset
        self.skipped_records = SkippedRecords()

    def __getitem__(self, examples: CutSet) -> Any:
        """The dataset's batch; an empty one where no example is left of it."""
        checked = [self._checked(example) for example in examples]
        readable = [example for example in checked if example is not None]
        return self.dataset[CutSet(readable)] if readable else {}

    def _checked(self, example: Any) -> Any:
        if not isinstance(example, Cut):
            return None if note_refused(self.skipped_records, example) else example
        try:
            return with_checked_audio(example)
        except AudioFault as fault:
            note_audio_fault(self.skipped_records, example, fault)
            return None


def note_refused(skipped_records: SkippedRecords, example: Any) -> bool:
    """Whether loading an example would run a command that the recipe does not allow; notes one that would."""
    refused = any(map(is_refused, recordings_of(example)))
    if refused:
        note_example(skipped_records, example, RUNS_A_COMMAND)
    return refused


def _marks(conversation: NeMoMultimodalConversation) -> list[str]:
    """What tells a conversation from the others of its batch: the ids of its cuts, or its own where it has none."""
    return [turn.cut.id for turn in _audio_turns(conversation)] or [conversation.id]


def _audio_turns(conversation: NeMoMultimodalConversation) -> list[AudioTurn]:
    return [turn for turn in conversation.turns if isinstance(turn, AudioTurn)]


def prepare_dataset(dataset: torch.utils.data.Dataset) -> tuple[torch.utils.data.Dataset, ExampleKind]:
    """What really collates the batches, and what it takes.

    NeMo's ``FallbackDataset`` is taken off: it hands out the previous batch again, in silence, where one has failed.
    """
    from nemo.collections.speechlm2.data.salm_dataset import SALMDataset

    while isinstance(dataset, FallbackDataset):
        dataset = dataset.dataset
    if isinstance(dataset, SpeechTextDataset):
        return dataset, ExampleKind.TRANSLATION
    if isinstance(dataset, SALMDataset):
        return SpeechConversations(dataset), ExampleKind.CONVERSATION
    return CheckedCuts(dataset), ExampleKind.AS_READ


def is_empty(batch: Any) -> bool:
    """Whether nothing is left of a batch."""
    return batch is None or (isinstance(batch, Mapping) and not batch)
