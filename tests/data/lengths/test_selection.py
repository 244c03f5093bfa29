"""Selection decides about arrays of lengths what NeMo's and lhotse's objects decide about one example at a time."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from functools import cache, partial
from types import SimpleNamespace

import numpy as np
import pytest
from lhotse import SupervisionSegment
from lhotse.cut import MonoCut
from lhotse.dataset.sampling.base import TimeConstraint
from nemo.collections.common.data.lhotse.dataloader import make_structured_with_schema_warnings
from nemo.collections.common.data.lhotse.sampling import (
    FixedBucketBatchSizeConstraint2D,
    MultimodalFixedBucketBatchSizeConstraint2D,
    MultimodalSamplingConstraint,
    _measure_tokens,
)
from nemo.collections.common.data.lhotse.text_adapters import (
    AudioTurn,
    NeMoMultimodalConversation,
    SourceTargetTextExample,
    TextExample,
    TextTurn,
)
from omegaconf import OmegaConf

from nemo_emmett.data.lengths.measures import Measures
from nemo_emmett.data.lengths.selection import Selection
from nemo_emmett.data.readers.registry import register_data_types
from nemo_emmett.data.sampling.buckets import SampledExample, _Bucket
from nemo_emmett.data.sampling.tolerance import KEYS_OF_FUNCTION, cause_of
from nemo_emmett.data.sampling.transforms import TransformPipeline
from nemo_emmett.errors import ConfigError

FRAME = 0.08  # seconds of speech that count as one token
TOKEN_EDGES = [4, 9, 16, 30]
TOKEN_PAIRS = [[4, 3], [4, 6], [9, 5], [9, 14], [16, 12], [30, 8], [30, 40]]
SECOND_EDGES = [0.32, 0.72, 1.28, 2.4]
SECOND_PAIRS = [[0.32, 3], [0.32, 6], [0.72, 5], [0.72, 14], [1.28, 12], [2.4, 8], [2.4, 40]]
FILTERS = {
    "min_duration": 0.32,
    "max_duration": 2.4,
    "min_tokens": 4,
    "max_tokens": 30,
    "min_tps": 2,
    "max_tps": 12.5,
    "min_tpt": 1,
    "max_tpt": 3.0,
}


@pytest.fixture(scope="module", autouse=True)
def registered():
    register_data_types()


@cache
def plain():
    return structured()


def structured(**keys):
    return make_structured_with_schema_warnings(OmegaConf.create({"input_cfg": [], "batch_size": 4, **keys}))


class Examples:
    """Random examples whose lengths are often exactly a limit, or next to one."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        limits = [0.32, 0.72, 1.28, 2.4, *(FRAME * edge for edge in TOKEN_EDGES)]
        near = [(np.nextafter(limit, 0), limit, np.nextafter(limit, 9)) for limit in limits]
        self.seconds = [float(second) for second in (0.0, *itertools.chain.from_iterable(near))]

    def _tokens(self, at_least: int = 0) -> np.ndarray:
        near = [0, 1, *(edge + by for edge in (3, *TOKEN_EDGES) for by in (-1, 0, 1))]
        number = self.rng.choice(near) if self.rng.random() < 0.5 else self.rng.integers(0, 45)
        return np.zeros(max(at_least, int(number)), dtype=int)

    def _seconds(self) -> float:
        return float(self.rng.choice(self.seconds) if self.rng.random() < 0.5 else self.rng.uniform(0.01, 3.0))

    def cut(self) -> MonoCut:
        seconds = self._seconds()
        cut = MonoCut("cut", start=0.0, duration=seconds, channel=0)
        for number in range(self.rng.integers(1, 3)):
            supervision = SupervisionSegment(str(number), "recording", 0.0, seconds)
            supervision.tokens = self._tokens()
            cut.supervisions.append(supervision)
        if self.rng.random() < 0.5:  # prompted
            cut.input_ids = self._tokens()
        return cut

    def _prompted(self, example):
        example.context_ids, example.answer_ids = self._tokens(), self._tokens()
        example.input_ids = np.concatenate([example.context_ids, example.answer_ids])
        if self.rng.random() < 0.3:  # not all formats have a sum
            example.input_ids = self._tokens()
        return example

    def text(self) -> SourceTargetTextExample:
        return self._prompted(SourceTargetTextExample(TextExample("a"), TextExample("b")))

    def conversation(self, speech: bool) -> NeMoMultimodalConversation:
        turns = [AudioTurn(self.cut(), "user", "<audio>") for _ in range(self.rng.integers(1, 3) if speech else 0)]
        turns.append(TextTurn("answer", "assistant"))
        return self._prompted(NeMoMultimodalConversation("conversation", turns, token_equivalent_duration=FRAME))


