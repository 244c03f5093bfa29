"""NeMo's SALM: one flat batch, a locator token in it for each recording.

Its batch: ``input_ids`` (B, T) int64, padded on the left; ``loss_mask`` (B, T) bool, true on the answer; ``audios``
(R, N) float32 and ``audio_lens`` (R,) int64, in the order of the locators.

Shapes: B examples, T tokens, R recordings, N samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nemo_emmett.errors import ConfigError
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
from nemo_emmett.oomptimizer.adapters.lengths import Lengths, longest_speech, longest_text, shortest_speech
from nemo_emmett.oomptimizer.adapters.prompts import PromptTokens, ShortestPrompts
from nemo_emmett.oomptimizer.adapters.rows import split_rows, stack_padded, take_rows
from nemo_emmett.oomptimizer.buckets import Shape
from nemo_emmett.prompts.families import prompt_formatter

_OF_RECORDINGS = ("audios", "audio_lens")


class SALMAdapter(Adapter):
    """NeMo's ``speechlm2.SALM`` and models that take its batch.

    It cannot train on a batch without recordings, so text needs ``sampler_fusion: zip``.
    """

    @property
    def can_split(self) -> bool:  # type: ignore[override]
        """Only if the loss is SALM's own: the mean over the tokens of the answers."""
        return any(kind.__name__ == "SALM" for kind in type(self.model).__mro__)

    pads_together = True
    measures_conversations = True

    def check_alone(self, modality: str) -> None:
        """See :meth:`Adapter.check_alone`."""
        if modality == "text":
            raise ConfigError(
                f"data.train_ds: {type(self.model).__name__} cannot train on a batch of text alone; train "
                "nemo_emmett's SALMGPT, which takes text, speech and both, or set ++data.train_ds.sampler_fusion=zip, "
                "so that each batch holds speech too."
            )

    def synthetic_batch(self, shape: Shape, size: int, device: torch.device) -> dict[str, Tensor]:
        """See :meth:`Adapter.synthetic_batch`."""
        lengths = self._lengths(shape)
        recordings = 1 if shape.modality == "audio" else 0
        context = lengths.context + recordings
        inputs = self.model.oomptimizer_schema["inputs"]
        (vocab_size,) = (item["vocab_size"] for item in inputs if "vocab_size" in item)
        ids = random_ids(size, context + lengths.answer, vocab_size, special_ids(self.model), device)
        if recordings:
            ids[:, context // 2] = self.model.audio_locator_tag_id
        if size > 1 and context > 1:
            # One token of padding: real batches need an attention mask, and those without padding do not.
            ids[0, 0] = self.model.text_pad_id
        answer_columns = [column >= context for column in range(ids.shape[1])]
        per_token = shape.contents.seconds_per_token
        samples = samples_of(self.model, lengths.seconds, per_token) if recordings else 0
        return {
            "audios": random_recordings(size * recordings, samples, device),
            "audio_lens": full_lengths(size * recordings, samples, device),
            "input_ids": ids,
            "loss_mask": torch.tensor([answer_columns] * size, device=device),
        }

    def _lengths(self, shape: Shape) -> Lengths:
        """The example that takes the most memory: SALM makes logits of all positions, so it has the most speech."""
        if shape.modality == "text":
            return longest_text(shape, PromptTokens(1, 1), shares_sequence=True).first
        shortest = PromptTokens(2, 1)  # a token before the recording, and one after it
        if self._prompts is not None:
            shortest = self._prompts.of_conversations(shape.contents)
        examples = longest_speech(shape, conversations=shortest)
        return shortest_speech(shape, shortest) if examples is None else examples.first

    @cached_property
    def _prompts(self) -> ShortestPrompts | None:
        """None if the model's config has no prompt format."""
        name = getattr(self.model, "cfg", {}).get("prompt_format")
        if not name:
            return None
        return ShortestPrompts(prompt_formatter(name, self.model.tokenizer), self.model.audio_locator_tag)

    def join(self, batches: Sequence[Mapping]) -> dict[str, Tensor]:
        """See :meth:`Adapter.join`."""
        speech = [batch for batch in batches if len(batch["audios"])]
        if not speech:
            self.check_alone("text")
        return {
            "audios": stack_padded([batch["audios"] for batch in speech]),
            "audio_lens": stack_padded([batch["audio_lens"] for batch in speech]),
            "input_ids": stack_padded([batch["input_ids"] for batch in batches], self.model.text_pad_id, left=True),
            "loss_mask": stack_padded([batch["loss_mask"] for batch in batches], False, left=True),
        }

    def extents(self, batch: Mapping) -> list[Extent]:
        """See :meth:`Adapter.extents`."""
        counts = self._recordings_of_rows(batch)
        rate, lens = sampling_rate(self.model), iter(batch["audio_lens"].tolist())
        seconds = [sum(next(lens) for _ in range(count)) / rate for count in counts]
        answer = batch["loss_mask"].bool()
        context = (batch["input_ids"] != self.model.text_pad_id) & ~answer & ~self._locators(batch)
        contexts, answers = context.sum(1).tolist(), answer.sum(1).tolist()
        found = []
        for modality in ("audio", "text"):
            rows = [row for row, count in enumerate(counts) if bool(count) == (modality == "audio")]
            if rows:
                longest = (max(values[row] for row in rows) for values in (seconds, contexts, answers))
                found.append(Extent(modality, len(rows), *longest))
        return found

    def split_batch(self, batch: Mapping, count: int) -> list[dict[str, Any]]:
        """See :meth:`Adapter.split_batch`; every microbatch holds a recording, since SALM needs one."""
        counts = self._recordings_of_rows(batch)
        with_speech = [row for row, recordings in enumerate(counts) if recordings]
        without = [row for row, recordings in enumerate(counts) if not recordings]
        speech = split_rows(len(with_speech), count)
        text = split_rows(len(without), len(speech))
        text += [[]] * (len(speech) - len(text))
        return [
            self._take(batch, sorted([*(with_speech[i] for i in some), *(without[i] for i in others)]), counts)
            for some, others in zip(speech, text, strict=True)
        ]

    def loss_weight(self, microbatch: Mapping, whole: Mapping) -> float:
        """See :meth:`Adapter.loss_weight`: the loss is the mean over all tokens that have a target."""
        return self._targets(microbatch) / max(1, self._targets(whole))

    @contextmanager
    def planning(self) -> Iterator[None]:
        """See :meth:`Adapter.planning`."""
        with fake_values():
            yield

    def _take(self, batch: Mapping, rows: Sequence[int], counts: Sequence[int]) -> dict[str, Any]:
        starts = [sum(counts[:row]) for row in range(len(counts))]
        recordings = [index for row in rows for index in range(starts[row], starts[row] + counts[row])]
        taken = {key: take_rows(value, rows, len(counts)) for key, value in batch.items() if key not in _OF_RECORDINGS}
        return taken | {key: take_rows(batch[key], recordings, sum(counts)) for key in _OF_RECORDINGS}

    def _locators(self, batch: Mapping) -> Tensor:
        return batch["input_ids"] == self.model.audio_locator_tag_id

    def _recordings_of_rows(self, batch: Mapping) -> list[int]:
        return self._locators(batch).sum(1).tolist()

    def _targets(self, batch: Mapping) -> int:
        # As SALM counts: padding and locators have no target, whatever the mask.
        has_target = batch["loss_mask"].bool() & (batch["input_ids"] != self.model.text_pad_id)
        return int((has_target & ~self._locators(batch)).sum())
