"""Items: the possible values of a phrasebook, and their division into splits."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_emmett.corpora.leaks import HeldOut
from nemo_emmett.corpora.phrasebook.config import PhrasebookConfig
from nemo_emmett.corpora.sentence_files import PlacedSentence
from nemo_emmett.errors import ConfigError


@dataclass(frozen=True)
class Item:
    """A value to be said in any language: ``Item("price", "EUR:12.50")``."""

    type: str
    value: str  # number "42", date "1994-03-03", time "15:20", price "EUR:12.50" or, without hundredths, "JPY:12"

    def __str__(self) -> str:
        return f"{self.type}:{self.value}"


@dataclass(frozen=True)
class Phrase:
    """An item and its text in each language."""

    item: Item
    texts: Mapping[str, str]


def candidate_items(item_type: str, config: PhrasebookConfig) -> Iterator[Item]:
    """Every item of a type that ``config`` allows."""
    if item_type == "number":
        values = map(str, range(config.max_number + 1))
    elif item_type == "date":
        first, last = datetime.date(config.first_year, 1, 1), datetime.date(config.last_year, 12, 31)
        values = ((first + datetime.timedelta(days)).isoformat() for days in range((last - first).days + 1))
    elif item_type == "time":
        values = (f"{hour:02}:{minute:02}" for hour in range(24) for minute in range(60))
    else:
        hundredths = [f".{number:02}" for number in range(100)]
        parts = {currency: [""] if currency == "JPY" else hundredths for currency in config.currencies}
        units = range(1, config.max_price + 1)
        values = (f"{currency}:{unit}{part}" for currency in parts for unit in units for part in parts[currency])
    return (Item(item_type, value) for value in values)


def split_phrases(
    candidates: Mapping[str, Sequence[Item]],
    sizes: Mapping[str, Mapping[str, int]],
    write: Callable[[Item], Mapping[str, str]],
    seed: int,
) -> dict[str, list[Phrase]]:
    """Divide items into splits that have no item in common, and of which none has a line of an earlier one in any
    language, alone or inside of a longer one.

    Different items may have the same text, and long ones end like others (79.52 and 9.52). Splits are filled in the
    given order, so list held-out splits first: an item that would be a leak (``corpora.leaks``) of an earlier split is
    skipped. The order of the items is drawn from ``seed`` for each
    type; a larger split extends the smaller one of the same seed.

    Args:
        candidates: the items of each type.
        sizes: for each split, in order, the number of items of each type.
        write: returns an item's text in every language.
        seed: of the order of the items.

    Returns:
        Each split's phrases, the types mixed: every prefix of the list has them in about the same proportion.

    Raises:
        ConfigError: if a type has too few items for the splits.
    """
    queues = {
        item_type: iter(sorted(items, key=lambda item: _draw(seed, "split", item)))
        for item_type, items in candidates.items()
    }
    splits: dict[str, list[Phrase]] = {}
    for split, counts in sizes.items():
        earlier = (
            PlacedSentence(phrase.texts, Path(name), 0) for name, of_split in splits.items() for phrase in of_split
        )
        held_out = HeldOut(earlier, near=False)
        phrases: list[Phrase] = []
        for item_type, count in counts.items():
            found = 0
            while found < count:
                if (item := next(queues[item_type], None)) is None:
                    raise ConfigError(
                        f"phrasebook.{split}_items: {count} items of type '{item_type}' are asked for and only {found} "
                        f"are left; lower {split}_items or widen the range of the type's values"
                    )
                phrase = Phrase(item, write(item))
                if held_out.match(phrase.texts) is None:
                    phrases.append(phrase)
                    found += 1
        splits[split] = sorted(phrases, key=lambda phrase: _draw(seed, "order", phrase.item))
    return splits


def share_out(total: int, types: Sequence[str]) -> dict[str, int]:
    """Divide ``total`` items among the types as evenly as possible, the remainder among the first types."""
    each, left_over = divmod(total, len(types))
    return {item_type: each + (position < left_over) for position, item_type in enumerate(types)}


def _draw(seed: int, purpose: str, item: Item) -> bytes:
    # A hash, since Python's shuffle may differ between its versions.
    return hashlib.sha256(f"{seed}/{purpose}/{item}".encode()).digest()
