"""Batch sizes for steps that hold a batch of every group at once (``sampler_fusion: zip``).

The memory of a step is split once between the modalities. The groups before the last get batch sizes for their share,
each alone. The last group's are then found in whole steps, together with the largest batches of the others, so that
what modalities share (activations of the one are freed while the other is computed) is measured, not assumed.

Which batch of a group takes the most memory in a whole step depends on when the model frees what: either the one with
the highest peak of its own, or the one that holds the most activations for the backward pass. The first is the
companion in all steps of the last group. At the end, whole steps are run with the second; if they exceed the budget,
batches that hold so much are made smaller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from nemo_emmett.errors import ConfigError
from nemo_emmett.oomptimizer.buckets import Bucket, Group
from nemo_emmett.oomptimizer.meter import Reading
from nemo_emmett.oomptimizer.search import Result, Search

JointProbe = Callable[[Mapping[Bucket, int]], Reading]
"""Runs one step with so many examples of one bucket of each of some groups."""

SHARES = [share / 20 for share in range(2, 19)]
"""What ``modality_share: auto`` chooses from."""


ASSUMED_EXCESS = 0.02
"""Share of the memory for batches by which a step that ran out of memory is assumed to exceed the budget."""


class ZipSearch:
    """Finds the batch sizes of groups whose batches share their steps.

    Args:
        groups: two or more.
        probe: runs a step.
        budget: bytes that a step may take.
        base: bytes alive throughout every step.
        resident: bytes alive before a step begins.
        audio_share: of the memory above ``resident``, for groups of speech together; the rest is for text.
        padded_together: the model pads all groups' examples to one width, so that batches of many short ones and of
            few long ones waste the more the more they differ: the last group is tried with both.
        search_options: of :class:`~nemo_emmett.oomptimizer.search.Search`.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        probe: JointProbe,
        budget: int,
        base: float,
        resident: float,
        audio_share: float,
        padded_together: bool = False,
        **search_options: float,
    ) -> None:
        # Speech comes last: its examples are large, so its batch sizes are the coarser unit.
        self._groups = sorted(groups, key=lambda group: group.modality == "audio")
        self._probe, self._budget, self._base, self._resident = probe, budget, base, resident
        self._shares = shares_of(self._groups, audio_share)
        self._padded_together, self._options = padded_together, search_options

    def run(self) -> Iterator[Result]:
        """Find all batch sizes.

        Raises:
            ConfigError: if a bucket does not fit with a single example in its share.
        """
        *others, last = self._groups
        found = {group.name: list(self._alone(group)) for group in others}
        companion = {result.bucket: result.batch_size for result in map(_highest, found.values())}
        companions = [companion]
        if self._padded_together:  # also the most short examples, and the longest
            most = [max(results, key=lambda result: result.batch_size) for results in found.values()]
            longest = [max(results, key=lambda result: result.bucket.index) for results in found.values()]
            companions += [{result.bucket: result.batch_size for result in results} for results in (most, longest)]

        def probe(bucket: Bucket, size: int) -> Reading:
            """The step with the highest peak; one that runs out of memory is the worst."""
            steps = {frozenset(others.items()): {**others, bucket: size} for others in companions}
            return max(map(self._probe, steps.values()), key=lambda reading: (reading.out_of_memory, reading.peak))

        search = Search(probe, self._budget, self._base, **self._options)
        of_last = []
        for result in search.run(last.buckets):
            of_last.append(result)
            yield result
        for group in others:
            yield from self._checked(found[group.name], companion, of_last)

    def _alone(self, group: Group) -> Iterator[Result]:
        budget = self._resident + self._shares[group.name] * (self._budget - self._resident)
        search = Search(lambda bucket, size: self._probe({bucket: size}), round(budget), self._base, **self._options)
        try:
            yield from search.run(group.buckets)
        except ConfigError as error:
            raise ConfigError(
                f"{str(error).rstrip('.')}; that budget is what modality_share leaves to '{group.name}', so another "
                "share may help as well."
            ) from error

    def _checked(
        self, results: Sequence[Result], companion: Mapping[Bucket, int], of_last: Sequence[Result]
    ) -> list[Result]:
        """The results of a group; lowered if batches hold too much in a step with the largest of the last group."""
        rest = {bucket: size for bucket, size in companion.items() if bucket.group != results[0].bucket.group}
        results = list(results)
        of_companion = _held(_highest(results))
        while (holds_most := max(results, key=_held)).bucket not in companion:
            step = {**rest, holds_most.bucket: holds_most.batch_size}
            more = _held(holds_most) - of_companion
            peak = max(
                self._joint_peak(step, more, largest) for largest in (_highest(of_last), max(of_last, key=_held))
            )
            if peak <= self._budget or holds_most.batch_size == 1:
                break
            allowed = _held(holds_most) - (peak - self._budget)
            results = [self._holding_at_most(allowed, result) for result in results]
        return results

    def _joint_peak(self, step: Mapping[Bucket, int], more: float, largest: Result) -> float:
        """Peak of a step with a batch of the last group, where the others hold ``more`` bytes than the companion did.

        If that might exceed the budget, a smaller batch is run, and the peak extrapolated along its line.
        """
        rise = max(largest.line.slope, 1.0)
        excess = largest.confirmed.peak + max(more, 0.0) - self._budget
        fewer = min(max(0, math.ceil(excess / rise)), largest.batch_size - 1)
        reading = self._probe({**step, largest.bucket: largest.batch_size - fewer})
        if reading.out_of_memory:  # the peak is then what was reached before
            return max(reading.peak, self._budget) + ASSUMED_EXCESS * (self._budget - self._resident)
        return reading.peak + fewer * rise

    def _holding_at_most(self, allowed: float, result: Result) -> Result:
        held = _held(result)
        if held <= allowed:
            return result
        share = max(0.0, allowed - self._resident) / (held - self._resident)
        size = max(1, min(math.floor(share * result.batch_size), result.batch_size - 1))
        held = self._resident + (held - self._resident) * size / result.batch_size
        confirmed = replace(result.confirmed, peak=round(result.line.peak(size)), held=round(held))
        return replace(
            result, batch_size=size, predicted_peak=result.line.peak(size), confirmed=confirmed, measured=False
        )


