"""Our own models: a batch for each modality, as docs/architecture.md, "The batch", describes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from nemo_emmett.modules.batch import split_modalities
from nemo_emmett.oomptimizer.adapters.base import Adapter, Extent
from nemo_emmett.oomptimizer.adapters.draws import (
    full_lengths,
    random_ids,
    random_recordings,
    samples_of,
    sampling_rate,
    special_ids,
)
from nemo_emmett.oomptimizer.adapters.fakes import fake_values
from nemo_emmett.oomptimizer.adapters.lengths import (
    PROMPT_TOKENS,
    Lengths,
    decoder_only_lengths,
    encoder_decoder_lengths,
    speech_apart_lengths,
)
from nemo_emmett.oomptimizer.buckets import Shape
from nemo_emmett.prompts.families import prompt_formatter
from nemo_emmett.prompts.translation import translation_turns


class SpeechTextAdapter(Adapter):
    """Models that keep speech and text apart, tell a schema for each, and split their batches themselves."""

    def synthetic_batch(self, shape: Shape, size: int, device: torch.device) -> dict[str, dict[str, Tensor]]:
        """See :meth:`Adapter.synthetic_batch`.

        Raises:
            ModelError: if speech is asked of a model that reads text only.
        """
        lengths = self._lengths(shape)
        is_speech = shape.modality == "audio"
        recordings = self._recordings(lengths, size, device) if is_speech else {}
        context = lengths.context + is_speech
        context_lens = [context] * size
        context_ids = self._ids(shape.modality, size, context, device)
        if is_speech:
            context_ids[:, (context - 1) // 2] = self.model.audio_locator_id
        if size > 1 and context > 1:
            # One token of padding: without any, attention needs no mask, and batches of real data need one.
            context_ids[0, -1] = self.model.pad_id
            context_lens[0] -= 1
        batch = {
            "context_ids": context_ids,
            "context_lens": torch.tensor(context_lens, device=device),
            "answer_ids": self._ids(shape.modality, size, lengths.answer, device),
            "answer_lens": full_lengths(size, lengths.answer, device),
        }
        return {shape.modality: batch | recordings}

    def _lengths(self, shape: Shape) -> Lengths:
        if self.model.is_encoder_decoder:
            return encoder_decoder_lengths(shape)
        lengths_of = speech_apart_lengths if self.model.has_cross_attention else decoder_only_lengths
        return lengths_of(shape, self._prompt_tokens)

    @cached_property
    def _prompt_tokens(self) -> int:
        """Of the prompt beside a recording: chat formats write more around it than ``PROMPT_TOKENS``."""
        formatter = prompt_formatter(self.model.options.prompt_format, self.model.tokenizer)
        turns = translation_turns(formatter, self.model.audio_locator_tag, "de", "en")
        return max(PROMPT_TOKENS, len(formatter.encode_dialog(turns)["context_ids"]) - 1)

    def _recordings(self, lengths: Lengths, size: int, device: torch.device) -> dict[str, Tensor]:
        samples = samples_of(self.model, lengths.seconds)
        return {
            "audios": random_recordings(size, samples, device),
            "audio_lens": full_lengths(size, samples, device),
        }

    def _ids(self, modality: str, size: int, length: int, device: torch.device) -> Tensor:
        inputs = self.model.oomptimizer_schema(modality)["inputs"]
        vocab_size = next(item["vocab_size"] for item in inputs if "vocab_size" in item)
        return random_ids(size, length, vocab_size, special_ids(self.model), device)

    def join(self, batches: Sequence[Mapping]) -> dict[str, Any]:
        """See :meth:`Adapter.join`."""
        return {modality: part for batch in batches for modality, part in batch.items()}

    def extents(self, batch: Mapping) -> list[Extent]:
        """See :meth:`Adapter.extents`; a flat batch of NeMo's may hold text beside speech."""
        parts = split_modalities(batch, self.model.pad_id) if batch else {}
        rows = [row for part in parts.values() for row in self._rows(part)]
        of_modality = {name: [row for row in rows if row.modality == name] for name in ("audio", "text")}
        return [_longest(found) for found in of_modality.values() if found]

    def _rows(self, part: Mapping) -> list[Extent]:
        """The examples of a one-modality batch, each as if it were alone."""
        counts_B = (part["context_ids"] == self.model.audio_locator_id).sum(1)
        has_audio = part.get("audios") is not None
        samples = iter(part["audio_lens"].tolist() if has_audio else ())
        rate = sampling_rate(self.model) if has_audio else 1
        contexts, answers = (part["context_lens"] - counts_B).tolist(), part["answer_lens"].tolist()
        return [
            Extent("audio" if count else "text", 1, sum(islice(samples, count)) / rate, context, answer)
            for count, context, answer in zip(counts_B.tolist(), contexts, answers, strict=True)
        ]

    def split_batch(self, batch: Mapping, pieces: int) -> list[Any]:
        """See :meth:`Adapter.split_batch`; the model's own."""
        return self.model.split_batch(batch, pieces)

    def loss_weight(self, piece: Mapping, whole: Mapping) -> float:
        """See :meth:`Adapter.loss_weight`; the model's own."""
        return self.model.loss_weight(piece, whole)

    @contextmanager
    def one_step(self, whole: Mapping) -> Iterator[None]:
        """See :meth:`Adapter.one_step`; the model's own."""
        with self.model.one_step(whole):
            yield

    @contextmanager
    def planning(self) -> Iterator[None]:
        """See :meth:`Adapter.planning`."""
        with fake_values():
            yield


def _longest(rows: Sequence[Extent]) -> Extent:
    return Extent(
        rows[0].modality,
        len(rows),
        max(row.seconds for row in rows),
        max(row.input_tokens for row in rows),
        max(row.output_tokens for row in rows),
    )
