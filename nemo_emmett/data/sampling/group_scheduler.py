"""Which group gives the next step, and what is said when finite data ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class GroupScheduler:
    """Which group gives the next step: in turn, or at random with each group's share kept at every moment.

    A group's credit grows by its weight at each step and falls by one when it is drawn. Groups are drawn with
    probabilities proportional to their credit, as far as it is positive. So over any n steps a group gives n times its
    weight, up to the number of groups, while independent draws are off by about the square root of n.

    Args:
        weights: the groups' shares of the steps; None: in turn.
        num_groups: how many there are.
        seed: of the draws.
    """

    weights: list[float] | None
    num_groups: int
    seed: list[int]
    step: int = 0
    ended: list[int] = field(default_factory=list)
    credit: list[float] = field(default_factory=list)

    def next(self) -> int:
        """The number of the group."""
        alive = [group for group in range(self.num_groups) if group not in self.ended]
        self.step += 1
        if self.weights is None:
            return alive[(self.step - 1) % len(alive)]
        self.credit = self.credit or [0.0] * self.num_groups
        total = sum(self.weights[group] for group in alive)
        for group in alive:
            self.credit[group] += self.weights[group] / total
        odds = np.maximum([self.credit[group] for group in alive], 0.0)
        rng = np.random.default_rng([*self.seed, self.step])  # seeded by the step, so that it has no state to save
        chosen = alive[int(rng.choice(len(alive), p=odds / odds.sum()))]
        self.credit[chosen] -= 1.0
        return chosen

    def end(self, group: int) -> None:
        """Never draw this group again. Credits start over, since those of the other groups may all be negative."""
        self.ended.append(group)
        self.credit = []

    def state_dict(self) -> dict[str, Any]:
        """The state of the schedule."""
        return {"step": self.step, "ended": list(self.ended), "credit": list(self.credit)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        self.step, self.ended, self.credit = state["step"], list(state["ended"]), list(state["credit"])


def what_was_left_out(left_out: Mapping[str, int], ended: str | None, unused: int) -> str:
    """The message, for the log, on examples that no step has held when finite data ended; empty if there are none.

    Args:
        left_out: for each group, the examples that did not fill a batch for each rank.
        ended: the group with which ``zip`` ended; None with other fusions.
        unused: examples that were taken from the other groups by then.
    """
    parts = []
    if ended is not None and len(left_out) > 1:
        parts.append(
            f"zip ended with {ended}, the first group to end; {unused} examples drawn from the others were not used"
        )
    for group, number in left_out.items():
        if number:
            what = f"of {group} " if group else ""
            parts.append(f"{number} examples {what}did not fill a batch for each rank and were left out")
    return "; ".join(parts)