@cache
def make_examples(count: int, cuts: bool, texts: bool, speech_conversations: bool = False, seed: int = 0) -> list:
    random = Examples(seed)
    kinds = [random.cut] * (2 * cuts) + [random.text, partial(random.conversation, speech=False)] * texts
    kinds += [partial(random.conversation, speech=True)] * speech_conversations
    return [kinds[random.rng.integers(len(kinds))]() for _ in range(count)]


def measures_of(examples) -> Measures:
    rows = []
    for example in examples:
        if isinstance(example, MonoCut):
            tokens = sum(len(supervision.tokens) for supervision in example.supervisions)
            rows.append((example.duration, 0, _measure_tokens(example), tokens, True))
            continue
        cuts = example.list_cuts() if isinstance(example, NeMoMultimodalConversation) else []
        seconds = sum(cut.duration for cut in cuts) if cuts else math.nan
        rows.append((seconds, example.input_length, example.output_length, example.total_length, False))
    columns = zip(*rows, strict=True) if rows else ([],) * 5
    dtypes = (float, np.int64, np.int64, np.int64, bool)
    return Measures(*(np.array(column, dtype=dtype) for column, dtype in zip(columns, dtypes, strict=True)))


def filters_of(pipeline: TransformPipeline) -> list:
    """NeMo's own filters, made by NeMo's factory, in its order."""
    return [step.args[0] for step in pipeline._steps if getattr(step, "func", None) == pipeline._apply_filter]


def nemo_buckets(pipeline: TransformPipeline, examples) -> tuple[list[int], Counter]:
    """What the sampler does with each example today."""
    filters = filters_of(pipeline)
    buckets, left_out = [], Counter()
    for example in examples:
        bucket = -1
        for predicate in filters:
            try:
                if not predicate(example):
                    left_out[KEYS_OF_FUNCTION[type(predicate).__name__]] += 1
                    break
            except Exception as error:
                left_out[cause_of(predicate, example, error)] += 1
                break
        else:
            bins = pipeline.duration_bins
            bucket = 0 if bins is None else pipeline.constraint.select_bucket(bins, example=example)
            left_out[""] += 1
        buckets.append(bucket)
    return buckets, left_out


def batch_ends_today(constraint, examples) -> list[int]:
    bucket = _Bucket(constraint)
    for index, example in enumerate(examples):
        bucket.add(SampledExample(example, 0, 0, index))
    return np.cumsum([len(batch) for batch in bucket.full]).tolist()


def check_equal_to_nemo(keys, tokenizer, examples) -> Selection:
    config = structured(**keys)
    pipeline = TransformPipeline(config, tokenizer)
    selection = Selection(config, pipeline.constraint, pipeline.duration_bins, has_tokenizer=tokenizer is not None)
    measures = measures_of(examples)
    left_out: Counter = Counter()
    buckets = selection.buckets(measures, left_out)
    expected, expected_left_out = nemo_buckets(pipeline, examples)
    assert buckets.dtype == np.int16
    assert buckets.tolist() == expected
    assert left_out == expected_left_out
    kept = np.flatnonzero(buckets >= 0)
    lengths = selection.lengths(measures)
    assert lengths[kept].tolist() == [
        list(length) if isinstance(length := pipeline.constraint.measure_length(examples[index]), tuple) else length
        for index in kept
    ]
    by_bucket = defaultdict(list)
    for index in kept.tolist():
        by_bucket[int(buckets[index])].append(index)
    assert max(by_bucket) < selection.num_buckets
    for bucket, members in by_bucket.items():
        ends = batch_ends_today(pipeline.constraint, [examples[index] for index in members])
        assert selection.batch_ends(lengths[members], bucket).tolist() == ends
        if selection.batch_sizes is not None:
            assert np.diff([0, *ends]).tolist() == [selection.batch_sizes[bucket]] * len(ends)
    return selection


