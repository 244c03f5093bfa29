"""Mixing in blocks: every count is within one of its share, at every moment, and blocks and resuming change nothing."""

from fractions import Fraction

import numpy as np
import pytest

from nemo_emmett.data.sampling.mixing_sequence import LONGEST_PERIOD, MixingSequence


def chairmen(parts: list[int], number: int) -> list[int]:
    """Tijdeman's rule in exact fractions, one draw at a time."""
    period, counts, drawn = sum(parts), [0] * len(parts), []
    alive = [source for source, part in enumerate(parts) if part]
    slack = Fraction(1, 2 * len(alive) - 2) if len(alive) > 1 else Fraction(0)
    for n in range(1, number + 1):
        due = [s for s in alive if Fraction(parts[s] * n, period) - counts[s] >= slack]
        chosen = min(due, key=lambda s: ((counts[s] + 1 - slack) * period // parts[s], s))
        counts[chosen] += 1
        drawn.append(chosen)
    return drawn


@pytest.mark.parametrize("parts", [[3, 7], [1, 2, 3], [1, 0, 1], [5, 3, 3, 2, 1, 1], [1, 1000]])
def test_the_draws_are_those_of_tijdemans_rule(parts):
    assert MixingSequence(parts).next(1500).tolist() == chairmen(parts, 1500)


@pytest.mark.parametrize("seed", range(10))
def test_no_count_is_ever_off_by_more_than_tijdemans_bound(seed):
    rng = np.random.default_rng(seed)
    k = int(rng.integers(2, 30))
    shares = rng.dirichlet(np.full(k, rng.choice([0.2, 1.0, 5.0]))) + 1e-5
    sequence = MixingSequence(shares)
    drawn = np.concatenate([sequence.next(int(size)) for size in rng.integers(1, 3000, 12)])
    counts = np.cumsum(drawn[:, None] == np.arange(k), axis=0)
    due = np.outer(np.arange(1, len(drawn) + 1), shares / shares.sum())
    # Shares are rounded to parts of a period of a million draws.
    assert np.abs(counts - due).max() <= 1 - 1 / (2 * k - 2) + len(drawn) / LONGEST_PERIOD


def test_weights_as_people_write_them_are_exact_also_over_many_periods():
    sequence = MixingSequence([0.3, 0.45, 0.25])
    counts = np.zeros(3, dtype=int)
    for block in range(1, 200):
        counts += np.bincount(sequence.next(9_999), minlength=3)
        assert np.abs(counts - np.array([0.3, 0.45, 0.25]) * 9_999 * block).max() < 1


@pytest.mark.parametrize("shares", [[0.3, 0.7], [0.1234567, 0.2345678, 0.6], [1e-9, 1.0]])
def test_it_continues_where_it_was(shares):
    whole = MixingSequence(shares).next(70_000)
    for drawn in (0, 1, 17, 65_530, 65_536, 69_000):
        first = MixingSequence(shares)
        first.next(drawn)
        second = MixingSequence(shares)
        second.go_to(drawn, first.counts)
        assert (second.next(70_000 - drawn) == whole[drawn:]).all()


def test_one_source_is_always_drawn_and_one_without_share_never():
    assert set(MixingSequence([2.0]).next(5).tolist()) == {0}
    assert set(MixingSequence([1.0, 0.0, 1.0]).next(100).tolist()) == {0, 2}
    assert np.bincount(MixingSequence([1e-4, 1.0]).next(200_000)).tolist() == [20, 199_980]
