"""Our own models: a batch for each modality, as docs/architecture.md, "The batch", describes it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from itertools import islice
from operator import add
from typing import Any

import torch
from torch import Tensor

from nemo_emmett.modules.batch import split_modalities
from nemo_emmett.modules.packing import ENCODER_PADDING
from nemo_emmett.oomptimizer.adapters.base import Adapter, Extent
from nemo_emmett.oomptimizer.adapters.draws import random_ids, random_recordings, samples_of, sampling_rate, special_ids
from nemo_emmett.oomptimizer.adapters.fakes import fake_values
from nemo_emmett.oomptimizer.adapters.lengths import (
    PROMPT_TOKENS,
    Lengths,
    longest_speech,
    longest_text,
    shortest_speech,
    widest,
)
from nemo_emmett.oomptimizer.adapters.prompts import PromptTokens, ShortestPrompts
from nemo_emmett.oomptimizer.adapters.rows import stack_padded
from nemo_emmett.oomptimizer.buckets import Shape
from nemo_emmett.prompts.families import prompt_formatter
from nemo_emmett.prompts.instruction import translation_turns

_ANY = PromptTokens(1, 1)
"""Of a prompt that no bin bounds."""


class SpeechTextAdapter(Adapter):
    """Models with one batch and one schema for each modality, which split their batches themselves."""

    def synthetic_batch(self, shape: Shape, size: int, device: torch.device) -> dict[str, dict[str, Tensor]]:
        """See :meth:`Adapter.synthetic_batch`.

        Raises:
            ModelError: if speech is asked of a model that reads text only.
        """
        if shape.contents.packed:
            return {shape.modality: self._packed_batch(shape, size, device)}
        rows = self._rows_of(shape, size)
        if rows is None:  # no speech fits into the bin with the shortest prompt: its examples are text
            text = replace(shape, modality="text", seconds=0.0)
            return self.synthetic_batch(text, size, device)
        is_speech = shape.modality == "audio"
        width = widest(rows)
        context_lens = [row.context + is_speech for row in rows]
        context_ids = self._ids(shape.modality, size, width.context + is_speech, device)
        if is_speech:
            context_ids[:, width.context // 2] = self.model.audio_locator_id
        if size > 1 and rows[0] == rows[1] and context_lens[0] > 1:
            # One token of padding: real batches need an attention mask, and those without padding do not.
            context_lens[0] -= 1
        answer_lens = [row.answer for row in rows]
        batch = {
            "context_ids": self._padded(context_ids, context_lens),
            "context_lens": torch.tensor(context_lens, device=device),
            "answer_ids": self._padded(self._ids(shape.modality, size, width.answer, device), answer_lens),
            "answer_lens": torch.tensor(answer_lens, device=device),
        }
        if is_speech:
            samples = [samples_of(self.model, row.seconds, shape.contents.seconds_per_token) for row in rows]
            batch["audios"] = random_recordings(size, max(samples), device)
            batch["audio_lens"] = torch.tensor(samples, device=device)
            batch |= self._transcripts([length - 1 for length in context_lens], answer_lens, device)
        return {shape.modality: batch}

    def _packed_batch(self, shape: Shape, size: int, device: torch.device) -> dict[str, Any]:
        """Full rows, so that the longest batch is no longer. A row of text has one example. A row of speech has two:
        together they have the seconds that a row may have, padded, and what they leave of the row is text."""
        S, A = shape.input_tokens, shape.output_tokens
        is_speech, joint = shape.modality == "audio", not self.model.is_encoder_decoder
        if not is_speech:
            lens = [(1, S - 1)] if joint else [(S, A)]
            return self._packed_rows(shape, lens, size, device)
        frame, rate = shape.contents.seconds_per_token, sampling_rate(self.model)
        seconds = (shape.contents.batch_seconds / size or ENCODER_PADDING * S * frame) / 2
        positions = [0, 0] if self.model.has_cross_attention else [math.floor(seconds / frame) + 1, 1]
        # The locator's token makes room for the recording's positions.
        left = max(2, S - sum(positions))
        lens = (
            [(1, left // 2), (1, left - left // 2)] if joint else [(1, max(1, A // 2)), (1 + left, max(1, A - A // 2))]
        )
        batch = self._packed_rows(shape, lens, size, device)
        batch["context_ids"][:, 0] = self.model.audio_locator_id
        samples = [max(1, round(one * rate)) for one in (seconds, min(seconds, frame / 2 or seconds))] * size
        batch["audios"] = random_recordings(2 * size, max(samples), device)
        batch["audio_lens"] = torch.tensor(samples, device=device)
        return batch | self._transcripts([0] * 2 * size, batch["answer_lens"].tolist(), device)

    def _packed_rows(
        self, shape: Shape, lens: Sequence[tuple[int, int]], size: int, device: torch.device
    ) -> dict[str, Any]:
        """Rows that each have examples with contexts and answers of these lengths."""
        contexts, answers = (list(of_row) * size for of_row in zip(*lens, strict=True))
        batch: dict[str, Any] = {}
        for name, of_examples in (("context", contexts), ("answer", answers)):
            ids = self._ids(shape.modality, len(of_examples), max(of_examples), device)
            batch[f"{name}_ids"] = self._padded(ids, of_examples)
            batch[f"{name}_lens"] = torch.tensor(of_examples, device=device)
        rows = [number // len(lens) for number in range(len(contexts))]
        sizes = (size, shape.input_tokens, sum(answer for _, answer in lens))
        return batch | {"packed_rows": torch.tensor(rows, device=device), "packed_sizes": sizes}

    def _transcripts(
        self, prompt_lens: Sequence[int], answer_lens: Sequence[int], device: torch.device
    ) -> dict[str, Tensor]:
        """What the model's objectives read of a batch of speech. A transcript has as many tokens as the answer, and as
        text the prompt of the recording."""
        if "transcript_ids" not in {item["name"] for item in self.model.oomptimizer_schema("audio")["inputs"]}:
            return {}
        size = len(answer_lens)
        lens = {"transcript": list(answer_lens), "text_context": list(map(add, prompt_lens, answer_lens))}
        batch = {"is_transcription": torch.tensor([index % 2 == 0 for index in range(size)], device=device)}
        for name, of_rows in lens.items():
            ids = self._ids("audio", size, max(of_rows), device)
            batch |= {f"{name}_ids": self._padded(ids, of_rows), f"{name}_lens": torch.tensor(of_rows, device=device)}
        return batch

    def _rows_of(self, shape: Shape, size: int) -> list[Lengths] | None:
        """The examples of a bucket's worst batch."""
        shares_sequence = not self.model.is_encoder_decoder
        contents = shape.contents
        if shape.modality == "text":
            tokens = self._prompts.of_texts(contents) if shape.total else _ANY
            return longest_text(shape, tokens, shares_sequence=shares_sequence).rows(size, shares_sequence)
        examples = longest_speech(
            shape,
            cuts=self._prompts.of_cuts(contents) if shape.total or contents.two_dimensional else _ANY,
            conversations=self._prompts.of_conversations(contents) if contents.conversations else None,
            prompt=self._prompt_tokens,
        )
        if examples is not None:
            return examples.rows(size, shares_sequence and not self.model.has_cross_attention)
        if contents.text and shape.total:
            return None
        return [shortest_speech(shape, self._prompts.of_cuts(contents))] * size

    @cached_property
    def _prompts(self) -> ShortestPrompts:
        formatter = prompt_formatter(self.model.options.prompt_format, self.model.tokenizer)
        return ShortestPrompts(formatter, self.model.audio_locator_tag)

    @cached_property
    def _prompt_tokens(self) -> int:
        """Of a prompt whose length no bin bounds: chat formats write more than ``PROMPT_TOKENS``."""
        formatter = prompt_formatter(self.model.options.prompt_format, self.model.tokenizer)
        turns = translation_turns(formatter, self.model.audio_locator_tag, "de", "en")
        return max(PROMPT_TOKENS, len(formatter.encode_dialog(turns)["context_ids"]) - 1)

    def _padded(self, ids: Tensor, lengths: Sequence[int]) -> Tensor:
        columns_T = torch.tensor(range(ids.shape[1]), device=ids.device)
        lengths_B = torch.tensor(list(lengths), device=ids.device)
        return ids.masked_fill(columns_T >= lengths_B[:, None], self.model.pad_id)

    def _ids(self, modality: str, size: int, length: int, device: torch.device) -> Tensor:
        inputs = self.model.oomptimizer_schema(modality)["inputs"]
        vocab_size = next(item["vocab_size"] for item in inputs if "vocab_size" in item)
        return random_ids(size, length, vocab_size, special_ids(self.model), device)

    def join(self, batches: Sequence[Mapping]) -> dict[str, Any]:
        """See :meth:`Adapter.join`."""
        padding = dict.fromkeys(("context_ids", "answer_ids", "transcript_ids", "text_context_ids"), self.model.pad_id)
        joined: dict[str, Any] = {}
        for modality, part in (item for batch in batches for item in batch.items()):
            if (first := joined.get(modality)) is not None:
                packed = _joined_rows(first, part)
                part = {
                    key: stack_padded([first[key], part[key]], padding.get(key, 0))
                    for key in first
                    if key not in packed
                } | packed
            joined[modality] = part
        return joined

    def extents(self, batch: Mapping) -> list[Extent]:
        """See :meth:`Adapter.extents`; a flat batch of NeMo's may hold speech and text."""
        parts = split_modalities(batch, self.model.pad_id) if batch else {}
        rows = [row for part in parts.values() for row in self._rows(part)]
        of_modality = {name: [row for row in rows if row.modality == name] for name in ("audio", "text")}
        packed = {name: part["packed_sizes"][0] for name, part in parts.items() if "packed_sizes" in part}
        return [_longest(found, packed.get(name)) for name, found in of_modality.items() if found]

    def _rows(self, part: Mapping) -> list[Extent]:
        """The lengths of each example of a one-modality batch."""
        counts_B = (part["context_ids"] == self.model.audio_locator_id).sum(1)
        has_audio = part.get("audios") is not None
        samples = iter(part["audio_lens"].tolist() if has_audio else ())
        rate = sampling_rate(self.model) if has_audio else 1
        contexts, answers = (part["context_lens"] - counts_B).tolist(), part["answer_lens"].tolist()
        return [
            Extent("audio" if count else "text", 1, sum(islice(samples, count)) / rate, context, answer)
            for count, context, answer in zip(counts_B.tolist(), contexts, answers, strict=True)
        ]

    def split_batch(self, batch: Mapping, count: int) -> list[Any]:
        """See :meth:`Adapter.split_batch`; the model's own."""
        return self.model.split_batch(batch, count)

    def loss_weight(self, microbatch: Mapping, whole: Mapping) -> float:
        """See :meth:`Adapter.loss_weight`; the model's own."""
        return self.model.loss_weight(microbatch, whole)

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


def _joined_rows(first: Mapping, second: Mapping) -> dict[str, Any]:
    """Rows of two packed batches; nothing if they are not packed."""
    if first.get("packed_rows") is None:
        return {}
    rows, sizes = zip(*((one["packed_rows"], one["packed_sizes"]) for one in (first, second)), strict=True)
    number, *longest = sizes[0][0] + sizes[1][0], *map(max, zip(*(of[1:] for of in sizes), strict=True))
    return {"packed_rows": torch.cat([rows[0], rows[1] + sizes[0][0]]), "packed_sizes": (number, *longest)}


def _longest(rows: Sequence[Extent], packed_rows: int | None = None) -> Extent:
    """Of a packed batch, with its rows for examples."""
    return Extent(
        rows[0].modality,
        len(rows) if packed_rows is None else packed_rows,
        max(row.seconds for row in rows),
        max(row.input_tokens for row in rows),
        max(row.output_tokens for row in rows),
    )
