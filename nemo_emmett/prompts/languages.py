"""Languages of translations: their names, and their codes in each family of backbones.

Codes are compared in one form, :func:`language_code`. The code of a language in a family of backbones is given by
:func:`m2m100_code`, :func:`flores_code` (NLLB) and :func:`mbart_code`, by the tables of the tokenizers in transformers.
"""

from __future__ import annotations

import re
from functools import cache

from nemo_emmett.config import nearest
from nemo_emmett.errors import ConfigError
from nemo_emmett.prompts.language_codes import (
    FLORES_OF_ISO,
    MBART_CODES,
    NEW_CODES,
    OWN_CODES,
    cldr_name,
    language_code,
    recased,
    slip_of,
    usual_script,
)

_WITH_SUBTAGS = re.compile(r"[a-z]{2,3}(-[A-Z][a-z]{3})?(-([A-Z]{2}|\d{3}))?")

_TRADITIONAL_CHINESE = ("TW", "HK", "MO")  # regions that write Chinese in the traditional script

_TAGALOG = {"fil": "tl"}
"""Filipino, the standard of Tagalog, which is Tagalog in all families."""

_NAMES = {
    "bn": "Bengali",
    "ff": "Fulah",
    "jw": "Javanese",
    "mi": "Maori",
    "my": "Myanmar",
    "nn": "Nynorsk",
    "ns": "Northern Sotho",
}
"""English names other than Babel's: Whisper's, which stay, since models were trained on prompts with them."""


@cache
def _m2m100_codes() -> frozenset[str]:
    from transformers.models.m2m_100.tokenization_m2m_100 import FAIRSEQ_LANGUAGE_CODES

    return frozenset(FAIRSEQ_LANGUAGE_CODES["m2m100"])


@cache
def _flores_codes() -> frozenset[str]:
    from transformers.models.nllb.tokenization_nllb import FAIRSEQ_LANGUAGE_CODES

    return frozenset(FAIRSEQ_LANGUAGE_CODES)


@cache
def known_languages() -> frozenset[str]:
    """The language codes of the backbones' own tables: ``de``, ``ast``, ``deu_Latn``, ..."""
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    return frozenset(LANGUAGES) | frozenset(FLORES_OF_ISO) | _m2m100_codes() | _flores_codes()


def is_known_language(code: str) -> bool:
    """Whether ``code`` is a language code that a recipe may name, as :func:`language_code` takes them.

    Example:
        >>> is_known_language("pt-BR"), is_known_language("mdw"), is_known_language("en-de")
        (True, True, False)
    """
    return language_code(code) is not None


def is_backbone_language(code: str) -> bool:
    """Whether ``code`` is in one of the backbones' tables, or one of theirs with a script, a region or both."""
    return code in known_languages() or (
        _WITH_SUBTAGS.fullmatch(code) is not None and code.split("-")[0] in known_languages()
    )


def check_language(code: str, where: str) -> str:
    """Return the one form of ``code`` (:func:`language_code`).

    Args:
        code: a language code.
        where: the key or record that names it, for the message.

    Raises:
        ConfigError: if it is no code, or a likely slip of another; the nearest valid one is named.
    """
    code = str(code)
    found = language_code(code)
    if found is not None:
        return found
    if meant := slip_of(code):
        name, written = _base_name(code), f"{code}-{usual_script(code) or 'Latn'}"
        raise ConfigError(
            f"{where}: '{code}' is the code of {name}; if {language_name(meant)} is meant, write '{meant}', for {name} "
            f"write '{written}'."
        )
    raise ConfigError(f"{where}: '{code}' is not a known language; {_hint(code)}")


def _hint(code: str) -> str:
    """What to write in place of a code that is none."""
    first, *others = re.split("[-_]", code)
    if len(others) == 1 and len(others[0]) < 4 and language_code(first) and language_code(others[0]):
        names = " and ".join(f"'{one}' ({language_name(one)})" for one in (first, *others))
        return f"it names two, {names}; give one of them."
    candidates = (recased(code), _by_name().get(code.lower()), nearest(code.lower(), known_languages()))
    suggestion = next((one for one in candidates if one is not None and language_code(one)), None)
    if suggestion is None:
        return "use a code of ISO 639 (de, mdw; with a region: pt-BR) or FLORES-200 (deu_Latn)."
    return f"did you mean '{suggestion}' ({language_name(suggestion)})?"


