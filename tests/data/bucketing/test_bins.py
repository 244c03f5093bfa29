"""The solver against brute force, its bounds against exact optima, and compared with NeMo's own selection."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

import numpy as np
import pytest
from lhotse.dataset.sampling.dynamic_bucketing import estimate_duration_buckets
from nemo.collections.common.data.lhotse.sampling import find_smallest_bucket

from nemo_emmett.data.bucketing import bins as bucketing
from nemo_emmett.data.bucketing.bins import optimal_bins, optimal_bins_2d, solve_bins, solve_bins_2d
from nemo_emmett.data.bucketing.padding import (
    bucket_of,
    equal_mass_bins,
    equal_mass_bins_2d,
    largest_ratios,
    padding_of,
    within_deviations,
    within_ratio,
)
from nemo_emmett.errors import ConfigError, DataError

SHARED_DATA = Path(os.environ.get("NEMO_EMMETT_SHARED_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))
MULTI30K = SHARED_DATA / "multi30k"


def seconds_1d(cap):
    return 0.01 + cap**1.5


def seconds_2d(input_cap, output_cap):
    return 0.1 + input_cap + 0.3 * output_cap + 0.05 * input_cap * output_cap


def area(*caps):
    return sum(caps)


# Brute force: every way to choose the caps


def chains(values: list, most: int):
    """Every ascending choice of at most ``most`` of the values that ends in the last."""
    for count in range(1, min(most, len(values)) + 1):
        for inner in itertools.combinations(values[:-1], count - 1):
            yield (*inner, values[-1])


def brute_force_1d(lengths, num_buckets, cost=area) -> float:
    def total(caps):
        return sum(cost(next(cap for cap in caps if cap >= length)) for length in lengths)

    return min(total(caps) for caps in chains(sorted(set(lengths)), num_buckets))


def brute_force_2d(examples, num_buckets, num_sub_buckets, cost=area) -> float:
    """``examples`` are pairs; every choice of strips, and in each strip every choice of sub-buckets."""

    def strip(first, cap):
        outputs = [output for input_, output in examples if first < input_ <= cap]

        def total(sub_caps):
            return sum(cost(cap, next(c for c in sub_caps if c >= output)) for output in outputs)

        return min(total(sub_caps) for sub_caps in chains(sorted(set(outputs)), num_sub_buckets))

    return min(
        sum(strip(first, cap) for first, cap in itertools.pairwise((-1, *caps)))
        for caps in chains(sorted({input_ for input_, _ in examples}), num_buckets)
    )


def cost_of(bins, lengths, cost=area) -> float:
    """What bins cost by NeMo's own choice of the bucket; every example must find one."""
    if np.ndim(bins[0]) == 0:
        return sum(cost(bins[find_smallest_bucket(bins, float(length))]) for length in lengths)
    table = np.asarray(bins)
    return sum(cost(*table[find_smallest_bucket(table, pair, strict=True)]) for pair in lengths)


@pytest.mark.parametrize("cost", [None, seconds_1d], ids=["padding", "cost"])
def test_optimal_bins_equal_brute_force(cost) -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        lengths = rng.integers(0, 25, rng.integers(1, 15)).tolist()
        num_buckets = int(rng.integers(1, 6))
        bins = optimal_bins(lengths, num_buckets, cost=cost)
        assert len(bins) == min(num_buckets, len(set(lengths)))
        best = brute_force_1d(lengths, num_buckets, cost or area)
        assert cost_of(bins, lengths, cost or area) == pytest.approx(best, rel=1e-12)
        assert solve_bins(lengths, num_buckets, cost=cost).total == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("cost", [None, seconds_2d], ids=["padding", "cost"])
def test_optimal_bins_2d_equal_brute_force(cost) -> None:
    rng = np.random.default_rng(2)
    for _ in range(200):
        examples = [tuple(pair) for pair in rng.integers(0, rng.integers(2, 10), (rng.integers(1, 13), 2)).tolist()]
        num_buckets, num_sub_buckets = int(rng.integers(1, 5)), int(rng.integers(1, 5))
        bins = optimal_bins_2d(*zip(*examples, strict=True), num_buckets, num_sub_buckets, cost=cost)
        assert bins == sorted(bins)
        best = brute_force_2d(examples, num_buckets, num_sub_buckets, cost or area)
        assert cost_of(bins, examples, cost or area) == pytest.approx(best, rel=1e-12)


