"""Which group gives the next step."""

import numpy as np
import pytest

from nemo_emmett.data.sampling.group_scheduler import GroupScheduler


def test_groups_come_in_turns():
    scheduler = GroupScheduler(None, 3, [0])
    assert [scheduler.next() for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("weights", [[0.3, 0.7], [5.0, 1.0, 1.0, 3.0]])
def test_random_groups_keep_their_shares_up_to_the_number_of_groups(weights):
    scheduler = GroupScheduler(weights, len(weights), [1])
    shares = np.array(weights) / sum(weights)
    counts = np.zeros(len(weights))
    for step in range(1, 2001):
        counts[scheduler.next()] += 1
        assert np.abs(counts - shares * step).max() <= len(weights)


def test_groups_may_end_at_any_moment():
    rng = np.random.default_rng(0)
    for run in range(400):
        num_groups = int(rng.integers(2, 5))
        scheduler = GroupScheduler(rng.uniform(0.05, 1, num_groups).tolist(), num_groups, [run])
        while len(scheduler.ended) < num_groups:
            group = scheduler.next()
            assert group not in scheduler.ended
            if rng.random() < 0.1:
                scheduler.end(group)


def test_a_restored_state_continues_in_the_same_way():
    scheduler = GroupScheduler([0.2, 0.5, 0.3], 3, [4])
    for _ in range(30):
        scheduler.next()
    other = GroupScheduler([0.2, 0.5, 0.3], 3, [4])
    other.load_state_dict(scheduler.state_dict())
    assert [scheduler.next() for _ in range(100)] == [other.next() for _ in range(100)]