def product_of(**axes) -> list[dict]:
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


@pytest.mark.parametrize("filters", [{}, FILTERS], ids=["no filters", "filters"])
@pytest.mark.parametrize("bins", [None, SECOND_EDGES], ids=["one bucket", "buckets"])
@pytest.mark.parametrize(
    "rule",
    [
        {"batch_size": 5},
        {"batch_size": None, "batch_duration": 7.2},
        {"batch_size": 6, "batch_duration": 12.8},
        {"batch_size": None, "batch_duration": 9.6, "quadratic_duration": 1.5},
        {"batch_size": 3, "batch_duration": math.inf},
    ],
    ids=lambda rule: "-".join(rule),
)
def test_speech_in_seconds(tokenizer, filters, bins, rule):
    examples = make_examples(600, cuts=True, texts=False)
    selection = check_equal_to_nemo({"bucket_duration_bins": bins, **rule, **filters}, tokenizer, examples)
    assert (selection.batch_sizes is None) == ("batch_duration" in rule)


@pytest.mark.parametrize("filters", [{}, FILTERS], ids=["no filters", "filters"])
@pytest.mark.parametrize("bins", [SECOND_EDGES, SECOND_PAIRS], ids=["1-D", "2-D"])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("has_ratios", [True, False])
def test_speech_in_fixed_buckets(tokenizer, filters, bins, strict, has_ratios):
    examples = make_examples(1200, cuts=True, texts=False)
    keys = {"bucket_duration_bins": bins, "bucket_batch_size": list(range(1, len(bins) + 1)), **filters}
    keys["bucketing_2d_strict_mode"] = strict
    if has_ratios:
        keys["max_tps"] = [5.0 + number for number in range(len(bins))]
    check_equal_to_nemo(keys, tokenizer, examples)


@pytest.mark.parametrize("filters", [{}, FILTERS], ids=["no filters", "filters"])
@pytest.mark.parametrize("bins", [None, TOKEN_EDGES], ids=["one bucket", "buckets"])
@pytest.mark.parametrize("is_total", [True, False])
@pytest.mark.parametrize(
    "rule",
    [
        {"batch_size": 5},
        {"batch_size": None, "batch_tokens": 90},
        {"batch_size": 6, "batch_tokens": 160},
        {"batch_size": None, "batch_tokens": 120, "quadratic_factor": 17.0},
    ],
    ids=lambda rule: "-".join(rule),
)
def test_speech_and_text_in_tokens(tokenizer, filters, bins, is_total, rule):
    examples = make_examples(600, cuts=True, texts=True, speech_conversations=not filters)
    keys = {"use_multimodal_sampling": True, "token_equivalent_duration": FRAME, "measure_total_length": is_total}
    selection = check_equal_to_nemo({**keys, "bucket_duration_bins": bins, **rule, **filters}, tokenizer, examples)
    assert (selection.batch_sizes is None) == ("batch_tokens" in rule)


@pytest.mark.parametrize("filters", [{}, FILTERS], ids=["no filters", "filters"])
@pytest.mark.parametrize("bins", [TOKEN_EDGES, TOKEN_PAIRS, [[4.5, 3.0], [30.0, 40.5]]], ids=["1-D", "2-D", "floats"])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("is_total", [True, False])
@pytest.mark.parametrize("has_ratios", [True, False])
def test_speech_and_text_in_fixed_buckets(tokenizer, filters, bins, strict, is_total, has_ratios):
    examples = make_examples(600, cuts=True, texts=True, speech_conversations=not filters)
    keys = {
        "use_multimodal_sampling": True,
        "token_equivalent_duration": FRAME,
        "measure_total_length": is_total,
        "bucketing_2d_strict_mode": strict,
        "bucket_duration_bins": bins,
        "bucket_batch_size": list(range(1, len(bins) + 1)),
        **filters,
    }
    if has_ratios:
        keys["max_tpt"] = [0.5 + number for number in range(len(bins))]
    check_equal_to_nemo(keys, tokenizer, examples)


