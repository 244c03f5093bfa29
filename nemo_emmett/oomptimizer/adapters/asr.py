"""NeMo's ASR models: CTC and transducers, whose batch is a tuple, and Canary's encoder-decoder.

Shapes: B examples, T tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from lhotse import CutSet, MonoCut
from nemo.core.neural_types import AudioSignal, LabelsType, LengthsType, NeuralType
from torch import Tensor

from nemo_emmett.oomptimizer.adapters.draws import full_lengths
from nemo_emmett.oomptimizer.adapters.generic import SchemaAdapter
from nemo_emmett.oomptimizer.adapters.lengths import PROMPT_TOKENS
from nemo_emmett.oomptimizer.adapters.rows import split_rows, take_rows
from nemo_emmett.oomptimizer.adapters.schema import Schema
from nemo_emmett.oomptimizer.buckets import Shape


class TranscriptAdapter(SchemaAdapter):
    """``EncDecCTCModel`` and ``EncDecRNNTModel``, of characters or subwords.

    The batch is (audio, audio lengths, transcript, transcript lengths).
    """

    def _schema(self) -> Schema:
        if getattr(self.model, "tokenizer", None) is not None:
            return super()._schema()
        # The schema that these models inherit asks for the tokenizer, which those of characters lack.
        lengths = NeuralType(("B",), LengthsType())
        vocabulary = getattr(self.model.decoder, "vocabulary", None) or self.model.joint.vocabulary
        transcript = {"type": NeuralType(("B", "T"), LabelsType()), "vocab_size": len(vocabulary)}
        inputs = [
            {"type": NeuralType(("B", "T"), AudioSignal()), "seq_length": "input"},
            {"type": lengths, "seq_length": "input"},
            transcript | {"seq_length": "output"},
            {"type": lengths, "seq_length": "output"},
        ]
        return Schema(self.model, {"cls": tuple, "inputs": inputs})

    @property
    def can_split(self) -> bool:  # type: ignore[override]
        """Unless the loss is not reduced over the examples."""
        return self._reduction in ("mean", "mean_batch", "mean_volume", "sum")

    @property
    def _reduction(self) -> str | None:
        # NeMo's CTCLoss leaves torch's own reduction in `reduction` and does some of its own by `config_reduction`.
        return getattr(self.model.loss, "config_reduction", getattr(self.model.loss, "reduction", None))

    def split_batch(self, batch: Sequence[Tensor], count: int) -> list[tuple[Tensor, ...]]:
        """See :meth:`Adapter.split_batch`."""
        size = len(batch[0])
        parts = []
        for rows in split_rows(size, count):
            audio, audio_lens, transcript, transcript_lens = (take_rows(value, rows, size) for value in batch)
            # The transducer's loss takes no transcripts that are all shorter than they are wide.
            parts.append((audio, audio_lens, transcript[:, : int(transcript_lens.max())], transcript_lens))
        return parts

    def loss_weight(self, microbatch: Sequence[Tensor], whole: Sequence[Tensor]) -> float:
        """See :meth:`Adapter.loss_weight`, by the ``ctc_reduction`` or ``rnnt_reduction`` of the model's config."""
        if self._reduction == "sum":
            return 1.0
        if self._reduction == "mean_volume":
            return float(microbatch[3].sum() / whole[3].sum())
        return len(microbatch[0]) / len(whole[0])


class MultiTaskAdapter(SchemaAdapter):
    """``EncDecMultiTaskModel`` (Canary): a transcript after a prompt, in one sequence of ``output_tokens``."""

    @property
    def can_split(self) -> bool:  # type: ignore[override]
        """Where the loss is the mean over the tokens of all positions."""
        return getattr(self.model.loss, "_per_token_reduction", False) and not self.model.loss._predict_last_k

    def synthetic_batch(self, shape: Shape, size: int, device: torch.device) -> Any:
        """See :meth:`Adapter.synthetic_batch`."""
        # The decoder reads all tokens but the last and predicts all but the first.
        shape = dataclasses.replace(shape, output_tokens=max(2, shape.output_tokens))
        return self._completed(super().synthetic_batch(shape, size, device))

    def join(self, batches: Sequence[Any]) -> Any:
        """See :meth:`Adapter.join`."""
        return batches[0] if len(batches) == 1 else self._completed(super().join(batches))

    def _completed(self, batch: Any) -> Any:
        """Add what the schema lacks since most configs need none: the end of the prompt, and the cuts for metrics."""
        size, length = batch.prompted_transcript.shape
        prompt = min(PROMPT_TOKENS, length // 2)
        batch.prompt, batch.transcript = batch.prompted_transcript.split([prompt, length - prompt], dim=1)
        batch.prompt_lens = full_lengths(size, prompt, batch.audio.device)
        batch.transcript_lens = full_lengths(size, length - prompt, batch.audio.device)
        batch.cuts = CutSet([MonoCut(str(row), start=0.0, duration=1.0, channel=0) for row in range(size)])
        return batch

    def split_batch(self, batch: Any, count: int) -> list[Any]:
        """See :meth:`Adapter.split_batch`."""
        size = len(batch.audio)
        names = [field.name for field in dataclasses.fields(batch)]
        return [
            dataclasses.replace(batch, **{name: take_rows(getattr(batch, name), rows, size) for name in names})
            for rows in split_rows(size, count)
        ]

    def loss_weight(self, microbatch: Any, whole: Any) -> float:
        """See :meth:`Adapter.loss_weight`: the loss is the mean over tokens, with or without the prompt's."""
        return self._targets(microbatch) / max(1, self._targets(whole))

    def _targets(self, batch: Any) -> int:
        if not self.model.cfg.get("use_loss_mask_for_prompt", False):
            _, labels = batch.get_decoder_inputs_outputs()
            return int((labels != self.model.tokenizer.pad_id).sum())
        # The first token is an input only, and the first of the prompt.
        after_prompt = batch.prompted_transcript_lens - batch.prompt_lens.clamp(min=1)
        return int(after_prompt.clamp(min=0).sum())
