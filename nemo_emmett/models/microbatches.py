"""A training step in pieces: a batch cut into smaller ones, which together give its loss and its gradient.

OOMptimizer's guard redoes a step that ran out of memory so. A modality's loss is a mean over the tokens of the whole
batch on all ranks; so the pieces divide by the whole's count, and their losses add up.

Shapes: B examples, T tokens, R recordings, N samples, M modalities.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from nemo_emmett.modules.batch import MODALITIES, length_mask, split_modalities
from nemo_emmett.modules.loss import sum_over_ranks


def cut_batch(batch: Mapping, pieces: int, pad_id: int, locator_id: int) -> list[Mapping]:
    """Cut a batch into at most so many smaller ones, each of one modality, together the same examples in their order.

    Args:
        batch: in any form that :func:`~nemo_emmett.modules.batch.split_modalities` takes.
        pieces: how many; a batch of both modalities makes two at least, unless one is asked for.
        pad_id: the tokenizer's padding id.
        locator_id: the id of the audio locator token.

    Returns:
        Batches such as ``{"audio": {...}}``, speech before text, padded no further than their own longest example.
    """
    if pieces <= 1:
        return [batch]
    parts = split_modalities(batch, pad_id)
    of_each = max(1, pieces // len(parts))
    return [{modality: piece} for modality, part in parts.items() for piece in _cut_examples(part, of_each, locator_id)]


def _cut_examples(part: Mapping, pieces: int, locator_id: int) -> list[dict[str, Any]]:
    B = len(part["context_lens"])
    pieces = min(pieces, B)
    starts = [B * piece // pieces for piece in range(pieces + 1)]
    recordings = _recordings_before(part, locator_id)
    return [_examples(part, slice(a, b), slice(recordings[a], recordings[b])) for a, b in pairwise(starts)]


def _recordings_before(part: Mapping, locator_id: int) -> list[int]:
    """How many recordings belong to the examples before each one; B + 1 numbers, the last is R."""
    if part.get("audios") is None:
        return [0] * (len(part["context_lens"]) + 1)
    ids_BT = part["context_ids"]
    locators_BT = (ids_BT == locator_id) & length_mask(part["context_lens"], ids_BT.shape[1])
    return [0, *locators_BT.sum(1).cumsum(0).tolist()]


def _examples(part: Mapping, rows: slice, recordings: slice) -> dict[str, Any]:
    """Some examples of a one-modality batch, with their recordings."""
    piece = {key: value[rows] for key, value in part.items() if value is not None and not key.startswith("audio")}
    for name in ("context_ids", "context_targets", "answer_ids"):
        if name in piece:
            piece[name] = _trimmed(piece[name], piece[f"{name.partition('_')[0]}_lens"])
    if part.get("audios") is not None and recordings.start < recordings.stop:
        piece["audio_lens"] = part["audio_lens"][recordings]
        piece["audios"] = _trimmed(part["audios"][recordings], piece["audio_lens"])
    return piece


def _trimmed(padded: Tensor, lens: Tensor) -> Tensor:
    return padded[:, : int(lens.max())]


def target_counts(parts: Mapping[str, Mapping], device: torch.device) -> Tensor:
    """(M,) int64 target tokens of the one-modality batches of a step; 0 where a modality is absent."""
    none = torch.zeros((), dtype=torch.long, device=device)
    return torch.stack([_target_count(parts[m]) if m in parts else none for m in MODALITIES])


def _target_count(part: Mapping) -> Tensor:
    """Tokens of the answers, and of the answers of earlier turns."""
    count = part["answer_lens"].sum()
    earlier = part.get("context_targets")
    return count if earlier is None else count + earlier.sum()


class TokenCounts:
    """The target tokens of a whole batch, on this rank and on all of them.

    Args:
        batch: the whole batch.
        parts: its one-modality batches.
        device: of the counts.
    """

    def __init__(self, batch: Mapping, parts: Mapping[str, Mapping], device: torch.device) -> None:
        self.here_M = target_counts(parts, device)
        self.logged = False
        self._mark = weakref.ref(_any_tensor(batch)) if batch else None
        self._totals_M: Tensor | None = None

    def are_of(self, batch: Mapping) -> bool:
        """Whether this is the batch; DDP hands on its tensors in a new dict."""
        return self._mark is not None and self._mark() is _any_tensor(batch)

    def over_all_ranks(self) -> Tensor:
        """(M,) tokens on all ranks. The first call is a collective: every rank must make it, once in a step."""
        if self._totals_M is None:
            self._totals_M = sum_over_ranks(self.here_M)
        return self._totals_M


class MicrobatchLoss:
    """What the pieces of a step have added up to so far."""

    def __init__(self, counts: TokenCounts) -> None:
        self._counts = counts
        self._losses_M = torch.zeros_like(counts.here_M, dtype=torch.float32)
        self._tokens_M = torch.zeros_like(counts.here_M)

    def add(self, loss_sums_M: Tensor, token_counts_M: Tensor) -> None:
        """Count a piece: (M,) summed cross-entropies, nats, and (M,) target tokens."""
        self._losses_M += loss_sums_M.detach()
        self._tokens_M += token_counts_M

    def loss_sums(self) -> Tensor:
        """(M,) summed cross-entropies of the whole batch, nats.

        A piece whose backward pass ran out of memory comes again in smaller ones; so this is the mean over all tokens
        that came, times the tokens of the batch.
        """
        return self._losses_M / self._tokens_M.clamp(min=1) * self._counts.here_M


def _any_tensor(batch: Mapping) -> Tensor:
    """A tensor by which to know a batch again."""
    for key in ("input_ids", "context_ids"):
        if key in batch:
            return batch[key]
    return next(batch[m]["context_ids"] for m in MODALITIES if batch.get(m) is not None)
