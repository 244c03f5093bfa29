"""The global batches of one group, computed from length indexes.

A global batch holds examples of one bucket; it is divided among the ranks in the order of the examples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
from nemo.utils import logging

from nemo_emmett.data.config.sources import Source
from nemo_emmett.data.lengths.packing import Packing
from nemo_emmett.data.lengths.selection import Selection
from nemo_emmett.data.sampling.mixing_sequence import MixingSequence
from nemo_emmett.data.sampling.source_order import Cursor, SourceOrder, joined

FIRST_BLOCK = 32
"""Examples that are mixed at a time, at least: few, since what is mixed already does not follow a changed blend."""


class Step(NamedTuple):
    """A global batch; if it is packed, in the order of its rows, with each example's row in ``bucket``."""

    examples: np.ndarray  # (M,) EXAMPLE
    bounds: Sequence[int] | None = None  # between the ranks' batches; None: their sizes differ by at most one

    def of_rank(self, rank: int, world_size: int) -> np.ndarray:
        """A rank's batch."""
        if self.bounds is not None:
            return self.examples[self.bounds[rank] : self.bounds[rank + 1]]
        size, larger = divmod(len(self.examples), world_size)
        first = rank * size + min(rank, larger)
        return self.examples[first : first + size + (rank < larger)]


@dataclass
class GroupOrder:
    """What a group's schedule is computed from.

    Args:
        name: of the group; empty if a dataset has no groups.
        sources: the orders of its sources.
        names: of the sources, by which a state is matched to them.
        shares: of the examples, one for each source.
        global_batch_sizes: examples of a global batch by bucket; None: batches close by a measured limit.
        drop_last: leave out what does not fill a global batch when the data ends.
        every_n_steps: under ``zip``, it is in every n-th step.
        ratio: under ``zip``, its examples in a step per example of the first group without a ratio; None: none.
        packing: the rows of a rank's batch; None: examples are not packed.
        ends_with: of each source the number of the source with which it ends, though it has more; None: at its own end.
    """

    name: str
    sources: list[SourceOrder]
    names: list[str]
    shares: list[float]
    global_batch_sizes: Sequence[int] | None
    drop_last: bool
    every_n_steps: int = 1
    ratio: float | None = None
    packing: Packing | None = None
    ends_with: Sequence[int | None] = ()


def ends_with(sources: Sequence[Source]) -> list[int | None]:
    """For each source the number of the one with which it ends: of one that is read for transcription, that which is
    translated; None for all others, which end with their data."""
    return [number - 1 if source.is_transcription else None for number, source in enumerate(sources)]


class Snapshot(NamedTuple):
    """Where a group's schedule is. Its arrays are never changed, so a snapshot costs next to nothing."""

    alive: tuple[int, ...]  # sources that have not ended
    drawn: int  # examples mixed since the last source ended
    counts: tuple[int, ...]  # of these by source, since the last multiple of the mixing's period
    position: int  # examples mixed in all
    cursors: tuple[Cursor, ...]
    waiting: tuple[np.ndarray, ...]  # examples that are in no step yet
    has_ended: bool
    left_out: int


