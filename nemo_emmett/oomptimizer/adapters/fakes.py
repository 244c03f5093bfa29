"""What lets the models' own code run on fake tensors.

A fake tensor has a shape and no values, so code that asks for one stops: NeMo's SALM slices each recording's
embeddings by their length and looks for the locator among the token ids. The values it asks for all follow from token
ids and lengths alone, a few kilobytes. :func:`known_integers` has PyTorch compute those for real, as it does for single
numbers anyway, and the models' code stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch.utils._python_dispatch import TorchDispatchMode

LARGEST_KNOWN = 1 << 24
"""Elements of the largest tensor whose values are kept: the token ids of a batch, not its recordings' samples."""


@contextmanager
def fake_values() -> Iterator[None]:
    """What every model needs. To be entered inside the ``FakeTensorMode``, and the batch to be made inside it."""
    with known_integers(), single_rows_unpadded(), nothing_packed():
        yield


@contextmanager
def known_integers() -> Iterator[None]:
    """Keep the values of what is made by ``torch.tensor`` and of all that is computed from nothing else."""
    # FakeTensorMode does so for one element (its constant propagation); the limit is a variable of its module.
    limit = fake_tensor.CONSTANT_NUMEL_LIMIT
    fake_tensor.CONSTANT_NUMEL_LIMIT = LARGEST_KNOWN
    try:
        yield
    finally:
        fake_tensor.CONSTANT_NUMEL_LIMIT = limit


@contextmanager
def single_rows_unpadded() -> Iterator[None]:
    """Tell transformers that a batch of one example has no padding.

    Without values it takes padding for granted and makes a mask, with values it looks. Larger synthetic batches are
    padded (:mod:`nemo_emmett.oomptimizer.adapters.salm`), so that with them both come to the same.
    """
    from transformers import masking_utils

    names = ("_ignore_causal_mask_sdpa", "_ignore_bidirectional_mask_sdpa")
    originals = {name: getattr(masking_utils, name) for name in names}
    try:
        for name, original in originals.items():
            setattr(masking_utils, name, _without_single_rows(original))
        yield
    finally:
        for name, original in originals.items():
            setattr(masking_utils, name, original)


@contextmanager
def nothing_packed() -> Iterator[None]:
    """Tell transformers that no row of a batch holds several sequences one after another.

    Where it is given no attention mask it looks for that among the positions. Without values it takes packed rows for
    granted, and makes a mask of (B, 1, T, T).
    """
    from transformers import masking_utils

    original = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = original


def _without_single_rows(original: Any) -> Any:
    def ignore_mask(padding_mask: Tensor | None, *args: Any, **kwargs: Any) -> bool:
        is_single = padding_mask is not None and padding_mask.shape[0] == 1
        return original(None if is_single else padding_mask, *args, **kwargs)

    return ignore_mask


class CTCLossShapes(TorchDispatchMode):
    """What ``torch.nn.functional.ctc_loss`` allocates: PyTorch has no shapes of it for fake tensors.

    The targets are taken to be as long as they are wide, which holds for synthetic batches.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._ctc_loss.Tensor and isinstance(args[0], fake_tensor.FakeTensor):
            log_probs_TBV, targets_BL = args[:2]
            num_frames, size = log_probs_TBV.shape[:2]
            # Between two labels, before the first and after the last there may be a blank.
            states = 2 * targets_BL.shape[1] + 1
            return log_probs_TBV.new_empty(size), log_probs_TBV.new_empty(size, num_frames, states)
        return func(*args, **(kwargs or {}))
