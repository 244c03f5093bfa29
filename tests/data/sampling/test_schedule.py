"""The schedule against one that is computed example by example; ranks, resuming, and the end of the data."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from itertools import count

import numpy as np
import pytest

from nemo_emmett.data.sampling.global_batches import GroupOrder, GroupSchedule
from nemo_emmett.data.sampling.mixing_sequence import MixingSequence
from nemo_emmett.data.sampling.schedule import Schedule, ScheduleOrder
from nemo_emmett.data.sampling.source_order import EXAMPLE, SourceOrder


class FakeIndex:
    """Records that make so many entries each, and a number for each entry, which decides on its bucket.

    Args:
        shards: for each shard, the entries of its records.
        seed: of the numbers.
    """

    def __init__(self, *shards: list[int], seed: int = 0) -> None:
        self.shard_sizes = np.array([len(shard) for shard in shards])
        starts = [(shard, first) for shard, records in enumerate(shards) for first in range(0, len(records), 4)]
        self.block_shards = np.array([shard for shard, _ in starts], np.int32)
        sizes = [sum(shards[shard][first : first + 4]) for shard, first in starts]
        self.block_entries = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.num_entries = int(self.block_entries[-1])
        self.numbers = np.random.default_rng(seed).integers(0, 100, self.num_entries)

    def blocks_of(self, entries):
        return np.searchsorted(self.block_entries, entries, side="right") - 1

    def read_blocks(self, blocks):
        entries = [np.arange(self.block_entries[block], self.block_entries[block + 1]) for block in blocks]
        entries = np.concatenate([np.empty(0, np.int64), *entries])
        return entries, self.numbers[entries]


class FakeSelection:
    """Buckets by the tens of the numbers, of which the last ones are left out."""

    def __init__(self, batch_sizes: list[int] | None) -> None:
        self.batch_sizes = batch_sizes

    def buckets(self, numbers, left_out=None):
        bucket = np.where(numbers < 90, numbers // 30, -1).astype(np.int16)
        if left_out is not None:
            left_out[""] += int((bucket >= 0).sum())
            left_out["max_duration"] += int((bucket < 0).sum())
        return bucket

    def fill(self, examples, numbers):
        examples["length"] = numbers if self.batch_sizes is None else 0.0
        examples["positions"] = examples["answers"] = 0

    def batch_ends(self, lengths, bucket):
        ends, total = [], 0.0
        for place, length in enumerate(lengths):
            total += length
            if total >= 200:
                ends.append(place + 1)
                total = 0.0
        return np.array(ends, dtype=int)


SIZES = [6, 4, 2]


def group_of(*indexes: FakeIndex, shares=(0.5, 0.3, 0.2), world_size=1, sizes=SIZES, name="") -> GroupOrder:
    selection = FakeSelection(sizes)
    names = [f"source{number}" for number in range(len(indexes))]
    return GroupOrder(
        name=name,
        sources=[
            SourceOrder(index, selection, name, True, [7, number], 50)
            for number, (index, name) in enumerate(zip(indexes, names, strict=True))
        ],
        names=names,
        shares=list(shares[: len(indexes)]),
        global_batch_sizes=None if sizes is None else [size * world_size for size in sizes],
        drop_last=False,
    )


@pytest.fixture
def indexes() -> list[FakeIndex]:
    return [FakeIndex([1] * 200, [1] * 37, seed=1), FakeIndex([3, 0, 2] * 60, seed=2), FakeIndex([1] * 90, seed=3)]


def addresses(examples: np.ndarray) -> list[tuple[int, int, int]]:
    return [(int(e["source"]), int(e["entry"]), int(e["number_of_pass"])) for e in examples]


def one_by_one(group: GroupOrder, number_of_steps: int, only_pass: int | None = None) -> list[list[tuple]]:
    """Global batches computed by going through the blend example by example."""
    streams = [replace(source, only_pass=only_pass) for source in group.sources]
    alive, steps, waiting = list(range(len(streams))), [], defaultdict(list)
    draws = iter(MixingSequence([group.shares[s] for s in alive]).next(100_000).tolist())
    while alive and len(steps) < number_of_steps:
        index = next(draws)
        example = streams[alive[index]].take(1).copy()
        if not len(example):
            del alive[index]
            draws = iter(MixingSequence([group.shares[s] for s in alive]).next(100_000).tolist()) if alive else None
            continue
        example["source"] = alive[index]
        bucket = waiting[int(example["bucket"][0])]
        bucket += addresses(example)
        size = group.global_batch_sizes[int(example["bucket"][0])]
        if len(bucket) == size * (1 if only_pass is None else 2):
            steps.append(bucket[:size])
            del bucket[:size]
    for number, bucket in sorted(waiting.items()) if not alive else ():
        half = -(-len(bucket) // 2) if len(bucket) > group.global_batch_sizes[number] else len(bucket)
        steps += [part for part in (bucket[:half], bucket[half:]) if part]
    return steps


def global_batches(schedule: GroupSchedule, number: int) -> list[list[tuple]]:
    steps = []
    for _ in range(number):
        try:
            steps.append(addresses(schedule.next_step().examples))
        except StopIteration:
            break
    return steps


@pytest.mark.parametrize("only_pass", [None, 0, 3])
def test_global_batches_are_those_of_a_blend_taken_example_by_example(indexes, only_pass):
    group = group_of(*indexes)
    expected = one_by_one(group, 1000, only_pass)
    assert global_batches(GroupSchedule(group, 1, only_pass), len(expected)) == expected
    assert len(expected) > 100 if only_pass is None else len(expected) > 50


def test_a_pass_over_finite_data_has_each_selected_example_once(indexes):
    group = group_of(*indexes)
    met = Counter(address for step in global_batches(GroupSchedule(group, 1, 2), 10_000) for address in step)
    selected = {
        (source, entry, 2)
        for source, index in enumerate(indexes)
        for entry in np.flatnonzero(index.numbers < 90).tolist()
    }
    assert met == Counter(selected)


def test_shares_hold_in_every_window(indexes):
    group = group_of(*indexes, sizes=[1, 1, 1])  # each example is a step, in the order of the blend
    sources = [step[0][0] for step in global_batches(GroupSchedule(group, 1), 3000)]
    counts = np.cumsum(np.array(sources)[:, None] == np.arange(3), axis=0)
    assert np.abs(counts - np.outer(np.arange(1, 3001), group.shares)).max() < 1


@pytest.mark.parametrize(("world_size", "sizes"), [(1, [24, 16, 8]), (2, [12, 8, 4]), (4, [6, 4, 2])])
@pytest.mark.parametrize("only_pass", [None, 1])
def test_global_batches_do_not_depend_on_the_number_of_ranks(indexes, world_size, sizes, only_pass):
    group = group_of(*indexes, world_size=world_size, sizes=sizes)
    reference = GroupSchedule(group_of(*indexes, sizes=[24, 16, 8]), 1, only_pass)
    schedule = GroupSchedule(group, world_size, only_pass)
    for number in count():
        try:
            step = schedule.next_step()
        except StopIteration:
            break
        assert addresses(step.examples) == global_batches(reference, 1)[0]
        (bucket,) = set(step.examples["bucket"].tolist())
        batches = [step.of_rank(rank, world_size) for rank in range(world_size)]
        assert (np.concatenate(batches) == step.examples).all()
        assert max(map(len, batches)) <= sizes[bucket]
        assert max(map(len, batches)) - min(map(len, batches)) <= 1
        if number == 300:
            break
    assert only_pass is None or global_batches(reference, 1) == []


@pytest.mark.parametrize("trained", [0, 1, 7, 20, 21, 39])
@pytest.mark.parametrize("only_pass", [None, 0])
def test_it_resumes_with_the_next_step_on_any_number_of_ranks(indexes, trained, only_pass):
    whole = GroupSchedule(group_of(*indexes, sizes=[24, 16, 8]), 1, only_pass)
    steps = global_batches(whole, 200)
    first = GroupSchedule(group_of(*indexes, world_size=2, sizes=[12, 8, 4]), 2, only_pass)
    global_batches(first, trained)
    state = first.state_dict(first.snapshot())
    again = GroupSchedule(group_of(*indexes, world_size=4, sizes=[6, 4, 2]), 4, only_pass)
    again.load_state_dict(state)
    assert global_batches(again, len(steps) - trained if trained < len(steps) else 1) == steps[trained:]


@pytest.mark.parametrize("trained", [3, 50])
def test_other_batches_take_what_waits_and_repeat_nothing(indexes, trained):
    first = GroupSchedule(group_of(*indexes), 1, 0)
    seen = [address for step in global_batches(first, trained) for address in step]
    again = GroupSchedule(group_of(*indexes, world_size=3, sizes=[5, 5, 5]), 3, 0)
    again.load_state_dict(first.state_dict(first.snapshot()))
    seen += [address for step in global_batches(again, 1000) for address in step]
    assert len(seen) == len(set(seen)) == sum(int((index.numbers < 90).sum()) for index in indexes)


def rank_batches(schedule: GroupSchedule) -> list[list[list[tuple]]]:
    """The batches of all ranks in each step, to the end."""
    steps = []
    while True:
        try:
            step = schedule.next_step()
        except StopIteration:
            return steps
        steps.append([addresses(step.of_rank(rank, schedule.world_size)) for rank in range(schedule.world_size)])


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 7])
def test_batches_that_close_by_a_measured_limit(indexes, world_size):
    group = group_of(*indexes, sizes=None)
    schedule = GroupSchedule(group, world_size, 0)
    steps = rank_batches(schedule)
    numbers = [index.numbers for index in indexes]
    for batch in (batch for step in steps for batch in step):
        assert sum(numbers[source][entry] for source, entry, _ in batch[:-1]) < 200
        assert batch
    seen = Counter(address for step in steps for batch in step for address in batch)
    assert set(seen.values()) == {1}
    assert sum(seen.values()) + schedule.left_out == sum(int((n < 90).sum()) for n in numbers)
    for trained in (len(steps) // 2, *range(len(steps) - 4, len(steps) + 1)):
        interrupted, resumed = (GroupSchedule(group, world_size, 0) for _ in range(2))
        for _ in range(trained):
            interrupted.next_step()
        resumed.load_state_dict(interrupted.state_dict(interrupted.snapshot()))
        assert rank_batches(resumed) == steps[trained:]
        assert resumed.left_out == schedule.left_out


def test_at_the_end_every_rank_has_examples_or_none_has(indexes):
    """A bucket of fewer examples than ranks fits into no step; any other is used to the last example."""
    kept = sum(int((index.numbers < 90).sum()) for index in indexes)
    for world_size in (2, 16, 100, 200):
        schedule = GroupSchedule(group_of(*indexes, world_size=world_size), world_size, 0)
        sizes = []
        while True:
            try:
                step = schedule.next_step()
            except StopIteration:
                break
            sizes.append([len(step.of_rank(rank, world_size)) for rank in range(world_size)])
        assert all(min(of_step) > 0 for of_step in sizes)
        assert sum(map(sum, sizes)) + schedule.left_out == kept
        assert schedule.left_out == 0 or world_size == 200
    dropping = replace(group_of(*indexes, world_size=16), drop_last=True)
    schedule = GroupSchedule(dropping, 16, 0)
    assert {len(step) for step in global_batches(schedule, 1000)} <= {96, 64, 32}
    assert schedule.left_out > 0


@pytest.mark.parametrize("fusion", ["zip", "round_robin", "randomized_round_robin"])
def test_groups_are_fused_and_resumed(indexes, fusion):
    groups = [group_of(*indexes[:2], name="a"), group_of(indexes[2], name="b", shares=(1.0,))]
    order = ScheduleOrder(groups, fusion, [2.0, 1.0], seed=5, finite=False)

    def steps(schedule: Schedule, number: int) -> list:
        return [[(group, addresses(examples)) for group, examples in schedule.next()] for _ in range(number)]

    first = Schedule(order, 0, 1)
    expected = steps(first, 60)
    names = Counter(group for step in expected for group, _ in step)
    assert names == {"zip": {0: 60, 1: 60}, "round_robin": {0: 30, 1: 30}}.get(fusion, {0: 40, 1: 20})
    second = Schedule(order, 0, 1)
    steps(second, 23)
    third = Schedule(order, 0, 1)
    third.load_state_dict(second.state_dict(second.snapshot()))
    assert steps(third, 37) == expected[23:]


def test_zip_ends_with_the_first_group_and_says_what_was_not_used(indexes):
    groups = [group_of(indexes[0], name="a", shares=(1.0,)), group_of(indexes[2], name="b", shares=(1.0,))]
    schedule = Schedule(ScheduleOrder(groups, "zip", [1.0, 1.0], seed=5, finite=True), 0, 1)
    steps = schedule.count_steps()
    assert steps == len(global_batches(GroupSchedule(groups[1], 1, 0), 1000))
    assert "zip ended with b, the first group to end; " in schedule.end_of_data_message


def test_filters_count_each_example_once(indexes):
    schedule = Schedule(ScheduleOrder([group_of(*indexes)], "zip", [1.0], seed=5, finite=True), 0, 1)
    schedule.count_steps()
    left_out = schedule.take_left_out()
    assert left_out == {
        "": sum(int((index.numbers < 90).sum()) for index in indexes),
        "max_duration": sum(int((index.numbers >= 90).sum()) for index in indexes),
    }


def test_a_snapshot_costs_no_copy(indexes):
    schedule = GroupSchedule(group_of(*indexes), 1)
    schedule.next_step()
    snapshot = schedule.snapshot()
    waiting = [piece for pieces in schedule._waiting.values() for piece in pieces]
    assert all(any(piece is own for own in waiting) for piece in snapshot.waiting[: len(waiting)])
    assert np.concatenate(snapshot.waiting).dtype == EXAMPLE


def test_what_waits_keeps_no_more_memory_than_a_few_times_its_own():
    rare = FakeIndex([1] * 3000, seed=4)
    rare.numbers = np.where(np.arange(len(rare.numbers)) % 100 == 0, 89, 1)  # one in a hundred is in another bucket
    schedule = GroupSchedule(group_of(rare, shares=[1.0], sizes=[2000, 2000, 2000]), 1)
    for _ in range(10):
        schedule.next_step()
        waiting = [piece for pieces in schedule._waiting.values() for piece in pieces]
        kept = {id(base): base.nbytes for base in map(_memory_of, waiting)}
        assert sum(kept.values()) <= 5 * sum(piece.nbytes for piece in waiting)


def _memory_of(array: np.ndarray) -> np.ndarray:
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def zipped(indexes, *, world_size=1, finite=False, **of_text) -> ScheduleOrder:
    """Speech in steps of 24, 16 and 8 examples by bucket, and text."""
    per_rank = [size // world_size for size in (24, 16, 8)]
    speech = group_of(*indexes[:2], name="speech", world_size=world_size, sizes=per_rank)
    text = group_of(indexes[2], name="text", shares=(1.0,), world_size=world_size, sizes=[12 // world_size] * 3)
    return ScheduleOrder([replace(text, **of_text), speech], "zip", [1.0, 1.0], seed=5, finite=finite)


def taken(schedule: Schedule, number: int = 10_000) -> list[dict[int, list]]:
    steps = []
    for _ in range(number):
        try:
            steps.append({group: addresses(examples) for group, examples in schedule.next()})
        except StopIteration:
            break
    return steps


def test_a_group_is_in_every_nth_step_and_loses_nothing(indexes):
    whole = taken(Schedule(zipped(indexes), 0, 1), 60)
    steps = taken(Schedule(zipped(indexes, every_n_steps=3), 0, 1), 60)
    assert [set(step) for step in steps] == [{0, 1}, {1}, {1}] * 20
    assert [step[1] for step in steps] == [step[1] for step in whole]
    assert [step[0] for step in steps if 0 in step] == [step[0] for step in whole[:20]]


@pytest.mark.parametrize(("ratio", "world_size"), [(0.25, 1), (0.25, 4), (0.7, 2), (3.0, 1)])
def test_a_group_with_a_ratio_has_that_many_examples_of_one_bucket(indexes, ratio, world_size):
    schedules = [
        Schedule(zipped(indexes, ratio=ratio, world_size=world_size), r, world_size) for r in range(world_size)
    ]
    of_one = taken(Schedule(zipped(indexes, ratio=ratio), 0, 1), 80)
    steps = [taken(schedule, 80) for schedule in schedules]
    met = []
    for number, whole in enumerate(of_one):
        wanted = max(round(ratio * len(whole[1])), world_size)
        of_ranks = [steps[rank][number][0] for rank in range(world_size)]
        assert sum(map(len, of_ranks)) == min(wanted, 12)
        assert max(map(len, of_ranks)) - min(map(len, of_ranks)) <= 1
        met += [address for batch in of_ranks for address in batch]
        assert len({int(indexes[2].numbers[entry] // 30) for batch in of_ranks for _, entry, _ in batch}) == 1
    assert len(met) == len(set(met))  # an address holds the number of the pass
    if all(round(ratio * len(step[1])) >= world_size for step in of_one):
        assert met == [address for step in of_one for address in step[0]]


def test_steps_with_a_ratio_are_those_of_going_through_the_blend_one_by_one(indexes):
    order = zipped(indexes, ratio=0.3)
    steps = taken(Schedule(order, 0, 1), 50)
    stream, drawn, waiting = replace(order.groups[0].sources[0]), 0, defaultdict(list)
    for step in steps:
        wanted = round(0.3 * len(step[1]))
        while not (full := [bucket for bucket in waiting.values() if len(bucket) >= wanted]):
            example = stream.take(1).copy()
            example["source"] = 0
            waiting[int(example["bucket"][0])].append((drawn, addresses(example)[0]))
            drawn += 1
        first = min(full, key=lambda bucket: bucket[wanted - 1][0])
        assert step[0] == [address for _, address in first[:wanted]]
        del first[:wanted]


@pytest.mark.parametrize("trained", [0, 1, 13])
def test_a_ratio_resumes_exactly_on_another_number_of_ranks(indexes, trained):
    steps = taken(Schedule(zipped(indexes, ratio=0.5, every_n_steps=2), 0, 1), 40)
    first = Schedule(zipped(indexes, ratio=0.5, every_n_steps=2, world_size=2), 0, 2)
    taken(first, trained)
    state = first.state_dict(first.snapshot())
    ranks = [Schedule(zipped(indexes, ratio=0.5, every_n_steps=2, world_size=4), rank, 4) for rank in range(4)]
    for rank in ranks:
        rank.load_state_dict(state)
    again = [taken(rank, 40 - trained) for rank in ranks]
    for number, step in enumerate(steps[trained:]):
        for group, examples in step.items():
            assert [address for of_rank in again for address in of_rank[number].get(group, [])] == examples


def test_the_end_of_finite_data_under_a_ratio(indexes):
    """Text of which little is left in each bucket still makes steps, and what did not is counted."""
    schedule = Schedule(zipped(indexes, ratio=0.5, finite=True, world_size=2), 0, 2)
    other = Schedule(zipped(indexes, ratio=0.5, finite=True, world_size=2), 1, 2)
    steps, of_other = taken(schedule), taken(other)
    seen = [address for of_rank in (steps, of_other) for step in of_rank for address in step.get(0, [])]
    kept = int((indexes[2].numbers < 90).sum())
    assert len(seen) == len(set(seen)) <= kept
    assert "zip ended with" in schedule.end_of_data_message
    assert all(step[0] for step in steps + of_other)
