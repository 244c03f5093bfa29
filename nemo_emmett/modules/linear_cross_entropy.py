"""Cross-entropy of a linear layer without all its logits in memory at once.

With a vocabulary of 256 k tokens the logits of 8,192 tokens are 8 GB, and the naive loss holds them three times. Here a
chunk of rows at a time is computed, replaced in place by its gradient, and multiplied into the gradients of hidden
states and weight; so the forward pass computes all gradients, and the backward pass only scales them. (The method of
Liger's fused linear cross-entropy, arXiv 2410.10989; cut cross-entropy, arXiv 2411.09009, needs not even a chunk of
logits. On CUDA their kernels are used where they are installed.)

Where the vocabulary is split over ranks (:mod:`~nemo_emmett.modules.vocabulary`), V is what this rank has of it, and
``chunked`` is the one implementation: no kernel exchanges what the ranks' parts have to know of one another.

Shapes: N tokens, C tokens of a chunk, V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from nemo_emmett.config import nearest
from nemo_emmett.errors import ConfigError
from nemo_emmett.modules.loss import IGNORE_INDEX
from nemo_emmett.modules.vocabulary import WHOLE, Vocabulary

IMPLEMENTATIONS = ("auto", "chunked", "liger", "cut_cross_entropy", "naive")
"""Values of ``model.loss_implementation``."""

CHUNK_ELEMENTS = 2**25
"""Logits of a chunk at most: 128 MiB in float32. 2,048 tokens, d = 1,024, V = 32,000 took one CPU core 5.4 s with
2**22, 4.8 s with 2**24, 4.7 s with 2**25 and with 2**26, and 5.2 s all at once: small chunks pass over the weight's
gradient too often."""

MIN_CHUNK_ROWS = 256
"""Rows of a chunk all the same, since each chunk reads and writes the weight's gradient once, 8 V H bytes for its
6 C V H operations: by that arithmetic a GPU of 3 TB/s and 500 Tflop/s waits for its memory below some 200 rows."""

_KEY = "model.loss_implementation"
_KERNELS = {
    "liger": ("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss", "liger-kernel"),
    "cut_cross_entropy": ("cut_cross_entropy", "linear_cross_entropy", "cut-cross-entropy"),
}
"""In the order of ``auto``: module, name in it, and the package to install."""

KERNEL_PACKAGES = {name: package for name, (_, _, package) in _KERNELS.items()}
"""The package to install for each kernel for CUDA."""


def linear_cross_entropy(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    implementation: str = "auto",
    vocabulary: Vocabulary = WHOLE,
) -> Tensor:
    """Sum of the cross-entropies of the rows that have a target.

    Logits are ``hidden_NH @ weight_VH.T + bias_V``, computed as ``torch.nn.functional.linear`` would (under autocast:
    in its type); softmax and sums are float32. Of ``chunked``, the gradients exist once: a second backward pass through
    the same loss is an error.

    Args:
        hidden_NH: (N, H).
        weight_VH: (V, H).
        targets_N: (N,) int64 below V; rows of ``IGNORE_INDEX`` have no loss and no gradient.
        bias_V: (V,).
        softcap: logits become ``softcap * tanh(logits / softcap)`` (Gemma 2, arXiv 2408.00118, section 2).
        label_smoothing: as ``torch.nn.functional.cross_entropy`` has it.
        implementation: ``chunked`` (any device), ``liger`` or ``cut_cross_entropy`` (kernels for CUDA; the latter for
            16-bit types, without label smoothing, and leaves out gradients below the type's precision), ``naive``
            (all logits at once), or ``auto``: the first kernel that is installed and able, else ``chunked``. On fake
            tensors, which no kernel can read, a kernel's memory is that of ``chunked``.
        vocabulary: over which the weight's rows are a part, or all; the gradient of the hidden states is that of this
            part alone.

    Returns:
        A scalar, nats, float32 (float64 of float64 inputs).

    Raises:
        ConfigError: for an implementation that does not exist, is not installed, or lacks what the arguments need.

    Example:
        >>> hidden, weight = torch.zeros(3, 8), torch.zeros(100, 8)
        >>> linear_cross_entropy(hidden, weight, torch.tensor([7, 99, IGNORE_INDEX]))  # 2 log(100)
        tensor(9.2103)
    """
    check_implementation(implementation, label_smoothing)
    inputs = LinearInputs(hidden_NH, weight_VH, bias_V, targets_N, softcap, label_smoothing, vocabulary)
    return _COMPUTE[_chosen(implementation, inputs)](inputs)


@torch.no_grad()
def token_scores(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    vocabulary: Vocabulary = WHOLE,
) -> tuple[Tensor, Tensor]:
    """Each row's cross-entropy, and whether its most likely prediction is the target; chunk by chunk.

    Args:
        hidden_NH: (N, H).
        weight_VH: (V, H).
        targets_N: (N,) int64; ``IGNORE_INDEX`` where there is none.
        bias_V: (V,).
        softcap: as for :func:`linear_cross_entropy`.
        vocabulary: as there.

    Returns:
        (N,) float32 nats, 0 where ignored, and (N,) bool, false where ignored. Neither has a gradient.
    """
    inputs = LinearInputs(hidden_NH, weight_VH, bias_V, targets_N, softcap, vocabulary=vocabulary).cast()
    losses_N, is_correct_N = inputs.zeros_N(), torch.zeros_like(targets_N, dtype=torch.bool)
    for rows in inputs.chunks():
        chunk = inputs.of(rows)
        logits_CV = chunk.logits()
        is_correct_N[rows] = vocabulary.argmax(logits_CV) == chunk.targets_N
        losses_N[rows] = _into_losses(logits_CV, chunk)
        del logits_CV  # before those of the next chunk are made
    return losses_N, is_correct_N


def check_implementation(implementation: str, label_smoothing: float = 0.0) -> None:
    """Refuse what cannot work on any device, before training.

    Raises:
        ConfigError: for an unknown name, a smoothing that is no share, or smoothing by ``cut_cross_entropy``.
    """
    if implementation not in IMPLEMENTATIONS:
        suggestion = nearest(str(implementation), IMPLEMENTATIONS)
        hint = f"did you mean '{suggestion}'?" if suggestion else f"there are {', '.join(IMPLEMENTATIONS)}."
        raise ConfigError(f"{_KEY}: there is no implementation '{implementation}'; {hint}")
    if not 0 <= label_smoothing <= 1:
        raise ConfigError(f"model.label_smoothing: {label_smoothing} is not a share; give a number from 0 to 1.")
    if implementation == "cut_cross_entropy" and label_smoothing:
        raise ConfigError(
            f"{_KEY}: cut_cross_entropy has no label smoothing (here {label_smoothing}); choose liger or chunked, or "
            "set model.label_smoothing: 0.0."
        )


@dataclass(frozen=True)
class LinearInputs:
    """The arguments of :func:`linear_cross_entropy`; of a chunk of rows, N is C."""

    hidden_NH: Tensor
    weight_VH: Tensor
    bias_V: Tensor | None
    targets_N: Tensor
    softcap: float | None = None
    label_smoothing: float = 0.0
    vocabulary: Vocabulary = WHOLE

    @property
    def layer(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The tensors that may have a gradient."""
        return self.hidden_NH, self.weight_VH, self.bias_V

    def cast(self) -> LinearInputs:
        """All in the types that ``torch.nn.functional.linear`` would compute with."""
        hidden_NH, weight_VH, bias_V = (None if t is None else t.to(linear_dtype(t)) for t in self.layer)
        return replace(self, hidden_NH=hidden_NH, weight_VH=weight_VH, bias_V=bias_V)

    def chunks(self, share: int = 1) -> Iterator[slice]:
        """Chunks of rows, all but the last of one size: so more rows never take less memory, which OOMptimizer's search
        for batch sizes relies on.

        Args:
            share: chunks have one in so many of the usual rows, for a loss that holds more for each row.
        """
        N, V = len(self.hidden_NH), self.vocabulary.most(len(self.weight_VH))  # the same on all ranks
        most = max(1, max(MIN_CHUNK_ROWS, CHUNK_ELEMENTS // V) // share)
        return (slice(start, min(start + most, N)) for start in range(0, N, most))

    def of(self, rows: slice) -> LinearInputs:
        """A chunk."""
        return replace(self, hidden_NH=self.hidden_NH[rows], targets_N=self.targets_N[rows])

    def logits(self) -> Tensor:
        """(N, V) float32, without the soft cap."""
        logits_NV = F.linear(*self.layer)
        return logits_NV.to(sum_dtype(logits_NV.dtype))

    def zeros_N(self) -> Tensor:
        """(N,) float32."""
        return self.hidden_NH.new_zeros(len(self.hidden_NH), dtype=sum_dtype(self.hidden_NH.dtype))


def _chosen(implementation: str, inputs: LinearInputs) -> str:
    if inputs.vocabulary is not WHOLE and implementation != "chunked":
        if implementation == "auto":
            return "chunked"
        raise ConfigError(f"{_KEY}: {implementation} cannot read a vocabulary that is split over ranks; choose auto.")
    if implementation in ("naive", "chunked"):
        return implementation
    # Kernels cannot read fake tensors, and have no grid for no rows; then there is nothing to compute.
    if isinstance(inputs.hidden_NH, FakeTensor) or len(inputs.hidden_NH) == 0:
        return "chunked"
    if implementation == "auto":
        return next((name for name in _KERNELS if _obstacle(name, inputs) is None), "chunked")
    if obstacle := _obstacle(implementation, inputs):
        raise ConfigError(f"{_KEY}: {implementation} {obstacle}, or choose auto.")
    return implementation


def _obstacle(name: str, inputs: LinearInputs) -> str | None:
    """Why a kernel cannot be used, and what would help; None if it can."""
    device, dtype = _device_type(inputs.hidden_NH), linear_dtype(inputs.hidden_NH)
    if device != "cuda":
        return f"runs on CUDA alone, but the model is on {device}; train on a GPU"
    if _kernel(name) is None:
        return f"is not installed; install {_KERNELS[name][-1]}"
    if name == "cut_cross_entropy" and inputs.label_smoothing:
        return f"has no label smoothing (here {inputs.label_smoothing}); set model.label_smoothing: 0.0"
    if name == "cut_cross_entropy" and dtype not in (torch.bfloat16, torch.float16):
        return f"computes in 16 bits, not in {str(dtype).removeprefix('torch.')}; set trainer.precision: bf16-mixed"
    return None


def _device_type(tensor: Tensor) -> str:
    return tensor.device.type


@cache
def _kernel(name: str) -> Callable[..., Any] | None:
    module, attribute, _ = _KERNELS[name]
    try:
        return getattr(import_module(module), attribute)
    except ImportError:
        return None


def kernel_is_installed(name: str) -> bool:
    """Whether a kernel of :data:`KERNEL_PACKAGES` can be imported."""
    return _kernel(name) is not None


def _naive(inputs: LinearInputs) -> Tensor:
    logits_NV = inputs.logits()
    if inputs.softcap is not None:
        logits_NV = inputs.softcap * torch.tanh(logits_NV / inputs.softcap)
    return F.cross_entropy(
        logits_NV, inputs.targets_N, ignore_index=IGNORE_INDEX, label_smoothing=inputs.label_smoothing, reduction="sum"
    )


def _liger(inputs: LinearInputs) -> Tensor:
    hidden_NH, weight_VH, bias_V = inputs.layer
    if wants_gradient(weight_VH, bias_V) and not hidden_NH.requires_grad:
        # Liger computes no gradient at all unless the hidden states require one.
        hidden_NH = hidden_NH.detach().requires_grad_()
    loss = _kernel("liger")(
        ignore_index=IGNORE_INDEX, label_smoothing=inputs.label_smoothing, reduction="sum", softcap=inputs.softcap
    )
    return loss(weight_VH, hidden_NH, inputs.targets_N, bias_V).float()


def _cut_cross_entropy(inputs: LinearInputs) -> Tensor:
    # Its kernels ignore autocast.
    hidden_NH, weight_VH, bias_V = inputs.cast().layer
    options = {"bias": bias_V, "ignore_index": IGNORE_INDEX, "softcap": inputs.softcap, "reduction": "sum"}
    return _kernel("cut_cross_entropy")(hidden_NH, weight_VH, inputs.targets_N, **options).float()


def _chunked(inputs: LinearInputs) -> Tensor:
    if wants_gradient(*inputs.layer):
        return _ChunkedLoss.apply(*inputs.layer, inputs)
    return _sum_of_losses(inputs)


_COMPUTE = {"naive": _naive, "liger": _liger, "cut_cross_entropy": _cut_cross_entropy, "chunked": _chunked}


class _ChunkedLoss(torch.autograd.Function):
    """The loss, whose gradients are computed in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, inputs: LinearInputs) -> Tensor:
        # `inputs` holds the tensors again; autograd tracks only those that are arguments themselves.
        gradients = LinearGradients(inputs.layer, ctx.needs_input_grad)
        loss = _sum_of_losses(inputs, gradients)
        # Not among the saved tensors: they are scaled in place and returned.
        ctx.gradients = gradients.in_types_of(inputs.layer)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "linear_cross_entropy: a second backward pass through one loss, but its gradients were returned by "
                "the first; compute the loss again, or use the implementation 'naive'."
            )
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(grad_loss)
        return *gradients, None


class LinearGradients:
    """Gradients of a layer's hidden states, weight and bias, summed up chunk by chunk; None where none is required."""

    def __init__(self, layer: Sequence[Tensor | None], wanted: Sequence[bool]) -> None:
        hidden_NH, weight_VH, bias_V = layer
        self.hidden_NH = torch.empty_like(hidden_NH) if wanted[0] else None
        self.weight_VH = torch.zeros_like(weight_VH, dtype=sum_dtype(weight_VH.dtype)) if wanted[1] else None
        self.bias_V = torch.zeros_like(bias_V, dtype=sum_dtype(bias_V.dtype)) if wanted[2] else None

    def add(self, rows: slice, chunk: LinearInputs, dlogits_CV: Tensor) -> None:
        """Backpropagate the gradient of a chunk's logits."""
        if self.bias_V is not None:
            self.bias_V += dlogits_CV.sum(0)
        dlogits_CV = dlogits_CV.to(chunk.weight_VH.dtype)
        if self.hidden_NH is not None:
            self.hidden_NH[rows] = dlogits_CV @ chunk.weight_VH
        if self.weight_VH is not None:
            _add_product(self.weight_VH, dlogits_CV, chunk.hidden_NH)

    def in_types_of(self, layer: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The three of them, each of the type of its tensor."""
        sums = (self.hidden_NH, self.weight_VH, self.bias_V)
        return [None if s is None else s.to(tensor.dtype) for s, tensor in zip(sums, layer, strict=True)]


def _sum_of_losses(inputs: LinearInputs, gradients: LinearGradients | None = None) -> Tensor:
    """The sum of all rows' losses; their gradients are added to ``gradients``."""
    inputs = inputs.cast()
    losses_N = inputs.zeros_N()
    for rows in inputs.chunks():
        losses_N[rows] = _losses_of_chunk(rows, inputs.of(rows), gradients)
    return losses_N.sum()


def _losses_of_chunk(rows: slice, chunk: LinearInputs, gradients: LinearGradients | None) -> Tensor:
    # A function of its own, so that a chunk's tensors are gone before those of the next are made.
    logits_CV = chunk.logits()
    if gradients is None:
        return _into_losses(logits_CV, chunk)
    losses_C, dlogits_CV = _into_gradient(logits_CV, chunk)
    gradients.add(rows, chunk, dlogits_CV)
    return losses_C


def _into_losses(logits_CV: Tensor, chunk: LinearInputs) -> Tensor:
    """The (C,) losses; the logits are used up."""
    if chunk.softcap is not None:
        logits_CV.div_(chunk.softcap).tanh_().mul_(chunk.softcap)
    losses_C, _ = into_exponentials(logits_CV, chunk)
    return losses_C


def _into_gradient(logits_CV: Tensor, chunk: LinearInputs) -> tuple[Tensor, Tensor]:
    """The (C,) losses, and their gradient by the logits, in the logits' place."""
    slope_CV = cap_logits(logits_CV, chunk.softcap)
    losses_C = into_gradient(logits_CV, chunk, (chunk.targets_N != IGNORE_INDEX).to(logits_CV.dtype)[:, None])
    if slope_CV is not None:
        logits_CV.mul_(slope_CV)
    return losses_C, logits_CV


def cap_logits(logits_CV: Tensor, softcap: float | None) -> Tensor | None:
    """Apply the soft cap in place. Returns its (C, V) slope; None without a cap."""
    if softcap is None:
        return None
    logits_CV.div_(softcap).tanh_()
    slope_CV = logits_CV.square().neg_().add_(1)
    logits_CV.mul_(softcap)
    return slope_CV


def into_gradient(logits_CV: Tensor, chunk: LinearInputs, weights_C1: Tensor) -> Tensor:
    """The (C,) losses. In the logits' place comes the gradient of their weighted sum by the capped logits.

    Args:
        logits_CV: (C, V), with the soft cap applied.
        chunk: the layer's inputs and targets.
        weights_C1: (C, 1), 0 where there is no target.
    """
    losses_C, sums_C1 = into_exponentials(logits_CV, chunk)
    # weight * (softmax - (1 - smoothing) * one-hot - smoothing / V).
    logits_CV.mul_(weights_C1 / sums_C1)
    columns_C1, is_here_C1 = chunk.vocabulary.columns(chunk.targets_N)
    own_C1 = weights_C1 if is_here_C1 is None else weights_C1 * is_here_C1
    logits_CV.scatter_add_(1, columns_C1, (chunk.label_smoothing - 1) * own_C1)
    if chunk.label_smoothing:
        logits_CV.sub_(weights_C1 * (chunk.label_smoothing / chunk.vocabulary.size(logits_CV.shape[1])))
    return losses_C


def into_exponentials(logits_CV: Tensor, chunk: LinearInputs) -> tuple[Tensor, Tensor]:
    """The (C,) losses, and the (C, 1) sums of each row's exponentials, which take the logits' place."""
    vocabulary, smoothing = chunk.vocabulary, chunk.label_smoothing
    logits_CV.sub_(vocabulary.max(logits_CV.amax(1, keepdim=True)))
    columns_C1, is_here_C1 = vocabulary.columns(chunk.targets_N)
    expected_C1 = (1 - smoothing) * logits_CV.gather(1, columns_C1)
    if is_here_C1 is not None:
        expected_C1.masked_fill_(~is_here_C1, 0)
    if smoothing:
        expected_C1 += smoothing * logits_CV.sum(1, keepdim=True) / vocabulary.size(logits_CV.shape[1])
    sums_C1 = logits_CV.exp_().sum(1, keepdim=True)
    sums_C1, expected_C1 = vocabulary.sum(torch.cat([sums_C1, expected_C1], 1)).split(1, 1)
    losses_C = (sums_C1.log() - expected_C1)[:, 0].masked_fill(chunk.targets_N == IGNORE_INDEX, 0)
    return losses_C, sums_C1


def _add_product(sum_VH: Tensor, left_CV: Tensor, right_CH: Tensor) -> None:
    """Add ``left_CV.T @ right_CH`` to a sum that may be of a wider type."""
    if sum_VH.dtype == left_CV.dtype:
        sum_VH.addmm_(left_CV.T, right_CH)
        return
    # The product is of the narrower type: so that it takes little memory, a part of the vocabulary at a time.
    width = max(1, CHUNK_ELEMENTS // sum_VH.shape[1])
    for part_WH, left_CW in zip(sum_VH.split(width), left_CV.split(width, dim=1), strict=True):
        part_WH += left_CW.T @ right_CH


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 of float64."""
    return torch.promote_types(dtype, torch.float32)


def linear_dtype(tensor: Tensor) -> torch.dtype:
    """The type in which ``torch.nn.functional.linear`` reads a tensor."""
    device = tensor.device.type
    # float64 is what autocast leaves alone.
    if torch.is_autocast_enabled(device) and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return tensor.dtype


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd asks for the gradient of any of the tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
