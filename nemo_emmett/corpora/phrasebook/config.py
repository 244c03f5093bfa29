"""What a phrasebook holds: its configuration, checked when it is made."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from nemo_emmett.config import nearest
from nemo_emmett.errors import ConfigError

LANGUAGES = ("en", "de", "es", "fr")
TYPES = ("number", "date", "time", "price")
CURRENCIES = ("EUR", "GBP", "CHF", "CAD", "JPY")
SPLITS = ("train", "dev", "test")

LARGEST_NUMBER = 99_999
"""Beyond it num2words is not right in German: 101,000 becomes "einhunderteinstausend"."""


@dataclass(frozen=True)
class PhrasebookConfig:
    """Everything that a phrasebook's bytes depend on, besides the versions of the libraries that write and speak it.

    Sequences may be given as lists. Numbers of items are totals over all types, shared out evenly among them.

    Raises:
        ConfigError: if a field has a value that cannot work.
    """

    languages: Sequence[str] = LANGUAGES
    types: Sequence[str] = TYPES
    train_items: int = 1600
    dev_items: int = 80
    test_items: int = 120
    spoken_train_items: int | None = None  # how many of the train items are spoken as well as written; None: all
    renditions: int = 1  # recordings of each spoken train item in each language; dev and test have one
    max_number: int = 9999  # numbers are 0 to this one
    first_year: int = 1900  # dates are the days of these years
    last_year: int = 2099
    max_price: int = 99  # prices are 1 to this many whole units, with or without a part of one
    currencies: Sequence[str] = CURRENCIES  # ISO 4217
    accents: bool = True  # speak English and Spanish in two accents each
    variants: Sequence[str] = ("f1", "f2", "f3", "f4", "m1", "m2", "m3", "m4", "m5", "m6", "m7")  # eSpeak NG's
    speed: Sequence[int] = (140, 190)  # words a minute, slowest and fastest
    pitch: Sequence[int] = (30, 70)  # of eSpeak NG's 0 to 99, lowest and highest
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), list):
                object.__setattr__(self, field.name, tuple(value))
        check_choices("phrasebook.languages", self.languages, LANGUAGES)
        check_choices("phrasebook.types", self.types, TYPES)
        check_choices("phrasebook.currencies", self.currencies, CURRENCIES)
        check_choices("phrasebook.variants", self.variants, None)
        for name in ("train_items", "test_items", "renditions"):
            check_range(f"phrasebook.{name}", getattr(self, name), 1, None)
        for name in ("dev_items", "seed"):
            check_range(f"phrasebook.{name}", getattr(self, name), 0, None)
        if self.spoken_train_items is not None:
            check_range("phrasebook.spoken_train_items", self.spoken_train_items, 0, self.train_items)
        check_range("phrasebook.max_number", self.max_number, 1, LARGEST_NUMBER)
        check_range("phrasebook.first_year", self.first_year, 1000, 2999)
        check_range("phrasebook.last_year", self.last_year, self.first_year, 2999)
        check_range("phrasebook.max_price", self.max_price, 1, 999)
        check_interval("phrasebook.speed", self.speed, 80, 450)
        check_interval("phrasebook.pitch", self.pitch, 0, 99)

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values: what ``phrasebook.json`` keeps and is compared with."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def check_choices(name: str, values: Sequence[str], known: Collection[str] | None) -> None:
    """Refuse names that are none, given twice, or not among ``known``; ``name`` is the key: "phrasebook.types"."""
    if isinstance(values, str) or not values or len(set(values)) != len(values):
        raise ConfigError(f"{name}: {values!r} must be a list of one or more different names")
    for value in values:
        if known is not None and value not in known:
            suggestion = nearest(value, known)
            hint = f"did you mean '{suggestion}'?" if suggestion else f"choose among {', '.join(known)}"
            raise ConfigError(f"{name}: there is no '{value}' in the {name.partition('.')[0]}; {hint}")


def check_range(name: str, value: int, low: int, high: int | None) -> None:
    """Refuse what is no whole number from ``low`` to ``high``; None: from ``low``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        upper = "or more" if high is None else f"to {high}"
        raise ConfigError(f"{name}: {value!r} must be a whole number, {low} {upper}")


def check_interval(name: str, interval: Sequence[int], low: int, high: int) -> None:
    """Refuse what is not a lowest and a highest whole number within ``low`` to ``high``."""
    if isinstance(interval, str) or len(interval) != 2:
        raise ConfigError(f"{name}: {interval!r} must be two numbers, the lowest and the highest")
    check_range(name, interval[0], low, high)
    check_range(name, interval[1], interval[0], high)