def strip_costs_one_by_one(inputs, outputs, num_sub_buckets) -> np.ndarray:
    """The middle layer without bounds on the search: all partitions of each strip by plain dynamic programming."""
    caps = np.unique(inputs)
    strips = np.full((len(caps), len(caps)), np.inf)
    for i, j in itertools.combinations_with_replacement(range(len(caps)), 2):
        held = np.sort(outputs[(inputs >= caps[i]) & (inputs <= caps[j])])
        best = np.append(0, np.full(len(held), np.inf))
        for _ in range(num_sub_buckets):
            best = np.array(
                [0] + [min(best[t] + (u - t) * (caps[j] + held[u - 1]) for t in range(u)) for u in range(1, len(best))]
            )
        strips[i, j] = best[-1]
    return strips


@pytest.mark.parametrize(("num_buckets", "num_sub_buckets"), [(3, 3), (6, 4)])
def test_nothing_is_lost_by_the_short_cuts(monkeypatch, num_buckets, num_sub_buckets) -> None:
    """Larger than brute force can do: tiles, bounded search and left-out strips against a plain recurrence."""
    monkeypatch.setattr(bucketing, "_TILE", 5)
    rng = np.random.default_rng(3)
    for _ in range(5):
        inputs = np.ceil(rng.lognormal(2.0, 0.6, 60))
        outputs = np.ceil(inputs * rng.lognormal(0, 0.6, 60))
        strips = strip_costs_one_by_one(inputs, outputs, num_sub_buckets)
        best = np.append(0, np.full(len(strips), np.inf))
        for _ in range(num_buckets):
            best = np.array([0] + [min(best[i] + strips[i, j - 1] for i in range(j)) for j in range(1, len(best))])
        assert solve_bins_2d(inputs, outputs, num_buckets, num_sub_buckets).total == best[-1]


def test_by_hand() -> None:
    # Two caps for 3, 4, 4, 9, 10: {3, 4, 4} and {9, 10} pad 1 + 1; any other cut pads at least 5.
    solution = solve_bins([3, 4, 4, 9, 10], 2)
    assert solution.bins == [4, 10]
    assert solution.total - 30 == 2
    assert optimal_bins_2d([2, 2, 9, 9], [1, 8, 5, 9], 2, 2) == [[2, 1], [2, 8], [9, 5], [9, 9]]


# Degenerate input


def test_fewer_lengths_than_buckets() -> None:
    assert optimal_bins([7, 7, 3], 10) == [3, 7]
    assert optimal_bins([5], 3) == [5]
    assert optimal_bins_2d([7, 7, 3], [2, 2, 4], 10, 5) == [[3, 4], [7, 2]]
    assert optimal_bins_2d([5], [0], 3, 3) == [[5, 0]]


@pytest.mark.parametrize(
    ("solve", "words"),
    [
        (lambda: optimal_bins([], 2), "lengths: there are no lengths"),
        (lambda: optimal_bins([1, float("nan")], 2), r"lengths\[1\]: nan is not a length"),
        (lambda: optimal_bins_2d([1, 2], [1, -3], 1, 1), r"output_lengths\[1\]: -3.0 is not a length"),
        (lambda: optimal_bins_2d([1, float("inf")], [1, 3], 1, 1), r"input_lengths\[1\]: inf is not"),
        (lambda: optimal_bins_2d([1, 2], [1], 1, 1), "there are 1, but 2 input_lengths"),
    ],
)
def test_lengths_that_are_none(solve, words) -> None:
    with pytest.raises(DataError, match=words) as caught:
        solve()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("solve", "words"),
    [
        (lambda: optimal_bins([1, 2], 0), "num_buckets: 0"),
        (lambda: optimal_bins([1, 2], 2.0), "num_buckets: 2.0"),
        (lambda: optimal_bins_2d([1], [2], 2, True), "num_sub_buckets: True"),
        (lambda: optimal_bins([1, 2], 2, step=0), "step: 0"),
        (lambda: optimal_bins_2d([1], [2], 1, 1, output_step=-1), "output_step: -1"),
        (lambda: optimal_bins([1, 2], 2, cost=lambda cap: -cap), "cost: falls"),
        (lambda: optimal_bins_2d([1, 2], [1, 2], 2, 2, cost=lambda i, o: i - o), "cost: falls"),
    ],
)
def test_settings_that_cannot_work(solve, words) -> None:
    with pytest.raises(ConfigError, match=words):
        solve()


