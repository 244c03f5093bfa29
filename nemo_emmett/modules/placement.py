"""Recordings take the place of their locator tokens: ``<de> <|audio|></s>`` becomes one sequence of embeddings.

Everything is a fixed number of tensor operations, whatever the batch: each token's width (1, or the frames of the
recording it stands for) is summed up to its position in the output, and one scatter moves all embeddings there.

Shapes: B examples, T tokens, R recordings, F frames, S positions in the output, H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor

from nemo_emmett.errors import DataError
from nemo_emmett.modules.batch import length_mask


def place_audio(
    token_embeds_BTH: Tensor,
    token_ids_BT: Tensor,
    token_lens_B: Tensor,
    audio_embeds_RFH: Tensor,
    audio_lens_R: Tensor,
    locator_id: int,
) -> tuple[Tensor, Tensor]:
    """Replace each locator token by the frames of its recording; pad on the right.

    Args:
        token_embeds_BTH: (B, T, H) embeddings of the tokens; those of locators are ignored.
        token_ids_BT: (B, T) int64, right-padded.
        token_lens_B: (B,) int64, tokens per row.
        audio_embeds_RFH: (R, F, H) encoded recordings in the order of their locators, row by row.
        audio_lens_R: (R,) int64, frames per recording.
        locator_id: the locator token's id.

    Returns:
        (B, S, H) embeddings, zero where padded, and a (B, S) bool mask, true where an embedding stands.

    Raises:
        DataError: if the number of locators differs from the number of recordings.
    """
    B, T, H = token_embeds_BTH.shape
    R, F, _ = audio_embeds_RFH.shape
    is_token_BT = length_mask(token_lens_B, T)
    is_locator_BT = is_token_BT & (token_ids_BT == locator_id)

    # The r-th locator, counted through the whole batch, stands for the r-th recording.
    recording_BT = (is_locator_BT.flatten().cumsum(0) - 1).clamp(0, R - 1).view(B, T)
    width_BT = torch.where(is_locator_BT, audio_lens_R.long()[recording_BT], is_token_BT.long())
    start_BT = width_BT.cumsum(1) - width_BT
    lens_B = width_BT.sum(1)

    S = _output_width(is_locator_BT, lens_B, audio_lens_R, F)

    row_B1 = torch.arange(B, device=token_ids_BT.device)[:, None] * S
    surplus = B * S  # padding goes to one extra row, which is cut off
    token_target_BT = torch.where(is_token_BT & ~is_locator_BT, row_B1 + start_BT, surplus)

    recording_start_R = torch.zeros(R + 1, dtype=torch.long, device=token_ids_BT.device)
    slot_BT = torch.where(is_locator_BT, recording_BT, R)
    recording_start_R = recording_start_R.scatter(0, slot_BT.flatten(), (row_B1 + start_BT).flatten())[:R]
    frame_F = torch.arange(F, device=token_ids_BT.device)
    frame_target_RF = torch.where(
        frame_F[None, :] < audio_lens_R[:, None], recording_start_R[:, None] + frame_F[None, :], surplus
    )

    sources = torch.cat([token_embeds_BTH.reshape(B * T, H), audio_embeds_RFH.reshape(R * F, H).to(token_embeds_BTH)])
    targets = torch.cat([token_target_BT.flatten(), frame_target_RF.flatten()])
    placed = sources.new_zeros(B * S + 1, H).index_copy(0, targets, sources)
    return placed[:surplus].view(B, S, H), length_mask(lens_B, S)


def _output_width(is_locator_BT: Tensor, lens_B: Tensor, audio_lens_R: Tensor, F: int) -> int:
    """S, the longest row's length; refuses recordings that are left over."""
    R = len(audio_lens_R)
    if isinstance(lens_B, FakeTensor):
        # OOMptimizer plans on tensors without values, in batches whose longest row is full.
        B, T = is_locator_BT.shape
        return T + (_longest(audio_lens_R, F) - 1) * (R // B)
    # The only read of the device by the host.
    num_locators, S = torch.stack([is_locator_BT.sum(), lens_B.max()]).tolist()
    if num_locators != R:
        raise DataError(
            f"a batch has {R} recordings but {num_locators} audio locator tokens: "
            "each recording needs exactly one locator in its context."
        )
    return S


def _longest(fake_lens_R: Tensor, F: int) -> int:
    """The greatest of the lengths where their values are known all the same, or else what they are padded to."""
    try:
        return int(fake_lens_R.max())
    except DataDependentOutputException:
        return F
