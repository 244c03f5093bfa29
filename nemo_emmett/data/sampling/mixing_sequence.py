"""Which source each example of a blend comes from: an endless sequence, computed in blocks, in which shares hold."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from heapq import heapify, heappop, heappush
from math import lcm

import numpy as np

LONGEST_PERIOD = 1 << 20
"""Draws after which a sequence repeats, at most, where no share is so small that it needs more."""

SHORTEST_PERIOD = 1 << 16
"""A shorter one is repeated, so that a block of draws is looked up in few pieces."""

DRAWS_OF_THE_SMALLEST_SHARE = 1_000
"""In a period, at least, unless shares are exact."""


class MixingSequence:
    """Draws of sources in which source i has ``shares[i]`` of the first n draws, to within less than one, for every n.

    Tijdeman's rule (The chairman assignment problem, 1980): the j-th draw of a source may not come before, and must not
    come after, certain draws; of the sources that may be drawn, the one with the earliest deadline is. Then no count is
    ever off by more than ``1 - 1 / (2k - 2)`` for k sources, the best possible bound.

    Shares are fractions of a common period: exactly where their denominators allow it (weights such as 0.3 and 0.7),
    else rounded to the nearest part of :data:`LONGEST_PERIOD`, which is one example in a million. All arithmetic is on
    integers, so every process computes the same sequence; and a period, once computed, is looked up.

    Args:
        shares: of the sources, not negative; they need not sum to one.
    """

    def __init__(self, shares: Sequence[float]) -> None:
        self.parts, self.period = _parts_of_a_period(shares)
        alive = sum(part > 0 for part in self.parts)
        self._slack = max(2 * alive - 2, 1)  # Tijdeman's slack is one divided by this
        self._looked_up = np.empty(self.period if self.period <= LONGEST_PERIOD else 0, np.int16)
        self._known = 0  # of the period, from its beginning
        self._drawn = 0
        self._counts = [0] * len(self.parts)

    @property
    def counts(self) -> list[int]:
        """The draws of each source since the last multiple of the period."""
        return list(self._counts)

    def go_to(self, drawn: int, counts: Sequence[int]) -> None:
        """Continue after so many draws, of which the sources have had these since the last multiple of the period."""
        self._drawn, self._counts = drawn, list(counts)

    def next(self, number: int) -> np.ndarray:
        """(number,) int16, the sources of the next draws."""
        blocks = [np.empty(0, np.int16)]
        while number > 0:
            offset = self._drawn % self.period
            size = min(number, self.period - offset)
            if offset + size <= self._known:
                block = self._looked_up[offset : offset + size]
            else:
                block = self._draw(offset, size)
                if offset <= self._known and len(self._looked_up):
                    self._known = offset + size
                    self._looked_up[offset : self._known] = block
            counted = np.bincount(block, minlength=len(self.parts)).tolist()
            self._counts = [old + new for old, new in zip(self._counts, counted, strict=True)]
            self._drawn += size
            if self._drawn % self.period == 0:
                self._counts = [0] * len(self.parts)
            blocks.append(block)
            number -= size
        return np.concatenate(blocks)

    def _draw(self, drawn: int, number: int) -> np.ndarray:
        """The draws after the first ``drawn`` of a period, by earliest deadline."""
        last = drawn + number
        releases, keys = [], []
        for source, part in enumerate(self.parts):
            if not part:
                continue
            # The draws of this source that may come by the last one, from its next one on.
            draws = np.arange(
                self._counts[source], last * part // self.period + 2, dtype=object if self._is_wide else None
            )
            scale = self._slack * part
            release = -(-(self._slack * draws + 1) * self.period // scale)
            deadline = (self._slack * (draws + 1) - 1) * self.period // scale
            may_come = release <= last
            releases.append(release[may_come])
            keys.append(deadline[may_come] * len(self.parts) + source)
        releases, keys = np.concatenate(releases), np.concatenate(keys)
        order = np.argsort(releases, kind="stable")
        releases, keys = releases[order], keys[order]
        waiting = keys[: (first := int(np.searchsorted(releases, drawn, side="right")))].tolist()
        heapify(waiting)
        keys = keys[first:].tolist()
        # How many become available for each draw.
        available = np.searchsorted(releases[first:], np.arange(drawn + 1, last + 1), side="right").tolist()
        drawn_keys, added = [], 0
        for until in available:
            while added < until:
                heappush(waiting, keys[added])
                added += 1
            drawn_keys.append(heappop(waiting))
        return (np.array(drawn_keys) % len(self.parts)).astype(np.int16)

    @property
    def _is_wide(self) -> bool:
        """Whether products may exceed 64 bits."""
        return self.period**2 * self._slack > 1 << 62


def _parts_of_a_period(shares: Sequence[float]) -> tuple[list[int], int]:
    """Whole numbers in the proportion of the shares, and their sum."""
    total = sum(shares)
    exact = [Fraction(share / total).limit_denominator(LONGEST_PERIOD) for share in shares]
    period = lcm(*(fraction.denominator for fraction in exact))
    is_exact = sum(exact) == 1 and all(abs(f - share / total) < 1e-12 for f, share in zip(exact, shares, strict=True))
    if is_exact and period <= LONGEST_PERIOD:
        period *= max(1, SHORTEST_PERIOD // period)
        return [int(fraction * period) for fraction in exact], period
    smallest = min(share for share in shares if share > 0) / total
    period = LONGEST_PERIOD
    while smallest * period < DRAWS_OF_THE_SMALLEST_SHARE:
        period *= 2
    quotas = [Fraction(share) / Fraction(total) * period for share in shares]
    parts = [int(quota) for quota in quotas]
    by_rest = sorted(range(len(parts)), key=lambda source: parts[source] - quotas[source])
    for source in by_rest[: period - sum(parts)]:
        parts[source] += 1
    return parts, period
