"""What bins leave: the padding of batches, the outputs that are outliers, and the same for NeMo's own rule.

Lengths are NumPy arrays or lists, of seconds or tokens; bins are those of :mod:`~nemo_emmett.data.bucketing.bins`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from nemo_emmett.data.bucketing.bins import ROUNDING, checked, checked_pair
from nemo_emmett.errors import ConfigError

# Outliers: outputs too long for their inputs


def within_ratio(
    input_lengths: ArrayLike, output_lengths: ArrayLike, max_ratio: float | Sequence[float], bins: Sequence = ()
) -> np.ndarray:
    """(N,) bool, which examples have at most ``max_ratio`` of output per input: NeMo's ``max_tps`` and ``max_tpt``.

    Args:
        input_lengths: (N,) seconds or tokens.
        output_lengths: (N,) tokens.
        max_ratio: one for all, or one for each of the ``bins``.
        bins: where the ratios are many, the pairs of caps that they belong to; examples that fit into none are out.

    Raises:
        ConfigError: if there are not as many ratios as bins.
    """
    inputs, outputs = checked_pair(input_lengths, output_lengths)
    if not isinstance(max_ratio, Sequence):
        return outputs <= max_ratio * inputs
    if len(max_ratio) != len(bins):
        raise ConfigError(f"max_tpt, max_tps: there are {len(max_ratio)} for {len(bins)} bins; give one for each.")
    bucket = bucket_of(bins, inputs, outputs)
    return (bucket >= 0) & (outputs <= np.asarray(max_ratio)[bucket] * inputs)


def within_deviations(
    input_lengths: ArrayLike, output_lengths: ArrayLike, num_deviations: float, num_strips: int = 10
) -> np.ndarray:
    """(N,) bool, which examples have a usual ratio of output to input for their input length.

    Inputs are cut into strips of equal mass; in each, ratios of more than ``num_deviations`` standard deviations above
    the strip's mean are unusual: such examples would raise the cap of their whole bucket. Short outputs are not.

    Raises:
        ConfigError: if ``num_deviations`` is not positive.
    """
    if not num_deviations > 0:
        raise ConfigError(f"outliers: {num_deviations!r} is not a number of standard deviations; give a positive one.")
    inputs, outputs = checked_pair(input_lengths, output_lengths)
    ratios = np.divide(outputs, inputs, out=np.zeros_like(outputs), where=inputs > 0)
    strips = np.searchsorted(np.unique(equal_mass_bins(inputs, num_strips)), inputs)
    counts = np.bincount(strips)
    means = np.bincount(strips, ratios) / np.maximum(counts, 1)
    deviations = np.sqrt(np.bincount(strips, (ratios - means[strips]) ** 2) / np.maximum(counts, 1))
    # A strip of one ratio has a deviation of zero, give or take a rounding.
    limits = means + num_deviations * deviations + ROUNDING * np.abs(means)
    return (ratios <= limits[strips]) & ((inputs > 0) | (outputs == 0))


def largest_ratios(bins: Sequence[Sequence[float]], input_lengths: ArrayLike, output_lengths: ArrayLike) -> list[float]:
    """For each bin the largest ratio of output to input in its strip, rounded up: NeMo's ``max_tps``, ``max_tpt``."""
    inputs, outputs = checked_pair(input_lengths, output_lengths)
    caps = np.asarray(bins, dtype=float)
    strip_caps, strip_of_bin = np.unique(caps[:, 0], return_inverse=True)
    bucket = bucket_of(bins, inputs, outputs)
    fits = (bucket >= 0) & (inputs > 0)
    largest = np.zeros(len(strip_caps))
    np.maximum.at(largest, strip_of_bin[bucket[fits]], outputs[fits] / inputs[fits])
    return [float(ratio) for ratio in (np.ceil(largest * 100) / 100)[strip_of_bin]]


# What others do, to compare with


def equal_mass_bins(lengths: ArrayLike, num_buckets: int) -> list[float]:
    """Caps by the rule of lhotse and NeMo's scripts: whenever a bucket holds more than its share of the sum, cut.

    See ``estimate_duration_buckets`` in ``lhotse.dataset.sampling.dynamic_bucketing``; here the last cap is added.
    """
    lengths = np.sort(checked(lengths, "lengths"))
    caps = [float(lengths[cut]) for cut in _equal_mass_cuts(lengths, num_buckets)]
    return [*caps, float(lengths[-1])]


