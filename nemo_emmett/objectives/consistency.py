"""Speech close to its transcript, before the language model reads either."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_emmett.objectives.alignment import best_alignment_distance, cross_attentive_distance
from nemo_emmett.objectives.objective import EncodedSpeech, SpeechObjective
from nemo_emmett.typed_config import Switch

BEST_ALIGNMENT, CROSS_ATTENTION = "best_alignment", "cross_attention"
_DISTANCES = {BEST_ALIGNMENT: best_alignment_distance, CROSS_ATTENTION: cross_attentive_distance}


@dataclass(frozen=True)
class Consistency(SpeechObjective):
    """The distance of the encoded recording from the embedded transcript, for each speech example that has one."""

    name: ClassVar[str] = "consistency"
    needs_transcripts: ClassVar[bool] = True
    batch_keys: ClassVar[tuple[str, ...]] = ("transcript_ids", "transcript_lens")

    distance: Literal[BEST_ALIGNMENT, CROSS_ATTENTION] = BEST_ALIGNMENT  # of the best alignment, or of reconstructions
    train_text: Switch = False  # the gradient also reaches the embeddings of the transcripts

    def units(self, part: Mapping) -> Tensor:
        """Speech examples with a transcript."""
        return (part["transcript_lens"] > 0).sum()

    def loss_sum(self, part: Mapping, speech: EncodedSpeech) -> Tensor:
        """See :class:`SpeechObjective`."""
        ids_BT, text_lens_B = part["transcript_ids"], part["transcript_lens"]
        if ids_BT.shape[1] == 0:  # no transcript in the batch: the embeddings are looked up all the same
            ids_BT = F.pad(ids_BT, (0, 1))
        text_BTH = speech.embed(ids_BT)
        if not self.train_text:
            text_BTH = text_BTH.detach()
        # An example with a transcript has one recording.
        first_B = (speech.recordings_B.cumsum(0) - speech.recordings_B).clamp(max=len(speech.lens_R) - 1)
        frames_BFH, frame_lens_B = speech.frames_RFH[first_B], speech.lens_R[first_B]
        with torch.autocast(frames_BFH.device.type, enabled=False):
            return _DISTANCES[self.distance](frames_BFH, frame_lens_B, text_BTH, text_lens_B).sum()
