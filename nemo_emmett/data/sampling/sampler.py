"""One worker's sampler: groups of sources, each with its blend and its buckets, fused into steps.

All ranks run the same sampler on the same data, and each takes its own batch of every step. So they agree on group and
bucket without a word, no example goes to two of them, and the state of one is the state of all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from lhotse import CutSet
from nemo.utils import logging

from nemo_emmett.data.sampling.buckets import Buckets, Drawn
from nemo_emmett.data.sampling.proportional_mixing import ProportionalMixer
from nemo_emmett.data.sampling.source_iterator import ChunkReader, Leaf, WorkerInfo
from nemo_emmett.data.sampling.transforms import TransformPipeline


@dataclass
class GroupPlan:
    """What a group's samplers are made of, the same in every process.

    Args:
        name: of the group; empty where a dataset has none.
        readers: one for each source.
        names: of the sources, by which a state is matched to them.
        seeds: for each source, of its random stages and of the order of its examples.
        num_open: chunks of each source that are open at a time.
        shares: of the examples, one for each source.
        chain: NeMo's chain of maps and filters.
    """

    name: str
    readers: list[ChunkReader]
    names: list[str]
    seeds: list[list[int]]
    num_open: list[int]
    shares: list[float]
    chain: TransformPipeline


@dataclass
class SamplingPlan:
    """What the samplers of all workers and ranks are made of.

    Args:
        groups: at least one.
        fusion: ``zip``, ``round_robin`` or ``randomized_round_robin``; means nothing for one group.
        weights: of the groups under ``randomized_round_robin``.
        world_size: number of ranks.
        shuffle: whether the groups' draws are shifted at random.
        finite: whether an epoch is one pass over the data.
        seed: of all draws.
    """

    groups: list[GroupPlan]
    fusion: str
    weights: list[float]
    world_size: int
    shuffle: bool
    finite: bool
    seed: int


class GroupSampler:
    """Steps of one group: a batch for each rank, all from one bucket.

    Args:
        plan: the group's.
        number: of the group, for its seeds.
        of_all: the plan of the dataset.
        share: the worker's.
        epoch: which pass over finite data this is.
    """

    def __init__(self, plan: GroupPlan, number: int, of_all: SamplingPlan, share: WorkerInfo, epoch: int) -> None:
        self.plan = plan
        self.world_size = of_all.world_size
        self.leaves = [
            Leaf(reader, plan.chain, seed, share, epoch, name, num_open)
            for reader, seed, name, num_open in zip(plan.readers, plan.seeds, plan.names, plan.num_open, strict=True)
        ]
        shift = [of_all.seed, number, share.worker, epoch] if of_all.shuffle else None
        self.draws = ProportionalMixer(plan.shares, shift)
        self.buckets = Buckets(plan.chain.constraint, plan.chain.duration_bins, of_all.world_size, plan.chain.drop_last)
        self.left_out = 0  # examples that fit into no step when the data ended
        self._ready: list[list[list[Drawn]]] = []  # steps that are complete already
        self._has_ended = False

    def next_step(self) -> list[list[Any]]:
        """The examples of a batch for each rank.

        Raises:
            StopIteration: at the end of finite data.
        """
        while not self._ready:
            if self._has_ended:
                raise StopIteration
            if self.draws.is_empty:
                self._ready, self.left_out = self.buckets.flush()
                self._has_ended = True
                continue
            number = self.draws.next()
            try:
                example, (chunk, index) = self.leaves[number].next()
            except StopIteration:
                self.draws.remove(number)
                continue
            if (step := self.buckets.add(Drawn(example, number, chunk, index))) is not None:
                self._ready.append(step)
        return [[drawn.example for drawn in batch] for batch in self._ready.pop(0)]

    @property
    def waiting(self) -> int:
        """Examples in the buckets."""
        return len(self.buckets.waiting())

    def state_dict(self) -> dict[str, Any]:
        """Where the sources are, whose turn it is, and which examples wait in the buckets."""
        return {
            "sources": list(self.plan.names),
            "sizes": [reader.records_in_a_pass() for reader in self.plan.readers],
            "shares": list(self.plan.shares),
            "leaves": [leaf.state_dict() for leaf in self.leaves],
            "draws": self.draws.state_dict(),
            "waiting": _places(self.buckets.waiting()),
            "ready": [[_places(batch) for batch in step] for step in self._ready],
            "has_ended": self._has_ended,
            "left_out": self.left_out,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. Sources that it does not know begin at their beginning, which is logged."""
        numbers = self._numbers_of(state["sources"])
        for old, number in numbers.items():
            self._warn_of_change(state["sizes"][old], number)
            self.leaves[number].load_state_dict(state["leaves"][old])
        if list(state["shares"]) == list(self.plan.shares) and numbers == dict(enumerate(range(len(self.leaves)))):
            self.draws.load_state_dict(state["draws"])
        else:
            logging.info(
                f"{self.plan.name or 'The data'}: sources or weights differ from the checkpoint's; the blend is drawn "
                "anew, sources that were there before go on where they were."
            )
        self._ready = [[self._found_again(batch, numbers) for batch in step] for step in state["ready"]]
        if any(len(step) != self.world_size for step in self._ready):  # of another number of ranks
            again, self._ready = [drawn for step in self._ready for batch in step for drawn in batch], []
            self._put_back(again)
        self._put_back(self._found_again(state["waiting"], numbers))
        self._has_ended, self.left_out = state["has_ended"], state["left_out"]
        if self._has_ended and self.buckets.waiting():
            steps, left_out = self.buckets.flush()
            self._ready, self.left_out = self._ready + steps, self.left_out + left_out

    def _put_back(self, waited: Sequence[Drawn]) -> None:
        for drawn in waited:  # fewer ranks or smaller batches than the checkpoint's complete some steps
            if (step := self.buckets.add(drawn)) is not None:
                self._ready.append(step)

    def _warn_of_change(self, size: int | None, number: int) -> None:
        now = self.plan.readers[number].records_in_a_pass()
        if now != size:
            logging.warning(
                f"{self.plan.names[number]} has {now} records, {size} when the checkpoint was written: its order is "
                "another, so records may repeat or be left out in this pass."
            )

    def _numbers_of(self, sources: Sequence[str]) -> dict[int, int]:
        """For each source of a state, by number, the number that it has here."""
        here: dict[str, list[int]] = {}
        for number, name in enumerate(self.plan.names):
            here.setdefault(name, []).append(number)
        return {old: here[name].pop(0) for old, name in enumerate(sources) if here.get(name)}

    def _found_again(self, places: Sequence[Sequence[int]], numbers: Mapping[int, int]) -> list[Drawn]:
        wanted: dict[int, list[tuple[int, int]]] = {}
        for leaf, chunk, index in places:
            if leaf in numbers:
                wanted.setdefault(leaf, []).append((chunk, index))
        found = {leaf: iter(self.leaves[numbers[leaf]].examples_at(of_leaf)) for leaf, of_leaf in wanted.items()}
        again = [
            Drawn(next(found[leaf]), numbers[leaf], chunk, index) for leaf, chunk, index in places if leaf in numbers
        ]
        return [drawn for drawn in again if drawn.example is not None]


