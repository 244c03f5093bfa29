"""Which of several sources comes next, so that each keeps its share in every stretch, not only on average."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


class ProportionalMixer:
    """An endless sequence of indices in which index i has the share ``shares[i]`` of any stretch, give or take one.

    After n draws index i is due ``shares[i] * n`` times. Tijdeman's rule (The chairman assignment problem, 1980) draws,
    of all that are due soon enough, the one whose time is over first; then no count is ever off by more than
    ``1 - 1 / (2k - 2)`` for k indices, which is the best that any rule can promise.

    Args:
        shares: they need not sum to one; an index with the share 0 is never drawn.
        seed: shifts the beginning by a random amount for each index, so that workers do not draw in lockstep; None:
            no shift. The shift adds up to a half to the promise.
    """

    def __init__(self, shares: Sequence[float], seed: Sequence[int] | None = None) -> None:
        total = sum(shares)
        self.shares = [share / total for share in shares]
        self._shifts = [0.0] * len(self.shares)
        if seed is not None:
            draws = np.random.default_rng(list(seed)).uniform(-0.5, 0.5, len(self.shares))
            self._shifts = [float(shift) for shift in (draws - draws.mean()) / 2]
        self._counts = [0] * len(self.shares)
        self._drawn = 0
        self._slack = self._slack_of(self.shares)

    @staticmethod
    def _slack_of(shares: Sequence[float]) -> float:
        alive = sum(share > 0 for share in shares)
        return 1.0 / (2 * alive - 2) if alive > 1 else 0.0

    def next(self) -> int:
        """The next index."""
        earliest, chosen = float("inf"), None
        most_due, fallback = -float("inf"), 0
        for index, share in enumerate(self.shares):
            if share <= 0:
                continue
            owed = share * self._drawn - self._counts[index] + self._shifts[index]
            if owed + share > most_due:
                most_due, fallback = owed + share, index
            if owed + share >= self._slack:
                over = (1.0 - self._slack - owed) / share
                if over < earliest:
                    earliest, chosen = over, index
        chosen = fallback if chosen is None else chosen
        self._counts[chosen] += 1
        self._drawn += 1
        return chosen

    def remove(self, index: int) -> None:
        """Never draw this index again; the others share what it had."""
        left = [0.0 if i == index else share for i, share in enumerate(self.shares)]
        total = sum(left)
        self.shares = [share / total for share in left] if total > 0 else left
        self._slack = self._slack_of(self.shares)
        self._counts, self._drawn = [0] * len(left), 0

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing left to draw."""
        return not any(self.shares)

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on from here."""
        return {"shares": list(self.shares), "counts": list(self._counts), "drawn": self._drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.shares = list(state["shares"])
        self._counts = list(state["counts"])
        self._drawn = state["drawn"]
        self._slack = self._slack_of(self.shares)
