"""The one form of a language's code. Expected values are from the IANA registry and SIL's table of ISO 639-3."""

from __future__ import annotations

import time

import pytest
from transformers.models.mbart50.tokenization_mbart50 import FAIRSEQ_LANGUAGE_CODES as MBART50_CODES
from transformers.models.nllb.tokenization_nllb import FAIRSEQ_LANGUAGE_CODES as FLORES_CODES

from nemo_emmett.prompts.language_codes import (
    MBART_CODES,
    NEW_CODES,
    language_code,
    language_of_suffix,
    normalized,
    slip_of,
)
from nemo_emmett.prompts.languages import flores_code, known_languages, language_name

ONE_FORM = {
    # ISO 639-1, 639-2/T, 639-2/B and 639-3 of one language (SIL: Part1, Part2t, Part2b, Id)
    "de": "de",
    "deu": "de",
    "ger": "de",
    "fre": "fr",
    "fra": "fr",
    "ces": "cs",
    "cze": "cs",
    "ell": "el",
    "wel": "cy",
    "hye": "hy",
    "hbs": "sh",
    # ISO 639-3 without a code of two letters
    "mdw": "mdw",
    "ceb": "ceb",
    "yue": "yue",
    "arz": "arz",
    "gsw": "gsw",
    "prs": "prs",
    "fil": "fil",
    "fuc": "fuc",
    "tok": "tok",
    # deprecated subtags and their Preferred-Value (registry: Type language, redundant, grandfathered)
    "iw": "he",
    "in": "id",
    "ji": "yi",
    "mo": "ro",
    "aue": "ktz",
    "drw": "prs",
    "i-klingon": "tlh",
    "zh-min-nan": "nan",
    "zh-yue": "yue",
    "no-bok": "nb",
    # a macrolanguage and its standard member (registry: Macrolanguage)
    "zho": "zh",
    "cmn": "zh",
    "ara": "ar",
    "arb": "ar",
    "ekk": "et",
    "zsm": "ms",
    "no": "no",
    "nor": "no",
    "nb": "nb",
    "nob": "nb",
    "nn": "nn",
    "tl": "tl",
    "tgl": "tl",
    "tw": "tw",
    # BCP 47 with a script (registry: Suppress-Script Latn of en, Cyrl of ru), a region, a variant, an extension
    "en-Latn": "en",
    "ru-Cyrl": "ru",
    "zh-Hans": "zh",
    "zh-Hant": "zh-Hant",
    "zh-Hant-TW": "zh-Hant-TW",
    "zh-Hans-TW": "zh-Hans-TW",
    "sr-Latn": "sr-Latn",
    "mdw-Latn": "mdw",
    "pt-BR": "pt-BR",
    "deu-AT": "de-AT",
    "es-419": "es-419",
    "de-1996": "de-1996",
    "ca-valencia": "ca-valencia",
    "fr-x-old": "fr-x-old",
    "qaa": "qaa",
    # FLORES-200
    "eng_Latn": "en",
    "zho_Hans": "zh",
    "zho_Hant": "zh-Hant",
    "arb_Arab": "ar",
    "arb_Latn": "ar-Latn",
    "arz_Arab": "arz",
    "nob_Latn": "nb",
    "kas_Deva": "ks-Deva",
    "ace_Latn": "ace",
    "ace_Arab": "ace-Arab",
    "crh_Latn": "crh",
    # Whisper, M2M100, mBART
    "jw": "jv",
    "ns": "nso",
    "de_DE": "de",
    "ar_AR": "ar",
    "en_XX": "en",
    # with an underscore, as locales are written
    "pt_BR": "pt-BR",
}


@pytest.mark.parametrize(("code", "expected"), ONE_FORM.items())
def test_one_form(code, expected) -> None:
    assert language_code(code) == expected
    assert language_code(expected) == expected