@pytest.mark.parametrize("keys", [{"pretokenize": False}, {"min_tps": -1, "max_tps": math.inf}], ids=str)
def test_without_tokens_there_are_no_filters_on_rates(tokenizer, keys):
    examples = make_examples(300, cuts=True, texts=False)
    check_equal_to_nemo({**FILTERS, **keys}, tokenizer, examples)


def test_without_a_tokenizer_there_are_no_filters_on_rates():
    check_equal_to_nemo(FILTERS, None, make_examples(300, cuts=True, texts=False))


def measures(*, seconds=math.nan, inputs=0, outputs=0, totals=0, is_cut=False) -> Measures:
    columns = np.broadcast_arrays(seconds, inputs, outputs, totals, is_cut)
    dtypes = (float, np.int64, np.int64, np.int64, bool)
    return Measures(*(np.atleast_1d(column).astype(dtype) for column, dtype in zip(columns, dtypes, strict=True)))


def token_buckets(bins=TOKEN_PAIRS, **keys) -> Selection:
    constraint = MultimodalFixedBucketBatchSizeConstraint2D(
        [tuple(pair) for pair in bins], [2] * len(bins), token_equivalent_duration=FRAME
    )
    return Selection(structured(use_multimodal_sampling=True, **keys), constraint, constraint.max_seq_len_buckets)


def test_a_place_holder_has_no_bucket_and_is_not_counted():
    left_out: Counter = Counter()
    buckets = token_buckets().buckets(measures(inputs=[4, -1, 4, -1], outputs=[3, 0, 99, 99]), left_out)
    assert buckets.tolist() == [0, -1, -1, -1]
    assert left_out == {"": 1, "bucket_duration_bins": 1}


@pytest.mark.parametrize("constraint", ["time", "tokens", "seconds x tokens", "tokens x tokens"])
def test_no_examples_have_no_buckets_and_no_batches(constraint):
    selection = {
        "time": Selection(structured(**FILTERS), TimeConstraint(max_duration=3.0), SECOND_EDGES),
        "tokens": Selection(structured(**FILTERS), MultimodalSamplingConstraint(FRAME, batch_tokens=9), TOKEN_EDGES),
        "seconds x tokens": Selection(
            structured(**FILTERS), FixedBucketBatchSizeConstraint2D(SECOND_PAIRS, [1] * len(SECOND_PAIRS)), SECOND_PAIRS
        ),
        "tokens x tokens": token_buckets(**FILTERS),
    }[constraint]
    none = measures(inputs=[])
    left_out: Counter = Counter()
    assert selection.buckets(none, left_out).tolist() == []
    assert left_out.total() == 0
    assert len(selection.lengths(none)) == 0
    assert selection.batch_ends(selection.lengths(none), 0).tolist() == []


def test_what_nemo_cannot_divide_is_left_out_with_its_cause():
    left_out: Counter = Counter()
    examples = measures(seconds=[math.nan, 0.0, 1.0], inputs=[0, 0, 0], outputs=[3, 3, 3], is_cut=[False, True, True])
    buckets = token_buckets(max_tps=9.0, max_tpt=9.0).buckets(examples, left_out)
    assert buckets.tolist() == [-1, -1, 4]
    assert left_out == {"": 1, "min_tps, max_tps: ZeroDivisionError": 1, "min_tpt, max_tpt: ZeroDivisionError": 1}


def test_the_first_filter_counts_what_several_leave_out():
    left_out: Counter = Counter()
    examples = measures(seconds=[9.0, 1.0], outputs=[99, 99], is_cut=True)
    token_buckets(max_duration=2.0, max_tps=5).buckets(examples, left_out)
    assert left_out == {"min_duration, max_duration": 1, "min_tps, max_tps": 1, "": 0}