# Rounded lengths


def test_a_stated_step_is_the_grid_of_the_caps_and_bounds_the_loss() -> None:
    rng = np.random.default_rng(4)
    for _ in range(50):
        lengths = rng.gamma(3, 4, 40).round(3)
        exact = solve_bins(lengths, 4)
        rounded = solve_bins(lengths, 4, step=0.5)
        assert exact.loss_bound == 0
        assert all(cap * 2 == int(cap * 2) for cap in rounded.bins)
        loss = cost_of(rounded.bins, lengths) - cost_of(exact.bins, lengths)
        assert 0 <= loss <= rounded.loss_bound <= 0.5 * len(lengths)


def test_lengths_on_the_grid_are_solved_exactly() -> None:
    durations = np.array([0.1, 0.3, 0.7, 1.1, 1.1, 1.2])
    assert optimal_bins(durations, 3, step=0.1) == optimal_bins(durations, 3) == [0.3, 0.7, 1.2]
    assert solve_bins(durations, 3, step=0.1).loss_bound == 0
    assert optimal_bins([0.56], 1, step=0.08) == [0.56]  # although 0.56 / 0.08 is more than 7


@pytest.mark.parametrize("cost", [None, seconds_2d], ids=["padding", "cost"])
@pytest.mark.parametrize("steps", [(3, None), (None, 4), (3, 4)])
def test_the_loss_of_rounding_in_2d_is_bounded(steps, cost) -> None:
    rng = np.random.default_rng(5)
    for _ in range(40):
        inputs = rng.integers(1, 30, 14)
        outputs = rng.integers(1, 30, 14)
        best = solve_bins_2d(inputs, outputs, 3, 2, cost=cost)
        rounded = solve_bins_2d(inputs, outputs, 3, 2, input_step=steps[0], output_step=steps[1], cost=cost)
        assert rounded.total >= best.total * (1 - 1e-12)
        assert rounded.total - best.total <= rounded.loss_bound * (1 + 1e-12)
        if cost is None and steps == (None, 4):
            assert rounded.loss_bound <= 4 * len(inputs)


def test_the_lower_bound_by_hand() -> None:
    # 1 to 6 in steps of 2: cells of two examples with caps 2, 4, 6 and floors 0, 2, 4. One cap is above 4: 6 x 4.
    one = solve_bins_2d(range(1, 7), [0] * 6, 1, 1, input_step=2)
    assert (one.total, one.total - one.loss_bound) == (36, 24)
    # Of two caps, the lower may divide the cell of 1 and 2, then 2 x 0 + 4 x 4, or that of 3 and 4, then 2 x 2 for the
    # cell below, 2 x 2 for its own and 2 x 4 for the one above. The optimum on the grid is 2 x 2 + 4 x 6.
    two = solve_bins_2d(range(1, 7), [0] * 6, 2, 1, input_step=2)
    assert (two.total, two.total - two.loss_bound) == (28, 16)
    # Two lengths in one cell: two caps divide it, and nothing is known but that each costs its floor.
    two = solve_bins_2d([1, 2, 4], [0] * 3, 3, 1, input_step=2)
    assert two.total - two.loss_bound == 0 + 0 + 2


