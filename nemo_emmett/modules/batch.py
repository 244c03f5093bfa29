"""A training batch holds one batch per modality; here it is taken apart, whatever form it arrives in.

Shapes: B examples, T tokens, R recordings, S samples (docs/architecture.md, "The batch").
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

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
    """NeMo's flat SALM batch as a one-modality batch: the tokens before the answer are the context.

    Args:
        batch: ``input_ids`` (B, T) int64, padded on either side; ``loss_mask`` (B, T) bool, true on the answer;
            ``audios`` (R, S) float32 and ``audio_lens`` (R,) int64, both empty for text.
        pad_id: the id of padding in ``input_ids``.

    Returns:
        A dict with ``context_ids``, ``context_lens``, ``answer_ids``, ``answer_lens``, ``audios``, ``audio_lens``.
    """
    ids_BT, answer_BT = batch["input_ids"], batch["loss_mask"].bool()
    context_BT = (ids_BT != pad_id) & ~answer_BT & (answer_BT.cumsum(1) == 0)
    context_ids, context_lens = pack_left(ids_BT, context_BT, pad_id)
    answer_ids, answer_lens = pack_left(ids_BT, answer_BT, pad_id)
    has_audio = batch.get("audios") is not None and batch["audios"].numel() > 0
    return {
        "context_ids": context_ids,
        "context_lens": context_lens,
        "answer_ids": answer_ids,
        "answer_lens": answer_lens,
        "audios": batch["audios"] if has_audio else None,
        "audio_lens": batch["audio_lens"] if has_audio else None,
    }


def pack_left(ids_BT: Tensor, keep_BT: Tensor, pad_id: int) -> tuple[Tensor, Tensor]:
    """Move the kept tokens of each row to its left end and pad on the right.

    Args:
        ids_BT: (B, T) int64.
        keep_BT: (B, T) bool.
        pad_id: what fills the rest.

    Returns:
        (B, max kept) int64 and the number of kept tokens per row, (B,) int64.

    Example:
        >>> pack_left(torch.tensor([[0, 0, 7, 8]]), torch.tensor([[False, False, True, True]]), pad_id=0)
        (tensor([[7, 8]]), tensor([2]))
    """
    lens_B = keep_BT.sum(1)
    width = int(lens_B.max()) if len(lens_B) else 0
    # Positions that are dropped all land in one extra column, which is cut off.
    columns_BT = torch.where(keep_BT, keep_BT.cumsum(1) - 1, width)
    packed = ids_BT.new_full((ids_BT.shape[0], width + 1), pad_id)
    packed.scatter_(1, columns_BT, ids_BT)
    return packed[:, :width], lens_B


def length_mask(lens_B: Tensor, width: int) -> Tensor:
    """(B, width) bool, true in the first ``lens_B[b]`` columns of row b."""
    return torch.arange(width, device=lens_B.device)[None, :] < lens_B[:, None]
