"""Bins of least padding: where to cut a distribution of lengths into buckets, solved exactly.

A bucket is given by its cap, the longest length that it takes, as NeMo's ``bucket_duration_bins`` have it: an example
goes to the first bucket whose cap is not below its length (``bisect_left`` in lhotse and NeMo). In two dimensions the
input lengths are cut into strips and each strip's output lengths into sub-buckets; an example goes to the first strip
whose input cap takes it and, in that strip, to the first output cap that does (NeMo's ``bucketing_2d_strict_mode``).
NeMo's scripts give each bucket the same sum of lengths instead; :mod:`~nemo_emmett.data.bucketing.padding` compares.

Lengths are in whatever unit the bins shall have: tokens, frames, seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np
from numpy.typing import ArrayLike

from nemo_emmett.errors import ConfigError, DataError

MAX_LENGTHS_1D = 2048
"""Different lengths that the one-dimensional solver distinguishes: its work grows with their square."""

MAX_LENGTHS_2D = 512
"""The same for either side of the two-dimensional solver: there, with their cube and more."""

_TILE = 32
"""Strips are costed in tiles of this many first by this many last lengths, so that the arrays stay in the cache."""

_DECIMALS = 9
ROUNDING = 10.0**-_DECIMALS
"""Differences between floats that are taken for rounding."""

Cost1D = Callable[[np.ndarray], ArrayLike]
Cost2D = Callable[[np.ndarray, np.ndarray], ArrayLike]


@dataclass(frozen=True)
class Solution:
    """Bins, and how good they are.

    Args:
        bins: caps in ascending order; in two dimensions pairs of caps.
        total: what the bins cost, summed over all examples: their caps (input plus output), or ``cost`` of them.
        steps: the grid on which the lengths of each side were rounded up; 0 where they were taken as they are.
        find_lower_bound: solves for what no bins can cost less than.
    """

    bins: list
    total: float
    steps: tuple[float, ...]
    find_lower_bound: Callable[[], float] = field(repr=False)

    @cached_property
    def loss_bound(self) -> float:
        """By how much ``total`` may exceed that of the best bins there are; 0 where lengths were not rounded."""
        return self.total - self.find_lower_bound() if any(self.steps) else 0.0


def optimal_bins(
    lengths: ArrayLike, num_buckets: int, *, step: float | None = None, cost: Cost1D | None = None
) -> list[float]:
    """Caps of the buckets that need the least padding: no other ``num_buckets`` caps need less.

    With the different lengths v(1) < ... < v(m), of which C(j) examples are no longer than v(j), the first j lengths
    in k buckets cost at least

        D(k, j) = min over i < j of  D(k-1, i) + (C(j) - C(i)) * v(j),       D(0, 0) = 0,

    since the last of them holds the lengths after some i and has the cap v(j). That takes O(k m^2) additions for m
    different lengths (at most ``MAX_LENGTHS_1D``) and O(n) to count n examples.

    Args:
        lengths: (N,) lengths of examples, not negative.
        num_buckets: how many buckets; where there are fewer different lengths, there are fewer bins.
        step: lengths are rounded up to multiples of it. By default they are taken as they are, unless more than
            ``MAX_LENGTHS_1D`` of them differ: then to the finest of the steps 1, 2, 3, 4, 5, 6 and 8 (times a power of
            ten) that leaves no more. The caps then need at most ``step`` more per example than the best there are.
        cost: minimise the sum of ``cost(cap)`` over the examples instead, for example in seconds; takes an array of
            caps and must not fall from a cap to a larger one.

    Returns:
        The cap of every bucket, for ``bucket_duration_bins`` with a ``bucket_batch_size`` for each. Without
        ``bucket_batch_size`` lhotse adds an open bucket after the last: leave the last cap out (``[:-1]``).

    Raises:
        DataError: if there are no lengths, or one is negative or not a number.
        ConfigError: if ``num_buckets`` or ``step`` is not positive, or ``cost`` falls.

    Example:
        >>> optimal_bins([3, 4, 4, 9, 10], 2)
        [4.0, 10.0]
    """
    return solve_bins(lengths, num_buckets, step=step, cost=cost).bins


def optimal_bins_2d(
    input_lengths: ArrayLike,
    output_lengths: ArrayLike,
    num_buckets: int,
    num_sub_buckets: int,
    *,
    input_step: float | None = None,
    output_step: float | None = None,
    cost: Cost2D | None = None,
) -> list[list[float]]:
    """Caps of strips and sub-buckets with the least padding of input plus output: no other nested bins need less.

    The recurrence is that of :func:`optimal_bins` twice, one in the other. A strip that holds the input lengths after
    v(i) up to v(j) costs W(i, j), the optimum of its sub-buckets; with H(u) of its examples having outputs up to u,

        F(s, u) = min over t < u of  F(s-1, t) + (H(u) - H(t)) * (v(j) + u),        W(i, j) = F(S, its longest output),
        D(k, j) = min over i < j of  D(k-1, i) + W(i, j).

    In F the minimising t does not fall from one u to the next (see ``_cheapest_middle``), which bounds the search. All
    W take O(m^2 p) for m input and p output lengths with up to two sub-buckets, O(m^2 p^2) at most with more; strips
    that cannot be part of the best bins are left out (see ``_strips_worth_trying``).

    Args:
        input_lengths: (N,) for example tokens of the context, seconds of audio.
        output_lengths: (N,) for example tokens of the answer.
        num_buckets: how many strips; fewer where fewer input lengths differ.
        num_sub_buckets: how many sub-buckets in each strip; fewer where fewer output lengths differ in it.
        input_step: as ``step`` of :func:`optimal_bins`; the default distinguishes ``MAX_LENGTHS_2D`` lengths.
        output_step: the same for outputs. Rounding them costs at most ``output_step`` per example. For inputs no
            such bound exists in advance, since two examples closer than a step may deserve strips of their own:
            :func:`solve_bins_2d` bounds the loss of both for the data at hand, in ``loss_bound``.
        cost: minimise the sum of ``cost(input_cap, output_cap)`` over the examples instead, for example in seconds;
            takes two arrays that broadcast and must not fall from a cap to a larger one.

    Returns:
        ``[input cap, output cap]`` of every sub-bucket, strip by strip: NeMo's two-dimensional
        ``bucket_duration_bins``, which go with a ``bucket_batch_size`` for each.

    Raises:
        DataError: if there are no lengths, one is negative or not a number, or the sides differ in number.
        ConfigError: if a number of buckets or a step is not positive, or ``cost`` falls.

    Example:
        >>> optimal_bins_2d([2, 2, 9, 9], [1, 8, 5, 9], num_buckets=2, num_sub_buckets=2)
        [[2.0, 1.0], [2.0, 8.0], [9.0, 5.0], [9.0, 9.0]]
    """
    steps = {"input_step": input_step, "output_step": output_step}
    return solve_bins_2d(input_lengths, output_lengths, num_buckets, num_sub_buckets, **steps, cost=cost).bins


def solve_bins(
    lengths: ArrayLike, num_buckets: int, *, step: float | None = None, cost: Cost1D | None = None
) -> Solution:
    """:func:`optimal_bins` with its cost and the bound of its loss; arguments and errors are those."""
    _check_number("num_buckets", num_buckets)
    grid = _Grid.of(checked(lengths, "lengths"), step, MAX_LENGTHS_1D, "step")
    costs = _costs(cost, grid.caps)
    totals = np.concatenate([[0], np.cumsum(np.bincount(grid.cells, minlength=len(grid.caps)))]).astype(float)
    strips = (totals[None, 1:] - totals[:-1, None]) * costs
    ends, total = _cheapest_chain(strips, num_buckets)
    # The best caps, rounded up, are caps on the grid that take the same examples.
    loss = len(grid.cells) * float(np.max(costs - _costs(cost, grid.floors)))
    return Solution([float(grid.caps[end]) for end in ends], total, (grid.step,), lambda: total - loss)


def solve_bins_2d(
    input_lengths: ArrayLike,
    output_lengths: ArrayLike,
    num_buckets: int,
    num_sub_buckets: int,
    *,
    input_step: float | None = None,
    output_step: float | None = None,
    cost: Cost2D | None = None,
) -> Solution:
    """:func:`optimal_bins_2d` with its cost and the bound of its loss; arguments and errors are those."""
    _check_number("num_buckets", num_buckets)
    _check_number("num_sub_buckets", num_sub_buckets)
    lengths = checked_pair(input_lengths, output_lengths)
    inputs = _Grid.of(lengths[0], input_step, MAX_LENGTHS_2D, "input_step")
    outputs = _Grid.of(lengths[1], output_step, MAX_LENGTHS_2D, "output_step")
    shape = len(inputs.caps), len(outputs.caps)
    histogram = np.bincount(inputs.cells * shape[1] + outputs.cells, minlength=shape[0] * shape[1]).reshape(shape)
    counts = _Counts(histogram)

    costs = _costs(cost, inputs.caps, outputs.caps)
    worth_trying = _strips_worth_trying(counts, costs, num_buckets, num_sub_buckets) if num_sub_buckets > 2 else None
    ends, total = _cheapest_chain(_strip_costs(counts, costs, num_sub_buckets, worth_trying), num_buckets)
    bins, start = [], 0
    for end in ends:
        sub_ends = _sub_buckets(counts.of_strip(start, end), costs[end], num_sub_buckets)
        bins += [[float(inputs.caps[end]), float(outputs.caps[sub_end])] for sub_end in sub_ends]
        start = end + 1
    floors = _costs(cost, inputs.floors, outputs.floors)
    lower_bound = partial(_lower_bound, counts, floors, num_buckets, num_sub_buckets, exact=inputs.step == 0)
    return Solution(bins, total, (inputs.step, outputs.step), lower_bound)


# Lengths on a grid


@dataclass(frozen=True)
class _Grid:
    """Lengths, rounded up to the caps that are tried.

    Args:
        cells: (N,) for each example, which of the caps is its rounded length.
        caps: (m,) the different rounded lengths, ascending.
        floors: (m,) of each, the length above which lengths are rounded up to it; itself where nothing is rounded.
        step: between the caps there are multiples of it; 0 where nothing is rounded.
    """

    cells: np.ndarray
    caps: np.ndarray
    floors: np.ndarray
    step: float

    @classmethod
    def of(cls, lengths: np.ndarray, step: float | None, limit: int, name: str) -> _Grid:
        if step is not None and not (step > 0 and math.isfinite(step)):
            raise ConfigError(f"{name}: {step!r} is not a length to round up to; give a positive number.")
        different, cells = np.unique(lengths, return_inverse=True)
        if step is None:
            step = 0.0 if len(different) <= limit else _finest_step(different, limit)
        if not step:
            return cls(cells, different, different, 0.0)
        multiples, coarser = np.unique(_multiples(different, step), return_inverse=True)
        longest = different[np.append(np.flatnonzero(np.diff(coarser)), -1)]
        caps = np.maximum(np.round(multiples * step, _DECIMALS), longest)
        if np.array_equal(caps[coarser], different):  # on the grid as they are
            return cls(cells, different, different, 0.0)
        return cls(coarser[cells], caps, np.maximum(caps - step, 0), step)


def _multiples(lengths: np.ndarray, step: float) -> np.ndarray:
    """How many steps each length is rounded up to; 0.56 is 7 steps of 0.08, though 0.56 / 0.08 is a little more."""
    return np.ceil(np.round(lengths / step, _DECIMALS))


def _finest_step(different: np.ndarray, limit: int) -> float:
    """The finest of 1, 2, 3, 4, 5, 6, 8, 10, 20, ... and 0.8, 0.6, ... that leaves at most ``limit`` lengths."""
    power = math.floor(math.log10((different[-1] - different[0]) / limit)) - 3
    while True:
        for digit in (1, 2, 3, 4, 5, 6, 8):
            step = digit * 10.0**power
            if len(np.unique(_multiples(different, step))) <= limit:
                return step
        power += 1


def checked(lengths: ArrayLike, name: str) -> np.ndarray:
    """Lengths as (N,) float64.

    Raises:
        DataError: if there are none, or one is no length; naming the argument.
    """
    array = np.asarray(lengths, dtype=float)
    if array.ndim != 1 or len(array) == 0:
        raise DataError(f"{name}: there are no lengths to make bins of; give at least one example.")
    bad = ~(np.isfinite(array) & (array >= 0))
    if bad.any():
        place = int(np.argmax(bad))
        raise DataError(f"{name}[{place}]: {array[place]} is not a length; leave out what cannot be measured.")
    return array


def checked_pair(inputs: ArrayLike, outputs: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """The lengths of inputs and of outputs, (N,) float64 each; errors as those of :func:`checked`."""
    pair = checked(inputs, "input_lengths"), checked(outputs, "output_lengths")
    if len(pair[0]) != len(pair[1]):
        raise DataError(
            f"output_lengths: there are {len(pair[1])}, but {len(pair[0])} input_lengths; give both of each example."
        )
    return pair


def _check_number(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ConfigError(f"{name}: {value!r} is not a number of buckets; give 1, 2, 3, ...")


def _costs(cost: Cost1D | Cost2D | None, *caps: np.ndarray) -> np.ndarray:
    """What an example costs in a bucket of each cap: (m,), or (m, p) of each pair of caps."""
    axes = np.ix_(*caps)
    shape = tuple(len(axis) for axis in caps)
    costs = sum(axes) if cost is None else cost(*axes)
    costs = np.broadcast_to(np.asarray(costs, dtype=float), shape)
    for axis in range(costs.ndim):
        if not (np.diff(costs, axis=axis) >= 0).all():  # also refuses NaN
            raise ConfigError("cost: falls from a cap to a larger one, or is not a number; make it monotone.")
    return costs


# Dynamic programming


def _cheapest_chain(strips: np.ndarray, num_buckets: int) -> tuple[list[int], float]:
    """Cut the lengths 0 to m-1 into at most so many runs at the least cost.

    Args:
        strips: (m, m); ``strips[i, j]`` is the cost of the run of lengths i to j. Only i <= j is read.

    Returns:
        The last length of each run, and the sum of their costs.
    """
    size = len(strips)
    strips = np.where(np.tri(size, k=-1, dtype=bool), np.inf, strips)
    best, came_from = strips[0], []  # best[j]: lengths 0 to j in the runs so far
    for _ in range(min(num_buckets, size) - 1):
        candidates = np.concatenate([[0.0], best[:-1]])[:, None] + strips  # row i: the last run starts at i
        starts = np.argmin(candidates, axis=0)
        came_from.append(starts)
        best = candidates[starts, np.arange(size)]
    ends = [size - 1]
    for starts in reversed(came_from):
        start = int(starts[ends[-1]])
        if start == 0:  # fewer runs do as well
            break
        ends.append(start - 1)
    return ends[::-1], float(best[-1])


class _Counts:
    """How many examples a strip holds, by their output lengths: a two-dimensional cumulative histogram."""

    def __init__(self, histogram: np.ndarray) -> None:
        self.histogram = histogram
        cumulative = np.cumsum(np.cumsum(histogram, axis=0), axis=1).astype(float)
        self._up_to = np.vstack([np.zeros((1, histogram.shape[1])), cumulative])

    def of_strip(self, first: int | np.ndarray, last: int | np.ndarray) -> np.ndarray:
        """(..., p) examples of the strips of input lengths ``first`` to ``last`` with outputs up to each length."""
        return self._up_to[last + 1] - self._up_to[first]


def _strip_costs(
    counts: _Counts, costs: np.ndarray, num_sub_buckets: int, worth_trying: np.ndarray | None = None
) -> np.ndarray:
    """(m, m) of every strip of input lengths, first by last, what its examples cost in the best sub-buckets.

    Strips that are not ``worth_trying``, an (m, m) mask, cost infinity.
    """
    size = len(counts.histogram)
    strips = np.full((size, size), np.inf)
    tried = ~np.tri(size, k=-1, dtype=bool) if worth_trying is None else worth_trying
    for first, last in _tiles(tried):
        columns = np.flatnonzero(counts.histogram[first.min() : last.max() + 1].any(axis=0))
        held = counts.of_strip(first, last)[:, columns]
        strips[first, last] = _cheapest_sub_buckets(held, costs[last][:, columns], num_sub_buckets)
    return strips


def _tiles(tried: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The strips that are tried, neighbours together: the first and the last input lengths of each."""
    for top in range(0, len(tried), _TILE):
        for left in range(top, len(tried), _TILE):
            first, last = np.nonzero(tried[top : top + _TILE, left : left + _TILE])
            if len(first):
                yield first + top, last + left


