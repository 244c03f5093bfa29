"""Which examples share a row of the language model's input, and which of those that wait form a step.

A step has so many rows for each rank. It is made of the oldest example that waits, of others of about its length, so
that recordings need little padding in the speech encoder, and of shorter ones in what space is left. What it is made of
follows from the first examples that wait alone, in the order in which they were mixed; so a run that is resumed makes
the same steps.

Shapes: N examples, R rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from nemo_emmett.data.lengths.measures import Measures

WINDOW = 16
"""Steps whose positions wait before a step is made of some of them."""


@dataclass(frozen=True)
class Packing:
    """The rows of a group's batches.

    Args:
        rows: of the batch of a rank.
        size: most positions of a row.
        answer_size: most tokens of the answers of a row.
        is_joint: answers are in the same rows as contexts (decoder-only models), and not in rows of their own.
        token_equivalent_duration: seconds of a recording to a position of the language model; None: recordings have no
            positions there.
        seconds: most seconds of the recordings of a row, each counted as the longest of its step, as it is padded for
            the speech encoder.
    """

    rows: int
    size: int
    answer_size: int
    is_joint: bool
    token_equivalent_duration: float | None = None
    seconds: float = math.inf

    def positions_and_answers(self, measures: Measures) -> tuple[np.ndarray, np.ndarray]:
        """(N,) int64 positions that each example takes, and (N,) tokens of its answer.

        A recording counts as its locator token and, for each whole step of its frames, one more: no encoder that pads
        its input makes more of it.
        """
        # Of a cut NeMo counts the tokens of context and answer as its output.
        answers = np.where(measures.is_cut, measures.outputs - measures.inputs, measures.outputs)
        positions = measures.inputs.copy()
        if self.token_equivalent_duration is not None:
            steps = np.floor(np.nan_to_num(measures.seconds) / self.token_equivalent_duration + 1e-6)
            positions += np.where(measures.is_cut, steps, 0).astype(np.int64)
        return positions + answers * self.is_joint, answers

    def fits(self, measures: Measures) -> np.ndarray:
        """(N,) bool, the examples that are no longer than a row."""
        positions, answers = self.positions_and_answers(measures)
        seconds = np.nan_to_num(measures.seconds)
        return (positions <= self.size) & (answers <= self.answer_size) & (seconds <= self.seconds)

    def next_step(self, waiting: np.ndarray, ranks: int, at_end: bool = False) -> tuple[np.ndarray, np.ndarray] | None:
        """The examples of the next step, and the row of each.

        Args:
            waiting: (N,) EXAMPLE, the oldest first.
            ranks: among which the rows are divided.
            at_end: no others will come.

        Returns:
            (M,) numbers of examples, and (M,) their rows, ascending, of which none is empty; None while too few wait.
        """
        rows = ranks * self.rows
        ends = np.cumsum(waiting["positions"], dtype=np.int64)
        window = int(np.searchsorted(ends, WINDOW * rows * self.size)) + 1
        if len(waiting) < window:
            if not at_end or len(waiting) < ranks:
                return None
            window = len(waiting)
        window = waiting[:window]
        chosen = self._fill(window, _by_length(window, rows * self.size), rows)
        if at_end and 0 < (left := len(waiting) - len(chosen)) < len(chosen):
            # The last two steps share the rest, so that the last one has rows for all ranks.
            chosen = {number: chosen[number] for number in sorted(chosen)[: (len(chosen) + left + 1) // 2]}
        chosen = _spread(chosen, ranks)
        numbers = sorted(chosen, key=lambda number: (chosen[number], number))
        return np.array(numbers), np.array([chosen[number] for number in numbers])

    def _fill(self, window: np.ndarray, candidates: list[int], rows: int) -> dict[int, int]:
        """Best fit: each candidate in turn goes to the row that it leaves the least space in, if there is one.

        Returns:
            Number of the example -> row.
        """
        positions, answers, lengths = (window[key].tolist() for key in ("positions", "answers", "length"))
        space, answer_space = np.full(rows, self.size), np.full(rows, self.answer_size)
        counts, longest, chosen = np.zeros(rows, np.int64), 0.0, {}
        smallest = min(positions)
        for number in candidates:
            if space.max() < smallest:
                break
            padded = max(longest, lengths[number])
            fits = (space >= positions[number]) & (answer_space >= answers[number])
            fits &= (counts + 1) * padded <= self.seconds
            if not fits.any() or (counts * padded > self.seconds).any():
                continue
            row = int(np.where(fits, space, self.size + 1).argmin())
            chosen[number] = row
            space[row] -= positions[number]
            answer_space[row] -= answers[number]
            counts[row] += 1
            longest = max(longest, lengths[number])
        return chosen


def _by_length(window: np.ndarray, positions: int) -> list[int]:
    """The examples in the order in which they are tried: the oldest; those of about its length that have so many
    positions, the longest first; then all that are shorter, the longest first."""
    keys = window["length"] if window["length"].any() else window["positions"]
    order = np.argsort(-keys, kind="stable")
    ends = np.cumsum(window["positions"][order], dtype=np.int64)
    parts = max(1, int(ends[-1]) // positions)
    part = np.minimum(ends * parts // (int(ends[-1]) + 1), parts - 1)
    first = part[np.flatnonzero(order == 0)[0]]
    return [0, *(number for number in order[part >= first].tolist() if number)]


def _spread(chosen: dict[int, int], ranks: int) -> dict[int, int]:
    """The same examples without empty rows, and in at least one row for each rank, which at the end of the data may
    need some that are less full."""
    used: dict[int, list[int]] = {}
    for number, row in chosen.items():
        used.setdefault(row, []).append(number)
    rows = [numbers for _, numbers in sorted(used.items())]
    while len(rows) < ranks:
        longest = max(rows, key=len)
        rows.remove(longest)
        rows += [longest[::2], longest[1::2]]
    return {number: row for row, numbers in enumerate(rows) for number in numbers}
