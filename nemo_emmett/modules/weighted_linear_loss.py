"""Cross-entropy with a weight for each row, and the divergence from a teacher, of a linear layer; chunk by chunk.

What :mod:`~nemo_emmett.modules.linear_cross_entropy` does for a plain sum, this does for training objectives on answer
tokens: ``sum_n weight_n * CE_n + kl_weight_n * T**2 * KL(teacher_n || student_n)``. The teacher's logits exist for a
chunk of rows only, as the student's do, and both terms share one gradient of the logits: hidden states and weight
are read, and their gradients added to, once.

The divergence is that of distributions softened by a temperature T (Hinton et al., arXiv 1503.02531, section 2); the
factor T**2 keeps the size of its gradient independent of T.

Shapes: N tokens, C tokens of a chunk, V vocabulary, W columns of the teacher's logits, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_emmett.modules.linear_cross_entropy import (
    LinearGradients,
    LinearInputs,
    cap_logits,
    into_gradient,
    linear_dtype,
    sum_dtype,
    wants_gradient,
)
from nemo_emmett.modules.loss import IGNORE_INDEX
from nemo_emmett.modules.vocabulary import WHOLE, Vocabulary

BLOCK_ELEMENTS = 2**21
"""Logits whose softmax is computed at a time, for the divergence needs several copies of them: 8 MiB each."""


class Teacher(Protocol):
    """What gives the teacher's logits."""

    def logits(self, rows: slice) -> Tensor:
        """(C, W) float32 logits of some rows."""


@dataclass(frozen=True)
class LinearTeacher:
    """A teacher whose logits are those of a linear layer; the arguments are those of
    :func:`~nemo_emmett.modules.linear_cross_entropy.linear_cross_entropy`."""

    hidden_NH: Tensor
    weight_WH: Tensor
    bias_W: Tensor | None = None
    softcap: float | None = None
    vocabulary: Vocabulary = WHOLE

    def logits(self, rows: slice) -> Tensor:
        """See :class:`Teacher`."""
        layer = (self.hidden_NH[rows], self.weight_WH, self.bias_W)
        logits_CW = F.linear(*(None if t is None else t.to(linear_dtype(t)) for t in layer))
        logits_CW = logits_CW.to(sum_dtype(logits_CW.dtype))
        if self.softcap is not None:
            logits_CW.div_(self.softcap).tanh_().mul_(self.softcap)
        return self.vocabulary.whole(logits_CW)


@dataclass(frozen=True)
class LogitsTeacher:
    """A teacher whose logits are there."""

    logits_NW: Tensor

    def logits(self, rows: slice) -> Tensor:
        """See :class:`Teacher`."""
        logits_CW = self.logits_NW[rows]
        return logits_CW.to(sum_dtype(logits_CW.dtype))


@dataclass(frozen=True)
class RowWeights:
    """The factor of each row's losses in their sum.

    Args:
        cross_entropy_N: (N,) of the cross-entropy.
        divergence_N: (N,) of the divergence; None without a teacher.
        temperature: of the divergence.
    """

    cross_entropy_N: Tensor
    divergence_N: Tensor | None = None
    temperature: float = 1.0

    def of(self, rows_M: Tensor) -> RowWeights:
        """Those of some rows, by their numbers (M,) int64."""
        divergence_M = None if self.divergence_N is None else self.divergence_N[rows_M]
        return RowWeights(self.cross_entropy_N[rows_M], divergence_M, self.temperature)