def _strips_worth_trying(counts: _Counts, costs: np.ndarray, num_buckets: int, num_sub_buckets: int) -> np.ndarray:
    """(m, m) which strips may be part of the best bins; to solve for the others as well is most of the work.

    The sub-buckets of a strip, applied to each of its input lengths alone, cost no more than they do for the strip. So
    a strip costs at least what its lengths cost one by one, each in sub-buckets of its own, plus what an example pays
    at least for the strip's cap instead of its own length. The best bins by this measure cost, truly, what the best
    bins cost at most: a strip is out if, by the same measure, no bins with it cost as little.
    """
    size = len(costs)
    each = np.arange(size)
    alone = _cheapest_sub_buckets(counts.of_strip(each, each), costs, num_sub_buckets)
    examples = counts.histogram.sum(axis=1)
    at_least = np.full((size, size), np.inf)
    for last in range(size):
        extra = (costs[last] - costs[: last + 1]).min(axis=1)
        at_least[: last + 1, last] = np.cumsum((alone[: last + 1] + examples[: last + 1] * extra)[::-1])[::-1]

    last = np.array(_cheapest_chain(at_least, num_buckets)[0])
    first = np.append(0, last[:-1] + 1)
    enough = _cheapest_sub_buckets(counts.of_strip(first, last), costs[last], num_sub_buckets).sum()

    before, after = _costs_of_the_rest(at_least, num_buckets)
    through = np.full((size, size), np.inf)
    for strips_before in range(num_buckets):
        rest = before[strips_before][:-1, None] + after[num_buckets - 1 - strips_before][None, 1:]
        np.minimum(through, rest, out=through)
    return through + at_least <= enough * (1 + ROUNDING)


