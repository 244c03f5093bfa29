"""Objectives that keep the language model close to a teacher: distillation and retention.

Shapes: B examples, T tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from nemo_emmett.objectives.objective import TokenObjective
from nemo_emmett.typed_config import NonEmpty, Positive

START, WITHOUT_LORA = "start", "without_lora"
"""Teachers that are no folder: the language model as the training starts, and the trained one without its LoRA."""


@dataclass(frozen=True)
class TeachingObjective(TokenObjective):
    """The divergence ``KL(teacher || student)`` of the predictions of each answer token, times the temperature's
    square (Hinton et al., arXiv 1503.02531). The teacher predicts the same answers, without dropout and gradient."""

    teacher: NonEmpty | None = None  # start, without_lora (default with model.lora), or the folder of a model
    temperature: Positive = 1.0  # by which logits are divided; above 1 unlikely tokens count more

    @abstractmethod
    def teacher_batch(self, part: Mapping, pad_id: int) -> dict[str, Any]:
        """The one-modality batch that the teacher reads, with the answers of ``part``."""


@dataclass(frozen=True)
class Distillation(TeachingObjective):
    """Speech is answered as the teacher answers its transcript: knowledge distillation from text translation (Liu et
    al., arXiv 1904.08075), here that of the language model itself (as in Tang et al., arXiv 2107.05782)."""

    name: ClassVar[str] = "distillation"
    modality: ClassVar[str] = "audio"
    needs_transcripts: ClassVar[bool] = True
    batch_keys: ClassVar[tuple[str, ...]] = ("text_context_ids", "text_context_lens", "is_transcription")

    def examples(self, part: Mapping) -> Tensor:
        """Examples with a transcript that are translated: of a transcript the teacher could only repeat its input."""
        return (part["text_context_lens"] > 0) & ~part["is_transcription"]

    def teacher_batch(self, part: Mapping, pad_id: int) -> dict[str, Any]:
        """The transcripts in place of the recordings. Every example has at least one token, padding if need be."""
        ids_BT = part["text_context_ids"]
        if ids_BT.shape[1] == 0:
            ids_BT = ids_BT.new_full((len(ids_BT), 1), pad_id)
        return {
            "context_ids": ids_BT,
            "context_lens": part["text_context_lens"].clamp(min=1),
            "answer_ids": part["answer_ids"],
            "answer_lens": part["answer_lens"],
        }


@dataclass(frozen=True)
class Retention(TeachingObjective):
    """Text is answered as the teacher answers it, by default the language model before the training, so that text
    translation is not forgotten (the divergence of ZeroMMT, arXiv 2407.13579)."""

    name: ClassVar[str] = "retention"
    modality: ClassVar[str] = "text"

    def examples(self, part: Mapping) -> Tensor:
        """All of them."""
        return torch.ones_like(part["answer_lens"], dtype=torch.bool)

    def teacher_batch(self, part: Mapping, pad_id: int) -> dict[str, Any]:
        """The batch itself."""
        return dict(part)
