"""Mutations of recipes: a place, another value there, and what becomes of it."""

from __future__ import annotations

import copy
import random
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from nemo_emmett.errors import EmmettError

VALUES: dict[str, Any] = {
    "text": "blue",
    "empty text": "",
    "false as text": "false",
    "true": True,
    "negative": -3,
    "zero": 0,
    "fraction": 0.37,
    "not a number": float("nan"),
    "infinite": float("inf"),
    "huge": 10**15,
    "list": ["blue", 7],
    "empty list": [],
    "mapping": {"blue": 7},
    "null": None,
}
"""Kind -> the value that every key of a recipe is given."""

SECONDS = 3.0
"""Of computing: a mutation that takes more hangs. Where it waits, the limit is tenfold, since others may compute."""


@dataclass(frozen=True)
class Mutation:
    """A value at a place of a recipe, which is a dotted path; or, for a misspelt key, another name of its last key."""

    place: str
    kind: str
    value: Any

    def is_named(self, sentence: str) -> bool:
        """Whether a sentence names the key, or the one that it misspells."""
        *parents, key = self.place.split(".")
        if len(key) < 3:  # items of lists, and languages
            key = parents[-1]
        return key in sentence or (self.kind == "misspelt key" and self.value in sentence)

    def __str__(self) -> str:
        return f"{self.place}: {self.kind} ({self.value!r})"


@dataclass(frozen=True)
class Outcome:
    """What becomes of a mutated recipe, and what was said: ``sentence`` (one, which names the key), ``accepted``,
    ``other sentence``, ``traceback`` or ``hang``."""

    mutation: Mutation
    kind: str
    said: str = ""


class Hang(BaseException):
    """Nothing in the package may catch it."""


def every_kind(places: Iterable[str], per_place: int, seed: int) -> Iterator[Mutation]:
    """Some of the general values for each place, by a seed of its own, so that more places change no other choice."""
    for place in places:
        kinds = random.Random(f"{seed} {place}").sample(list(VALUES), per_place)
        yield from (Mutation(place, kind, VALUES[kind]) for kind in VALUES if kind in kinds)


def misspelt(places: Iterable[str], seed: int) -> Iterator[Mutation]:
    """A letter doubled in the last key of each place."""
    for place in places:
        key = place.rpartition(".")[2]
        if len(key) < 3:  # items of lists, and languages
            continue
        number = random.Random(f"{seed} {place}").randrange(1, len(key))
        yield Mutation(place, "misspelt key", key[:number] + key[number - 1] + key[number:])


def places_of(value: Any, place: str) -> Iterator[str]:
    """The paths of all keys in a section, outer ones first; of a list its first item's."""
    items = value.items() if isinstance(value, Mapping) else enumerate(value[:1] if isinstance(value, list) else ())
    for key, child in items:
        yield f"{place}.{key}"
        yield from places_of(child, f"{place}.{key}")


def mutated(recipe: Mapping, mutation: Mutation) -> dict | None:
    """A copy of the recipe with the mutation; None if it changes nothing."""
    recipe = copy.deepcopy(dict(recipe))
    *parents, last = (int(part) if part.isdigit() else part for part in mutation.place.split("."))
    holder: Any = recipe
    for part in parents:
        holder = holder[part] if isinstance(holder, list) else holder.setdefault(part, {})
    if mutation.kind == "misspelt key":
        holder[mutation.value] = holder.pop(last)
        return recipe
    before = holder[last] if isinstance(holder, list) else holder.get(last)
    if type(before) is type(mutation.value) and before == mutation.value:
        return None
    holder[last] = mutation.value
    return recipe


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise :class:`Hang` in what computes for longer, or takes ten times as long."""

    def stop(*_: Any) -> None:
        raise Hang

    timers = {signal.ITIMER_PROF: (signal.SIGPROF, seconds), signal.ITIMER_REAL: (signal.SIGALRM, 10 * seconds)}
    before = {number: signal.signal(number, stop) for number, _ in timers.values()}
    for timer, (_, limit) in timers.items():
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for timer in timers:
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def outcome_of(mutation: Mutation, recipe: Mapping, use: Callable[[dict], Any]) -> Outcome | None:
    """Use the mutated recipe, and see; None where the mutation changes nothing."""
    changed = mutated(recipe, mutation)
    if changed is None:
        return None
    try:
        with time_limit(SECONDS):
            use(changed)
    except EmmettError as error:
        said = str(error)
        is_sentence = "\n" not in said and said.endswith((".", "?"))
        return Outcome(mutation, "sentence" if is_sentence and mutation.is_named(said) else "other sentence", said)
    except Hang:
        return Outcome(mutation, "hang")
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f"{frame.filename.rpartition('nemo_emmett/')[2]}:{frame.lineno}" for frame in frames]
        ours = [place for place in ours if not place.startswith("/")]
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return Outcome(mutation, "traceback", f"{said} [{' > '.join(ours[-2:])} > {frames[-1].name}]")
    return Outcome(mutation, "accepted")
