"""A training batch of any form as one-modality batches, and operations on padded rows.

Shapes: B examples, T tokens, R recordings, S samples (docs/architecture.md, "The batch").
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from nemo_emmett.errors import DataError

MODALITIES = ("audio", "text")
"""The modalities of a batch, in the order in which losses and counts are kept."""


def split_modalities(batch: Mapping, pad_id: int) -> dict[str, Mapping]:
    """The one-modality batches of a batch.

    Args:
        batch: ``{"audio": {...}, "text": {...}}`` or either alone; a one-modality batch as it is; or NeMo's flat SALM
            batch (``input_ids``, ``loss_mask``, ``audios``, ``audio_lens``).
        pad_id: the tokenizer's padding id.

    Returns:
        A dict with a one-modality batch under ``audio``, ``text`` or both.

    Raises:
        DataError: if the batch has none of these forms.
    """
    if "input_ids" in batch:
        batch = from_salm_batch(batch, pad_id)
    if "context_ids" in batch:
        return {"audio" if batch.get("audios") is not None else "text": batch}
    parts = {name: batch[name] for name in MODALITIES if batch.get(name) is not None}
    if not parts:
        raise DataError(
            f"a batch with the keys {sorted(batch)} cannot be trained on: "
            "it needs `audio` or `text` (SpeechTextDataset makes such batches), or NeMo's `input_ids`."
        )
    return parts


def from_salm_batch(batch: Mapping, pad_id: int) -> dict[str, Tensor | None]:
    """NeMo's flat SALM batch as a one-modality batch: the last answer is the answer, what comes before it the context.

    Answers of earlier turns belong to the context and are trained on all the same (``context_targets``). What follows
    the last answer, such as the end of its turn, is dropped: nothing is predicted from it.

    Args:
        batch: ``input_ids`` (B, T) int64, padded on either side; ``loss_mask`` (B, T) bool, true on the answers;
            ``audios`` (R, S) float32 and ``audio_lens`` (R,) int64, both empty for text.
        pad_id: the id of padding in ``input_ids``; inside a row it is a token like any other.

    Returns:
        A dict with ``context_ids``, ``context_lens``, ``context_targets``, ``answer_ids``, ``answer_lens``, ``audios``,
        ``audio_lens``. ``context_targets`` is (B, T_context) bool, without the first token of a row, which nothing
        predicts.
    """
    ids_BT, is_answer_BT = batch["input_ids"], batch["loss_mask"].bool()
    is_real_BT = _from_first_to_last((ids_BT != pad_id) | is_answer_BT)
    is_before_gap_BT = _from_here(~is_answer_BT & _from_here(is_answer_BT))
    is_last_BT = is_answer_BT & ~is_before_gap_BT  # the last run of each row
    is_context_BT = is_real_BT & ~_so_far(is_last_BT)

    context_lens, answer_lens = is_context_BT.sum(1), is_last_BT.sum(1)
    T_context, T_answer = torch.stack([context_lens.max(), answer_lens.max()]).tolist()
    context_targets = pack(is_answer_BT, is_context_BT, T_context, False)
    context_targets[:, :1] = False
    has_audio = batch.get("audios") is not None and batch["audios"].numel() > 0
    return {
        "context_ids": pack(ids_BT, is_context_BT, T_context, pad_id),
        "context_lens": context_lens,
        "context_targets": context_targets,
        "answer_ids": pack(ids_BT, is_last_BT, T_answer, pad_id),
        "answer_lens": answer_lens,
        "audios": batch["audios"] if has_audio else None,
        "audio_lens": batch["audio_lens"] if has_audio else None,
    }


def pack_left(ids_BT: Tensor, keep_BT: Tensor, pad_id: int) -> tuple[Tensor, Tensor]:
    """Move the kept tokens of each row to its left end and pad on the right.

    Args:
        ids_BT: (B, T) int64.
        keep_BT: (B, T) bool, such as :func:`padding_mask` gives.
        pad_id: what fills the rest.

    Returns:
        (B, max kept) int64 and the number of kept tokens per row, (B,) int64.

    Example:
        >>> pack_left(torch.tensor([[0, 0, 7, 8]]), torch.tensor([[False, False, True, True]]), pad_id=0)
        (tensor([[7, 8]]), tensor([2]))
    """
    lens_B = keep_BT.sum(1)
    width = int(lens_B.max()) if len(lens_B) else 0
    return pack(ids_BT, keep_BT, width, pad_id), lens_B


def pack(values_BT: Tensor, keep_BT: Tensor, width: int, fill: float) -> Tensor:
    """The kept values of each row, at most ``width``, moved to its left end, then ``fill``.

    Unlike :func:`pack_left` it reads nothing from the device.
    """
    # Dropped values go to one extra column, which is cut off.
    columns_BT = torch.where(keep_BT, keep_BT.cumsum(1) - 1, width)
    packed = values_BT.new_full((values_BT.shape[0], width + 1), fill)
    return packed.scatter_(1, columns_BT, values_BT)[:, :width]


def padding_mask(ids_BT: Tensor, pad_id: int) -> Tensor:
    """Which ids are tokens, whichever side the padding is on: (B, T) bool, true from the first to the last other id.

    Padding is often the end-of-sequence or the unknown token (Qwen, TinyLlama), which may also occur inside a row.

    Example:
        >>> padding_mask(torch.tensor([[0, 7, 0, 8, 0, 0]]), pad_id=0)
        tensor([[False,  True,  True,  True, False, False]])
    """
    return _from_first_to_last(ids_BT != pad_id)


def speech_rows(batch: Mapping, locator_id: int) -> Tensor | bool:
    """(L,) bool, which rows of a one-modality batch have recordings; False for a batch of text.

    A row is an example; or several, all with recordings or all without, where they are packed.

    Args:
        batch: see docs/architecture.md, "The batch".
        locator_id: the id of the audio locator token.
    """
    if batch.get("audios") is None:
        return False
    ids_BT = batch["context_ids"]
    has_speech_B = ((ids_BT == locator_id) & length_mask(batch["context_lens"], ids_BT.shape[1])).any(1)
    if batch.get("packed_rows") is None:
        return has_speech_B
    return has_speech_B.new_zeros(batch["packed_sizes"][0]).index_put((batch["packed_rows"],), has_speech_B)


def length_mask(lens_B: Tensor, width: int) -> Tensor:
    """(B, width) bool, true in the first ``lens_B[b]`` columns of row b."""
    if isinstance(lens_B, FakeTensor):
        # Of the fake tensors that OOMptimizer plans on, lengths have values, but the result of `arange` has none.
        columns_T = torch.tensor(range(width), dtype=torch.int64, device=lens_B.device)
    else:
        columns_T = torch.arange(width, device=lens_B.device)
    return columns_T[None, :] < lens_B[:, None]


def _from_first_to_last(marks_BT: Tensor) -> Tensor:
    return _so_far(marks_BT) & _from_here(marks_BT)


def _so_far(marks_BT: Tensor) -> Tensor:
    """Whether there is a mark here or before."""
    return marks_BT.cumsum(1) > 0


def _from_here(marks_BT: Tensor) -> Tensor:
    """Whether there is a mark here or after."""
    return _so_far(marks_BT.flip(1)).flip(1)