def _places(batch: Sequence[Drawn]) -> list[list[int]]:
    return [[drawn.leaf, drawn.chunk, drawn.index] for drawn in batch]


@dataclass
class GroupScheduler:
    """Which group gives the next step: in turns, or at random yet so that each keeps its share in any stretch.

    A group's credit grows by its weight at each step and falls by one when it is drawn. Groups are drawn with
    probabilities proportional to their credit, as far as it is positive. So over any n steps a group gives n times its
    weight give or take the number of groups, where independent draws are off by about the square root of n.

    Args:
        weights: the groups' shares of the steps; None: in turns.
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
        rng = np.random.default_rng([*self.seed, self.step])
        chosen = alive[int(rng.choice(len(alive), p=odds / odds.sum()))]
        self.credit[chosen] -= 1.0
        return chosen

    def end(self, group: int) -> None:
        """Never draw this group again; the others start even, since their credits alone may all be negative."""
        self.ended.append(group)
        self.credit = []

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on from here."""
        return {"step": self.step, "ended": list(self.ended), "credit": list(self.credit)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.step, self.ended, self.credit = state["step"], list(state["ended"]), list(state["credit"])


class WorkerSampler:
    """The steps of one worker process, as one rank takes them.

    Args:
        plan: the dataset's.
        share: the worker's.
        rank: whose batches to take.
        epoch: which pass over finite data this is.
    """

    def __init__(self, plan: SamplingPlan, share: WorkerInfo, rank: int, epoch: int = 0) -> None:
        self.plan = plan
        self.share = share
        self.rank = rank
        self.epoch = epoch
        self.groups = [GroupSampler(group, number, plan, share, epoch) for number, group in enumerate(plan.groups)]
        weights = plan.weights if plan.fusion == "randomized_round_robin" else None
        self.turns = GroupScheduler(weights, len(self.groups), [plan.seed, 7, share.worker, epoch])
        self.steps = 0
        self.end_of_data_message = ""  # what the log shall say of what was left when finite data ended

    def next(self) -> CutSet:
        """This rank's examples of the next step.

        Raises:
            StopIteration: at the end of finite data.
        """
        examples = self._of_each_group() if self.plan.fusion == "zip" else self._of_next_group()
        self.steps += 1
        return CutSet(examples)

    def _of_each_group(self) -> list:
        taken = []
        for number, group in enumerate(self.groups):
            try:
                taken.extend(self._batch_of(number, group.next_step()))
            except StopIteration:
                self._say_farewell(group, len(taken))
                raise
        return taken

    def _of_next_group(self) -> list:
        while len(self.turns.ended) < len(self.groups):
            number = self.turns.next()
            try:
                return list(self._batch_of(number, self.groups[number].next_step()))
            except StopIteration:
                self.turns.end(number)
        self._say_farewell()
        raise StopIteration

    def _batch_of(self, number: int, step: list[list[Any]]) -> CutSet:
        seed = [self.plan.seed, number, self.share.worker, self.epoch, self.steps, self.rank]
        return self.groups[number].plan.chain.finish(CutSet(step[self.rank]), seed)

    def _say_farewell(self, ended: GroupSampler | None = None, unused: int = 0) -> None:
        said = []
        if ended is not None and len(self.groups) > 1:
            unused += sum(group.waiting for group in self.groups if group is not ended)
            said.append(
                f"zip ended with {ended.plan.name}, the first group to end; {unused} examples drawn from the others "
                "were not used"
            )
        for group in self.groups:
            if group.left_out:
                what = f"of {group.plan.name} " if group.plan.name else ""
                said.append(f"{group.left_out} examples {what}did not fill a batch for each rank and were left out")
        self.end_of_data_message = "; ".join(said)

    def take_filtered(self) -> Counter[str]:
        """The examples left out by filters since the last call, by the keys of the filter; "" for those kept."""
        filtered: Counter[str] = Counter()
        for group in self.plan.groups:
            filtered += group.chain.filtered
            group.chain.filtered.clear()
        return filtered

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on, as plain numbers and strings."""
        return {
            "epoch": self.epoch,
            "steps": self.steps,
            "groups": {group.plan.name: group.state_dict() for group in self.groups},
            "turns": self.turns.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        for group in self.groups:
            if group.plan.name in state["groups"]:
                group.load_state_dict(state["groups"][group.plan.name])
            else:
                logging.info(f"{group.plan.name}: the checkpoint's data has no such group; it begins at its beginning.")
        self.steps = state["steps"]
        if set(state["groups"]) == {group.plan.name for group in self.groups}:
            self.turns.load_state_dict(state["turns"])
