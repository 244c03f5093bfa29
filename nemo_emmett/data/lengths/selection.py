"""Filters on lengths, buckets and the batch rule of a group, on arrays of lengths.

NeMo's filters and sampling constraints take one example at a time. Here their decisions are taken for thousands of
examples at once, from lengths alone, and are the same.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from lhotse.dataset.sampling.base import SamplingConstraint, TimeConstraint
from nemo.collections.common.data.lhotse.sampling import (
    BucketingFilter,
    DurationFilter,
    FixedBucketBatchSizeConstraint2D,
    MultimodalFixedBucketBatchSizeConstraint2D,
    MultimodalSamplingConstraint,
    TokenCountFilter,
    TokenPerSecondFilter,
    TokenPerTokenFilter,
)
from omegaconf import DictConfig

from nemo_emmett.data.config.dataset_config import GroupConfig
from nemo_emmett.data.lengths.measures import Measures
from nemo_emmett.data.lengths.packing import Packing
from nemo_emmett.data.readers.examples import ExampleKind
from nemo_emmett.data.sampling.tolerance import KEYS_OF_FUNCTION, cause_of
from nemo_emmett.errors import ConfigError
from nemo_emmett.typed_config import is_number

_LARGEST_TABLE = 2**20
"""Bin edges up to this many tokens are looked up in a table, which is ten times faster than a binary search."""

_NEVER = 2**30
"""A number of examples that no batch reaches."""


class _Verdict(NamedTuple):
    """What a filter decides about N examples."""

    predicate: Callable  # NeMo's filter
    passes: np.ndarray  # (N,) bool
    raises: np.ndarray | None = None  # (N,) bool: the filter raises ``error``
    error: type[Exception] = ZeroDivisionError


class Selection:
    """The filters on durations, tokens and rates, the buckets and the batch rule of one group.

    Args:
        structured: NeMo's config of the group's sampler.
        constraint: NeMo's or lhotse's measure of a batch, made from this config.
        duration_bins: bin edges between the buckets; None: one bucket.
        has_tokenizer: the examples are tokenised; otherwise NeMo has no filters on rates of tokens.
        packing: the rows into which they are packed; None: batches follow the constraint.

    Raises:
        ConfigError: if the bins are pairs and there are no batch sizes for them.

    Example::

        pipeline = TransformPipeline(structured, tokenizer)
        selection = Selection(structured, pipeline.constraint, pipeline.duration_bins)
        buckets = selection.buckets(measures)
    """

    def __init__(
        self,
        structured: DictConfig,
        constraint: SamplingConstraint,
        duration_bins: Sequence | None,
        *,
        has_tokenizer: bool = True,
        packing: Packing | None = None,
    ) -> None:
        self._durations = DurationFilter(structured.min_duration, structured.max_duration)
        self._counts = TokenCountFilter(
            structured.min_tokens, structured.max_tokens, measure_total_length=structured.measure_total_length
        )
        self._per_second = self._per_token = None
        if has_tokenizer and structured.pretokenize:
            self._per_second = TokenPerSecondFilter(structured.min_tps, structured.max_tps)
            self._per_token = TokenPerTokenFilter(structured.min_tpt, structured.max_tpt)
        self.packing = packing
        self._constraint = constraint
        self._is_multimodal = isinstance(
            constraint, (MultimodalSamplingConstraint, MultimodalFixedBucketBatchSizeConstraint2D)
        )
        self._fixed = constraint if isinstance(constraint, FixedBucketBatchSizeConstraint2D) else None
        self._is_2d = self._fixed is not None and self._fixed.bucketing_2d_enabled
        self._max_ratios = None
        if self._is_2d and self._fixed.strict_2d and self._fixed.max_ratio is not None:
            self._max_ratios = np.asarray(list(self._fixed.max_ratio), dtype=float)
        if self._fixed is not None:  # it has its own bins
            duration_bins = self._fixed.max_seq_len_buckets
            self.num_buckets = len(duration_bins)
        else:
            if duration_bins is not None and np.ndim(duration_bins) == 2:
                raise ConfigError(
                    "bucket_duration_bins: pairs need bucket_batch_size, a size for each bin; give it, or one number "
                    "for each bin."
                )
            self.num_buckets = 1 if duration_bins is None else len(duration_bins) + 1
        self._table = None if duration_bins is None else _BucketTable(constraint, duration_bins)
        self._set_batch_rule()

    def _set_batch_rule(self) -> None:
        constraint = self._constraint
        self._limit = self._quadratic = None
        if self._fixed is not None:
            sizes = [max(1, size) for size in self._fixed.batch_sizes]
        elif isinstance(constraint, MultimodalSamplingConstraint):
            self._limit, self._quadratic = constraint.batch_tokens, constraint.quadratic_factor
            sizes = [constraint.batch_size] * self.num_buckets
        elif isinstance(constraint, TimeConstraint):
            self._limit, self._quadratic = constraint.max_duration, constraint.quadratic_duration
            sizes = [constraint.max_cuts] * self.num_buckets
        else:
            raise TypeError(f"the batch rule of {type(constraint).__name__} cannot be applied to arrays of lengths")
        self._largest = [_NEVER if size is None else size for size in sizes]
        by_count = self._limit is None and None not in sizes
        self.batch_sizes: tuple[int, ...] | None = tuple(sizes) if by_count else None

    def buckets(self, measures: Measures, left_out: Counter[str] | None = None) -> np.ndarray:
        """The bucket of each example.

        Args:
            measures: of N examples.
            left_out: counts the examples that are left out, by the recipe keys of the first filter that does so or,
                where NeMo's filter raises, by the cause; "" counts those that are kept.

        Returns:
            (N,) int16; -1: there is no example, or it is left out.
        """
        kept = measures.inputs >= 0
        inputs, outputs = self._measure(measures)
        buckets = np.zeros(len(kept), dtype=np.int16) if self._table is None else self._table.look_up(inputs, outputs)
        verdicts = [*self._filter(measures, kept), *self._filter_unfit(measures, inputs, outputs, buckets)]
        for verdict in verdicts:
            passes = verdict.passes if verdict.raises is None else verdict.passes & ~verdict.raises
            if left_out is not None:
                _count(verdict, kept & ~passes, left_out)
            kept &= passes
        if self.packing is not None:
            fits = self.packing.fits(measures)
            if left_out is not None and (too_long := int(np.count_nonzero(kept & ~fits))):
                left_out["row_tokens"] += too_long
            kept &= fits
        if left_out is not None:
            left_out[""] += int(np.count_nonzero(kept))
        return np.where(kept, buckets, np.int16(-1))

    def _filter(self, measures: Measures, exists: np.ndarray) -> Iterator[_Verdict]:
        """The decisions of NeMo's filters before the one of buckets, in its order."""
        seconds, is_cut = measures.seconds, measures.is_cut
        durations, counts, per_second, per_token = self._durations, self._counts, self._per_second, self._per_token
        within = (durations.d_min <= seconds) & (seconds <= durations.d_max)
        yield _Verdict(durations, within | (np.isnan(seconds) & ~is_cut))
        if counts.enabled:
            tokens = measures.totals if counts.measure_total_length else measures.inputs
            yield _Verdict(counts, (counts.t_min <= tokens) & (tokens <= counts.t_max) | is_cut)
        if per_second is not None and per_second.enabled and is_cut.any():
            rates = _ratio(measures.outputs, seconds)
            within = (per_second.tps_min <= rates) & (rates <= per_second.tps_max)
            yield _Verdict(per_second, within | ~is_cut, is_cut & (seconds == 0))
        if per_token is not None and per_token.enabled:
            if np.any(exists & ~is_cut & ~np.isnan(seconds)):  # NeMo counts their tokens without those of the audio
                raise NotImplementedError("min_tpt, max_tpt: lengths do not give the tokens of speech conversations")
            rates = _ratio(measures.outputs, measures.inputs)
            within = (per_token.tpt_min <= rates) & (rates <= per_token.tpt_max)
            yield _Verdict(per_token, within | is_cut, ~is_cut & (measures.inputs == 0))

    def _filter_unfit(
        self, measures: Measures, inputs: np.ndarray, outputs: np.ndarray | None, buckets: np.ndarray
    ) -> Iterator[_Verdict]:
        """NeMo's filter of the examples that fit into no bucket."""
        if self._fixed is None:
            return
        predicate, is_cut, fits = BucketingFilter(self._fixed), measures.is_cut, buckets >= 0
        if not self._is_multimodal:
            yield _Verdict(predicate, is_cut, ~is_cut, AttributeError)  # no duration
        elif is_cut.any():
            yield _Verdict(predicate, fits, is_cut & np.isinf(measures.seconds), OverflowError)  # no number of frames
        yield _Verdict(predicate, fits)
        if self._max_ratios is not None:
            within = ~(_ratio(outputs, inputs) > self._max_ratios[buckets])
            yield _Verdict(predicate, within, inputs == 0)

    def fill(self, examples: np.ndarray, measures: Measures) -> None:
        """Write into (N,) ``EXAMPLE`` what their batches depend on."""
        examples["length"] = examples["positions"] = examples["answers"] = 0
        if self.packing is not None:
            examples["positions"], examples["answers"] = self.packing.positions_and_answers(measures)
            examples["length"] = np.nan_to_num(measures.seconds)
        elif self.batch_sizes is None:
            examples["length"] = self.lengths(measures)

    def lengths(self, measures: Measures) -> np.ndarray:
        """What the constraint measures: (N,) float64, or (N, 2) for bins in two dimensions."""
        inputs, outputs = self._measure(measures)
        return inputs.astype(float) if outputs is None else np.stack([inputs, outputs], axis=1).astype(float)

    def _measure(self, measures: Measures) -> tuple[np.ndarray, np.ndarray | None]:
        outputs = measures.outputs if self._is_2d else None
        if not self._is_multimodal:
            return measures.seconds, outputs
        is_total = not self._is_2d and self._constraint.measure_total_length
        inputs = measures.totals if is_total else measures.inputs
        if measures.is_cut.any():
            with np.errstate(invalid="ignore"):
                frames = np.ceil(measures.seconds / self._constraint.token_equivalent_duration)
                frames = np.minimum(frames, 2.0**53).astype(np.int64)
            if is_total:  # NeMo's two constraints differ in which tokens of a recording they count
                frames += measures.totals if self._fixed is None else measures.outputs
            inputs = np.where(measures.is_cut, frames, inputs)
        return inputs, outputs

    def batch_ends(self, lengths: np.ndarray, bucket: int) -> np.ndarray:
        """The ends of the full batches that lhotse's rule makes of consecutive examples.

        A batch is full when it has all the examples it may have, or when one more, as long as its longest, would
        exceed its limit in seconds or tokens.

        Args:
            lengths: (N,) or (N, 2) from :meth:`lengths`, of examples of one bucket.
            bucket: its number.

        Returns:
            (K,) int64, ascending; the first batch is ``[0, ends[0])``, the next ``[ends[0], ends[1])``.
        """
        if self._limit is None:
            size = self._largest[bucket]
            return np.arange(size, len(lengths) + 1, size, dtype=np.int64)
        # For batches of fewer than some hundred examples, a loop is faster than NumPy's calls for each batch.
        ends, start, least, end = [], 0, _NEVER, _NEVER
        for position, size in enumerate(self._full_sizes(lengths, bucket).tolist(), 1):
            if size < least:
                least, end = size, start + size
            if position >= end:
                ends.append(position)
                start, least, end = position, _NEVER, _NEVER
        return np.asarray(ends, dtype=np.int64)

    def _full_sizes(self, lengths: np.ndarray, bucket: int) -> np.ndarray:
        """(N,) at how many examples a batch is full whose longest has this length.

        The least n >= 1 with ``(n + 1) * length > limit`` in floating point, as lhotse computes it; a longer example
        never gives a larger n, so that the least n of a batch is that of its longest.
        """
        if self._quadratic is not None:
            # Python's power, as lhotse uses it: NumPy's square differs from it in the last bit of one in a thousand.
            squares = np.fromiter((length**2 for length in lengths.tolist()), dtype=float, count=len(lengths))
            lengths = lengths + squares / self._quadratic
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            sizes = np.where(lengths > 0, np.floor(self._limit / lengths) - 1, _NEVER)
            sizes = np.clip(sizes, 1, _NEVER)
            for _ in range(2):  # the quotient and the product may both be rounded up
                sizes += (sizes + 1) * lengths <= self._limit
        return np.minimum(sizes, self._largest[bucket]).astype(np.int64)


