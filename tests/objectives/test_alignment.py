"""Distances of sequences of other lengths, against all alignments, and against loops."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from nemo_emmett.objectives.alignment import best_alignment, best_alignment_distance, cross_attentive_distance

DISTANCES = [best_alignment_distance, cross_attentive_distance]


def alignments(long: int, short: int) -> Iterator[list[int]]:
    """All monotonic alignments of ``long`` elements with ``short`` of which none is left out."""
    if long == 1:
        if short == 1:
            yield [0]
        return
    for last in (short, short - 1):
        if last:
            yield from ([*rest, short - 1] for rest in alignments(long - 1, last))


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    return 1 - (a @ b) / (a.norm() * b.norm())


def cheapest(long: Tensor, short: Tensor) -> Tensor:
    """The mean distance of the best of all alignments."""
    sums = [
        sum(cosine_distance(long[n], short[partner]) for n, partner in enumerate(one))
        for one in alignments(len(long), len(short))
    ]
    return torch.stack(sums).min() / len(long)


def reconstruction_distance(frames: Tensor, text: Tensor) -> Tensor:
    """Token by token."""
    frames, text = ([row / row.norm() for row in rows] for rows in (frames, text))

    def reconstruct(query: Tensor, values: list[Tensor]) -> Tensor:
        weights = [torch.exp(query @ value) for value in values]
        return sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights)

    return sum((reconstruct(t, frames) - reconstruct(t, text).detach()).norm() for t in text) / len(text)


BY_DEFINITION = {
    best_alignment_distance: lambda f, t: cheapest(f, t) if len(f) >= len(t) else cheapest(t, f),
    cross_attentive_distance: reconstruction_distance,
}


def test_there_are_as_many_alignments_as_binomials_say() -> None:
    assert len(list(alignments(7, 3))) == 15  # 6 over 2
    assert sorted(alignments(3, 2)) == [[0, 0, 1], [0, 1, 1]]


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("seed", range(3))
def test_a_padded_batch_gives_each_example_its_distance_by_definition(distance, seed) -> None:
    """Longer speech, longer text, the same length, single elements; padding holds anything, NaN as well."""
    generator = torch.Generator().manual_seed(seed)
    lens = [(7, 3), (5, 5), (3, 6), (1, 4), (6, 1), (1, 1), (8, 2)]
    frames = torch.randn(len(lens), 9, 5, generator=generator).requires_grad_()
    text = torch.randn(len(lens), 7, 5, generator=generator).requires_grad_()
    frame_lens, text_lens = torch.tensor(lens).T
    spoilt = [values.clone() for values in (frames, text)]
    for values, of_side in zip(spoilt, (frame_lens, text_lens), strict=True):
        for row, length in enumerate(of_side):
            values.data[row, length:] = torch.nan
    found = distance(spoilt[0], frame_lens, spoilt[1], text_lens)
    expected = torch.stack([BY_DEFINITION[distance](frames[n, :f], text[n, :t]) for n, (f, t) in enumerate(lens)])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn(len(lens), generator=generator)
    gradients = torch.autograd.grad((weights * found).sum(), (frames, text))
    by_definition = torch.autograd.grad((weights * expected).sum(), (frames, text))
    for mine, theirs in zip(gradients, by_definition, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize("seed", range(5))
def test_the_alignment_is_the_cheapest_of_all(seed) -> None:
    costs = torch.rand(2, 8, 4, generator=torch.Generator().manual_seed(seed))
    found = best_alignment(costs, torch.tensor([8, 6]), torch.tensor([4, 3]))
    for row, (long, short) in enumerate([(8, 4), (6, 3)]):
        best = min(alignments(long, short), key=lambda one: sum(costs[row, n, p].item() for n, p in enumerate(one)))
        assert found[row, :long].tolist() == best


@pytest.mark.parametrize("distance", DISTANCES)
def test_nothing_to_compare_is_no_distance(distance) -> None:
    frames, text = torch.randn(3, 4, 2, requires_grad=True), torch.randn(3, 2, 2)
    found = distance(frames, torch.tensor([4, 0, 4]), text, torch.tensor([0, 2, 2]))
    assert found[:2].tolist() == [0, 0]
    found.sum().backward()
    assert frames.grad[:2].abs().sum() == 0
    assert frames.grad.isfinite().all()


def test_repeated_text_is_at_no_distance_and_scale_has_no_part() -> None:
    text = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
    frames = 10 * text.repeat_interleave(torch.tensor([2, 1, 4]), 1)
    found = best_alignment_distance(frames, torch.tensor([7]), text, torch.tensor([3]))
    assert found.item() == pytest.approx(0, abs=1e-6)
    reordered = best_alignment_distance(frames.flip(1), torch.tensor([7]), text, torch.tensor([3]))
    assert reordered.item() > 0.1
