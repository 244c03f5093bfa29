"""Valid language codes, messages for others, and English names."""

from __future__ import annotations

import pytest
from transformers.models.mbart50.tokenization_mbart50 import FAIRSEQ_LANGUAGE_CODES as MBART50_CODES
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from nemo_emmett.errors import ConfigError
from nemo_emmett.prompts import languages
from nemo_emmett.prompts.language_codes import FLORES_OF_ISO
from nemo_emmett.prompts.languages import (
    check_language,
    flores_code,
    is_known_language,
    language_name,
    m2m100_code,
    mbart_code,
)


@pytest.mark.parametrize("code", ["de", "ast", "yue", "mdw", "en-US", "pt-BR", "es-419", "zh-Hant", "zh-Hant-TW"])
def test_known_languages(code) -> None:
    assert is_known_language(code)
    assert check_language(code, "target_lang") == code


@pytest.mark.parametrize(("code", "form"), [("deu_Latn", "de"), ("deu", "de"), ("de_DE", "de"), ("arz_Arab", "arz")])
def test_a_code_that_is_checked_gets_its_one_form(code, form) -> None:
    assert is_known_language(code)
    assert check_language(code, "target_lang") == form


@pytest.mark.parametrize(
    "code",
    ["xx", "DE", "en-de", "de-nonsense", "en-", "en-us", "zh-hant", "xx-US", "en-US-x", "deu_Latn-DE", "", "en\n"],
)
def test_unknown_languages(code) -> None:
    assert not is_known_language(code)
    with pytest.raises(ConfigError, match="is not a known language; "):
        check_language(code, "target_lang")


@pytest.mark.parametrize(
    ("code", "meant"),
    [
        ("DE", "'de' (German)"),
        ("De", "'de' (German)"),
        ("deu_latn", "'deu_Latn' (German)"),
        ("fra_Latm", "'fra_Latn' (French)"),
        ("en-us", "'en-US' (English)"),
        ("zh-hant", "'zh-Hant' (Chinese)"),
        ("xx", "'xh' (Xhosa)"),
        ("german", "'de' (German)"),
    ],
)
def test_the_nearest_language_is_named(code, meant) -> None:
    with pytest.raises(ConfigError) as refused:
        check_language(code, "data.train_ds.target_lang")
    assert str(refused.value) == f"data.train_ds.target_lang: '{code}' is not a known language; did you mean {meant}?"


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("en_de", "'en_de' is not a known language; it names two, 'en' (English) and 'de' (German); give one of them."),
        (
            "eng-mdw",
            "'eng-mdw' is not a known language; it names two, 'eng' (English) and 'mdw' (Mbosi); give one of them.",
        ),
        ("dee", "'dee' is the code of Dewoin; if German is meant, write 'de', for Dewoin write 'dee-Latn'."),
        ("dde", "'dde' is the code of Doondo; if German is meant, write 'de', for Doondo write 'dde-Latn'."),
        ("faa", "'faa' is the code of Fasu; if Persian is meant, write 'fa', for Fasu write 'faa-Latn'."),
        (
            "klingon",
            "'klingon' is not a known language; use a code of ISO 639 (de, mdw; with a region: pt-BR) or FLORES-200 "
            "(deu_Latn).",
        ),
    ],
)
def test_what_to_write_instead(code, sentence) -> None:
    with pytest.raises(ConfigError) as refused:
        check_language(code, "--to")
    assert str(refused.value) == f"--to: {sentence}"


def test_names_are_those_that_models_were_trained_with() -> None:
    assert all(language_name(code) == name.title() for code, name in LANGUAGES.items())
    assert [language_name(code) for code in ("ff", "ns", "om", "zu")] == ["Fulah", "Northern Sotho", "Oromo", "Zulu"]


def test_names() -> None:
    codes = ("de", "en-US", "zh-Hant", "deu_Latn", "deu", "mdw", "arz_Arab", "dee-Latn", "qaa", "xx")
    names = ["German", "English", "Chinese", "German", "German", "Mbosi", "Egyptian Arabic", "Dewoin", "qaa", "xx"]
    assert [language_name(code) for code in codes] == names