def filter_of_text(group: GroupConfig, kind: ExampleKind) -> str | None:
    """The key of a filter that needs more than lengths: NeMo's rates of tokens count the text of conversations."""
    if kind is not ExampleKind.CONVERSATION or all(source.is_text for source in group.sources):
        return None
    return next((key for key in ("min_tpt", "max_tpt") if is_number(group.keys.get(key))), None)


class _BucketTable:
    """The buckets of lengths, from their ranks among the bin edges.

    All lengths between two neighbouring edges have the same bucket, for which NeMo's own function is called once.
    """

    def __init__(self, constraint: SamplingConstraint, bins: Sequence) -> None:
        constraint = copy.copy(constraint)
        if isinstance(constraint, FixedBucketBatchSizeConstraint2D):
            constraint.max_ratio = None  # depends on more than ranks
        edges = np.asarray(bins, dtype=float)
        self._sides = [_Edges(np.unique(side)) for side in np.atleast_2d(edges.T)]
        # A length between two edges has the bucket of the upper one; above all edges is infinity.
        sides = [[*side.edges.tolist(), math.inf] for side in self._sides]
        lengths = itertools.product(*sides) if edges.ndim == 2 else sides[0]
        numbers = [constraint.select_bucket(bins, example_len=length) for length in lengths]
        self._buckets = np.array([-1 if number is None else number for number in numbers], dtype=np.int16)

    def look_up(self, inputs: np.ndarray, outputs: np.ndarray | None) -> np.ndarray:
        """(N,) int16 bucket of each example; -1: it has none."""
        rank = self._sides[0].ranks(inputs)
        if outputs is not None:
            rank = rank * np.int32(len(self._sides[1].edges) + 1) + self._sides[1].ranks(outputs)
        return self._buckets.take(rank)


class _Edges:
    """Bin edges of one dimension, without duplicates."""

    def __init__(self, edges: np.ndarray) -> None:
        self.edges = edges
        largest = edges[np.isfinite(edges)].max(initial=0)
        self._table = None
        if largest < _LARGEST_TABLE:
            self._table = np.searchsorted(edges, np.arange(int(largest) + 2)).astype(np.int32)

    def ranks(self, lengths: np.ndarray) -> np.ndarray:
        """(N,) how many edges are below each length."""
        if self._table is not None and np.issubdtype(lengths.dtype, np.integer):
            return self._table.take(lengths, mode="clip")
        return np.searchsorted(self.edges, lengths)


def _ratio(numerators: np.ndarray, denominators: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return numerators / denominators


def _count(verdict: _Verdict, dropped: np.ndarray, left_out: Counter[str]) -> None:
    raised = 0 if verdict.raises is None else int(np.count_nonzero(dropped & verdict.raises))
    if raised:
        left_out[cause_of(verdict.predicate, None, verdict.error())] += raised
    if filtered := int(np.count_nonzero(dropped)) - raised:
        left_out[KEYS_OF_FUNCTION[type(verdict.predicate).__name__]] += filtered
