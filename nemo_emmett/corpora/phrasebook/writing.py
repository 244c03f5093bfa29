"""Items in words: lower case, no digits, spaces for hyphens, as a speech recognizer's transcripts have them.

num2words supplies cardinals, ordinals and years; Babel (the CLDR) the names of months, day periods and currencies with
their plurals. What neither knows stands here: how numbers agree with a noun, the names of hundredths, and how dates,
clock times and prices are read aloud.
"""

from __future__ import annotations

import datetime
import re
import unicodedata

from nemo_emmett.corpora.phrasebook.extras import require
from nemo_emmett.corpora.phrasebook.items import Item

_DATE = {
    "en": "the {day} of {month} {year}",
    "de": "der {day} {month} {year}",
    "es": "el {day} de {month} de {year}",
    "fr": "le {day} {month} {year}",
}

_PRICE_JOIN = {"en": "and", "de": "und", "es": "con", "fr": "et"}

_FEMININE_CURRENCIES = {("es", "GBP"), ("fr", "GBP")}
"""Libra and livre. German names are masculine or neuter here, which count alike."""

_HUNDREDTHS = {
    "EUR": {
        "en": ("cent", "cents"),
        "de": ("cent", "cent"),
        "es": ("céntimo", "céntimos"),
        "fr": ("centime", "centimes"),
    },
    "GBP": {
        "en": ("penny", "pence"),
        "de": ("penny", "pence"),
        "es": ("penique", "peniques"),
        "fr": ("penny", "pence"),
    },
    "CHF": {
        "en": ("centime", "centimes"),
        "de": ("rappen", "rappen"),
        "es": ("céntimo", "céntimos"),
        "fr": ("centime", "centimes"),
    },
    "CAD": {"en": ("cent", "cents"), "de": ("cent", "cent"), "es": ("centavo", "centavos"), "fr": ("cent", "cents")},
}
"""(one, many) of a currency's hundredth part, which the CLDR does not name."""


def write_item(item: Item, language: str) -> str:
    """``item`` in words of ``language``: one line, lower case, without digits, hyphens and commas.

    Args:
        item: a type and a value, as in ``Item("time", "15:20")``.
        language: one of ``LANGUAGES``.

    Example:
        >>> write_item(Item("price", "EUR:12.50"), "fr")
        'douze euros et cinquante centimes'
    """
    return _normalize(_WRITERS[item.type](item.value, language))


def _write_number(value: str, language: str) -> str:
    return _cardinal(int(value), language)


def _write_date(value: str, language: str) -> str:
    date = datetime.date.fromisoformat(value)
    month = require("babel.dates").get_month_names("wide", locale=language)[date.month]
    return _DATE[language].format(day=_day(date.day, language), month=month, year=_year(date.year, language))


def _write_time(value: str, language: str) -> str:
    time = datetime.time.fromisoformat(value)
    return {"en": _time_en, "de": _time_de, "es": _time_es, "fr": _time_fr}[language](time)


def _write_price(value: str, language: str) -> str:
    currency, amount = value.split(":")
    units, _, hundredths = amount.partition(".")
    words = _units(int(units), currency, language)
    if int(hundredths or 0):
        words = f"{words} {_PRICE_JOIN[language]} {_hundredths(int(hundredths), currency, language)}"
    return words


_WRITERS = {"number": _write_number, "date": _write_date, "time": _write_time, "price": _write_price}


def _cardinal(number: int, language: str) -> str:
    words = require("num2words").num2words(number, lang=language)
    if language == "es":
        # num2words leaves "uno" whole before "mil", where Spanish shortens it.
        words = re.sub(r"uno (?=mil\b)", "un ", words).replace("veintiun ", "veintiún ")
    return words


def _count(number: int, language: str, feminine: bool = False) -> str:
    """The cardinal as it stands before a noun."""
    words = _cardinal(number, language)
    if language == "de":
        return words.removesuffix("s") if words.endswith("eins") else words
    if language == "fr":
        return re.sub(r"\bun$", "une", words) if feminine else words
    if language == "es" and feminine:
        return re.sub(r"(cient|quinient)os\b", r"\1as", re.sub(r"uno$", "una", words))
    if language == "es":
        return re.sub(r"\buno$", "un", re.sub(r"veintiuno$", "veintiún", words))
    return words


def _day(day: int, language: str) -> str:
    """The day of a month: an ordinal in English and German, in Spanish and French only the first."""
    if language in ("en", "de") or day == 1:
        return require("num2words").num2words(day, lang=language, to="ordinal")
    return _cardinal(day, language)


def _year(year: int, language: str) -> str:
    return require("num2words").num2words(year, lang=language, to="year")


def _time_en(time: datetime.time) -> str:
    period = _day_period(time, "en")
    hour = _cardinal(_on_clock_face(time.hour), "en")
    if period in ("noon", "midnight"):
        return f"{hour} {period}"
    if time.minute == 0:
        return f"{hour} o'clock {period}"
    minute = _cardinal(time.minute, "en")
    return f"{hour} oh {minute} {period}" if time.minute < 10 else f"{hour} {minute} {period}"


def _time_de(time: datetime.time) -> str:
    words = f"{_count(time.hour, 'de')} uhr"
    return f"{words} {_cardinal(time.minute, 'de')}" if time.minute else words


def _time_es(time: datetime.time) -> str:
    hour = _on_clock_face(time.hour)
    words = f"{'la' if hour == 1 else 'las'} {_count(hour, 'es', feminine=True)}"
    if time.minute:
        words = f"{words} y {_cardinal(time.minute, 'es')}"
    return f"{words} {_day_period(time, 'es')}"


def _time_fr(time: datetime.time) -> str:
    hours = "heure" if time.hour < 2 else "heures"
    words = f"{_count(time.hour, 'fr', feminine=True)} {hours}"
    # The unspoken noun is "minutes", feminine.
    return f"{words} {_count(time.minute, 'fr', feminine=True)}" if time.minute else words


def _on_clock_face(hour: int) -> int:
    return (hour - 1) % 12 + 1


def _day_period(time: datetime.time, language: str) -> str:
    """The part of the day as it follows a time: "in the afternoon", "de la tarde"."""
    return require("babel.dates").format_time(time, "BBBB", locale=language)


def _units(number: int, currency: str, language: str) -> str:
    name = require("babel.numbers").get_currency_name(currency, count=number, locale=language)
    return f"{_count(number, language, feminine=(language, currency) in _FEMININE_CURRENCIES)} {name}"


def _hundredths(number: int, currency: str, language: str) -> str:
    one, many = _HUNDREDTHS[currency][language]
    return f"{_count(number, language)} {one if number == 1 else many}"


def _normalize(words: str) -> str:
    plain = unicodedata.normalize("NFC", words).lower().replace(",", " ").replace("-", " ")
    return " ".join(plain.split())