def _costs_of_the_rest(strips: np.ndarray, num_buckets: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The least cost of the lengths before a place, and of those from it on, in up to 0, 1, 2, ... strips."""
    before, after = np.full(len(strips) + 1, np.inf), np.full(len(strips) + 1, np.inf)
    before[0] = after[-1] = 0.0
    all_before, all_after = [before], [after]
    for _ in range(num_buckets - 1):
        before, after = before.copy(), after.copy()
        before[1:] = (all_before[-1][:-1, None] + strips).min(axis=0)
        after[:-1] = (strips + all_after[-1][None, 1:]).min(axis=1)
        all_before.append(np.minimum(before, all_before[-1]))
        all_after.append(np.minimum(after, all_after[-1]))
    return all_before, all_after


def _cheapest_sub_buckets(held: np.ndarray, costs: np.ndarray, num_sub_buckets: int) -> np.ndarray:
    """What the best sub-buckets of each strip cost.

    Args:
        held: (R, p) examples of each strip with outputs up to each length.
        costs: (R, p) of an example in a sub-bucket of each output cap.

    Returns:
        (R,) the least costs.
    """
    everything = held[:, -1]
    longest = np.argmax(held == everything[:, None], axis=1)
    top = np.take_along_axis(costs, longest[:, None], axis=1)
    if num_sub_buckets == 1:
        return everything * top[:, 0]
    below = held * costs  # of the outputs up to each length, in the sub-buckets so far
    for _ in range(num_sub_buckets - 2):
        below = _cheapest_middle(below, held, costs)
    return (below - held * top).min(axis=1).clip(max=0) + everything * top[:, 0]


def _cheapest_middle(below: np.ndarray, held: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """Allow one sub-bucket more: for each output cap u, the least of ``below[t] + (held[u] - held[t]) * costs[u]``.

    For a cap u' > u the same holds with ``- held[t] * (costs[u'] - costs[u])`` added, which only falls with t: the
    best t (the first, where several are) of u' is not before that of u. So the middle cap is solved first, and bounds
    the search on either side, together for all rows; rows are neighbouring strips, whose best t are close.
    """
    least, rows = np.empty_like(below), np.arange(len(below))
    left_to_do = [(0, below.shape[1] - 1, 0, below.shape[1] - 1)]
    while left_to_do:
        low, high, from_, to = left_to_do.pop()
        if low > high:
            continue
        middle = (low + high) // 2
        window = slice(from_, min(to, middle) + 1)
        candidates = below[:, window] - held[:, window] * costs[:, middle, None]
        best = candidates.argmin(axis=1)
        least[:, middle] = candidates[rows, best]
        left_to_do.append((low, middle - 1, from_, from_ + int(best.max())))
        left_to_do.append((middle + 1, high, from_ + int(best.min()), to))
    return least + held * costs


def _sub_buckets(held: np.ndarray, costs: np.ndarray, num_sub_buckets: int) -> list[int]:
    """The output lengths that are the caps of one strip's best sub-buckets; ``held`` and ``costs`` are (p,)."""
    occupied = np.flatnonzero(np.diff(held, prepend=0))
    held, costs = np.concatenate([[0], held[occupied]]), costs[occupied]
    ends, _ = _cheapest_chain((held[None, 1:] - held[:-1, None]) * costs, num_sub_buckets)
    return [int(occupied[end]) for end in ends]


