"""Distances of a sequence of speech frames from a sequence of text embeddings of another length.

Two of them, neither of which needs an alignment: that of the best monotonic alignment, and that of two reconstructions
by attention. Each is a mean over positions, so that long examples weigh no more than short ones, and a batch gives each
example what it gets alone.

Shapes: B examples, F frames, T tokens, H hidden size; L, S: the longer and the shorter of two sequences.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_emmett.modules.batch import length_mask


def best_alignment_distance(frames_BFH: Tensor, frame_lens_B: Tensor, text_BTH: Tensor, text_lens_B: Tensor) -> Tensor:
    """The mean cosine distance of the pairs of the best monotonic alignment.

    Peyser et al. (Improving Joint Speech-Text Representations Without Alignment, arXiv 2308.06125) let a consistency
    loss assume the best alignment: the minimum over all alignments of the distances, found by dynamic programming. Here
    an alignment gives each element of the longer sequence one of the shorter, in order, and leaves out none of the
    shorter; so the number of pairs is known, and the minimum of the sum is that of the mean. The distance is ``1 -
    cosine``, which does not depend on the scale of either side.

    The alignment is found without a gradient; the distances of its pairs have one. It takes F + T steps, one after
    another, forwards and backwards, and memory for B x F x T distances.

    Args:
        frames_BFH: encoded speech; what is behind the lengths has no influence.
        frame_lens_B: (B,) int64, frames, at least 1 where the result is used.
        text_BTH: embedded text.
        text_lens_B: (B,) int64, tokens.

    Returns:
        (B,) float32, from 0 to 2; 0 for an example without frames or without tokens.
    """
    frames_BFH = F.normalize(_without_padding(frames_BFH, frame_lens_B), dim=-1)
    text_BTH = F.normalize(_without_padding(text_BTH, text_lens_B), dim=-1)
    with torch.no_grad():
        costs_BFT = 1.0 - frames_BFH @ text_BTH.mT
        token_of_frame_BF = best_alignment(costs_BFT, frame_lens_B, text_lens_B)
        frame_of_token_BT = best_alignment(costs_BFT.mT, text_lens_B, frame_lens_B)
    # Cosines of the chosen pairs alone: no gradient of all F x T.
    of_frames_BF = 1.0 - (frames_BFH * _gathered(text_BTH, token_of_frame_BF)).sum(-1)
    of_tokens_BT = 1.0 - (text_BTH * _gathered(frames_BFH, frame_of_token_BT)).sum(-1)
    is_speech_longer_B = frame_lens_B >= text_lens_B
    distance_B = torch.where(is_speech_longer_B, _mean(of_frames_BF, frame_lens_B), _mean(of_tokens_BT, text_lens_B))
    return torch.where((frame_lens_B > 0) & (text_lens_B > 0), distance_B, 0.0)


def best_alignment(costs_BLS: Tensor, long_lens_B: Tensor, short_lens_B: Tensor) -> Tensor:
    """The cheapest alignment of each element of a sequence with an element of one that is no longer.

    The elements come in order and none of the shorter sequence is left out: the first is aligned with the first, the
    last with the last, and from one element to the next the partner stays or moves on by one.

    Args:
        costs_BLS: (B, L, S) of each pair, finite; those of padding have no influence.
        long_lens_B: (B,) int64, at least ``short_lens_B`` where the result is used.
        short_lens_B: (B,) int64, at least 1 where the result is used.

    Returns:
        (B, L) int64 numbers of elements of the shorter sequence; any valid ones on padding.
    """
    total_BS = torch.full_like(costs_BLS[:, 0], torch.inf)
    total_BS[:, :1] = costs_BLS[:, 0, :1]
    moved = []
    for position in range(1, costs_BLS.shape[1]):
        before_BS = F.pad(total_BS[:, :-1], (1, 0), value=torch.inf)
        moved.append(before_BS < total_BS)
        total_BS = costs_BLS[:, position] + torch.minimum(before_BS, total_BS)
    partner_B = (short_lens_B - 1).clamp(min=0)
    chosen = [partner_B]
    for position in range(costs_BLS.shape[1] - 1, 0, -1):
        has_moved_B = moved[position - 1].gather(1, partner_B[:, None])[:, 0] & (position < long_lens_B)
        partner_B = partner_B - has_moved_B.long()
        chosen.append(partner_B)
    return torch.stack(chosen[::-1], 1)


def cross_attentive_distance(frames_BFH: Tensor, frame_lens_B: Tensor, text_BTH: Tensor, text_lens_B: Tensor) -> Tensor:
    """The distance of the text as attention reconstructs it from speech from what it reconstructs from the text itself.

    Cross-attentive regularisation of Tang et al. (Improving Speech Translation by Understanding and Learning from the
    Auxiliary Text Translation Task, arXiv 2107.05782): with ``S = softmax(text @ speech.T)`` the text is
    reconstructed as ``S @ speech``, and so from itself; the loss is the mean over the tokens of the L2 norm of
    the difference, without a gradient through the reconstruction from itself. As by default in the authors' code
    (fairseq), all vectors have the norm 1. Theirs are states of a shared encoder; here they are what the language model
    reads.

    It takes memory for B x (F + T) x T similarities.

    Args:
        frames_BFH: encoded speech; what is behind the lengths has no influence.
        frame_lens_B: (B,) int64, frames.
        text_BTH: embedded text.
        text_lens_B: (B,) int64, tokens.

    Returns:
        (B,) float32, from 0 to 2; 0 for an example without frames or without tokens.
    """
    frames_BFH = F.normalize(_without_padding(frames_BFH, frame_lens_B), dim=-1)
    text_BTH = F.normalize(_without_padding(text_BTH, text_lens_B), dim=-1)
    of_speech_BTH = _reconstructed(text_BTH, frames_BFH, frame_lens_B)
    of_text_BTH = _reconstructed(text_BTH, text_BTH, text_lens_B).detach()
    distance_B = _mean(torch.linalg.vector_norm(of_speech_BTH - of_text_BTH, dim=-1), text_lens_B)
    return torch.where((frame_lens_B > 0) & (text_lens_B > 0), distance_B, 0.0)


def _reconstructed(queries_BTH: Tensor, values_BFH: Tensor, lens_B: Tensor) -> Tensor:
    """(B, T, H) what attention without scaling makes of the values."""
    scores_BTF = queries_BTH @ values_BFH.mT
    # Without any values they are padding, and not NaN.
    is_padding_BF = ~length_mask(lens_B.clamp(min=1), values_BFH.shape[1])
    return scores_BTF.masked_fill(is_padding_BF[:, None], -torch.inf).softmax(-1) @ values_BFH


def _without_padding(values_BTH: Tensor, lens_B: Tensor) -> Tensor:
    """In float32, with zeros behind the lengths, whatever was there."""
    return torch.where(length_mask(lens_B, values_BTH.shape[1])[..., None], values_BTH.float(), 0.0)


def _gathered(values_BTH: Tensor, numbers_BL: Tensor) -> Tensor:
    return values_BTH.gather(1, numbers_BL[..., None].expand(-1, -1, values_BTH.shape[-1]))


def _mean(values_BT: Tensor, lens_B: Tensor) -> Tensor:
    """(B,) means over the first ``lens_B`` columns."""
    return torch.where(length_mask(lens_B, values_BT.shape[1]), values_BT, 0.0).sum(1) / lens_B.clamp(min=1)