@pytest.mark.parametrize(
    ("seconds", "cause"), [(math.inf, "bucket_duration_bins: OverflowError"), (math.nan, "min_duration, max_duration")]
)
def test_durations_that_are_no_numbers_are_left_out(tokenizer, seconds, cause):
    cut = MonoCut("cut", start=0.0, duration=seconds, channel=0)
    cut.input_ids = np.zeros(3)
    keys = {"use_multimodal_sampling": True, "token_equivalent_duration": FRAME, "bucket_duration_bins": TOKEN_PAIRS}
    config = structured(**keys, bucket_batch_size=[2] * len(TOKEN_PAIRS))
    pipeline = TransformPipeline(config, tokenizer)
    assert nemo_buckets(pipeline, [cut]) == ([-1], {cause: 1})
    left_out: Counter = Counter()
    selection = Selection(config, pipeline.constraint, pipeline.duration_bins)
    assert selection.buckets(measures(seconds=seconds, outputs=3, is_cut=True), left_out).tolist() == [-1]
    assert +left_out == {cause: 1}


def test_text_has_no_bucket_of_seconds():
    selection = Selection(structured(), FixedBucketBatchSizeConstraint2D([1.0], [2]), [1.0])
    left_out: Counter = Counter()
    assert selection.buckets(measures(inputs=5), left_out).tolist() == [-1]
    assert +left_out == {"bucket_duration_bins: AttributeError": 1}


def test_bins_of_more_tokens_than_the_table_has():
    edges = [2**20, 2**21, 2**40]
    selection = Selection(structured(), MultimodalSamplingConstraint(batch_size=1, measure_total_length=False), edges)
    lengths = [0, *(edge + by for edge in edges for by in (-1, 0, 1))]
    assert selection.buckets(measures(inputs=lengths)).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]


def test_pairs_of_bins_need_batch_sizes():
    with pytest.raises(ConfigError, match="bucket_duration_bins: pairs need bucket_batch_size"):
        Selection(structured(), MultimodalSamplingConstraint(batch_tokens=9), [(4, 3), (9, 5)])


def test_rates_of_conversations_with_speech_are_refused():
    with pytest.raises(NotImplementedError, match="min_tpt, max_tpt"):
        token_buckets(max_tpt=2.0).buckets(measures(seconds=[2.0, 1.0], inputs=9, is_cut=[False, True]))


def check_batches_of_seconds(seconds: np.ndarray, **limits) -> None:
    constraint = TimeConstraint(**limits)
    examples = [SimpleNamespace(duration=length) for length in seconds.tolist()]
    ends = Selection(plain(), constraint, None).batch_ends(seconds, 0)
    assert ends.tolist() == batch_ends_today(constraint, examples)


@pytest.mark.parametrize("quadratic", [None, 3.7])
@pytest.mark.parametrize("count", [None, 7])
def test_batches_end_where_rounding_decides(quadratic, count):
    """Limits that are products of a length and a number in floating point, and their neighbours."""
    rng = np.random.default_rng(0)
    for trial in range(40):
        lengths = rng.uniform(0.1, 9.0, 3) if trial % 3 else rng.integers(1, 30, 3) / 10
        longest = lengths[0] if quadratic is None else lengths[0] + lengths[0] ** 2 / quadratic
        limit = float(rng.choice([2, 3, 7, 15, 31]) * longest)
        drawn = rng.choice(lengths, 200, p=[0.9, 0.07, 0.03])
        drawn[rng.random(200) < 0.02] = 0.0
        for exactly in (np.nextafter(limit, 0), limit, np.nextafter(limit, 99)):
            check_batches_of_seconds(drawn, max_duration=float(exactly), max_cuts=count, quadratic_duration=quadratic)


def test_squares_of_seconds_are_rounded_as_lhotse_rounds_them():
    """``x**2`` of Python and of NumPy differ in the last bit where the C library's power does not round correctly."""
    drawn = np.random.default_rng(0).uniform(0, 40, 50_000)
    differ = [length for length in drawn.tolist() if length**2 != length * length]
    for length in [1.5, *differ[:20]]:
        limit = 3 * (length + length**2 / 0.01)
        for exactly in (np.nextafter(limit, 0), limit):
            check_batches_of_seconds(np.full(9, length), max_duration=float(exactly), quadratic_duration=0.01)


def test_one_bin_of_nemos_own_division_is_one_bucket(tokenizer):
    """NeMo divides the durations up to ``max_duration``; by one bucket, without an edge."""
    keys = {"use_bucketing": True, "num_buckets": 1, "max_duration": 2.4}
    selection = check_equal_to_nemo(keys, tokenizer, make_examples(100, cuts=True, texts=False))
    assert selection.num_buckets == 1
