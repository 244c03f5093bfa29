"""Items: which values a phrasebook may hold, and which split each falls into."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from nemo_emmett.corpora.phrasebook.config import PhrasebookConfig
from nemo_emmett.errors import ConfigError


@dataclass(frozen=True)
class Item:
    """What is said, whatever the language: ``Item("price", "EUR:12.50")``."""

    type: str
    value: str  # number "42", date "1994-03-03", time "15:20", price "EUR:12.50" or, without a part, "JPY:12"

    def __str__(self) -> str:
        return f"{self.type}:{self.value}"


@dataclass(frozen=True)
class Phrase:
    """An item and how it is written in each language."""

    item: Item
    texts: Mapping[str, str]


def candidate_items(item_type: str, config: PhrasebookConfig) -> Iterator[Item]:
    """Every item of a type that ``config`` allows."""
    return (Item(item_type, value) for value in _VALUES[item_type](config))


def split_phrases(
    candidates: Mapping[str, Sequence[Item]],
    sizes: Mapping[str, Mapping[str, int]],
    write: Callable[[Item], Mapping[str, str]],
    seed: int,
) -> dict[str, list[Phrase]]:
    """Share items out among splits that have neither an item nor, in any language, a whole line in common.

    Different items may be written alike. Splits are filled in the order given, so list those that are held out first:
    an item written like one of an earlier split, in whatever language, is passed over. The order of the items is
    drawn from ``seed`` for each type apart; a larger split extends the smaller one of the same seed.

    Args:
        candidates: the items of each type.
        sizes: for each split, in order, the number of items of each type.
        write: gives an item's text in every language.
        seed: decides which item falls where.

    Returns:
        Each split's phrases, the types mixed: any beginning of the list holds them all in much the same proportion.

    Raises:
        ConfigError: if a type has too few items for the splits.
    """
    queues = {
        item_type: iter(sorted(items, key=lambda item: _draw(seed, "split", item)))
        for item_type, items in candidates.items()
    }
    taken: set[tuple[str, str]] = set()
    splits = {}
    for split, counts in sizes.items():
        phrases = []
        for item_type, count in counts.items():
            phrases += _take(queues[item_type], count, write, taken, item_type, split)
        taken.update(line for phrase in phrases for line in phrase.texts.items())
        splits[split] = sorted(phrases, key=lambda phrase: _draw(seed, "order", phrase.item))
    return splits


def _take(
    queue: Iterator[Item],
    count: int,
    write: Callable[[Item], Mapping[str, str]],
    taken: set[tuple[str, str]],
    item_type: str,
    split: str,
) -> list[Phrase]:
    phrases: list[Phrase] = []
    while len(phrases) < count:
        if (item := next(queue, None)) is None:
            raise ConfigError(
                f"phrasebook.{split}_items: {count} items of type '{item_type}' are asked for and only {len(phrases)} "
                f"are left; lower {split}_items or widen the range of the type's values"
            )
        phrase = Phrase(item, write(item))
        if taken.isdisjoint(phrase.texts.items()):
            phrases.append(phrase)
    return phrases


def share_out(total: int, types: Sequence[str]) -> dict[str, int]:
    """``total`` items over the types as evenly as can be, the first types taking what is left over."""
    each, left_over = divmod(total, len(types))
    return {item_type: each + (position < left_over) for position, item_type in enumerate(types)}


def _draw(seed: int, purpose: str, item: Item) -> bytes:
    # A hash rather than a shuffle: Python promises no stable shuffle across its versions.
    return hashlib.sha256(f"{seed}/{purpose}/{item}".encode()).digest()


def _numbers(config: PhrasebookConfig) -> Iterator[str]:
    return (str(number) for number in range(config.max_number + 1))


def _dates(config: PhrasebookConfig) -> Iterator[str]:
    first, last = datetime.date(config.first_year, 1, 1), datetime.date(config.last_year, 12, 31)
    return ((first + datetime.timedelta(days)).isoformat() for days in range((last - first).days + 1))


def _times(config: PhrasebookConfig) -> Iterator[str]:
    return (f"{hour:02}:{minute:02}" for hour in range(24) for minute in range(60))


def _prices(config: PhrasebookConfig) -> Iterator[str]:
    for currency in config.currencies:
        for units in range(1, config.max_price + 1):
            if currency == "JPY":
                yield f"{currency}:{units}"
            else:
                yield from (f"{currency}:{units}.{hundredths:02}" for hundredths in range(100))


_VALUES: dict[str, Callable[[PhrasebookConfig], Iterator[str]]] = {
    "number": _numbers,
    "date": _dates,
    "time": _times,
    "price": _prices,
}
