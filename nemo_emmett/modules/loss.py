"""Each modality's loss is the mean cross-entropy of its tokens over all ranks (EMMeTT, arXiv 2409.13523, section 3).

A rank holds a sum and a count per term: of each modality, then of each active objective (nemo_emmett/objectives). The
counts are added over the ranks; the sums need not be, since the gradients are averaged by DDP: a rank's sum over the
global count, times the number of ranks, averages to the gradient that one process would have on the joined batch. The
counts are known before anything is computed, and are added up first: a rank that then runs out of memory leaves no
other rank waiting for its count.

Shapes: B examples, T tokens, L terms.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

IGNORE_INDEX = -100
"""Target of a position that has no loss (the default of ``torch.nn.functional.cross_entropy``)."""


def mask_padding(ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Targets: the ids where the mask is true, ``IGNORE_INDEX`` elsewhere."""
    return torch.where(mask_BT, ids_BT, IGNORE_INDEX)


def world_size() -> int:
    """Number of ranks that train together; 1 without ``torch.distributed``."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, detached. Every rank must call it with the same shape."""
    values = values.detach().clone()
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def step_loss(loss_sums_L: Tensor, total_units_L: Tensor, weights_L: Tensor) -> Tensor:
    """Weighted sum of the terms' mean losses.

    Args:
        loss_sums_L: (L,) this rank's summed losses, 0 where a term is absent.
        total_units_L: (L,) units on all ranks, such as target tokens (:func:`sum_over_ranks`).
        weights_L: (L,) ``modality_loss_weights``, and those of objectives.

    Returns:
        The loss to call backward on, a scalar; its gradient, averaged over ranks, is that of one process on the joined
        batch.
    """
    return (weights_L * loss_sums_L / total_units_L.clamp(min=1)).sum() * world_size()
