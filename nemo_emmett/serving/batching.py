"""The thread that owns the model, and the queue in front of it.

A batch is made of what waits when the model is free: the input that came first, and others of its modality and of
similar length, up to a number of tokens. As the first is always in the next batch, none waits for ever. Where the model
is idle, the first waits a few milliseconds for others.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from nemo_emmett.errors import DataError
from nemo_emmett.models.inputs import Input, fill_batches, is_recording
from nemo_emmett.prompts.answers import Answer

SIMILAR = 2.0
"""The lengths of a batch are that of its first input times at most this, and at least its inverse: a short answer
would otherwise wait until a long one is generated."""


@dataclass(eq=False)
class _Entry:
    """An input that waits."""

    input: Input
    source_lang: str | None
    target_lang: str
    future: Future[Answer] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)
    length: int = 0  # positions of the language model's input


class Batcher:
    """Translates inputs that come one by one in batches.

    Args:
        model: has ``answer_inputs`` and ``input_lengths``, as :class:`~nemo_emmett.models.generation.Generation`. It is
            used by one thread alone.
        wait: seconds that an input waits for others if the model is idle.
        batch_tokens: most positions of the language model's input in a batch, padding included.
        options: of ``answer_inputs``.
        observe: called for each batch with its modality, its number of inputs and its seconds, before its answers are
            given out: who has an answer finds its batch counted.
    """

    def __init__(
        self,
        model: Any,
        *,
        wait: float,
        batch_tokens: int,
        options: Mapping[str, Any] | None = None,
        observe: Callable[[str, int, float], None] = lambda *_: None,
    ) -> None:
        self._model = model
        self._wait = wait
        self._batch_tokens = batch_tokens
        self._options = dict(options or {})
        self._observe = observe
        self._arrived: list[_Entry] = []
        self._waiting: list[_Entry] = []  # in the order in which they came; of the thread alone
        self._is_closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread takes inputs."""
        return self._thread.is_alive() and not self._is_closed

    @property
    def num_waiting(self) -> int:
        """Inputs that are not in a batch yet."""
        return len(self._arrived) + len(self._waiting)

    def submit(self, item: Input, source_lang: str | None, target_lang: str) -> Future[Answer]:
        """Queue an input.

        Args:
            item: a text or a recording.
            source_lang: its language code; None if it is not known.
            target_lang: language code of the translation.

        Returns:
            The future answer. While it is not in a batch, ``cancel`` takes the input from the queue.
        """
        entry = _Entry(item, source_lang, target_lang)
        with self._changed:
            if self._is_closed:
                entry.future.set_exception(_ended())
            else:
                self._arrived.append(entry)
                self._changed.notify()
        return entry.future

    def close(self, wait: bool = True) -> None:
        """End the thread after the batch that it is at; what waits fails.

        Args:
            wait: until it has ended.
        """
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        if wait:
            self._thread.join()

    def _run(self) -> None:
        batch: list[_Entry] = []
        try:
            while self._take():
                batch = _next_batch(self._waiting, self._batch_tokens)
                taken = set(batch)
                self._waiting = [entry for entry in self._waiting if entry not in taken]
                if batch := [entry for entry in batch if entry.future.set_running_or_notify_cancel()]:
                    self._answer(batch)
        finally:
            with self._changed:
                self._is_closed = True
            for entry in (*batch, *self._waiting, *self._arrived):
                with suppress(InvalidStateError):  # those that are done, or cancelled
                    entry.future.set_exception(_ended())

    def _take(self) -> bool:
        """Wait until there are inputs, and for a few milliseconds more; false if the thread is to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._arrived or self._waiting)
            while not self._is_closed:
                first = (*self._waiting, *self._arrived)[0]
                if (remaining := first.arrived + self._wait - time.monotonic()) <= 0:
                    break
                self._changed.wait(remaining)
            if self._is_closed:
                return False
            arrived, self._arrived = self._arrived, []
        self._measure(arrived)
        # Of those that were cancelled nothing is computed; those that could not be measured have their error.
        self._waiting = [entry for entry in (*self._waiting, *arrived) if not entry.future.done()]
        return True

    def _measure(self, entries: Sequence[_Entry]) -> None:
        for entry, length in self._each(entries, self._model.input_lengths):
            if isinstance(length, Exception):
                _fail(entry, length)
                continue
            entry.length = length
            if length > self._batch_tokens and not is_recording(entry.input):
                most = f"{self._batch_tokens:,} of a batch"
                _fail(entry, DataError(f"a text has {length:,} tokens, more than the {most}; send its sentences."))

    def _answer(self, entries: Sequence[_Entry]) -> None:
        def answers(*inputs: Any) -> list[Answer]:
            return self._model.answer_inputs(*inputs, batch_tokens=self._batch_tokens, **self._options)

        started = time.monotonic()
        results = self._each(entries, answers)
        modality = "audio" if is_recording(entries[0].input) else "text"
        self._observe(modality, len(entries), time.monotonic() - started)
        for entry, answer in results:
            if isinstance(answer, Exception):
                _fail(entry, answer)
            else:
                entry.future.set_result(answer)

    def _each(self, entries: Sequence[_Entry], compute: Callable[..., list]) -> list[tuple[_Entry, Any]]:
        """Entries with what is computed of them together: in halves where one is at fault, which has its error."""
        if not entries:
            return []
        try:
            results = compute(
                [entry.input for entry in entries],
                [entry.source_lang for entry in entries],
                [entry.target_lang for entry in entries],
            )
            return list(zip(entries, results, strict=True))
        except Exception as error:
            if len(entries) == 1:
                return [(entries[0], error)]
        middle = len(entries) // 2
        return self._each(entries[:middle], compute) + self._each(entries[middle:], compute)


def _ended() -> RuntimeError:
    return RuntimeError("the thread of the model has ended")


def _fail(entry: _Entry, error: Exception) -> None:
    if entry.future.running() or entry.future.set_running_or_notify_cancel():
        entry.future.set_exception(error)


def _next_batch(waiting: Sequence[_Entry], batch_tokens: int) -> list[_Entry]:
    """The batch with the input that came first; empty if there is none."""
    if not waiting:
        return []
    first = waiting[0]
    sizes = {
        number: entry.length
        for number, entry in enumerate(waiting)
        if is_recording(entry.input) == is_recording(first.input)
        and first.length / SIMILAR <= entry.length <= first.length * SIMILAR
    }
    chosen = next(batch for batch in fill_batches(sizes, batch_tokens) if 0 in batch)
    return [waiting[number] for number in sorted(chosen)]
