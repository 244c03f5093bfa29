"""What the server does for a request, whatever the protocol: inputs for the model, and results from its answers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from nemo_emmett.audio_chunks import cut_into_chunks, join_translations
from nemo_emmett.errors import EmmettError
from nemo_emmett.models.exported import chunk_seconds_of
from nemo_emmett.models.inputs import Input, PlainText, Waveform
from nemo_emmett.prompts.answers import Answer
from nemo_emmett.serving.batching import Batcher
from nemo_emmett.serving.directions import Direction, Directions
from nemo_emmett.serving.limits import Limits
from nemo_emmett.serving.request_errors import RequestError
from nemo_emmett.serving.uploads import decode

_DECODERS = 2
"""Recordings that are decoded at once: each may take a few hundred megabytes."""


@dataclass(frozen=True)
class Part:
    """A chunk of a recording."""

    start: float  # seconds
    end: float  # seconds
    text: str
    transcript: str | None  # None where the model gives none


@dataclass(frozen=True)
class Spoken:
    """What was made of a recording."""

    seconds: float
    text: str
    transcript: str | None
    parts: list[Part]


class Service:
    """A model and its queue.

    Args:
        model: one of ``nemo_emmett.models``.
        name: by which requests name it.
        batcher: the thread that owns it.
        config: of the exported model: languages that it was trained on, and how long recordings were.
        limits: of a request.
    """

    def __init__(self, model: Any, name: str, batcher: Batcher, config: Mapping[str, Any], limits: Limits) -> None:
        self.name = name
        self.directions = Directions(config)
        self.limits = limits
        self.batcher = batcher
        self.sampling_rate = None if model.perception is None else model.sampling_rate
        self._chunk_seconds = limits.chunk_seconds or chunk_seconds_of(config)
        self._decoders = ThreadPoolExecutor(_DECODERS, "decoder")

    @property
    def reads_speech(self) -> bool:
        """Whether the model takes recordings."""
        return self.sampling_rate is not None

    async def translate_texts(self, texts: Sequence[str], direction: Direction) -> list[str]:
        """Translations of texts, in their order; that of an empty text is empty.

        Raises:
            RequestError: if a text cannot be translated.
        """
        for number, text in enumerate(texts):
            self._check_text(text, "text" if len(texts) == 1 else f"text.{number}")
        asked = [number for number, text in enumerate(texts) if text.strip()]
        answers = await self._answers([PlainText(texts[number]) for number in asked], direction)
        translations = dict(zip(asked, answers, strict=True))
        return [translations[number].translation if number in translations else "" for number in range(len(texts))]

    async def translate_recording(self, audio: bytes, direction: Direction) -> Spoken:
        """The translation of a recording, or its transcript if the direction wants that.

        Args:
            audio: a file of any container that libsndfile reads.
            direction: what is asked for.

        Raises:
            RequestError: if it cannot be read or translated.
        """
        if self.sampling_rate is None:
            raise RequestError("file: this model reads text only; send texts to /v1/translate.", param="file")
        loop = asyncio.get_running_loop()
        waveform, spans = await loop.run_in_executor(self._decoders, self._decoded, audio)
        rate = waveform.sampling_rate
        chunks = [Waveform(waveform.samples[start:end], rate) for start, end in spans]
        answers = await self._answers(chunks, direction)
        parts = []
        for (start, end), answer in zip(spans, answers, strict=True):
            text, transcript = answer.translation, answer.transcript
            if direction.wants_transcript:
                text = transcript or ""
            parts.append(Part(start / rate, end / rate, text, transcript))
        spoken = direction.source if direction.wants_transcript and direction.source else direction.target
        transcripts = [part.transcript for part in parts if part.transcript is not None]
        return Spoken(
            waveform.seconds,
            join_translations([part.text for part in parts], spoken),
            join_translations(transcripts, direction.source or "en") if transcripts else None,
            parts,
        )

    def close(self, wait: bool = True) -> None:
        """End the threads; ``wait`` until that of the model has ended."""
        self._decoders.shutdown(wait=False, cancel_futures=True)
        self.batcher.close(wait)

    def _check_text(self, text: str, key: str) -> None:
        if len(text) > self.limits.text_characters:
            raise RequestError(
                f"{key}: has {len(text)} characters, more than the {self.limits.text_characters} that are allowed; "
                "send its sentences.",
                param=key,
                code="text_too_long",
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"{key}: holds half of a surrogate pair, which is no character.", param=key) from error

    def _decoded(self, audio: bytes) -> tuple[Waveform, list[tuple[int, int]]]:
        """A recording, and the start and end of its chunks."""
        try:
            waveform = decode(audio, self.sampling_rate, self.limits.audio_seconds)
        except EmmettError as error:
            raise RequestError(str(error), param="file", code="invalid_audio") from error
        return waveform, cut_into_chunks(waveform.samples, waveform.sampling_rate, self._chunk_seconds)

    async def _answers(self, inputs: Sequence[Input], direction: Direction) -> list[Answer]:
        """Answers in the order of the inputs. If one fails, or nobody waits for them any more, the others are left."""
        if not self.batcher.is_alive:
            raise RequestError("The model has stopped; the server's log says why.", 503)
        futures = [self.batcher.submit(item, direction.source, direction.target) for item in inputs]
        try:
            return await asyncio.gather(*map(asyncio.wrap_future, futures))
        except EmmettError as error:  # of the prompt format, or the language model
            raise RequestError(str(error), code="not_translatable") from error
        finally:
            for future in futures:
                future.cancel()