def test_many_lengths_are_rounded_to_the_finest_grid_that_fits(monkeypatch) -> None:
    monkeypatch.setattr(bucketing, "MAX_LENGTHS_1D", 100)
    monkeypatch.setattr(bucketing, "MAX_LENGTHS_2D", 100)
    rng = np.random.default_rng(6)
    inputs, outputs = rng.permutation(1000) + 1, rng.uniform(0, 50, 1000)
    exact = rng.integers(1, 100, 1000)
    solution = solve_bins(inputs, 5)
    assert solution.steps == (10,)  # 1 to 1000 in steps of 10 are 100 lengths; in steps of 8, 125
    assert solution.bins == [200, 400, 600, 800, 1000]
    assert solve_bins_2d(inputs, outputs, 5, 2).steps == (10, 0.5)
    solution = solve_bins_2d(exact, outputs, 5, 2)
    assert solution.steps == (0, 0.5)
    assert 0 < solution.loss_bound <= 0.5 * 1000


# Buckets as NeMo and lhotse choose them


def test_examples_go_where_nemo_puts_them() -> None:
    rng = np.random.default_rng(7)
    inputs, outputs = rng.integers(1, 30, 300), rng.integers(1, 30, 300)
    bins = optimal_bins_2d(inputs[:100], outputs[:100], 4, 3)  # some of the others fit nowhere
    buckets = bucket_of(bins, inputs, outputs)
    nemos = [find_smallest_bucket(np.asarray(bins), pair, strict=True) for pair in zip(inputs, outputs, strict=True)]
    assert buckets.tolist() == [-1 if bucket is None else bucket for bucket in nemos]
    assert (buckets == -1).any()
    assert bucket_of([4, 9], [4, 4.5, 9, 10]).tolist() == [0, 1, 1, -1]


class Itself:
    """Measures a number."""

    def measure_length(self, length):
        return length


def test_equal_mass_is_lhotses_rule() -> None:
    rng = np.random.default_rng(8)
    lengths = rng.integers(1, 60, 500)
    caps = equal_mass_bins(lengths, 8)
    assert caps[:-1] == estimate_duration_buckets(lengths, 8, constraint=Itself())
    assert caps[-1] == lengths.max()


def test_equal_mass_in_two_dimensions_by_hand() -> None:
    # Inputs sum to 24: after 4, 4, 8 the share of 12 is exceeded, so the last of the ascending lengths is a cap too.
    inputs, outputs = [4, 4, 8, 8], [1, 3, 2, 6]
    assert equal_mass_bins(inputs, 2) == [8, 8]
    # Both cuts fall on 8: one strip with twice the sub-buckets; 1, 2, 3 | 6 by the share of 12 / 4 = 3.
    assert equal_mass_bins_2d(inputs, outputs, 2, 2) == [[8, 6]]
    assert equal_mass_bins_2d([1, 1, 5], [1, 3, 2], 2, 2) == [[5, 3]]
    # Again one strip for two; 4, 4, 4, 4 exceed the half of 30, so that 5 is a cap.
    assert equal_mass_bins_2d([8] * 6, [4, 4, 4, 4, 5, 9], 2, 1) == [[8, 5], [8, 9]]


def test_padding_by_hand() -> None:
    padding = padding_of([4, 12], [3, 4, 4, 9, 10, 13])  # 13 fits nowhere
    assert (padding.needed, padding.padded, padding.kept) == ((30,), (36,), 5)
    assert padding.share == pytest.approx(6 / 36)
    assert padding_of([4, 12], [3, 4, 4, 9, 10, 13], to_longest=True).padded == (32,)
    lengths = [3, 4, 4, 8, 8], [1, 2, 9, 4, 6]
    padding = padding_of([[4, 2], [4, 9], [8, 5]], *lengths)
    assert padding.kept == 4  # (8, 6) fits nowhere
    assert (padding.needed, padding.padded) == ((19, 16), (20, 18))
    assert padding.amount == 3
    assert padding.share_of_sides == pytest.approx((1 / 20, 2 / 18))


# Outliers


def test_one_ratio_for_all() -> None:
    assert within_ratio([10, 10, 0, 0], [20, 21, 0, 1], 2.0).tolist() == [True, False, True, False]