def shares_of(groups: Sequence[Group], audio_share: float) -> dict[str, float]:
    """Each group's share of the memory: groups of one modality share evenly; a single modality has all of it."""
    members = {m: [g.name for g in groups if g.modality == m] for m in ("audio", "text")}
    if not members["audio"] or not members["text"]:
        return {group.name: 1 / len(groups) for group in groups}
    share = {"audio": audio_share, "text": 1 - audio_share}
    return {name: share[modality] / len(names) for modality, names in members.items() for name in names}


def best_share(results: Sequence[Result]) -> float:
    """The share of the memory for speech with the most tokens (and frames' worth of seconds) per second.

    Args:
        results: of all groups, each found alone; steps must have been timed.

    The rate is that of a step with the mean batch of each modality; its time is the sum of theirs.
    """
    by_modality = {m: [r for r in results if r.bucket.shape.modality == m] for m in ("audio", "text")}

    def rate(share: float) -> float:
        parts = {"audio": share, "text": 1 - share}
        tokens = seconds = 0.0
        for modality, members in by_modality.items():
            for result in members:
                size = parts[modality] * result.batch_size / len(members)
                tokens += size * result.bucket.shape.output_tokens  # which both modalities are trained on
                seconds += size * result.confirmed.seconds / result.batch_size
        return tokens / seconds

    return max(SHARES, key=rate)


def _highest(results: Sequence[Result]) -> Result:
    return max(results, key=lambda result: result.confirmed.peak)


def _held(result: Result) -> float:
    """Bytes alive at the end of the forward pass."""
    return float(result.confirmed.held)
