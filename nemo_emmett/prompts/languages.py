"""Language codes: ISO 639-1 as Whisper lists them, M2M100's, and FLORES-200's as NLLB writes them.

The tables are those of the tokenizers in transformers, so a code is known here if one of the backbones knows it.
"""

from __future__ import annotations

from functools import cache

from nemo_emmett.config import nearest
from nemo_emmett.errors import ConfigError


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
    """Whether ``code`` is a language code that a recipe may name. Region suffixes (``en-US``) are accepted."""
    return code in known_languages() or code.split("-")[0] in _names()


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
    suggestion = nearest(str(code), known_languages())
    codes = "use an ISO 639-1 code (de) or a FLORES-200 one (deu_Latn)."
    hint = f"did you mean '{suggestion}'?" if suggestion else codes
    raise ConfigError(f"{where}: '{code}' is not a known language; {hint}")


def language_name(code: str) -> str:
    """English name of a language, for prompts that spell it out; the code itself where no name is known.

    Example:
        >>> language_name("de"), language_name("en-US"), language_name("deu_Latn")
        ('German', 'English', 'deu_Latn')
    """
    return _names().get(code) or _names().get(code.split("-")[0], code)
