"""Patches for models' code on fake tensors; each family's tests run it."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from nemo_emmett.oomptimizer.adapters.fakes import CTCLossShapes, fake_values


def test_values_that_follow_from_known_ones_are_known() -> None:
    with FakeTensorMode() as mode, fake_values():
        ids = torch.tensor([[5, 6, 7], [8, 6, 6]])
        assert (ids == 6).sum(1).tolist() == [1, 2]
        assert (ids[1] == 6).nonzero()[:, 0].tolist() == [1, 2]
        assert mode.from_tensor(torch.zeros(4, 3))[: ids[0, 0] - 3].shape == (2, 3)


def test_all_is_undone() -> None:
    from transformers import masking_utils

    def patched() -> tuple:
        ignores = (masking_utils._ignore_causal_mask_sdpa, masking_utils._ignore_bidirectional_mask_sdpa)
        return (fake_tensor.CONSTANT_NUMEL_LIMIT, masking_utils.find_packed_sequence_indices, *ignores)

    before = patched()
    with fake_values():
        assert all(now != then for now, then in zip(patched(), before, strict=True))
    assert patched() == before
    with suppress(KeyError), fake_values():
        raise KeyError
    assert patched() == before


def test_the_ctc_loss_allocates_what_the_real_one_does() -> None:
    log_probs = torch.randn(9, 2, 5).log_softmax(-1)
    targets, frames, labels = torch.randint(1, 5, (2, 6)), torch.tensor([9, 9]), torch.tensor([6, 6])
    real = torch.ops.aten._ctc_loss.Tensor(log_probs, targets, frames, labels)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, CTCLossShapes():
        fake = torch.ops.aten._ctc_loss.Tensor(mode.from_tensor(log_probs), targets, frames, labels)
    for made, expected in zip(fake, real, strict=True):
        assert made.shape == expected.shape
        assert made.stride() == expected.stride()
        assert made.dtype == expected.dtype
