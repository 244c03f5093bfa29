"""Batches taken apart and put together by examples."""

from __future__ import annotations

import pytest
import torch

from nemo_emmett.oomptimizer.adapters.rows import split_rows, stack_padded, take_rows


@pytest.mark.parametrize(
    ("count", "pieces", "expected"),
    [
        (4, 2, [[0, 1], [2, 3]]),
        (5, 2, [[0, 1, 2], [3, 4]]),
        (2, 5, [[0], [1]]),
        (3, 1, [[0, 1, 2]]),
        (0, 3, []),
    ],
)
def test_rows_are_dealt_evenly(count: int, pieces: int, expected: list) -> None:
    assert split_rows(count, pieces) == expected


def test_only_what_is_held_per_example_is_taken() -> None:
    assert take_rows(torch.tensor([[1], [2], [3]]), [0, 2], 3).tolist() == [[1], [3]]
    assert take_rows(["a", "b", "c"], [2], 3) == ["c"]
    assert take_rows(torch.tensor([7]), [0, 2], 3).tolist() == [7]
    assert take_rows("abc", [0], 3) == "abc"
    assert take_rows(None, [0], 3) is None


def test_a_lazy_cut_set_is_taken_too() -> None:
    from lhotse import CutSet, MonoCut

    cuts = CutSet([MonoCut(str(i), start=0, duration=1, channel=0) for i in range(3)]).map(lambda cut: cut)
    assert [cut.id for cut in take_rows(cuts, [0, 2], 3)] == ["0", "2"]


def test_tensors_are_padded_to_the_widest() -> None:
    narrow, wide = torch.tensor([[1, 2]]), torch.tensor([[3, 4, 5]])
    assert stack_padded([narrow, wide], 9).tolist() == [[1, 2, 9], [3, 4, 5]]
    assert stack_padded([narrow, wide], 9, left=True).tolist() == [[9, 1, 2], [3, 4, 5]]
    assert stack_padded([torch.tensor([1]), torch.tensor([2, 3])]).tolist() == [1, 2, 3]
