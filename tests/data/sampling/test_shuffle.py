"""The order of a source's records."""

import numpy as np
import pytest

from nemo_emmett.data.sampling.shuffle import SHUFFLE_BLOCK_SIZE, RecordOrder


def order_of(sizes, sequential=None, shuffle=True, seed=(0,), group_size=1000):
    return RecordOrder(sizes, sequential or [False] * len(sizes), shuffle, seed, group_size)


def one_pass(order, number=0):
    return [order.locate(number * len(order) + offset) for offset in range(len(order))]


@pytest.mark.parametrize("sizes", [[1], [5, 0, 3], [700, 20, 1300], [SHUFFLE_BLOCK_SIZE, SHUFFLE_BLOCK_SIZE], [3] * 50])
@pytest.mark.parametrize("group_size", [1, 100, 10_000])
@pytest.mark.parametrize("sequential", [False, True])
def test_every_pass_holds_every_record_once(sizes, group_size, sequential):
    order = order_of(sizes, [sequential] * len(sizes), group_size=group_size)
    every_record = sorted((shard, number) for shard, size in enumerate(sizes) for number in range(size))
    for number in range(3):
        assert sorted(one_pass(order, number)) == every_record


def test_without_shuffling_records_come_as_the_files_have_them():
    order = order_of([300, 2, 400], shuffle=False, group_size=7)
    expected = [(0, i) for i in range(300)] + [(1, i) for i in range(2)] + [(2, i) for i in range(400)]
    assert one_pass(order) == expected == one_pass(order, 5)


def test_passes_differ_and_the_seed_decides():
    assert one_pass(order_of([900, 900]), 0) != one_pass(order_of([900, 900]), 1)
    assert one_pass(order_of([900, 900]), 1) == one_pass(order_of([900, 900]), 1)
    assert one_pass(order_of([900, 900], seed=(1,)), 1) != one_pass(order_of([900, 900]), 1)


def test_a_position_is_found_without_those_before_it():
    order = order_of([5000, 3000, 10])
    expected = one_pass(order, 2)
    fresh = order_of([5000, 3000, 10])
    for offset in (8009, 0, 4321, 4320):
        assert fresh.locate(2 * 8010 + offset) == expected[offset]


def test_records_come_from_few_places_at_a_time():
    """Any 1,000 records of a large file are in a few blocks of neighbours, which a disk reads in one go."""
    order = order_of([100_000], group_size=1024)
    numbers = np.array([order.locate(position).number for position in range(1000)])
    assert len(set(numbers // SHUFFLE_BLOCK_SIZE)) <= 5


def test_shuffling_goes_far():
    """Neighbours of the file do not stay neighbours, and what comes first is from all over the file."""
    order = order_of([100_000], group_size=10_000)
    numbers = np.array([order.locate(position).number for position in range(100_000)])
    assert (np.abs(np.diff(numbers)) == 1).mean() < 0.01
    assert abs(np.corrcoef(np.arange(100_000), numbers)[0, 1]) < 0.1
    thousand = numbers[:1000]
    assert thousand.min() < 20_000
    assert thousand.max() > 80_000


def test_sequential_shards_are_read_forward_in_ranges_to_prepare():
    order = order_of([2000, 1500], [True, True], group_size=600)
    starts = {0: [], 1: []}
    for position in range(3500):
        place = order.locate(position)
        (start, stop), *others = [s[1:] for s in order.ranges_to_prepare(position) if s[0] == place.shard]
        assert not others
        assert start <= place.number < stop
        starts[place.shard].append(start)
    assert all(of_shard == sorted(of_shard) for of_shard in starts.values())


def test_an_order_of_ten_million_records_is_quick_and_small():
    order = order_of([10_000_000])
    assert order.locate(25_000_000) != order.locate(25_000_001)
    assert sum(array.nbytes for array in vars(order._pass[1]).values()) < 2_000_000


def test_each_pass_begins_in_other_places():
    """Each pass shuffles other blocks together."""
    order = order_of([100_000], group_size=1024)
    begins = [
        {place.number // SHUFFLE_BLOCK_SIZE for place in one_pass_begin}
        for one_pass_begin in (
            [order.locate(number * 100_000 + offset) for offset in range(1024)] for number in range(4)
        )
    ]
    assert len({frozenset(blocks) for blocks in begins}) == 4
