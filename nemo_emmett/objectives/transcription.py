"""Transcription as a task of its own weight.

Speech whose answer is its transcript trains the speech encoder for the recognition on which translation rests, and is
often the larger part of the data. In a term of its own it can be weighted, or ended after a first phase, without
another blend.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from nemo_emmett.objectives.objective import CrossEntropyObjective


@dataclass(frozen=True)
class Transcription(CrossEntropyObjective):
    """Answer tokens of speech that is transcribed count in a term of their own, not in ``audio``.

    Where its weight is 0 they count in ``audio`` again.
    """

    name: ClassVar[str] = "transcription"
    modality: ClassVar[str] = "audio"
    needs_transcripts: ClassVar[bool] = True
    batch_keys: ClassVar[tuple[str, ...]] = ("is_transcription",)

    def examples(self, part: Mapping) -> Tensor:
        """See :class:`TokenObjective`."""
        return part["is_transcription"]
