"""Patches under which the models' own code runs on fake tensors.

A fake tensor has no values, so code that reads one fails: NeMo's SALM slices each recording's embeddings by their
length and looks for the locator among the token ids. All values that it reads follow from token ids and lengths, a few
kilobytes. :func:`known_integers` makes PyTorch compute those, as it does for single numbers anyway, so that the models'
code need not be changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_emmett.oomptimizer.snapshot import replaced

LARGEST_KNOWN = 1 << 24
"""Elements of the largest tensor whose values are kept: the token ids of a batch, not its recordings' samples."""


@contextmanager
def fake_values() -> Iterator[None]:
    """The patches that every model needs. Entered inside the ``FakeTensorMode``; batches are made inside."""
    with known_integers(), single_rows_unpadded(), nothing_packed():
        yield


@contextmanager
def known_integers() -> Iterator[None]:
    """Keep the values of tensors that ``torch.tensor`` makes, and of results that depend on these alone."""
    # FakeTensorMode does so for one element (its constant propagation); the limit is a variable of its module.
    with replaced(fake_tensor, CONSTANT_NUMEL_LIMIT=LARGEST_KNOWN):
        yield


@contextmanager
def single_rows_unpadded() -> Iterator[None]:
    """Make transformers treat a batch of one example as unpadded.

    Without values it assumes padding and makes a mask; with values it checks. Larger synthetic batches are padded
    (:mod:`nemo_emmett.oomptimizer.adapters.salm`), so there both cases are the same.
    """
    from transformers import masking_utils

    names = ("_ignore_causal_mask_sdpa", "_ignore_bidirectional_mask_sdpa")
    with replaced(masking_utils, **{name: _without_single_rows(getattr(masking_utils, name)) for name in names}):
        yield


@contextmanager
def nothing_packed() -> Iterator[None]:
    """Make transformers treat batches as not packed (no row holds several sequences).

    Without an attention mask it checks the positions for that. Without values it assumes packed rows, and makes a mask
    of (B, 1, T, T).
    """
    from transformers import masking_utils

    with replaced(masking_utils, find_packed_sequence_indices=lambda position_ids: None):
        yield


def _without_single_rows(original: Any) -> Any:
    def ignore_mask(padding_mask: Tensor | None, *args: Any, **kwargs: Any) -> bool:
        is_single = padding_mask is not None and padding_mask.shape[0] == 1
        return original(None if is_single else padding_mask, *args, **kwargs)

    return ignore_mask


class CTCLossShapes(TorchDispatchMode):
    """The allocations of ``torch.nn.functional.ctc_loss``, for which PyTorch defines no shapes of fake tensors.

    The targets are assumed to be unpadded, which holds for synthetic batches.
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
