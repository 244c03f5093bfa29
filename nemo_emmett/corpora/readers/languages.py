"""Publishers' language codes, and the selection of a corpus's languages and splits."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache

from nemo_emmett.errors import ConfigError


@cache
def iso_code(code: str) -> str:
    """The code of a language in recipes: ISO 639-1 if it has one, with a script that is not its usual one.

    Other varieties than the standard one keep a code of their own, FLORES-200's if recipes have no other, so that no
    two varieties share a code. Regions are removed, since publishers write them for accents: ``es_419``.

    Args:
        code: ISO 639-1, 639-2 or 639-3, perhaps with an ISO 15924 script and a region: ``deu_Latn``, ``cmn_hans_cn``.

    Example:
        >>> [iso_code(code) for code in ("deu_Latn", "de_DE", "deu", "zho_Hant", "cmn_hans_cn", "arz_Arab")]
        ['de', 'de', 'de', 'zh-Hant', 'zh', 'arz_Arab']
    """
    from nemo_emmett.prompts.languages import flores_code, is_known_language

    language, *subtags = re.split("[-_]", code)
    short = _shortest(language.lower())
    usual = flores_code(short)
    script = next((tag.title() for tag in subtags if len(tag) == 4 and tag.isalpha()), None)
    if script is None and subtags and usual is not None:  # zh_TW: the region determines the script
        script = (flores_code(f"{short}-{subtags[-1].upper()}") or usual)[-4:]
    found = short if script is None or usual is None or usual.endswith(script) else f"{short}-{script}"
    return found if is_known_language(found) else flores_code(code) or flores_code(found) or found


def chosen(asked: Sequence[str] | None, there: Iterable[str], what: str) -> tuple[str, ...]:
    """The selected values in their order; all that exist, if none is selected.

    Args:
        asked: values of an option.
        there: the corpus's values.
        what: the option in words, for the message: "languages of FLORES".

    Raises:
        ConfigError: if a value is not there.
    """
    there = tuple(dict.fromkeys(there))
    if missing := [value for value in asked or () if value not in there]:
        raise ConfigError(f"'{missing[0]}' is not among the {what} that are there: {', '.join(there)}.")
    return tuple(dict.fromkeys(asked)) if asked else there


def check_languages(asked: Sequence[str] | None, there: Iterable[str] = ()) -> None:
    """Refuse unknown languages, for corpora of which a user may have downloaded only some of the selected pairs.

    Args:
        asked: values of the option.
        there: languages of the corpus, which may be unknown to recipes.

    Raises:
        ConfigError: if a value is neither among them nor a language of recipes.
    """
    from nemo_emmett.prompts.languages import check_language

    there = set(there)
    for language in asked or ():
        if language not in there:
            check_language(language, "languages")


_SAME = {"fil": "tl", "iw": "he", "jw": "jv"}
"""Codes of languages that have another code in all models here: Filipino (as Tagalog), and two obsolete ones."""


def _shortest(language: str) -> str:
    from nemo_emmett.prompts.languages import is_known_language

    language = _SAME.get(language, language)
    if len(language) == 2:
        return language
    if (standard := _two_letter_codes().get(language)) is not None:
        return standard
    from babel.core import get_global

    # The CLDR's: of a macrolanguage's members only the standard one has an alias (arb and cmn, not arz and yue).
    alias = get_global("language_aliases").get(language, language)
    return alias if is_known_language(alias) else language


@cache
def _two_letter_codes() -> dict[str, str]:
    """The ISO 639-1 code of each ISO 639-3 code in FLORES-200's tables."""
    from nemo_emmett.prompts.languages import flores_code, known_languages

    short = sorted((code for code in known_languages() if len(code) == 2), reverse=True)  # of no and nb, nb stays
    return {flores[:3]: code for code in short if (flores := flores_code(code)) is not None}
