"""Proportional mixing: sources are drawn so that each keeps its share at every moment, not only on average."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


class ProportionalMixer:
    """An endless sequence of indices in which index i has the share ``shares[i]`` of the draws so far, up to one draw.

    After n draws index i should have ``shares[i] * n`` of them. Tijdeman's rule (The chairman assignment problem, 1980)
    draws, of all indices that may be drawn already, the one with the earliest deadline; then no count is ever off by
    more than ``1 - 1 / (2k - 2)`` for k indices, which is the best possible bound.

    Args:
        shares: they need not sum to one; an index with the share 0 is never drawn.
        seed: shifts the start by a random amount for each index, so that workers do not draw the same sequence; None:
            no shift. The shift adds up to a half to the bound.
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
        largest_debt, fallback = -float("inf"), 0  # with shifted starts, or by rounding, none may be due
        for index, share in enumerate(self.shares):
            if share <= 0:
                continue
            owed = share * self._drawn - self._counts[index] + self._shifts[index]
            if owed + share > largest_debt:
                largest_debt, fallback = owed + share, index
            if owed + share >= self._slack:
                deadline = (1.0 - self._slack - owed) / share  # in draws from now
                if deadline < earliest:
                    earliest, chosen = deadline, index
        chosen = fallback if chosen is None else chosen
        self._counts[chosen] += 1
        self._drawn += 1
        return chosen

    def remove(self, index: int) -> None:
        """Never draw this index again; its share goes to the others in proportion."""
        left = [0.0 if i == index else share for i, share in enumerate(self.shares)]
        total = sum(left)
        self.shares = [share / total for share in left] if total > 0 else left
        self._slack = self._slack_of(self.shares)
        self._counts, self._drawn = [0] * len(left), 0

    @property
    def is_empty(self) -> bool:
        """Whether all indices were removed."""
        return not any(self.shares)

    def state_dict(self) -> dict[str, Any]:
        """The state of the sequence."""
        return {"shares": list(self.shares), "counts": list(self._counts), "drawn": self._drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        self.shares = list(state["shares"])
        self._counts = list(state["counts"])
        self._drawn = state["drawn"]
        self._slack = self._slack_of(self.shares)
