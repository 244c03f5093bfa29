"""The configuration of a phrasebook, checked when it is made."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from annotated_types import Ge, Le

from nemo_emmett.config import nearest
from nemo_emmett.errors import ConfigError
from nemo_emmett.typed_config import Count, PositiveWhole, Switch, Text, Whole, parse_fields, parse_value

LANGUAGES = ("en", "de", "es", "fr")
TYPES = ("number", "date", "time", "price")
CURRENCIES = ("EUR", "GBP", "CHF", "CAD", "JPY")
SPLITS = ("train", "dev", "test")

LARGEST_NUMBER = 99_999
"""Above it num2words is wrong in German: 101,000 becomes "einhunderteinstausend"."""

Names = tuple[Text, ...]
Year = Annotated[Whole, Ge(1000), Le(2999)]


@dataclass(frozen=True)
class PhrasebookConfig:
    """Everything that a phrasebook's bytes depend on, except the versions of the libraries that write and speak it.

    Numbers of items are totals over all types, divided evenly among them.

    Raises:
        ConfigError: if a field has a value that cannot work.
    """

    languages: Names = LANGUAGES
    types: Names = TYPES
    train_items: PositiveWhole = 1600
    dev_items: Count = 80
    test_items: PositiveWhole = 120
    spoken_train_items: Count | None = None  # how many of the train items are spoken as well as written; None: all
    renditions: PositiveWhole = 1  # recordings of each spoken train item in each language; dev and test have one
    max_number: Annotated[Whole, Ge(1), Le(LARGEST_NUMBER)] = 9999  # numbers are 0 to this one
    first_year: Year = 1900  # dates are the days of these years
    last_year: Year = 2099
    max_price: Annotated[Whole, Ge(1), Le(999)] = 99  # prices are 1 to this many whole units, and hundredths
    currencies: Names = CURRENCIES  # ISO 4217
    accents: Switch = True  # speak English and Spanish in two accents each
    variants: Names = ("f1", "f2", "f3", "f4", "m1", "m2", "m3", "m4", "m5", "m6", "m7")  # eSpeak NG's
    speed: tuple[Whole, ...] = (140, 190)  # words a minute, slowest and fastest
    pitch: tuple[Whole, ...] = (30, 70)  # of eSpeak NG's 0 to 99, lowest and highest
    seed: Count = 0

    def __post_init__(self) -> None:
        parse_fields(self, "phrasebook")
        check_choices("phrasebook.languages", self.languages, LANGUAGES)
        check_choices("phrasebook.types", self.types, TYPES)
        check_choices("phrasebook.currencies", self.currencies, CURRENCIES)
        check_choices("phrasebook.variants", self.variants, None)
        if self.spoken_train_items is not None:
            check_range("phrasebook.spoken_train_items", self.spoken_train_items, 0, self.train_items)
        check_range("phrasebook.last_year", self.last_year, self.first_year, 2999)
        check_interval("phrasebook.speed", self.speed, 80, 450)
        check_interval("phrasebook.pitch", self.pitch, 0, 99)

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values, which ``phrasebook.json`` contains."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def check_choices(name: str, values: Sequence[str], known: Collection[str] | None) -> None:
    """Refuse an empty list, and values that are repeated or not in ``known``; ``name`` is the key in the message."""
    if not values or len(set(values)) != len(values):
        raise ConfigError(f"{name}: {list(values)!r} must be a list of one or more different names")
    for value in values:
        if known is not None and value not in known:
            suggestion = nearest(value, known)
            hint = f"did you mean '{suggestion}'?" if suggestion else f"choose among {', '.join(known)}"
            raise ConfigError(f"{name}: there is no '{value}' in the {name.partition('.')[0]}; {hint}")


def check_range(name: str, value: int, low: int, high: int) -> None:
    """Refuse a whole number that is not within ``low`` to ``high``."""
    parse_value(Annotated[Whole, Ge(low), Le(high)], value, name)


def check_interval(name: str, interval: Sequence[int], low: int, high: int) -> None:
    """Refuse what is not a lowest and a highest number within ``low`` to ``high``."""
    if len(interval) != 2:
        raise ConfigError(f"{name}: {list(interval)!r} must be two numbers, the lowest and the highest")
    check_range(name, interval[0], low, high)
    check_range(name, interval[1], interval[0], high)
