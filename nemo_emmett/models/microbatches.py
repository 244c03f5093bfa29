"""A training step in microbatches, which together give the loss and the gradient of the whole batch.

OOMptimizer's guard uses it to redo a step that ran out of memory. A term of the loss, a modality's or an objective's,
is a mean over its units in the whole batch on all ranks; so each microbatch divides by the count of the whole, and the
losses add up.

Shapes: B examples, T tokens, R recordings, N samples, M modalities, L terms: the modalities, then objectives.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from nemo_emmett.modules.batch import MODALITIES, length_mask, split_modalities
from nemo_emmett.modules.loss import sum_over_ranks
from nemo_emmett.objectives.objective import CrossEntropyObjective, Objective, target_tokens


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
        starts = _starts(part, max(1, number // len(parts)))
        recordings = [0] * (B + 1)  # of the examples before each one; the last number is R
        if part.get("audios") is not None:
            ids_BT = part["context_ids"]
            locators_BT = (ids_BT == locator_id) & length_mask(part["context_lens"], ids_BT.shape[1])
            recordings = [0, *locators_BT.sum(1).cumsum(0).tolist()]
        microbatches += [
            {modality: _examples(part, slice(a, b), slice(recordings[a], recordings[b]))} for a, b in pairwise(starts)
        ]
    return microbatches


def _starts(part: Mapping, number: int) -> list[int]:
    """The first examples of at most so many microbatches, and the number of examples; packed rows stay whole."""
    B = len(part["context_lens"])
    if part.get("packed_rows") is None:
        firsts = list(range(B + 1))  # of each row
    else:
        row_of = part["packed_rows"].tolist()
        firsts = [*(example for example in range(B) if example == 0 or row_of[example] != row_of[example - 1]), B]
    rows = len(firsts) - 1
    number = min(number, rows)
    return [firsts[rows * i // number] for i in range(number + 1)]


def _examples(part: Mapping, rows: slice, recordings: slice) -> dict[str, Any]:
    """Some examples of a one-modality batch, with their recordings."""
    chosen = {
        key: value[rows]
        for key, value in part.items()
        if value is not None and not key.startswith("audio") and key != "packed_sizes"
    }
    if part.get("packed_rows") is not None:
        packed_rows, sizes = chosen["packed_rows"], part["packed_sizes"]
        chosen["packed_rows"] = packed_rows - packed_rows[0]
        chosen["packed_sizes"] = (int(chosen["packed_rows"][-1]) + 1, *sizes[1:])
    for name in ("context_ids", "context_targets", "answer_ids", "transcript_ids", "text_context_ids"):
        if name in chosen:
            lens = chosen[f"{name.rpartition('_')[0]}_lens"]
            chosen[name] = chosen[name][:, : int(lens.max())]
    if part.get("audios") is not None and recordings.start < recordings.stop:
        chosen["audio_lens"] = part["audio_lens"][recordings]
        chosen["audios"] = part["audios"][recordings, : int(chosen["audio_lens"].max())]
    return chosen


def term_counts(parts: Mapping[str, Mapping], device: torch.device, objectives: Sequence[Objective] = ()) -> Tensor:
    """(L,) int64 units of each term in the one-modality batches of a step; 0 where a modality is absent.

    A modality's units are its target tokens, without those that a :class:`CrossEntropyObjective` counts in its
    own term.

    Args:
        parts: the one-modality batches.
        device: of the counts.
        objectives: that are active.

    Raises:
        DataError: if a batch lacks what an objective reads.
    """
    zero = torch.zeros((), dtype=torch.long, device=device)
    counts = {m: zero if parts.get(m) is None else target_tokens(parts[m]).sum() for m in MODALITIES}
    for objective in objectives:
        part = parts.get(objective.modality)
        if part is not None:
            objective.check_batch(part)
        counts[objective.name] = zero if part is None else objective.units(part)
        if isinstance(objective, CrossEntropyObjective):
            counts[objective.modality] = counts[objective.modality] - counts[objective.name]
    return torch.stack(list(counts.values()))


def modality_tokens(counts_L: Tensor, objectives: Sequence[Objective]) -> Tensor:
    """(M,) target tokens of the modalities, whichever term they count in."""
    tokens_M = counts_L[: len(MODALITIES)].clone()
    for row, objective in enumerate(objectives, start=len(MODALITIES)):
        if isinstance(objective, CrossEntropyObjective):
            tokens_M[MODALITIES.index(objective.modality)] += counts_L[row]
    return tokens_M


class TermCounts:
    """The units of the terms in a whole batch, on this rank and on all of them.

    Args:
        batch: the whole batch.
        parts: its one-modality batches.
        device: of the counts.
        objectives: that are active in the step.
    """

    def __init__(
        self,
        batch: Mapping,
        parts: Mapping[str, Mapping],
        device: torch.device,
        objectives: Sequence[Objective] = (),
    ) -> None:
        self.objectives = tuple(objectives)
        self.here_L = term_counts(parts, device, objectives)
        self.logged = False
        self._mark = weakref.ref(_any_tensor(batch)) if batch else None
        self._totals_L: Tensor | None = None

    def are_of(self, batch: Mapping) -> bool:
        """Whether this is the batch; DDP passes its tensors in a new dict."""
        return self._mark is not None and self._mark() is _any_tensor(batch)

    def over_all_ranks(self) -> Tensor:
        """(L,) units on all ranks. The first call is a collective: every rank must make it, once in a step."""
        if self._totals_L is None:
            self._totals_L = sum_over_ranks(self.here_L)
        return self._totals_L


class MicrobatchLoss:
    """The sum of the losses of a step's microbatches so far."""

    def __init__(self, counts: TermCounts) -> None:
        self._counts = counts
        self._losses_L = torch.zeros_like(counts.here_L, dtype=torch.float32)
        self._units_L = torch.zeros_like(counts.here_L)

    def add(self, loss_sums_L: Tensor, counts_L: Tensor) -> None:
        """Add a microbatch: (L,) summed losses, nats, and (L,) units."""
        self._losses_L += loss_sums_L.detach()
        self._units_L += counts_L

    def loss_sums(self) -> Tensor:
        """(L,) summed losses of the whole batch, nats.

        A microbatch whose backward pass ran out of memory is added again in smaller ones; so this is the mean over all
        units that were added, times the units of the batch.
        """
        return self._losses_L / self._units_L.clamp(min=1) * self._counts.here_L


def _any_tensor(batch: Mapping) -> Tensor:
    """A tensor that identifies a batch."""
    for key in ("input_ids", "context_ids"):
        if key in batch:
            return batch[key]
    return next(batch[m]["context_ids"] for m in MODALITIES if batch.get(m) is not None)