NO_CODES = [
    *("", "xx", "DE", "De", "Deu", "en-de", "en_de", "en-us", "zh-hant", "ZH-Hant", "deu_latn", "deu_Latn-DE"),
    *(
        "de-nonsense",
        "en-",
        "-en",
        "en-US-x",
        "en--US",
        "xx-US",
        "x-foo",
        "en\n",
        " en",
        "english",
        "e",
        "de-DE-AT",
        "eng-mdw",
        "zh-fra",
    ),
    *("und", "mul", "zxx", "mis", "root", "dee", "dde", "abc1", "Ⅷ", "éé"),
]


@pytest.mark.parametrize("code", NO_CODES)
def test_what_is_no_code(code) -> None:
    assert language_code(code) is None
    assert normalized(code) == code


@pytest.mark.parametrize("value", [None, 3, True, ["de"], {"de": 1}])
def test_what_is_no_text_stays_for_its_own_check(value) -> None:
    assert normalized(value) is value


def test_codes_of_all_backbones_are_codes_and_keep_their_language() -> None:
    codes = known_languages() | set(MBART50_CODES)
    forms = {code: language_code(code) for code in codes}
    assert None not in forms.values()
    assert all(language_code(form) == form for form in forms.values())
    assert sorted(MBART_CODES) == sorted(MBART50_CODES)
    assert {flores_code(forms[code]) for code in FLORES_CODES} == set(FLORES_CODES), "no two have one form"


def test_prompts_of_the_codes_of_two_letters_are_those_of_before() -> None:
    """T5's tag is the code: no code that a model was trained with becomes another, but for Whisper's of Javanese."""
    two_letters = {code for code in known_languages() if len(code) == 2}
    assert {code for code in two_letters if language_code(code) != code} == {"jw", "ns"}


SLIPS = """
    aaf arr bbn bnn ccs css dde dee enn ess ett faa ffi ggl gll guu hhi hhr hrr itt jaa kka kkk kkm kko kmm mkk mll mmk
    mml mmn mmy myy nee nll nne nnl ppl pps ppt pss roo rro ruu sii sll ssl ssv sww taa tee thh trr tta tte tth ttl ukk
    urr uur
"""


def test_codes_that_are_taken_for_slips() -> None:
    """Of all codes of three letters these 60, among them a collection's (ccs) and a retired one (hrr).

    None is of a language with many speakers.
    """
    letters = "abcdefghijklmnopqrstuvwxyz"
    doubled = {f"{one}{one}{other}" for one in letters for other in letters}
    doubled |= {f"{one}{other}{other}" for one in letters for other in letters}
    assert {code for code in doubled if slip_of(code)} == set(SLIPS.split())
    assert slip_of("dee") == slip_of("dde") == "de"
    # Konkani, Lugbara, Nyakyusa, Northeastern Thai, Konzo, Tetela, Nande; Gaa and others that CLDR names; Mboshi
    for code in ("knn", "lgg", "nyy", "tts", "koo", "tll", "nnb", "gaa", "see", "ell", "mdw"):
        assert slip_of(code) is None
        assert language_code(code) is not None
    assert [language_code(code) for code in ("dee-Latn", "dde_Latn", "dee-LR")] == ["dee-Latn", "dde-Latn", "dee-LR"]


def test_every_code_of_iso_639_3_that_langcodes_does_not_know_yet_has_its_name() -> None:
    for code, name in NEW_CODES.items():
        assert (language_code(code), language_name(code)) == (code, name)
    assert language_code("tok-Latn") == "tok"
    assert language_code("zcd-nonsense") is None


@pytest.mark.parametrize(
    ("suffix", "language"),
    [("de", "de"), ("deu", "de"), ("eng_Latn", "en"), ("mdw", "mdw"), ("txt", None), ("tok", None), ("src", None)],
)
def test_the_end_of_a_file_name(suffix, language) -> None:
    assert language_of_suffix(suffix) == language


def test_a_lookup_costs_little() -> None:
    """It runs for each record, and reading one takes some 50 microseconds."""
    codes = ["deu_Latn", "mdw", "xx", "pt-BR", "de"]
    for code in codes:
        language_code(code)
    start = time.perf_counter()
    for _ in range(10_000):
        for code in codes:
            language_code(code)
    assert (time.perf_counter() - start) / 50_000 < 5e-6
