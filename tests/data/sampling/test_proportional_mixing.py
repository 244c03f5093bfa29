"""Proportional mixing: every count is within one of its share, at every moment."""

import numpy as np
import pytest

from nemo_emmett.data.sampling.proportional_mixing import ProportionalMixer


@pytest.mark.parametrize("seed", range(20))
def test_no_count_is_ever_off_by_more_than_tijdemans_bound(seed):
    rng = np.random.default_rng(seed)
    k = int(rng.integers(2, 9))
    shares = rng.dirichlet(np.full(k, 0.5)) + 1e-3
    shares /= shares.sum()
    mixer = ProportionalMixer(shares)
    counts = np.zeros(k)
    for n in range(1, 3001):
        counts[mixer.next()] += 1
        assert np.abs(counts - shares * n).max() <= 1 - 1 / (2 * k - 2) + 1e-9


def test_any_200_draws_have_the_shares_also_with_a_shifted_start():
    shares = [0.7, 0.2, 0.06, 0.04]
    mixer = ProportionalMixer(shares, seed=[3, 1])
    drawn = np.array([mixer.next() for _ in range(5000)])
    for start in range(0, 4800, 37):
        counts = np.bincount(drawn[start : start + 200], minlength=4)
        assert np.abs(counts - 200 * np.array(shares)).max() <= 2.5


def test_shifted_starts_differ_between_workers():
    sequences = [
        [mixer.next() for _ in range(50)] for mixer in (ProportionalMixer([1, 2, 3], [0, w]) for w in range(2))
    ]
    assert sequences[0] != sequences[1]


def test_one_index_is_always_drawn_and_one_without_share_never():
    assert {ProportionalMixer([2.0]).next() for _ in range(5)} == {0}
    mixer = ProportionalMixer([1.0, 0.0, 1.0])
    assert {mixer.next() for _ in range(100)} == {0, 2}


def test_the_others_share_what_a_removed_index_had():
    mixer = ProportionalMixer([0.5, 0.375, 0.125])
    for _ in range(10):
        mixer.next()
    mixer.remove(0)
    drawn = [mixer.next() for _ in range(400)]
    assert drawn.count(1) == 300
    assert drawn.count(2) == 100
    mixer.remove(1)
    mixer.remove(2)
    assert mixer.is_empty


def test_a_restored_state_continues_in_the_same_way():
    mixer = ProportionalMixer([0.61, 0.29, 0.1], seed=[1])
    for _ in range(77):
        mixer.next()
    other = ProportionalMixer([0.61, 0.29, 0.1], seed=[1])
    other.load_state_dict(mixer.state_dict())
    assert [mixer.next() for _ in range(300)] == [other.next() for _ in range(300)]