def test_a_ratio_for_each_bin_is_applied_as_nemo_does() -> None:
    rng = np.random.default_rng(10)
    inputs, outputs = rng.integers(1, 30, 300), rng.integers(1, 30, 300)
    bins = optimal_bins_2d(inputs[:200], outputs[:200], 3, 2)
    ratios = rng.uniform(0.5, 2, len(bins)).tolist()
    nemos = [
        find_smallest_bucket(np.asarray(bins), pair, strict=True, max_ratio=ratios) is not None
        for pair in zip(inputs, outputs, strict=True)
    ]
    assert within_ratio(inputs, outputs, ratios, bins).tolist() == nemos
    with pytest.raises(ConfigError, match="there are 1 for 6 bins"):
        within_ratio(inputs, outputs, [1.0], bins)


def test_ratios_far_above_those_of_like_inputs_are_outliers() -> None:
    # 100 examples of each length with ratios 1 and 2 in turns: mean 1.5, deviation 0.5 and a little.
    inputs = np.repeat([10.0, 20.0], 100)
    outputs = inputs * np.tile([1.0, 2.0], 100)
    inputs, outputs = np.append(inputs, [10, 10, 20]), np.append(outputs, [60, 1, 30])
    usual = within_deviations(inputs, outputs, 4, num_strips=2)
    assert np.flatnonzero(~usual).tolist() == [200]  # not the short output after it
    assert within_deviations([5, 5, 5], [7, 7, 7], 1).all()
    with pytest.raises(ConfigError, match="outliers: 0"):
        within_deviations(inputs, outputs, 0)


def test_the_largest_ratio_of_each_strip() -> None:
    bins = [[10, 5], [10, 20], [20, 30]]
    assert largest_ratios(bins, [10, 4, 20, 30], [15, 4, 25, 90]) == [1.5, 1.5, 1.25]
    assert largest_ratios(bins, [9], [4]) == [0.45, 0.45, 0.0]


# The figures of merit


def test_350_000_examples_take_less_than_two_seconds() -> None:
    rng = np.random.default_rng(9)
    inputs = np.ceil(rng.lognormal(3.3, 0.7, 350_000)).clip(1, 400)
    outputs = np.ceil(inputs * rng.lognormal(0, 0.25, 350_000)).clip(1, 400)
    start = time.process_time()  # not the wall clock: the machine may be busy with something else
    optimal_bins_2d(inputs, outputs, 15, 2)
    assert time.process_time() - start < 2


@pytest.mark.skipif(not MULTI30K.is_dir(), reason=f"{MULTI30K} is not there; set NEMO_EMMETT_SHARED_DATA")
@pytest.mark.parametrize(("num_buckets", "num_sub_buckets"), [(10, 2), (15, 2), (10, 3)])
def test_three_quarters_of_the_padding_of_equal_mass_at_most(multi30k_lengths, num_buckets, num_sub_buckets) -> None:
    ours = padding_of(optimal_bins_2d(*multi30k_lengths, num_buckets, num_sub_buckets), *multi30k_lengths)
    theirs = padding_of(equal_mass_bins_2d(*multi30k_lengths, num_buckets, num_sub_buckets), *multi30k_lengths)
    assert ours.kept == theirs.kept == 72_000
    assert ours.amount <= 0.75 * theirs.amount


@pytest.fixture(scope="module")
def multi30k_lengths(tmp_path_factory) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the text of all six directions, with the target's tag and the end of sentence."""
    import sentencepiece

    texts = {lang: (MULTI30K / f"train.{lang}").read_text().splitlines() for lang in ("en", "de", "fr", "cs")}
    model = tmp_path_factory.mktemp("bpe") / "bpe"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for lines in texts.values() for line in lines),
        model_prefix=str(model),
        model_type="bpe",
        vocab_size=8000,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=f"{model}.model")
    tokens = {lang: np.array([len(ids) for ids in processor.encode(lines)]) for lang, lines in texts.items()}
    directions = [pair for lang in ("de", "fr", "cs") for pair in (("en", lang), (lang, "en"))]
    inputs = np.concatenate([tokens[source] + 2 for source, _ in directions])
    outputs = np.concatenate([tokens[target] + 1 for _, target in directions])
    return inputs, outputs