def _lower_bound(counts: _Counts, floors: np.ndarray, num_buckets: int, num_sub_buckets: int, exact: bool) -> float:
    """What no bins fall below, whatever was rounded.

    Every cap is at least the floor of its cell of the grid. A cap of inputs may divide the examples of its cell in a
    way that the grid cannot: those are counted as if each had a bucket to itself; the cells between two caps are whole.

    Args:
        floors: (m, p) what an example costs in the cheapest place of each cell.
        exact: whether inputs were taken as they are, so that no cell can be divided.
    """
    if exact:
        return _cheapest_chain(_strip_costs(counts, floors, num_sub_buckets), num_buckets)[1]
    size = len(floors)
    alone = (counts.histogram * floors).sum(axis=1)
    # A strip from inside cell i to inside cell j > i holds the cells between them; its cap is above the floor of j.
    whole = _strip_costs(counts, np.vstack([floors[1:], floors[-1:]]), num_sub_buckets)
    strips = np.full((size + 1, size + 1), np.inf)  # [i + 1, j]; i = -1 is the start, j = size the end of all cells
    strips[:size, 1:] = whole
    np.fill_diagonal(strips, 0.0)
    strips += np.append(alone, 0.0)
    best = strips[0]
    for _ in range(num_buckets - 1):
        # To stay in the cell costs nothing: its examples are counted already.
        onward = (best[:size, None] + strips[1:]).min(axis=0)
        best = np.minimum(best, onward)
    return float(best[size])
