"""Language codes: ISO 639-1 as Whisper lists them, M2M100's, and FLORES-200's as NLLB writes them.

The tables are those of the tokenizers in transformers, so a code is known here if one of the backbones knows it.
"""

from __future__ import annotations

import re
from functools import cache

from nemo_emmett.config import nearest
from nemo_emmett.errors import ConfigError

_WITH_SUBTAGS = re.compile(r"(?P<code>[a-z]{2,3})(-[A-Z][a-z]{3})?(-([A-Z]{2}|\d{3}))?")
"""A language code with a script, a region or both, as BCP 47 writes them: zh-Hant, pt-BR, es-419, zh-Hant-TW."""


@cache
def _names() -> dict[str, str]:
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    return {code: name.title() for code, name in LANGUAGES.items()}


@cache
def known_languages() -> frozenset[str]:
    """All language codes that a recipe may name: ``de``, ``ast``, ``deu_Latn``, ..."""
    from transformers.models.m2m_100.tokenization_m2m_100 import FAIRSEQ_LANGUAGE_CODES as M2M100_CODES
    from transformers.models.nllb.tokenization_nllb import FAIRSEQ_LANGUAGE_CODES as FLORES_CODES

    return frozenset(_names()) | frozenset(M2M100_CODES["m2m100"]) | frozenset(FLORES_CODES)


def is_known_language(code: str) -> bool:
    """Whether ``code`` is a language code that a recipe may name; script and region may follow: ``zh-Hant``, ``en-US``.

    Example:
        >>> is_known_language("pt-BR"), is_known_language("en-de")
        (True, False)
    """
    if code in known_languages():
        return True
    tagged = _WITH_SUBTAGS.fullmatch(code)
    return tagged is not None and tagged["code"] in known_languages()


def check_language(code: str, where: str) -> str:
    """Return ``code`` if it is known.

    Args:
        code: a language code.
        where: the key or record that named it, for the message.

    Raises:
        ConfigError: if no backbone knows the code; the nearest known one is named.
    """
    if is_known_language(str(code)):
        return str(code)
    suggestion = nearest(str(code).lower(), known_languages())  # a code in capitals is no closer to any other
    codes = "use an ISO 639-1 code (de; with a region: pt-BR) or a FLORES-200 one (deu_Latn)."
    hint = f"did you mean '{suggestion}'?" if suggestion else codes
    raise ConfigError(f"{where}: '{code}' is not a known language; {hint}")


def language_name(code: str) -> str:
    """English name of a language, for prompts that spell it out; the code itself where no name is known.

    Example:
        >>> language_name("de"), language_name("en-US"), language_name("deu_Latn")
        ('German', 'English', 'deu_Latn')
    """
    return _names().get(code) or _names().get(code.split("-")[0], code)
