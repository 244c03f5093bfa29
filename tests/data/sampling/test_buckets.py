"""Buckets: a step as soon as there is a batch for every rank."""

from types import SimpleNamespace

import numpy as np
import pytest
from lhotse.dataset.sampling.base import TimeConstraint
from nemo.collections.common.data.lhotse.sampling import FixedBucketBatchSizeConstraint2D, MultimodalSamplingConstraint

from nemo_emmett.data.sampling.buckets import Buckets, SampledExample


def sampled(index: int, seconds: float) -> SampledExample:
    return SampledExample(SimpleNamespace(duration=seconds, index=index), 0, 0, index)


def steps_of(buckets: Buckets, durations: list[float]) -> list[list[list[int]]]:
    steps = [buckets.add(sampled(index, seconds)) for index, seconds in enumerate(durations)]
    return [[[d.index for d in batch] for batch in step] for step in steps if step]


def fixed(sizes=(2, 1)) -> FixedBucketBatchSizeConstraint2D:
    return FixedBucketBatchSizeConstraint2D(max_seq_len_buckets=[1.0, 2.0], batch_sizes=list(sizes))


def test_a_bucket_gives_its_batch_as_soon_as_it_is_full():
    durations = [0.5, 1.5, 0.6, 0.7, 1.0, 2.0]
    assert steps_of(Buckets(fixed(), [1.0, 2.0], 1, False), durations) == [[[1]], [[0, 2]], [[3, 4]], [[5]]]


def test_a_step_holds_a_batch_of_the_same_bucket_for_each_rank():
    durations = [0.5, 1.5, 0.6, 0.7, 2.0, 0.9]
    assert steps_of(Buckets(fixed(), [1.0, 2.0], 2, False), durations) == [[[1], [4]], [[0, 2], [3, 5]]]


def test_without_bins_there_is_one_bucket_and_lhotse_says_when_a_batch_is_full():
    durations = [2.0, 3.0, 1.0, 4.0, 1.0]
    # One more as long as the longest so far would exceed 8 s: lhotse's rule.
    assert steps_of(Buckets(TimeConstraint(max_duration=8.0), None, 1, False), durations) == [[[0, 1]], [[2, 3]]]


def test_constraints_with_counters_inside_are_not_shared_between_buckets():
    constraint = MultimodalSamplingConstraint(token_equivalent_duration=1.0, batch_size=2)
    buckets = Buckets(constraint, [1.5], 1, False)

    def text(index, length):
        from nemo.collections.common.data.lhotse.text_adapters import TextExample

        class Example(TextExample):
            total_length = input_length = length

        return SampledExample(Example(str(index)), 0, 0, index)

    steps = [buckets.add(text(index, length)) for index, length in enumerate([1, 5, 1, 5])]
    assert [step and [d.index for d in step[0]] for step in steps] == [None, None, [0, 2], [1, 3]]


@pytest.mark.parametrize(
    ("left", "world_size", "batches", "left_out"), [(7, 2, [5, 2], 0), (5, 2, [3, 2], 0), (3, 4, [], 3), (0, 2, [], 0)]
)
def test_what_is_left_is_shared_out_or_left_out(left, world_size, batches, left_out):
    buckets = Buckets(TimeConstraint(max_cuts=5), None, world_size, False)
    for index in range(left):
        assert buckets.add(sampled(index, 1.0)) is None
    steps, count = buckets.flush()
    assert [len(batch) for step in steps for batch in step] == batches
    assert count == left_out
    assert sorted(d.index for step in steps for batch in step for d in batch) == list(range(left - left_out))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_last_batches_hold_no_more_than_a_batch_may(seed, world_size):
    rng = np.random.default_rng(seed)
    buckets = Buckets(TimeConstraint(max_duration=20.0), None, world_size, False)
    durations = rng.choice([0.5, 1.0, 3.0, 10.0], size=40)
    given = sum(len(batch) for step in steps_of(buckets, durations.tolist()) for batch in step)
    steps, left_out = buckets.flush()
    for step in steps:
        assert len(step) == world_size
        assert all(len(batch) * max(d.example.duration for d in batch) <= 20.0 for batch in step)
    assert given + sum(len(batch) for step in steps for batch in step) + left_out == 40
    assert left_out < world_size


def test_drop_last_leaves_out_every_incomplete_batch():
    buckets = Buckets(TimeConstraint(max_cuts=5), None, 1, True)
    buckets.add(sampled(0, 1.0))
    assert buckets.flush() == ([], 1)
