"""A batch of one short example, by which a rank enters parts of the model that its own data does not use."""

from __future__ import annotations

import torch
from torch import Tensor


def dummy_batch(
    modality: str, device: torch.device, locator_id: int, sampling_rate: int | None = None
) -> dict[str, Tensor]:
    """A one-modality batch of one example.

    Args:
        modality: ``"audio"`` or ``"text"``.
        device: of its tensors.
        locator_id: the id of the audio locator token.
        sampling_rate: samples per second; needed for audio.
    """
    is_speech = modality == "audio"
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    length = torch.ones(1, dtype=torch.long, device=device)
    batch = {
        "context_ids": torch.cat([token, torch.full_like(token, locator_id) if is_speech else token], 1),
        "context_lens": 2 * length,
        "answer_ids": token,
        "answer_lens": length,
    }
    if is_speech:
        samples = round(0.2 * sampling_rate)
        batch |= {"audios": torch.zeros(1, samples, device=device), "audio_lens": samples * length}
        # What objectives read.
        batch |= {"transcript_ids": token, "transcript_lens": length, "is_transcription": length.bool()}
        batch |= {"text_context_ids": token, "text_context_lens": length}
    return batch
