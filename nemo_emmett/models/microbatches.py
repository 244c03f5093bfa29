"""A training step in microbatches, which together give the loss and the gradient of the whole batch.

OOMptimizer's guard uses it to redo a step that ran out of memory. A modality's loss is a mean over the tokens of the
whole batch on all ranks; so each microbatch divides by the count of the whole, and the losses add up.

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


def cut_batch(batch: Mapping, number: int, pad_id: int, locator_id: int) -> list[Mapping]:
    """Cut a batch into microbatches of one modality each, which hold the same examples in the same order.

    Args:
        batch: in any form that :func:`~nemo_emmett.modules.batch.split_modalities` takes.
        number: most microbatches; from 2 on, a batch of both modalities gives at least two.
        pad_id: the tokenizer's padding id.
        locator_id: the id of the audio locator token.

    Returns:
        Batches such as ``{"audio": {...}}``, speech before text, padded no further than their own longest example.
    """
    if number <= 1:
        return [batch]
    parts = split_modalities(batch, pad_id)
    microbatches = []
    for modality, part in parts.items():
        B = len(part["context_lens"])
        number_of_part = min(max(1, number // len(parts)), B)
        starts = [B * i // number_of_part for i in range(number_of_part + 1)]
        recordings = [0] * (B + 1)  # of the examples before each one; the last number is R
        if part.get("audios") is not None:
            ids_BT = part["context_ids"]
            locators_BT = (ids_BT == locator_id) & length_mask(part["context_lens"], ids_BT.shape[1])
            recordings = [0, *locators_BT.sum(1).cumsum(0).tolist()]
        microbatches += [
            {modality: _examples(part, slice(a, b), slice(recordings[a], recordings[b]))} for a, b in pairwise(starts)
        ]
    return microbatches


def _examples(part: Mapping, rows: slice, recordings: slice) -> dict[str, Any]:
    """Some examples of a one-modality batch, with their recordings."""
    chosen = {key: value[rows] for key, value in part.items() if value is not None and not key.startswith("audio")}
    for name in ("context_ids", "context_targets", "answer_ids"):
        if name in chosen:
            lens = chosen[f"{name.partition('_')[0]}_lens"]
            chosen[name] = chosen[name][:, : int(lens.max())]
    if part.get("audios") is not None and recordings.start < recordings.stop:
        chosen["audio_lens"] = part["audio_lens"][recordings]
        chosen["audios"] = part["audios"][recordings, : int(chosen["audio_lens"].max())]
    return chosen


def target_counts(parts: Mapping[str, Mapping], device: torch.device) -> Tensor:
    """(M,) int64 target tokens of the one-modality batches of a step; 0 where a modality is absent."""
    counts = []
    for modality in MODALITIES:
        part = parts.get(modality)
        count = torch.zeros((), dtype=torch.long, device=device) if part is None else part["answer_lens"].sum()
        if part is not None and part.get("context_targets") is not None:  # answers of earlier turns
            count = count + part["context_targets"].sum()
        counts.append(count)
    return torch.stack(counts)


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
        """Whether this is the batch; DDP passes its tensors in a new dict."""
        return self._mark is not None and self._mark() is _any_tensor(batch)

    def over_all_ranks(self) -> Tensor:
        """(M,) tokens on all ranks. The first call is a collective: every rank must make it, once in a step."""
        if self._totals_M is None:
            self._totals_M = sum_over_ranks(self.here_M)
        return self._totals_M


class MicrobatchLoss:
    """The sum of the losses of a step's microbatches so far."""

    def __init__(self, counts: TokenCounts) -> None:
        self._counts = counts
        self._losses_M = torch.zeros_like(counts.here_M, dtype=torch.float32)
        self._tokens_M = torch.zeros_like(counts.here_M)

    def add(self, loss_sums_M: Tensor, token_counts_M: Tensor) -> None:
        """Add a microbatch: (M,) summed cross-entropies, nats, and (M,) target tokens."""
        self._losses_M += loss_sums_M.detach()
        self._tokens_M += token_counts_M

    def loss_sums(self) -> Tensor:
        """(M,) summed cross-entropies of the whole batch, nats.

        A microbatch whose backward pass ran out of memory is added again in smaller ones; so this is the mean over all
        tokens that were added, times the tokens of the batch.
        """
        return self._losses_M / self._tokens_M.clamp(min=1) * self._counts.here_M


def _any_tensor(batch: Mapping) -> Tensor:
    """A tensor that identifies a batch."""
    for key in ("input_ids", "context_ids"):
        if key in batch:
            return batch[key]
    return next(batch[m]["context_ids"] for m in MODALITIES if batch.get(m) is not None)
