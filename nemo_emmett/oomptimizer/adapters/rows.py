"""Batches split and concatenated by examples.

Shapes: B examples, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from lhotse import CutSet
from torch import Tensor


def split_rows(count: int, parts: int) -> list[list[int]]:
    """The numbers below ``count`` in at most ``parts`` runs of about equal length, none of them empty.

    Example:
        >>> split_rows(5, 2)
        [[0, 1, 2], [3, 4]]
    """
    parts = min(parts, count)
    bounds = [-(-count * part // parts) for part in range(parts + 1)] if parts else []
    return [list(range(start, end)) for start, end in pairwise(bounds)]


def take_rows(value: Any, rows: Sequence[int], count: int) -> Any:
    """Some rows of a value that has one for each of a batch's ``count`` examples; any other value unchanged.

    Tensors keep the width to which the whole batch is padded, so that an example's result is the same.
    """
    if isinstance(value, Tensor):
        is_per_example = value.dim() > 0 and value.shape[0] == count
        return value[torch.tensor(list(rows), device=value.device)] if is_per_example else value
    if isinstance(value, (list, tuple, CutSet)):
        examples = list(value)  # a lazy CutSet does not know its length
        return type(value)([examples[row] for row in rows]) if len(examples) == count else value
    return value


def stack_padded(tensors: Sequence[Tensor], value: float = 0, left: bool = False) -> Tensor:
    """Concatenate (B, T) tensors, all padded to the width of the widest.

    Args:
        tensors: of the same number of dimensions; (B,) tensors are concatenated as they are.
        value: of the padding.
        left: pad on the left.
    """
    if tensors[0].dim() < 2:
        return torch.cat(list(tensors))
    width = max(tensor.shape[1] for tensor in tensors)
    padded = []
    for tensor in tensors:
        missing = width - tensor.shape[1]
        filling = tensor.new_full((tensor.shape[0], missing, *tensor.shape[2:]), value)
        padded.append(torch.cat([filling, tensor] if left else [tensor, filling], dim=1) if missing else tensor)
    return torch.cat(padded)
