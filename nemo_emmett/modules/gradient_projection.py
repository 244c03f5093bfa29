"""Gradients of two tasks compared, and their conflict projected away (PCGrad, arXiv 2001.06782, algorithm 1).

Each gradient loses its component against the other's original one, where their product is negative:
``a' = a - (a.t / t.t) t`` and ``t' = t - (a.t / a.a) a``. Their sum is ``(1 - a.t / a.a) a + (1 - a.t / t.t) t``: two
factors, and no gradient is copied. Afterwards ``a'.t' = -a.t (1 - cos^2) >= 0``.

Vectors are those of a block of a model (module-wise, arXiv 2211.02077), as lists of tensors; None is a zero.

Shapes: K blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

Gradients = Sequence[Tensor | None]
"""The gradients of some parameters, in their order."""


def products(audio: Gradients, text: Gradients, device: torch.device) -> Tensor:
    """``a.t``, ``a.a`` and ``t.t`` of two vectors, (3,) float64, without reading the device.

    Products of large tensors are made in float32 at least, and added in float64 (float32 on MPS, which has no other).
    """
    exact = torch.float32 if device.type == "mps" else torch.float64
    pairs = [(a, t) for a, t in zip(audio, text, strict=True) if a is not None and t is not None]
    dots = [torch.dot(_flat(a), _flat(t)).to(exact) for a, t in pairs]
    squares = []
    for gradients in (audio, text):
        there = [gradient for gradient in gradients if gradient is not None]
        dtype = reduce(torch.promote_types, {gradient.dtype for gradient in there}, torch.float32)
        norms = torch._foreach_norm(there, 2, dtype) if there else []
        squares.append([norm.to(exact).square() for norm in norms])
    zero = torch.zeros((), dtype=exact, device=device)
    return torch.stack([torch.stack([zero, *terms]).sum() for terms in (dots, *squares)])


def cosine_and_norms(products_K3: Tensor) -> Tensor:
    """(K, 3): cosine, ``|a|`` and ``|t|``; the cosine is 0 where a vector is zero."""
    dot_K, norms_K2 = products_K3[:, 0], products_K3[:, 1:].sqrt()
    length_K = norms_K2.prod(1)
    cosine_K = torch.where(length_K == 0, 0.0, dot_K / length_K)
    return torch.cat([cosine_K[:, None], norms_K2], 1)


def projection_factors(products_K3: Tensor) -> Tensor:
    """(K, 2) factors of ``a`` and ``t`` in the sum of the projected vectors; both 1 where there is no conflict.

    Values that are not finite stay so: a factor is then NaN, or the vectors are added as they are.
    """
    dot_K1, squares_K2 = products_K3[:, :1], products_K3[:, 1:]
    return torch.where(dot_K1 < 0, 1 - dot_K1 / squares_K2, torch.ones_like(squares_K2))


def add_scaled(audio: Gradients, text: Gradients, factors_2: Tensor | None) -> list[Tensor | None]:
    """``factors[0] * a + factors[1] * t``, in the memory of the arguments; without factors, ``a + t``."""
    if factors_2 is not None:
        for gradients, factor in zip((audio, text), factors_2, strict=True):
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(factor)
    for a, t in zip(audio, text, strict=True):
        if a is not None and t is not None:
            a.add_(t)
    return [t if a is None else a for a, t in zip(audio, text, strict=True)]


def named_values(values_K3: Tensor, blocks: Sequence[str]) -> Mapping[str, float]:
    """The values of :func:`cosine_and_norms` by the names under which they are logged; reads the device once."""
    named = {}
    for block, row in zip(blocks, values_K3.tolist(), strict=True):
        suffix = f"/{block}" if block else ""
        for name, value in zip(("gradient_cosine", "gradient_norm_audio", "gradient_norm_text"), row, strict=True):
            named[name + suffix] = value
    return named


def _flat(gradient: Tensor) -> Tensor:
    return gradient.detach().flatten().to(torch.promote_types(gradient.dtype, torch.float32))