@cache
def _by_name() -> dict[str, str]:
    """The code of each language that a backbone's table has, by its English name."""
    return {language_name(code).lower(): code for code in sorted(known_languages(), reverse=True) if "_" not in code}


@cache
def language_name(code: str) -> str:
    """English name of a language, for prompts that spell it out; the code itself where no name is known.

    Example:
        >>> language_name("de"), language_name("en-US"), language_name("deu_Latn"), language_name("mdw")
        ('German', 'English', 'German', 'Mbosi')
    """
    if code in _NAMES:
        return _NAMES[code]
    return _base_name((language_code(code) or code).split("-")[0]) or code


def with_name(code: str) -> str:
    """A code for messages, with its language's name: ``'mdw' (Mbosi)``."""
    name = language_name(code)
    return f"'{code}'" if name == code else f"'{code}' ({name})"


def _base_name(base: str) -> str | None:
    """English name of a language without subtags; None where none is known."""
    if name := _NAMES.get(base) or cldr_name(base) or NEW_CODES.get(base):
        return name
    if not re.fullmatch("[a-z]{2,3}", base):
        return None
    from langcodes import Language

    name = Language.get(base, normalize=False).language_name()
    return None if name.startswith("Unknown language") else name


@cache
def flores_code(code: str) -> str | None:
    """The FLORES-200 code of a language, as NLLB writes it; None if NLLB does not have it in that script.

    Example:
        >>> flores_code("de"), flores_code("zh-Hant"), flores_code("pt-BR"), flores_code("deu_Latn"), flores_code("la")
        ('deu_Latn', 'zho_Hant', 'por_Latn', 'deu_Latn', None)
    """
    if code in _flores_codes():
        return code
    language, *subtags = (language_code(code) or code).split("-")
    language = _TAGALOG.get(language, language)
    found = FLORES_OF_ISO.get(language)
    if found is None:  # a code of three letters that one FLORES-200 code begins with
        candidates = [known for known in _flores_codes() if known.split("_")[0] == language]
        found = candidates[0] if len(candidates) == 1 else f"{language}_{usual_script(language)}"
    script = next((tag for tag in subtags if len(tag) == 4 and tag.isalpha()), None)
    if script is None and language == "zh" and not set(_TRADITIONAL_CHINESE).isdisjoint(subtags):
        script = "Hant"
    written = f"{found[:3]}_{script}" if script else found
    return written if written in _flores_codes() else None


@cache
def m2m100_code(code: str) -> str | None:
    """M2M100's code of a language, whatever its script and region; None if M2M100 does not have it.

    Example:
        >>> m2m100_code("de"), m2m100_code("pt-BR"), m2m100_code("deu_Latn"), m2m100_code("la")
        ('de', 'pt', 'de', None)
    """
    return next((known for known in _shorter_codes(code) if known in _m2m100_codes()), None)


@cache
def mbart_code(code: str) -> str | None:
    """mBART's code of a language, whatever its script and region; None if mBART-50 does not have it.

    Example:
        >>> mbart_code("de"), mbart_code("pt-BR"), mbart_code("deu_Latn"), mbart_code("la")
        ('de_DE', 'pt_XX', 'de_DE', None)
    """
    codes = {known[:2]: known for known in MBART_CODES}
    return next((codes[known] for known in _shorter_codes(code) if known in codes), None)


def _shorter_codes(code: str) -> list[str]:
    """The codes that a language may have in families that do not distinguish scripts, its own first."""
    language = (language_code(code) or code).split("-")[0]
    language = _TAGALOG.get(language, language)
    own = [known for known, meant in OWN_CODES.items() if meant == language]
    same = [iso for iso, flores in FLORES_OF_ISO.items() if flores == FLORES_OF_ISO.get(language)]
    return [language, *same, *own]