class GroupSchedule:
    """The global batches of one group.

    Args:
        order: what they are computed from.
        world_size: ranks among which a global batch is divided.
        only_pass: number of the one pass that there is over finite data.
    """

    def __init__(self, order: GroupOrder, world_size: int, only_pass: int | None = None) -> None:
        self.order = order
        self.sources = [replace(source, only_pass=only_pass, left_out=Counter()) for source in order.sources]
        self.world_size = world_size
        self._alive = [number for number, share in enumerate(order.shares) if share > 0]
        self._mixing = self._new_mixing()
        self._drawn = 0
        self._position = 0
        self._waiting: dict[int, list[np.ndarray]] = {}  # by bucket, in the order in which they were mixed
        self._steps: list[Step] = []  # complete ones
        self._block = FIRST_BLOCK
        # Until the data ends, a bucket keeps a full global batch of finite data: divided in two together with what
        # remains then, it leaves examples for all ranks.
        self._holds_back = only_pass is not None and not order.drop_last
        self._has_ended = False
        self.left_out = 0  # examples that fit into no step when the data ended

    def next_step(self) -> Step:
        """The next global batch.

        Raises:
            StopIteration: at the end of finite data.
        """
        while not self._steps:
            self._more()
        step = self._steps.pop(0)
        # As many examples are mixed at a time as make some steps, so that few wait in complete ones.
        self._block = max(FIRST_BLOCK, len(step.examples))
        return step

    def next_step_of(self, size: int) -> Step:
        """The next global batch of so many examples, or of its bucket's size where that is less.

        It is of the bucket that was the first to hold as many.

        Raises:
            StopIteration: at the end of finite data.
        """
        size = max(size, self.world_size)
        while (bucket := self._first_bucket_of(size)) is None:
            if self._has_ended:
                self.left_out = self.waiting()
            self._more()
        self._block = max(FIRST_BLOCK, size)
        waiting, size = joined(self._waiting[bucket]), self._size_in(bucket, size)
        self._waiting[bucket] = [waiting[size:].copy()]
        return Step(waiting[:size])

    def _first_bucket_of(self, size: int) -> int | None:
        """The bucket in which so many examples waited first; at the end, any with at least one for each rank."""
        ends = {}
        for bucket, pieces in self._waiting.items():
            if len(pieces) > 1:
                self._waiting[bucket] = pieces = [joined(pieces)]
            positions = pieces[0]["position"] if pieces else ()
            if len(positions) >= (wanted := self._size_in(bucket, size)):
                ends[bucket] = positions[wanted - 1]
            elif self._has_ended and not self.order.drop_last and len(positions) >= self.world_size:
                ends[bucket] = self._position
        return min(ends, key=lambda bucket: (ends[bucket], bucket), default=None)

    def _size_in(self, bucket: int, size: int) -> int:
        return min(size, self.order.global_batch_sizes[bucket])

    def _more(self) -> None:
        """Mix more examples; when the data has ended, make the last steps of what waits.

        Raises:
            StopIteration: if that has been done.
        """
        if self._has_ended:
            raise StopIteration
        if self._alive:
            self._mix()
            self._block *= 2  # until there is a step
        else:
            self._has_ended = True
            self._steps = self._last_steps()

    def _mix(self) -> None:
        """Mix the next examples, as far as no source ends; the share of one that does then goes to the others."""
        draws = self._mixing.next(self._block)
        cursors = [self.sources[source].cursor for source in self._alive]
        taken = self._take(draws)
        wanted = np.bincount(draws, minlength=len(self._alive))
        short = {
            int(np.flatnonzero(draws == index)[len(examples)]): index
            for index, examples in enumerate(taken)
            if len(examples) < wanted[index]
        }
        if short:
            draws = draws[: min(short)]  # a source has no example for the next draw: those from it on are drawn again
            for source, cursor in zip(self._alive, cursors, strict=True):
                self.sources[source].cursor = cursor
            taken = self._take(draws)
        examples = joined(taken)
        examples["source"] = np.repeat(self._alive, list(map(len, taken)))
        # A single gather brings them into the order of their buckets and, in each, of the draws.
        by_draw = np.empty(len(draws), np.int64)
        by_draw[np.argsort(draws, kind="stable")] = np.arange(len(draws))
        order = np.argsort(examples["bucket"].take(by_draw), kind="stable")
        examples = examples.take(by_draw.take(order))
        examples["position"] = self._position + order
        self._position += len(draws)
        self._drawn += len(draws)
        self._put_into_buckets(examples)
        if short:
            ended = self._alive.pop(short[min(short)])
            self._alive = [source for source in self._alive if not self._ends_with(source, ended)]
            self._drawn = 0
            self._mixing = self._new_mixing()

    def _ends_with(self, source: int, other: int) -> bool:
        return bool(self.order.ends_with) and self.order.ends_with[source] == other

    def _take(self, draws: np.ndarray) -> list[np.ndarray]:
        wanted = np.bincount(draws, minlength=len(self._alive)).tolist()
        return [self.sources[source].take(number) for source, number in zip(self._alive, wanted, strict=True)]

    def _new_mixing(self) -> MixingSequence | None:
        shares = [self.order.shares[source] for source in self._alive]
        return MixingSequence(shares) if shares else None

    def _put_into_buckets(self, examples: np.ndarray) -> None:
        """Add examples to those that wait; what is complete then becomes steps, in the order of their last examples.

        Args:
            examples: in the order of their buckets and, in each, of their positions.
        """
        if self.order.packing is not None:
            self._waiting[0] = [joined([*self._waiting.get(0, []), examples])]
            self._steps += self._packed_steps(at_end=False)
            return
        buckets = examples["bucket"]
        steps = []
        for of_bucket in np.split(examples, np.flatnonzero(np.diff(buckets)) + 1) if len(examples) else ():
            bucket = int(of_bucket["bucket"][0])
            pieces = self._waiting.setdefault(bucket, [])
            # A view would keep the memory of all examples as long as a few of a rare bucket wait.
            pieces.append(of_bucket.copy() if 4 * len(of_bucket) < len(examples) else of_bucket)
            sizes = self.order.global_batch_sizes
            if self.order.ratio is not None:
                continue  # the size of the next step is not known yet
            if sizes is None or sum(map(len, pieces)) >= sizes[bucket] * (1 + self._holds_back):
                waiting = joined(pieces)
                made = self._complete_steps(bucket, waiting)
                self._waiting[bucket] = [waiting[sum(len(step.examples) for step, _ in made) :].copy()]
                steps += made
        steps.sort(key=itemgetter(1))
        self._steps += [step for step, _ in steps]

    def _packed_steps(self, at_end: bool) -> list[Step]:
        """The steps for which enough examples wait; at the end of the data, of all that make a row for each rank."""
        steps = []
        waiting = joined(self._waiting.get(0, []))
        while (found := self.order.packing.next_step(waiting, self.world_size, at_end)) is not None:
            numbers, rows = found
            examples = waiting.take(numbers)
            examples["bucket"] = rows
            per_rank, larger = divmod(int(rows[-1]) + 1, self.world_size)
            first_rows = [rank * per_rank + min(rank, larger) for rank in range(self.world_size + 1)]
            steps.append(Step(examples, np.searchsorted(rows, first_rows).tolist()))
            waiting = np.delete(waiting, numbers)
        self._waiting[0] = [waiting]
        return steps

    def _complete_steps(self, bucket: int, waiting: np.ndarray) -> list[tuple[Step, int]]:
        """The complete steps of a bucket, each with the position of the example that completes it."""
        positions = waiting["position"]
        if self.order.global_batch_sizes is not None:
            size = self.order.global_batch_sizes[bucket]
            firsts = range(0, len(waiting) - (1 + self._holds_back) * size + 1, size)
            return [(Step(waiting[n : n + size]), positions[n + (1 + self._holds_back) * size - 1]) for n in firsts]
        ends = self._selection.batch_ends(waiting["length"], bucket)
        ends = [0, *ends[: len(ends) // self.world_size * self.world_size].tolist()]
        return [(step, step.examples["position"][-1]) for step in self._steps_of(waiting, ends)]

    def _steps_of(self, examples: np.ndarray, bounds: Sequence[int]) -> list[Step]:
        """Steps of batches that lie between these bounds."""
        steps = []
        for first in range(0, len(bounds) - 1, self.world_size):
            of_step = bounds[first : first + self.world_size + 1]
            steps.append(Step(examples[of_step[0] : of_step[-1]], [bound - of_step[0] for bound in of_step]))
        return steps

    @property
    def _selection(self) -> Selection:
        return self.sources[0].selection

    def _last_steps(self) -> list[Step]:
        """The steps of what waits in the buckets when the data ends. No batch is larger than before, none is empty."""
        steps = []
        if self.order.ratio is not None:
            return steps
        if self.order.packing is not None:
            steps = [] if self.order.drop_last else self._packed_steps(at_end=True)
            self.left_out += sum(map(len, self._waiting.pop(0, [])))
            return steps
        for bucket, pieces in sorted(self._waiting.items()):
            waiting = joined(pieces)
            if self.order.drop_last:
                self.left_out += len(waiting)
            elif len(waiting) and self.order.global_batch_sizes is not None:
                size = self.order.global_batch_sizes[bucket]
                if size < len(waiting) and len(waiting) >= 2 * self.world_size:
                    size = -(-len(waiting) // 2)
                steps += [Step(waiting[first : first + size]) for first in range(0, len(waiting), size)]
            elif len(waiting):
                # The longest first: a batch is full when one more example as long as its longest would not fit.
                waiting = waiting.take(np.argsort(-waiting["length"], kind="stable"))
                batches = np.split(waiting, self._selection.batch_ends(waiting["length"], bucket))
                batches = [batch for batch in batches if len(batch)]
                while len(batches) % self.world_size and len(largest := max(batches, key=len)) > 1:
                    batches = [batch for batch in batches if batch is not largest]
                    batches += [largest[::2], largest[1::2]]
                complete = len(batches) // self.world_size * self.world_size
                self.left_out += sum(map(len, batches[complete:]))
                steps += self._steps_of(joined(batches), [0, *accumulate(map(len, batches[:complete]))])
        self._waiting = {}
        self.left_out += sum(len(step.examples) for step in steps if len(step.examples) < self.world_size)
        return [step for step in steps if len(step.examples) >= self.world_size]

    def waiting(self) -> int:
        """Number of examples that are in no step yet."""
        return sum(map(len, self._waiting_pieces()))

    def _waiting_pieces(self) -> Iterator[np.ndarray]:
        yield from chain.from_iterable(self._waiting.values())
        yield from (step.examples for step in self._steps)

    def snapshot(self) -> Snapshot:
        """Where the schedule is, after the last step taken."""
        return Snapshot(
            alive=tuple(self._alive),
            drawn=self._drawn,
            counts=tuple(self._mixing.counts) if self._alive else (),
            position=self._position,
            cursors=tuple(source.cursor for source in self.sources),
            waiting=tuple(self._waiting_pieces()),
            has_ended=self._has_ended,
            left_out=self.left_out,
        )

    def state_dict(self, snapshot: Snapshot) -> dict[str, Any]:
        """A snapshot as plain numbers and strings, with what it depends on."""
        waiting = joined(snapshot.waiting)
        return {
            "sources": list(self.order.names),
            "entries": [source.index.num_entries for source in self.sources],
            "seeds": [list(source.seed) for source in self.sources],
            "shares": list(self.order.shares),
            **{key: value for key, value in snapshot._asdict().items() if key not in ("cursors", "waiting")},
            "alive": list(snapshot.alive),
            "counts": list(snapshot.counts),
            "cursors": [list(cursor) for cursor in snapshot.cursors],
            "waiting": {key: waiting[key].tolist() for key in ("position", "source", "entry", "number_of_pass")},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state, also with other batches or another number of ranks.

        Sources that the state does not contain start at their beginning, which is logged.
        """
        numbers = self._numbers_of(state["sources"])
        for old, number in numbers.items():
            source = self.sources[number]
            source.go_to(Cursor(*state["cursors"][old]), state["seeds"][old])
            if source.index.num_entries != state["entries"][old]:
                logging.warning(
                    f"{self.order.names[number]} makes {source.index.num_entries} examples, {state['entries'][old]} "
                    "when the checkpoint was written: its order is another, so records may repeat or be left out in "
                    "this pass."
                )
        self._position, self._has_ended, self.left_out = state["position"], state["has_ended"], state["left_out"]
        is_same = numbers == dict(enumerate(range(len(self.sources))))
        if is_same and state["shares"] == list(self.order.shares):
            self._alive = list(state["alive"])
            self._mixing = self._new_mixing()
            if self._alive:
                self._mixing.go_to(state["drawn"], state["counts"])
            self._drawn = state["drawn"]
        else:
            logging.info(
                f"{self.order.name or 'The data'}: sources or weights differ from the checkpoint's; the mixing of the "
                "blend starts over, and sources that were there before continue where they were."
            )
        self._waiting, self._steps = {}, []
        self._put_into_buckets(self._read_again(state["waiting"], numbers))
        if self._has_ended:  # what is left makes the steps that it was to make
            self._steps += self._last_steps()

    def _numbers_of(self, names: Sequence[str]) -> dict[int, int]:
        """Maps the numbers of a state's sources to their numbers here, by name."""
        here: dict[str, list[int]] = {}
        for number, name in enumerate(self.order.names):
            here.setdefault(name, []).append(number)
        return {old: here[name].pop(0) for old, name in enumerate(names) if here.get(name)}

    def _read_again(self, waiting: Mapping[str, Sequence[int]], numbers: Mapping[int, int]) -> np.ndarray:
        """The examples that wait in a state, as far as they are still in the data and selected."""
        arrays = {key: np.asarray(values, np.int64) for key, values in waiting.items()}
        pieces = []
        for old, number in numbers.items():
            mine = arrays["source"] == old
            found, examples = self.sources[number].examples_at(arrays["entry"][mine])
            examples["source"] = number
            for key in ("position", "number_of_pass"):
                examples[key] = arrays[key][mine][found]
            pieces.append(examples)
        examples = joined(pieces)
        return examples.take(np.lexsort((examples["position"], examples["bucket"])))
