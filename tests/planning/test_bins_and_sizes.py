"""Bins and batch sizes together: the models behind them, and the plan, against trying out everything."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from nemo_emmett.data.bucketing.length_stats import Lengths, solve
from nemo_emmett.oomptimizer.profile import MemoryLine
from nemo_emmett.planning.bins_and_sizes import (
    BinPlan,
    MemoryModel,
    Probed,
    Surface,
    TimeModel,
    epoch_seconds,
    fastest_bins,
    plan_bins,
)

MEMORY = MemoryModel(intercept=100.0, slope=Surface((1.0, 0.5, 0.25, 0.05, 0.0, 0.02)))
TIME = TimeModel(overhead=2.0, per_example=Surface((0.01, 0.02, 0.03, 0.001, 0.0, 0.002)))
BUDGET = 160.0


def slope_by_hand(x: float, y: float) -> float:
    return 1.0 + 0.5 * x + 0.25 * y + 0.05 * x * x + 0.02 * y * y


def size_by_hand(x: float, y: float) -> int:
    return max(1, math.floor((BUDGET - 100.0) / slope_by_hand(x, y)))


def step_by_hand(n: int, x: float, y: float) -> float:
    return 2.0 + n * (0.01 + 0.02 * x + 0.03 * y + 0.001 * x * x + 0.002 * y * y)


def lengths_of(inputs, outputs=None) -> Lengths:
    as_array = lambda values: None if values is None else np.asarray(values, dtype=float)  # noqa: E731
    return Lengths(as_array(inputs), as_array(outputs), {}, "tokens")


def random_lengths(seed: int, count: int, longest: int, two_dimensional: bool) -> Lengths:
    generator = np.random.default_rng(seed)
    inputs = generator.integers(1, longest + 1, count)
    return lengths_of(inputs, generator.integers(1, longest + 1, count) if two_dimensional else None)


class TestModels:
    def test_a_surface_finds_the_polynomial_behind_its_values(self) -> None:
        caps = np.array(list(itertools.product([3.0, 10.0, 40.0, 90.0], [2.0, 7.0, 30.0])))
        values = 5e9 + 2e7 * caps[:, 0] + 3e5 * caps[:, 0] ** 2 + 1e6 * caps[:, 1] + 4e4 * caps[:, 0] * caps[:, 1]
        surface = Surface.fit(caps, values)
        assert surface(60.0, 20.0) == pytest.approx(5e9 + 1.2e9 + 1.08e9 + 2e7 + 4.8e7, rel=1e-4)

    def test_a_surface_never_falls_even_where_its_values_do(self) -> None:
        surface = Surface.fit([1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0])
        assert (np.diff(surface(np.linspace(0, 9, 50))) >= 0).all()

    def test_of_one_dimension(self) -> None:
        surface = Surface.fit([1.0, 2.0, 5.0], [3.0 + 1.0, 3.0 + 4.0, 3.0 + 25.0])
        assert surface(10.0) == pytest.approx(103.0)

    def test_batch_sizes_are_the_most_that_fit(self) -> None:
        sizes = MEMORY.batch_sizes(BUDGET, [2.0, 9.0], [3.0, 8.0])
        assert sizes.tolist() == [size_by_hand(2, 3), size_by_hand(9, 8)]
        for size, (x, y) in zip(sizes, [(2, 3), (9, 8)], strict=True):
            assert 100 + size * slope_by_hand(x, y) <= BUDGET < 100 + (size + 1) * slope_by_hand(x, y)
        assert MEMORY.batch_sizes(101.0, 9.0, 8.0) == 1
        assert MemoryModel(0.0, MEMORY.slope, max_batch_size=7).batch_sizes(1e9, 1.0) == 7

    def test_memory_is_fitted_to_what_was_found(self) -> None:
        bins = [[2.0, 3.0], [9.0, 4.0], [9.0, 8.0], [20.0, 10.0], [20.0, 30.0], [50.0, 20.0]]
        lines = [MemoryLine(50.0, 100.0, slope_by_hand(*caps)) for caps in bins]
        fitted = MemoryModel.fit(bins, [10] * len(bins), lines)
        assert fitted.intercept == 100.0
        assert fitted.slope(15.0, 9.0) == pytest.approx(slope_by_hand(15, 9), rel=1e-3)

    def test_a_line_with_another_intercept_equals_the_model_at_its_batch_size(self) -> None:
        lines = [MemoryLine(0.0, 100.0, 6.0), MemoryLine(0.0, 100.0, 6.0), MemoryLine(0.0, 120.0, 4.0)]
        fitted = MemoryModel.fit([4.0, 5.0, 6.0], [10, 10, 10], lines)
        assert fitted.slope(5.0) == pytest.approx(6.0)


class TestEpoch:
    def test_its_time_is_the_sum_over_full_batches(self) -> None:
        lengths = lengths_of([1, 1, 2, 2, 2, 9, 30], [1, 2, 2, 3, 3, 9, 1])
        bins, sizes = [[2.0, 2.0], [2.0, 3.0], [9.0, 9.0]], (3, 1, 4)
        # Three examples in batches of three, two one by one, one is a quarter of a batch; the longest fits nowhere.
        expected = step_by_hand(3, 2, 2) + 2 * step_by_hand(1, 2, 3) + step_by_hand(4, 9, 9) / 4
        assert epoch_seconds(bins, sizes, lengths, TIME) == pytest.approx(expected)
        plan = BinPlan.of(bins, sizes, lengths, TIME)
        assert plan.examples == 6
        assert plan.examples_per_second == pytest.approx(6 / expected)
        padded = 3 * 4 + 2 * 5 + 18
        assert plan.padding == pytest.approx(1 - (2 + 3 + 4 + 5 + 5 + 18) / padded)

    def test_the_time_of_a_step(self) -> None:
        assert TIME.of_step(3, (2.0, 3.0)) == pytest.approx(step_by_hand(3, 2, 3))
        assert TIME.of_step(3, 2.0) == pytest.approx(step_by_hand(3, 2, 0))


def seconds_by_hand(bins: list, lengths: Lengths) -> float:
    """Each example goes to the first bucket that takes it, and is its share of a full batch."""
    total = 0.0
    outputs = [0.0] * len(lengths.inputs) if lengths.outputs is None else lengths.outputs
    for x, y in zip(lengths.inputs, outputs, strict=True):
        caps = [(b, 0.0) if lengths.outputs is None else tuple(b) for b in bins]
        strip = min(cap for cap, _ in caps if cap >= x)
        mine = min(sub for cap, sub in caps if cap == strip and sub >= y)
        size = size_by_hand(strip, mine)
        total += step_by_hand(size, strip, mine) / size
    return total


def all_bins(lengths: Lengths, num_buckets: int, num_sub_buckets: int | None):
    """All bins there are: every choice of caps among the lengths, the longest always among them."""
    inputs = sorted(set(lengths.inputs))
    for count in range(num_buckets):
        for caps in itertools.combinations(inputs[:-1], count):
            strips = [*caps, inputs[-1]]
            if num_sub_buckets is None:
                yield strips
            else:
                yield from _all_nested(lengths, strips, num_sub_buckets)


def _all_nested(lengths: Lengths, strips: list, num_sub_buckets: int):
    choices = []
    for low, high in itertools.pairwise([-1, *strips]):
        outputs = sorted({y for x, y in zip(*lengths.sides, strict=True) if low < x <= high})
        choices.append(
            [
                [[high, cap] for cap in (*caps, outputs[-1])]
                for count in range(min(num_sub_buckets, len(outputs)))
                for caps in itertools.combinations(outputs[:-1], count)
            ]
        )
    for nested in itertools.product(*choices):
        yield [pair for strip in nested for pair in strip]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("num_buckets", "num_sub_buckets"), [(3, None), (2, 2), (3, 2)])
def test_no_bins_are_faster(seed: int, num_buckets: int, num_sub_buckets: int | None) -> None:
    lengths = random_lengths(
        seed, count=30, longest=9 if num_sub_buckets is None else 6, two_dimensional=bool(num_sub_buckets)
    )
    bins = fastest_bins(lengths, num_buckets, num_sub_buckets, MEMORY, TIME, BUDGET)
    fastest = min(seconds_by_hand(other, lengths) for other in all_bins(lengths, num_buckets, num_sub_buckets))
    assert seconds_by_hand(bins, lengths) == pytest.approx(fastest)


class TestPlan:
    """The search is stood in for by the truth, which the models must find from what was probed."""

    @staticmethod
    def probe(bins: list) -> Probed:
        caps = [(b, 0.0) if isinstance(b, float) else b for b in bins]
        lines = tuple(MemoryLine(50.0, 100.0, slope_by_hand(*c)) for c in caps)
        return Probed(bins, tuple(size_by_hand(*c) for c in caps), lines)

    @pytest.mark.parametrize("seed", range(4))
    def test_it_is_as_fast_as_the_best_there_is(self, seed: int) -> None:
        lengths = random_lengths(seed, count=400, longest=40, two_dimensional=True)
        start = self.probe(solve(lengths, 4, 2))
        plan = plan_bins(lengths, 4, 2, start, self.probe, TIME, BUDGET)
        known = fastest_bins(lengths, 4, 2, MEMORY, TIME, BUDGET)
        assert plan.epoch_seconds == pytest.approx(seconds_by_hand(known, lengths), rel=0.002)
        assert plan.epoch_seconds < epoch_seconds(start.bins, start.sizes, lengths, TIME)

    def test_in_one_dimension(self) -> None:
        lengths = random_lengths(3, count=300, longest=60, two_dimensional=False)
        start = self.probe(solve(lengths, 5))
        plan = plan_bins(lengths, 5, None, start, self.probe, TIME, BUDGET)
        known = fastest_bins(lengths, 5, None, MEMORY, TIME, BUDGET)
        assert plan.epoch_seconds == pytest.approx(seconds_by_hand(known, lengths), rel=0.002)

    def test_what_is_no_gain_is_not_taken(self) -> None:
        lengths = random_lengths(1, count=200, longest=30, two_dimensional=False)
        start = self.probe(solve(lengths, 4))
        asked = []

        def halved(bins: list) -> Probed:
            """Nothing but the bins to start from is any good."""
            asked.append(bins)
            found = self.probe(bins)
            return Probed(bins, tuple(max(1, size // 2) for size in found.sizes), found.lines)

        plan = plan_bins(lengths, 4, None, start, halved, TIME, BUDGET)
        assert plan.bins == start.bins
        assert len(asked) == 1
