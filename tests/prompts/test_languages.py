"""Which codes are languages, and what is said of those that are not."""

from __future__ import annotations

import pytest

from nemo_emmett.errors import ConfigError
from nemo_emmett.prompts.languages import check_language, is_known_language, language_name


@pytest.mark.parametrize("code", ["de", "ast", "yue", "deu_Latn", "en-US", "pt-BR", "es-419", "zh-Hant", "zh-Hant-TW"])
def test_known_languages(code) -> None:
    assert is_known_language(code)
    assert check_language(code, "target_lang") == code


@pytest.mark.parametrize(
    "code",
    ["xx", "DE", "en-de", "de-nonsense", "en-", "en-us", "zh-hant", "xx-US", "en-US-x", "deu_Latn-DE", "", "en\n"],
)
def test_unknown_languages(code) -> None:
    assert not is_known_language(code)
    with pytest.raises(ConfigError, match="is not a known language; "):
        check_language(code, "target_lang")


@pytest.mark.parametrize(
    ("code", "meant"), [("DE", "de"), ("De", "de"), ("deu_latn", "deu_Latn"), ("fra_Latm", "fra_Latn")]
)
def test_the_nearest_language_is_named(code, meant) -> None:
    with pytest.raises(ConfigError) as refused:
        check_language(code, "data.train_ds.target_lang")
    assert str(refused.value) == (
        f"data.train_ds.target_lang: '{code}' is not a known language; did you mean '{meant}'?"
    )


def test_names() -> None:
    assert [language_name(code) for code in ("de", "en-US", "zh-Hant", "deu_Latn")] == [
        "German",
        "English",
        "Chinese",
        "deu_Latn",
    ]