def equal_mass_bins_2d(
    input_lengths: ArrayLike, output_lengths: ArrayLike, num_buckets: int, num_sub_buckets: int
) -> list[list[float]]:
    """The same for two dimensions, as NeMo's ``estimate_duration_bins_2d.py`` has it, without dropping outliers.

    A cap that comes out several times leaves its strip as many times the sub-buckets. The last cap of each strip is its
    longest output, so that every example keeps its place.
    """
    inputs, outputs = checked_pair(input_lengths, output_lengths)
    caps, times = np.unique(equal_mass_bins(inputs, num_buckets), return_counts=True)
    strips = np.searchsorted(caps, inputs)
    return [
        [float(cap), sub_cap]
        for strip, cap in enumerate(caps)
        for sub_cap in sorted(set(equal_mass_bins(outputs[strips == strip], int(num_sub_buckets * times[strip]))))
    ]


def _equal_mass_cuts(ascending: np.ndarray, num_buckets: int) -> Iterator[int]:
    share, held = ascending.sum() / num_buckets, 0.0
    for place, length in enumerate(ascending):
        if held > share:
            yield place
            held = 0.0
        held += length


@dataclass(frozen=True)
class Padding:
    """How much is padded.

    Args:
        needed: for each side, the sum of the lengths.
        padded: for each side, the sum of the lengths with padding.
        kept: examples that fit into a bucket; only they are counted.
    """

    needed: tuple[float, ...]
    padded: tuple[float, ...]
    kept: int

    @property
    def amount(self) -> float:
        """Padding of both sides together, in the unit of the lengths."""
        return sum(self.padded) - sum(self.needed)

    @property
    def share(self) -> float:
        """Share of padding in what batches hold, both sides together, from 0 to 1."""
        return self.amount / sum(self.padded) if sum(self.padded) else 0.0

    @property
    def share_of_sides(self) -> tuple[float, ...]:
        """The same for each side."""
        return tuple(1 - n / p if p else 0.0 for n, p in zip(self.needed, self.padded, strict=True))


def padding_of(bins: Sequence, *lengths: ArrayLike, to_longest: bool = False) -> Padding:
    """The padding that bins leave, each example being padded to the cap of its bucket.

    Args:
        bins: caps, or pairs of caps if there are inputs and outputs.
        lengths: (N,) lengths; or those of inputs and those of outputs.
        to_longest: pad to the longest input and the longest output in the bucket, as a large batch does, where caps
            are larger than that.

    Example:
        >>> padding_of([4, 10], [3, 4, 4, 9, 10]).share
        0.0625
    """
    sides = np.stack([np.asarray(side, dtype=float) for side in lengths])
    bucket = bucket_of(bins, *lengths)
    sides, bucket = sides[:, bucket >= 0], bucket[bucket >= 0]
    caps = np.asarray(bins, dtype=float).reshape(len(bins), len(sides)).T
    if to_longest:
        caps = np.zeros_like(caps)
        for side, longest in zip(sides, caps, strict=True):
            np.maximum.at(longest, bucket, side)
    needed, padded = sides.sum(axis=1), caps[:, bucket].sum(axis=1)
    return Padding(tuple(needed.tolist()), tuple(padded.tolist()), len(bucket))


def bucket_of(bins: Sequence, *lengths: ArrayLike) -> np.ndarray:
    """(N,) the bucket of each example, -1 where it fits into none; as NeMo's ``find_smallest_bucket`` decides."""
    first = np.asarray(lengths[0], dtype=float)
    if len(lengths) == 1:
        bucket = np.searchsorted(np.asarray(bins, dtype=float), first)
        return np.where(bucket < len(bins), bucket, -1)
    second, caps = np.asarray(lengths[1], dtype=float), np.asarray(bins, dtype=float)
    strip_caps, strip_starts = np.unique(caps[:, 0], return_index=True)
    strips, found = np.searchsorted(strip_caps, first), np.full(len(first), -1)
    for strip, start in enumerate(strip_starts):
        mine = np.flatnonzero(strips == strip)
        sub_caps = caps[caps[:, 0] == strip_caps[strip], 1]
        sub_bucket = np.searchsorted(sub_caps, second[mine])
        fits = sub_bucket < len(sub_caps)
        found[mine[fits]] = start + sub_bucket[fits]
    return found