FLORES = {
    "en": "eng_Latn",
    "de": "deu_Latn",
    "es": "spa_Latn",
    "fr": "fra_Latn",
    "zh": "zho_Hans",
    "zh-Hant": "zho_Hant",
    "zh-TW": "zho_Hant",
    "zh-Hans-SG": "zho_Hans",
    "pt-BR": "por_Latn",
    "no": "nob_Latn",
    "nn": "nno_Latn",
    "ar": "arb_Arab",
    "jw": "jav_Latn",
    "ns": "nso_Latn",
    "ast": "ast_Latn",
    "yue": "yue_Hant",
    "ks-Deva": "kas_Deva",
    "arz_Arab": "arz_Arab",
    "deu": "deu_Latn",
    "de_DE": "deu_Latn",
    "nob": "nob_Latn",
    "cmn": "zho_Hans",
    "zh-Hant-HK": "zho_Hant",
    "de-1996": "deu_Latn",
    "ace": "ace_Latn",
    "fil": "tgl_Latn",
    "sd-IN": "snd_Arab",
    "la": None,
    "mdw": None,
    "sr-Latn": None,
    "sr-Latn-ME": None,
    "xx": None,
}


@pytest.mark.parametrize(("code", "flores"), FLORES.items())
def test_flores_codes(code, flores) -> None:
    assert flores_code(code) == flores


@pytest.mark.parametrize(
    ("code", "m2m100", "mbart"),
    [
        ("de", "de", "de_DE"),
        ("deu_Latn", "de", "de_DE"),
        ("pt-BR", "pt", "pt_XX"),
        ("zho_Hant", "zh", "zh_CN"),
        ("nb", "no", None),
        ("nob_Latn", "no", None),
        ("jw", "jv", None),
        ("nso_Latn", "ns", None),
        ("ast", "ast", None),
        ("arz_Arab", None, None),
        ("la", None, None),
        ("mdw", None, None),
        ("deu", "de", "de_DE"),
        ("ger-AT", "de", "de_DE"),
        ("cmn-Hant", "zh", "zh_CN"),
        ("fil", "tl", "tl_XX"),
    ],
)
def test_codes_of_the_other_families(code, m2m100, mbart) -> None:
    assert (m2m100_code(code), mbart_code(code)) == (m2m100, mbart)


def test_every_flores_code_in_the_table_is_one_and_stands_for_its_iso_code() -> None:
    """CLDR, by way of Babel, is the independent witness; it has no macrolanguages that it does not use itself."""
    get_global = pytest.importorskip("babel.core", reason="Babel holds CLDR's aliases").get_global
    aliases = get_global("language_aliases")
    differs = {}
    for iso, flores in FLORES_OF_ISO.items():
        assert flores in languages._flores_codes()
        if (alias := aliases.get(flores[:3])) != iso:
            differs[iso] = (flores, alias)
    # Members of macrolanguages that CLDR does not fold in, and where it prefers another code for the same language.
    assert differs == {
        "ff": ("fuv_Latn", None),
        "no": ("nob_Latn", "nb"),
        "ps": ("pbt_Arab", None),
        "qu": ("quy_Latn", None),
        "tl": ("tgl_Latn", "fil"),
        "tw": ("twi_Latn", "ak"),
    }


def test_each_family_finds_all_of_its_own_languages() -> None:
    codes = languages._m2m100_codes()
    assert {m2m100_code(code) for code in codes} == codes
    assert {flores_code(code) for code in languages._flores_codes()} == languages._flores_codes()
    assert [code for code in sorted(codes) if flores_code(code) is None] == ["br", "fy"]
    assert [mbart_code(code) for code in MBART50_CODES] == MBART50_CODES
    assert [mbart_code(code[:2]) for code in MBART50_CODES] == MBART50_CODES


def test_every_language_of_two_letters_has_a_name() -> None:
    two_letters = {code for code in languages.known_languages() if len(code) == 2}
    assert [code for code in sorted(two_letters) if language_name(code) == code] == []