def weighted_linear_loss(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    weights: RowWeights,
    *,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    teacher: Teacher | None = None,
    vocabulary: Vocabulary = WHOLE,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sum of each row's cross-entropy and of its divergence from a teacher.

    The gradients are computed in the forward pass, as those of ``linear_cross_entropy``: a second backward pass through
    the same loss is an error. The teacher gets none.

    Args:
        hidden_NH: (N, H).
        weight_VH: (V, H).
        targets_N: (N,) int64 below V; rows of ``IGNORE_INDEX`` have no loss and no gradient.
        weights: of the rows.
        bias_V: (V,).
        softcap: as for ``linear_cross_entropy``.
        label_smoothing: of the cross-entropy.
        teacher: its rows are those of ``hidden_NH``. If it has fewer columns than V, it gives the others no
            probability; columns beyond V are left out.
        vocabulary: as for ``linear_cross_entropy``; the teacher's is whole.

    Returns:
        The scalar; the (N,) cross-entropies; and the (N,) divergences times ``temperature ** 2``, 0 where their weight
        is. Nats, float32 (float64 of float64 inputs). Only the scalar has a gradient.
    """
    inputs = LinearInputs(hidden_NH, weight_VH, bias_V, targets_N, softcap, label_smoothing, vocabulary)
    terms = _Terms.of(inputs, weights, teacher)
    if wants_gradient(*inputs.layer):
        return _WeightedLoss.apply(*inputs.layer, inputs, terms)
    with torch.no_grad():
        return _losses(inputs, terms)


def weighted_logit_loss(
    logits_NV: Tensor,
    targets_N: Tensor,
    weights: RowWeights,
    *,
    label_smoothing: float = 0.0,
    teacher: Teacher | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`weighted_linear_loss` of logits that are there: those of an output layer that is not linear."""
    logits_NV = logits_NV.to(sum_dtype(logits_NV.dtype))
    options = {"ignore_index": IGNORE_INDEX, "label_smoothing": label_smoothing, "reduction": "none"}
    losses_N = F.cross_entropy(logits_NV, targets_N, **options)
    loss = (weights.cross_entropy_N * losses_N).sum()
    divergences_N = torch.zeros_like(losses_N)
    if teacher is not None:
        kl_weights_N = weights.divergence_N.masked_fill(targets_N == IGNORE_INDEX, 0)
        _, divergences_N = _divergence(logits_NV, teacher.logits(slice(None)), weights.temperature)
        divergences_N = torch.where(kl_weights_N != 0, divergences_N, 0)
        loss = loss + (kl_weights_N * divergences_N).sum()
    return loss, losses_N.detach(), divergences_N.detach()


@dataclass(frozen=True)
class _Terms:
    """Weights of the rows, 0 where there is no target, and the teacher."""

    weights_N1: Tensor
    kl_weights_N1: Tensor | None
    temperature: float
    teacher: Teacher | None

    @classmethod
    def of(cls, inputs: LinearInputs, weights: RowWeights, teacher: Teacher | None) -> _Terms:
        dtype, ignored_N = sum_dtype(inputs.hidden_NH.dtype), inputs.targets_N == IGNORE_INDEX
        of_rows = [weights.cross_entropy_N, None if teacher is None else weights.divergence_N]
        weights_N1, kl_weights_N1 = (
            None if one is None else one.detach().to(dtype).masked_fill(ignored_N, 0)[:, None] for one in of_rows
        )
        return cls(weights_N1, kl_weights_N1, weights.temperature, teacher)


class _WeightedLoss(torch.autograd.Function):
    """The loss, whose gradients are computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        inputs: LinearInputs,
        terms: _Terms,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # `inputs` holds the tensors again; autograd tracks only those that are arguments themselves.
        gradients = LinearGradients(inputs.layer, ctx.needs_input_grad)
        loss, losses_N, divergences_N = _losses(inputs, terms, gradients)
        # Not among the saved tensors: they are scaled in place and returned.
        ctx.gradients = gradients.in_types_of(inputs.layer)
        ctx.mark_non_differentiable(losses_N, divergences_N)
        return loss, losses_N, divergences_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "weighted_linear_loss: a second backward pass through one loss, but its gradients were returned by the "
                "first; compute the loss again."
            )
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(grad_loss)
        return *gradients, None, None


def _losses(
    inputs: LinearInputs, terms: _Terms, gradients: LinearGradients | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The results of :func:`weighted_linear_loss`; gradients are added to ``gradients``."""
    inputs = inputs.cast()
    losses_N, divergences_N = inputs.zeros_N(), inputs.zeros_N()
    # With a teacher a chunk has two tensors of logits, of half the rows.
    for rows in inputs.chunks(share=1 if terms.teacher is None else 2):
        losses_N[rows], divergences_N[rows] = _losses_of_chunk(rows, inputs.of(rows), terms, gradients)
    loss = (terms.weights_N1[:, 0] * losses_N).sum()
    if terms.kl_weights_N1 is not None:
        loss = loss + (terms.kl_weights_N1[:, 0] * divergences_N).sum()
    return loss, losses_N, divergences_N


def _losses_of_chunk(
    rows: slice, chunk: LinearInputs, terms: _Terms, gradients: LinearGradients | None
) -> tuple[Tensor, Tensor]:
    # A function of its own, so that a chunk's tensors are gone before those of the next are made.
    logits_CV = chunk.logits()
    slope_CV = cap_logits(logits_CV, chunk.softcap)
    weights_C1 = terms.weights_N1[rows]
    if terms.teacher is None:
        losses_C = into_gradient(logits_CV, chunk, weights_C1)
        divergences_C = torch.zeros_like(losses_C)
    else:
        teacher_CW, kl_weights_C1 = terms.teacher.logits(rows), terms.kl_weights_N1[rows]
        losses_C, divergences_C = torch.empty_like(weights_C1[:, 0]), torch.empty_like(weights_C1[:, 0])
        for block in _blocks(len(logits_CV), chunk.vocabulary.most(logits_CV.shape[1])):
            kl_weights_D1 = kl_weights_C1[block]
            dlogits_DV, divergences_D = _divergence(
                logits_CV[block], teacher_CW[block], terms.temperature, chunk.vocabulary
            )
            losses_C[block] = into_gradient(logits_CV[block], chunk.of(block), weights_C1[block])
            # What the teacher says of other rows may be anything.
            unused_D1 = kl_weights_D1 == 0
            divergences_C[block] = divergences_D.masked_fill(unused_D1[:, 0], 0)
            logits_CV[block] += dlogits_DV.mul_(kl_weights_D1).masked_fill_(unused_D1, 0)
            del dlogits_DV
        del teacher_CW
    if gradients is not None:
        gradients.add(rows, chunk, logits_CV if slope_CV is None else logits_CV.mul_(slope_CV))
    return losses_C, divergences_C


def _blocks(C: int, V: int) -> Iterator[slice]:
    rows = max(1, BLOCK_ELEMENTS // V)
    return (slice(start, min(start + rows, C)) for start in range(0, C, rows))


def _divergence(
    logits_DV: Tensor, teacher_DW: Tensor, temperature: float, vocabulary: Vocabulary = WHOLE
) -> tuple[Tensor, Tensor]:
    """Gradient by the student's logits, (D, V), and value, (D,), of ``T ** 2 * KL(teacher || student)``."""
    student_DV = _log_softmax(logits_DV / temperature, vocabulary)
    columns = min(vocabulary.size(logits_DV.shape[1]), teacher_DW.shape[1])
    teacher_DW = vocabulary.own((teacher_DW[:, :columns] / temperature).log_softmax(1))
    p_DW, own = teacher_DW.exp(), teacher_DW.shape[1]
    value_D = temperature**2 * vocabulary.sum((p_DW * (teacher_DW - student_DV[:, :own])).sum(1))
    if student_DV.requires_grad:  # autograd computes the gradient
        return student_DV, value_D
    dlogits_DV = student_DV.exp_()
    dlogits_DV[:, :own] -= p_DW
    return dlogits_DV.mul_(temperature), value_D


def _log_softmax(logits_DV: Tensor, vocabulary: Vocabulary) -> Tensor:
    if vocabulary is WHOLE:
        return logits_DV.log_softmax(1)
    logits_DV = logits_DV - vocabulary.max(logits_DV.amax(1, keepdim=True))
    return logits_DV - vocabulary.sum(logits_DV.exp().sum(1, keepdim=True)).log()
