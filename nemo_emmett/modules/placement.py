"""Encoded recordings in place of their locator tokens: ``<de> <|audio|></s>`` becomes one sequence of embeddings.

The number of tensor operations does not depend on the batch: the cumulative sum of the tokens' widths (1, or the frames
of a locator's recording) gives the positions in the output, to which embeddings are copied once, all tokens in one
operation and all frames in another. The host reads only the greatest lengths, once.

NeMo does this in ``replace_placeholders_and_build_targets`` (``speechlm2/models/salm.py``), row by row.

Shapes: B examples, T tokens, R recordings, F frames, L rows of the output (B of them, or fewer into which examples are
packed), S positions of a row, A target tokens, H hidden size; N all tokens of the batch, M all frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor
from torch.autograd.function import once_differentiable

from nemo_emmett.errors import DataError
from nemo_emmett.modules.batch import pack
from nemo_emmett.modules.loss import IGNORE_INDEX
from nemo_emmett.modules.packing import Layout, Rows

_WORD = torch.complex128
"""The widest type; memory is copied in words of it, and they are not computed with."""


@dataclass(frozen=True)
class Placed:
    """Sequences of embeddings for a language model, and their targets.

    Attributes:
        embeds_LSH: (L, S, H) embeddings, zero where padded.
        mask_LS: (L, S) bool, true where there is an embedding.
        lens_B: (B,) int64, embeddings per example.
        targets_BA: (B, A) int64, the target tokens of each example in their order, then ``IGNORE_INDEX``; None without
            ``is_target_BT``. A target that is the first of its example is ``IGNORE_INDEX``: nothing predicts it.
        positions_BA: (B, A) int64, the position in its row whose output predicts each target: the one before it; that
            of the example's first embedding where there is no target.
        layout: where the examples are in the rows; None if each is a row of its own.
        num_targets: targets that there are, with those elsewhere; None of tensors without values.
    """

    embeds_LSH: Tensor
    mask_LS: Tensor
    lens_B: Tensor
    targets_BA: Tensor | None = None
    positions_BA: Tensor | None = None
    layout: Layout | None = None
    num_targets: int | None = None


def merge_audio_embeddings(
    token_embeds_BTH: Tensor,
    token_ids_BT: Tensor,
    token_mask_BT: Tensor,
    audio_embeds_RFH: Tensor | None,
    audio_lens_R: Tensor | None,
    locator_id: int,
    *,
    is_target_BT: Tensor | None = None,
    max_targets: int | None = None,
    pad_left: bool = False,
    locators_elsewhere: Tensor | None = None,
    targets_elsewhere: Tensor | None = None,
    rows: Rows | None = None,
) -> Placed:
    """Replace each locator token by the frames of its recording, and close the gaps that masked tokens leave.

    Args:
        token_embeds_BTH: (B, T, H) embeddings of the tokens; those of locators are ignored.
        token_ids_BT: (B, T) int64.
        token_mask_BT: (B, T) bool, true on tokens. Padding may be anywhere, so that contexts and answers, each padded,
            can be concatenated.
        audio_embeds_RFH: (R, F, H) encoded recordings in the order of their locators, row by row, of any floating
            type; None for text.
        audio_lens_R: (R,) integers, frames per recording; None for text.
        locator_id: the locator token's id.
        is_target_BT: (B, T) bool, the tokens to predict; padding and locators never are.
        max_targets: A, at least the most targets of a row, such as the width of the answers; None: the most. Tensors
            without values, on which OOMptimizer plans, have no maximum; A is then T.
        pad_left: whether rows end, instead of begin, together: a decoder-only model generates from that.
        locators_elsewhere: () int64, locators outside of these tokens, such as in answers; they count as surplus.
        targets_elsewhere: () int64, targets outside of these tokens, such as in answers; they are counted as well.
        rows: into which the examples are packed; None: each is a row of its own.

    Returns:
        The sequences, of one position at least; the embeddings have the tokens' type.

    Raises:
        DataError: if the number of locators differs from the number of recordings, or a packed row is too long.

    Example:
        >>> ids, embeds, speech = torch.tensor([[5, 9, 6]]), torch.zeros(1, 3, 4), torch.ones(1, 2, 4)
        >>> merge_audio_embeddings(embeds, ids, ids > 0, speech, torch.tensor([2]), locator_id=9).embeds_LSH[0, :, 0]
        tensor([0., 1., 1., 0.])
    """
    B, T, H = token_embeds_BTH.shape
    if audio_embeds_RFH is None:
        audio_embeds_RFH, audio_lens_R = token_embeds_BTH.new_empty(0, 0, H), token_ids_BT.new_empty(0)
    R, F, _ = audio_embeds_RFH.shape
    audio_lens_R = audio_lens_R.long()

    is_locator_BT = token_mask_BT & (token_ids_BT == locator_id)
    # Of a given size R, so that the host need not wait for the count; another count is refused in _sizes.
    locator_R = is_locator_BT.flatten().nonzero_static(size=R, fill_value=0).flatten()
    width_BT = token_mask_BT.long().flatten().index_copy(0, locator_R, audio_lens_R).view(B, T)
    end_BT = width_BT.cumsum(1)
    start_BT, lens_B = end_BT - width_BT, width_BT.sum(1)

    if is_target_BT is not None:
        is_target_BT = is_target_BT & token_mask_BT & ~is_locator_BT
    num_locators = is_locator_BT.sum() + (0 if locators_elsewhere is None else locators_elsewhere)
    num_targets = torch.zeros_like(num_locators) if targets_elsewhere is None else targets_elsewhere
    if is_target_BT is not None:
        # Nothing predicts the first token of a row; fake tensors have lengths, but no places.
        is_predicted_BT = is_target_BT if isinstance(lens_B, FakeTensor) else is_target_BT & (start_BT > 0)
        num_targets = num_targets + is_predicted_BT.sum()
    counts = num_locators, num_targets
    S, A, num_targets = _sizes(is_locator_BT, counts, lens_B, audio_lens_R, F, is_target_BT, max_targets, rows)
    position_S = torch.arange(S, device=lens_B.device)
    if rows is None:
        L, layout = B, None
        row_B1 = torch.arange(B, device=lens_B.device)[:, None]
        margin_B1 = (S - lens_B if pad_left else torch.zeros_like(lens_B))[:, None]
        mask_LS = position_S >= margin_B1 if pad_left else position_S < lens_B[:, None]
    else:
        L, layout = rows.number, rows.layout(lens_B, S)
        row_B1, margin_B1 = rows.row_B[:, None], layout.start_B[:, None]
        mask_LS = position_S < rows.used(lens_B)[:, None]

    targets_BA = positions_BA = None
    if is_target_BT is not None:
        targets_BA = pack(token_ids_BT.masked_fill(start_BT == 0, IGNORE_INDEX), is_target_BT, A, IGNORE_INDEX)
        positions_BA = (pack((start_BT - 1).clamp(min=0), is_target_BT, A, 0) + margin_B1).clamp(max=S - 1)

    place_BT = row_B1 * S + margin_B1 + start_BT
    token_place_BT = torch.where(token_mask_BT & ~is_locator_BT, place_BT, L * S)
    frame_F = torch.arange(F, device=lens_B.device)
    first_place_R1 = place_BT.flatten()[locator_R][:, None]
    frame_place_RF = torch.where(frame_F < audio_lens_R[:, None], first_place_R1 + frame_F, L * S)  # without padding
    embeds = _CopyRows.apply(
        L * S,
        token_embeds_BTH.flatten(0, 1),
        token_place_BT.flatten(),
        audio_embeds_RFH.flatten(0, 1).to(token_embeds_BTH.dtype),
        frame_place_RF.flatten(),
    )
    return Placed(embeds.view(L, S, H), mask_LS, lens_B, targets_BA, positions_BA, layout, num_targets)


def _sizes(
    is_locator_BT: Tensor,
    counts: tuple[Tensor, Tensor],
    lens_B: Tensor,
    audio_lens_R: Tensor,
    F: int,
    is_target_BT: Tensor | None,
    max_targets: int | None,
    rows: Rows | None,
) -> tuple[int, int, int | None]:
    """S, the longest row's length; A, the most targets of an example; and the number of targets.

    Args:
        counts: of locators, one for each recording, and of targets.
    """
    R = len(audio_lens_R)
    if isinstance(lens_B, FakeTensor):
        # OOMptimizer plans on tensors that have values only where these follow from lengths and ids; otherwise each row
        # counts as full, which bounds the memory from above.
        B, T = is_locator_BT.shape
        if rows is not None:
            return rows.size, T if max_targets is None else max_targets, value_of(counts[1])
        full = T + (_longest(audio_lens_R, F) - 1) * (R // B) if R else T
        A = T if max_targets is None else max_targets
        return max(_longest(lens_B, full), 1), A, value_of(counts[1])
    most_targets = (lens_B if is_target_BT is None else is_target_BT.sum(1)).max()
    # The only read of the device by the host.
    longest = lens_B.max() if rows is None else rows.used(lens_B).max()
    found, num_targets, S, A = torch.stack([*counts, longest, most_targets]).tolist()
    if found != R:
        raise DataError(
            f"a batch has {R} recordings but {found} audio locator tokens: "
            "each recording needs exactly one locator in its context."
        )
    if rows is not None:
        rows.check(S)
    assert max_targets is None or is_target_BT is None or max_targets >= A
    # A language model needs at least one position, even for a batch of padding.
    return max(S, 1), A if max_targets is None else max_targets, num_targets


def _longest(fake_lens_N: Tensor, padded: int) -> int:
    """The greatest length, if the fake tensor has values, or else the padded length."""
    longest = value_of(fake_lens_N.max())
    return padded if longest is None else longest


def value_of(fake: Tensor) -> int | None:
    """The value of a () fake tensor, if it has one."""
    try:
        return int(fake)
    except DataDependentOutputException:
        return None


class _CopyRows(torch.autograd.Function):
    """Rows of two matrices, copied into a third, which is zero elsewhere.

    PyTorch's own differentiable operations would copy the whole gradient twice more.
    """

    @staticmethod
    def forward(ctx: Any, num_rows: int, tokens_NH: Tensor, row_N: Tensor, frames_MH: Tensor, row_M: Tensor) -> Tensor:
        """``num_rows`` rows. What goes to row ``num_rows`` is dropped; all others are named once at most."""
        ctx.save_for_backward(row_N, row_M)
        # Dropped rows go to one extra row.
        rows = tokens_NH.new_zeros(num_rows + 1, tokens_NH.shape[1])
        to, tokens, frames = _in_words(rows, tokens_NH.contiguous(), frames_MH.contiguous())
        to.index_copy_(0, row_N, tokens).index_copy_(0, row_M, frames)
        return rows[:num_rows]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Each row's gradient is that of the row that it was copied to; dropped rows have none."""
        _, needs_tokens, _, needs_frames, _ = ctx.needs_input_grad
        row_N, row_M = ctx.saved_tensors
        tokens = _rows_at(grad, row_N) if needs_tokens else None
        frames = _rows_at(grad, row_M) if needs_frames else None
        return None, tokens, None, frames, None


def _in_words(*matrices: Tensor) -> tuple[Tensor, ...]:
    """The same memory as words of 16 bytes, where rows consist of whole ones.

    An element takes as long to copy as a word: in words, bfloat16 takes a fifth to a quarter of the time on a CPU.
    """
    starts_and_widths = [n * m.element_size() for m in matrices for n in (m.storage_offset(), m.shape[1])]
    if matrices[0].device.type == "mps" or any(n % _WORD.itemsize for n in starts_and_widths):
        return matrices  # MPS has no numbers of that size
    return tuple(matrix.view(_WORD) for matrix in matrices)


def _rows_at(rows: Tensor, index: Tensor) -> Tensor:
    """The rows of an index; zero beyond the last row."""
    found = rows.index_select(0, index.clamp(max=len(rows) - 1))
    return found.mul_((index < len(rows))[:, None].to(rows.dtype))
