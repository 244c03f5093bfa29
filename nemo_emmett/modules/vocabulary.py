"""The vocabulary over which a loss is computed: whole, or split over the ranks of a tensor-parallel group.

Where it is split, each rank has the rows of some tokens of the output layer's weight, and computes the logits of these
alone. Of each row of logits the ranks exchange its maximum, its sum of exponentials and its target's logit, never the
logits (Megatron-LM, arXiv 1909.08053, section 3). All ranks of the group have the same rows.

Shapes: C tokens of a chunk, V vocabulary, W tokens of the vocabulary that this rank has.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate

from nemo_emmett.modules.loss import IGNORE_INDEX


class Vocabulary:
    """A whole one."""

    def size(self, W: int) -> int:
        """Number of tokens, of which this rank has W."""
        return W

    def most(self, W: int) -> int:
        """The most tokens that a rank has."""
        return W

    def columns(self, targets_C: Tensor) -> tuple[Tensor, Tensor | None]:
        """(C, 1) columns of this rank's logits to read for the targets, any where there is none; and (C, 1) bool, false
        where the target is not among them, or None: they all are."""
        return targets_C.masked_fill(targets_C == IGNORE_INDEX, 0)[:, None], None

    def sum(self, values: Tensor) -> Tensor:
        """Sums over this rank's tokens become sums over all."""
        return values

    def max(self, values: Tensor) -> Tensor:
        """Maxima over this rank's tokens become maxima over all."""
        return values

    def argmax(self, logits_CW: Tensor) -> Tensor:
        """(C,) the first token of the largest logit."""
        return logits_CW.argmax(1)

    def own(self, values_CV: Tensor) -> Tensor:
        """(C, W) the columns of this rank's tokens; fewer if there are fewer than V."""
        return values_CV

    def whole(self, values_CW: Tensor) -> Tensor:
        """(C, V) the columns of all ranks' tokens."""
        return values_CW


WHOLE = Vocabulary()


@dataclass(frozen=True)
class ShardedVocabulary(Vocabulary):
    """The tokens ``first`` to ``first + W`` of a vocabulary that a group of ranks shares.

    Args:
        group: of these ranks.
        first: this rank's first token.
        here: how many it has, W.
        total: size of the vocabulary.
    """

    group: dist.ProcessGroup
    first: int
    here: int
    total: int

    @classmethod
    def of(cls, weight_VH: DTensor) -> ShardedVocabulary:
        """That of a weight whose rows are divided among the ranks of its mesh, as ``torch.chunk`` divides them."""
        mesh, V = weight_VH.device_mesh, len(weight_VH)
        first = min(V, mesh.get_local_rank() * -(-V // mesh.size()))
        return cls(mesh.get_group(), first, len(weight_VH.to_local()), V)

    def size(self, W: int) -> int:
        """See :class:`Vocabulary`."""
        return self.total

    def most(self, W: int) -> int:
        """See :class:`Vocabulary`."""
        return -(-self.total // self.group.size())

    def columns(self, targets_C: Tensor) -> tuple[Tensor, Tensor | None]:
        """See :class:`Vocabulary`."""
        columns_C1 = (targets_C - self.first)[:, None]
        is_here_C1 = (columns_C1 >= 0) & (columns_C1 < self.here)
        return columns_C1.clamp(0, max(0, self.here - 1)), is_here_C1

    def sum(self, values: Tensor) -> Tensor:
        """See :class:`Vocabulary`. A collective of the group."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def max(self, values: Tensor) -> Tensor:
        """See :class:`Vocabulary`. A collective of the group."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def argmax(self, logits_CW: Tensor) -> Tensor:
        """See :class:`Vocabulary`. Two collectives of the group."""
        highest_C, token_C = logits_CW.max(1)
        is_best_C = highest_C == self.max(highest_C)
        return self._reduced(torch.where(is_best_C, token_C + self.first, self.total), dist.ReduceOp.MIN)

    def own(self, values_CV: Tensor) -> Tensor:
        """See :class:`Vocabulary`."""
        return values_CV[:, self.first : self.first + self.here]

    def whole(self, values_CW: Tensor) -> Tensor:
        """See :class:`Vocabulary`. A collective of the group."""
        C, ranks, most = len(values_CW), self.group.size(), self.most(0)
        padded_CW = values_CW.new_zeros(C, most)
        padded_CW[:, : self.here] = values_CW
        of_ranks = [torch.empty_like(padded_CW) for _ in range(ranks)]
        dist.all_gather(of_ranks, padded_CW, group=self.group)
        return torch.cat(of_ranks, 1)[:, : self.total]

    def _reduced(self, values: Tensor, operation: dist.ReduceOp) -> Tensor:
        values = values.contiguous().clone()
        dist.all_reduce(values, op=operation, group=self.group)
        return values


class VocabularyParallelEmbedding(nn.Embedding):
    """Token embeddings of which each rank has the rows of some tokens. (``DTensor`` would give each rank the gradient
    of the whole table.)"""

    def forward(self, ids: Tensor) -> Tensor:
        """(..., H) embeddings of (...) ids, which are the same on all ranks. A collective of the group."""
        weight_WH, vocabulary = self.weight.to_local(), ShardedVocabulary.of(self.weight)
        columns_C1, is_here_C1 = vocabulary.columns(ids.flatten())
        padding = None if self.padding_idx is None else self.padding_idx - vocabulary.first
        if padding is not None and not 0 <= padding < vocabulary.here:
            padding = None
        rows_CH = F.embedding(columns_C1[:, 0], weight_WH, padding).masked_fill(~is_here_C1, 0)
        summed = DTensor.from_local(rows_CH, self.weight.device_mesh, [Partial()], run_check=False).redistribute(
            placements=[Replicate()]
        )
        return summed.to_local().view(*ids.shape, -1)


class VocabularyParallelLinear(nn.Linear):
    """An output layer of which each rank has the rows of some tokens; its logits are those of all tokens."""

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., V) logits of (..., H) hidden states, which are the same on all ranks. A collective of the group."""
        hidden = DTensor.from_local(hidden, self.weight.device_mesh, [Replicate()], run_check=False)
        return F.linear(hidden, self.weight, self.bias).full_tensor()


def local_head(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Vocabulary]:
    """What an output layer computes on this rank: hidden states, weight (W, H), bias (W,), and the vocabulary.

    Args:
        hidden_NH: (N, H), the same on all ranks of the group.
        weight_VH: (V, H); where it is a ``DTensor``, a rank has the rows of some tokens.
        bias_V: (V,), as the weight.
    """
    if not isinstance(weight_VH, DTensor):
        return hidden_NH, weight_VH, bias_V, WHOLE
    mesh = weight_VH.device_mesh
    # Each rank has a part of the gradient of the hidden states, which are summed.
    hidden = DTensor.from_local(hidden_NH, mesh, [Replicate()], run_check=False)
    hidden_NH = hidden.to_local(grad_placements=[Partial()])
    bias_W = None if bias_V is None else bias_V.to_local()
    return hidden_NH, weight_VH.to_local(), bias_W, ShardedVocabulary.of(weight_VH)
