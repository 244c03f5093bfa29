"""Publishers' language codes, and the selection of a corpus's languages and splits."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache

from nemo_emmett.errors import ConfigError


@cache
def iso_code(code: str) -> str:
    """The one form of a language's code (:func:`~nemo_emmett.prompts.language_codes.language_code`) without a region.

    Case does not matter. Regions are removed, since publishers write them for accents: ``es_419``.

    Args:
        code: ISO 639-1, 639-2 or 639-3, perhaps with an ISO 15924 script and a region: ``deu_Latn``, ``cmn_hans_cn``.

    Example:
        >>> [iso_code(code) for code in ("deu_Latn", "de_DE", "deu", "zho_Hant", "cmn_hans_cn", "arz_Arab")]
        ['de', 'de', 'de', 'zh-Hant', 'zh', 'arz']
    """
    from nemo_emmett.prompts.language_codes import language_code

    language, *subtags = re.split("[-_]", code)
    language = _SAME.get(language.lower(), language.lower())
    script = next((tag.title() for tag in subtags if len(tag) == 4 and tag.isalpha()), None)
    if script is None and language in _CHINESE and subtags and subtags[-1].upper() in _TRADITIONAL:
        script = "Hant"
    found = language_code(language) or language
    return language_code(f"{language}-{script}") or found if script else found


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


_SAME = {"fil": "tl"}
"""Filipino is Tagalog in all models here."""

_CHINESE, _TRADITIONAL = ("zh", "zho", "chi", "cmn"), ("TW", "HK", "MO")
"""Codes of Chinese, and the regions that write it in the traditional script."""
