"""Items in words: lower case, no digits, spaces for hyphens, as in a speech recognizer's transcripts.

num2words supplies cardinals, ordinals and years; Babel (the CLDR) the names of months, day periods and currencies with
their plurals. This module adds what both lack: the agreement of numbers with nouns, the names of hundredths, and how
dates, clock times and prices are read aloud.
"""

from __future__ import annotations

import datetime
import re
import unicodedata

from nemo_emmett.corpora.extras import require
from nemo_emmett.corpora.phrasebook.items import Item

_DATE = {
    "en": "the {day} of {month} {year}",
    "de": "der {day} {month} {year}",
    "es": "el {day} de {month} de {year}",
    "fr": "le {day} {month} {year}",
}

_PRICE_JOIN = {"en": "and", "de": "und", "es": "con", "fr": "et"}

_FEMININE_CURRENCIES = {("es", "GBP"), ("fr", "GBP")}
"""Libra and livre. The German names are masculine or neuter, for which numbers have the same form."""

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
"""(singular, plural) of a currency's hundredth part, which the CLDR does not name."""


def write_item(item: Item, language: str) -> str:
    """``item`` in words of ``language``: one line, lower case, without digits, hyphens and commas.

    Args:
        item: a type and a value, as in ``Item("time", "15:20")``.
        language: one of ``LANGUAGES``.

    Example:
        >>> write_item(Item("price", "EUR:12.50"), "fr")
        'douze euros et cinquante centimes'
    """
    words = _WRITERS[item.type](item.value, language)
    return " ".join(unicodedata.normalize("NFC", words).lower().replace(",", " ").replace("-", " ").split())


def _write_number(value: str, language: str) -> str:
    return _cardinal(int(value), language)


def _write_date(value: str, language: str) -> str:
    date = datetime.date.fromisoformat(value)
    num2words = require("num2words").num2words
    # In English and German an ordinal, in Spanish and French only of the first day.
    is_ordinal = language in ("en", "de") or date.day == 1
    day = num2words(date.day, lang=language, to="ordinal") if is_ordinal else _cardinal(date.day, language)
    month = require("babel.dates").get_month_names("wide", locale=language)[date.month]
    return _DATE[language].format(day=day, month=month, year=num2words(date.year, lang=language, to="year"))


def _write_time(value: str, language: str) -> str:
    time = datetime.time.fromisoformat(value)
    # Babel's day period as it follows a time: "in the afternoon", "de la tarde".
    period = require("babel.dates").format_time(time, "BBBB", locale=language)
    minute = _cardinal(time.minute, language)
    on_clock_face = (time.hour - 1) % 12 + 1
    if language == "en":
        hour = _cardinal(on_clock_face, "en")
        if period in ("noon", "midnight"):
            return f"{hour} {period}"
        if time.minute == 0:
            return f"{hour} o'clock {period}"
        return f"{hour} oh {minute} {period}" if time.minute < 10 else f"{hour} {minute} {period}"
    if language == "de":
        words = f"{_count(time.hour, 'de')} uhr"
        return f"{words} {minute}" if time.minute else words
    if language == "es":
        words = f"{'la' if on_clock_face == 1 else 'las'} {_count(on_clock_face, 'es', feminine=True)}"
        return f"{words} y {minute} {period}" if time.minute else f"{words} {period}"
    words = f"{_count(time.hour, 'fr', feminine=True)} {'heure' if time.hour < 2 else 'heures'}"
    # The unspoken noun is "minutes", feminine.
    return f"{words} {_count(time.minute, 'fr', feminine=True)}" if time.minute else words


def _write_price(value: str, language: str) -> str:
    currency, amount = value.split(":")
    units, hundredths = (int(part or 0) for part in amount.partition(".")[::2])
    name = require("babel.numbers").get_currency_name(currency, count=units, locale=language)
    words = f"{_count(units, language, feminine=(language, currency) in _FEMININE_CURRENCIES)} {name}"
    if hundredths:
        name = _HUNDREDTHS[currency][language][hundredths != 1]
        words = f"{words} {_PRICE_JOIN[language]} {_count(hundredths, language)} {name}"
    return words


_WRITERS = {"number": _write_number, "date": _write_date, "time": _write_time, "price": _write_price}


def _cardinal(number: int, language: str) -> str:
    words = require("num2words").num2words(number, lang=language)
    if language == "es":
        # num2words does not shorten "uno" before "mil".
        words = re.sub(r"uno (?=mil\b)", "un ", words).replace("veintiun ", "veintiún ")
    return words


def _count(number: int, language: str, feminine: bool = False) -> str:
    """The form of the cardinal before a noun."""
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
