"""Which sentences are left out, and why; language identification on real captions."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_emmett.corpora.filtering import FilterConfig, LanguageIdentifier, SentenceFilter
from nemo_emmett.errors import ConfigError, DataError, EmmettError

CAPTIONS = Path(__file__).parents[3] / "shared" / "data" / "multi30k"


def cause(texts: dict[str, str], **config: Any) -> str | None:
    return SentenceFilter(FilterConfig(**config), list(texts)).cause(texts)


def test_nothing_is_left_out_by_default() -> None:
    assert cause({"en": "x", "de": "völlig anders als das, was dort steht"}) is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"max_length_ratio": 0.5}, "filters.max_length_ratio: 0.5 cannot be used; give a number from 1, or null"),
        ({"max_length_ratio": float("nan")}, "filters.max_length_ratio: nan cannot be used"),
        ({"max_length_ratio": "three"}, "filters.max_length_ratio: 'three' cannot be used"),
        ({"min_words": 0}, "filters.min_words: 0 cannot be used; give a whole number from 1, or null"),
        ({"max_words": 2.5}, "filters.max_words: 2.5 cannot be used"),
        ({"max_words": True}, "filters.max_words: True cannot be used"),
        ({"language_id": "false"}, "filters.language_id: 'false' cannot be used; give true or false"),
        ({"held_out": (3,)}, "filters.held_out.0: 3 cannot be used"),
        ({"min_words": 5, "max_words": 4}, "filters.min_words: 5 is above max_words, 4"),
    ],
)
def test_values_that_cannot_work_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        FilterConfig(**config)
    assert str(error.value).startswith(message)


def test_length_ratio_is_of_the_longest_to_the_shortest() -> None:
    assert cause({"en": "abcd", "de": "abcdabcdabcd"}, max_length_ratio=3) is None
    assert cause({"en": "abcd", "de": "abcdabcdabcda"}, max_length_ratio=3) == "length ratio above 3"
    assert cause({"en": "abcd", "fr": "abcdefgh", "de": "a"}, max_length_ratio=2.5) == "length ratio above 2.5"
    assert cause({"en": "abcd"}, max_length_ratio=1) is None


def test_length_ratio_is_fair_to_chinese() -> None:
    texts = {"en": "The children are playing football in the park.", "zh": "孩子们在公园里踢足球。"}
    assert len(texts["en"]) > 4 * len(texts["zh"])
    assert cause(texts, max_length_ratio=2.5) is None


def test_words_are_counted_in_each_language() -> None:
    assert cause({"en": "one two three", "de": "eins zwei"}, min_words=3) == "fewer than 3 words"
    assert cause({"en": "one two three", "de": "eins zwei drei"}, min_words=3, max_words=3) is None
    assert cause({"en": "one two three four", "de": "eins"}, max_words=3) == "more than 3 words"
    assert cause({"zh": "孩子们在公园里踢足球"}, min_words=5) is None  # five words, at two characters each
    assert cause({"zh": "孩子们在公园里踢足球"}, min_words=6) == "fewer than 6 words"


def test_only_the_first_of_equal_sentences_stays() -> None:
    sentence_filter = SentenceFilter(FilterConfig(deduplicate=True), ["en", "de"])
    assert sentence_filter.cause({"en": "The café.", "de": "Das Café."}) is None
    assert sentence_filter.cause({"de": "Das Café. ", "en": "The cafe\u0301."}) == "duplicate"
    assert sentence_filter.cause({"en": "The café.", "de": "Das Kaffeehaus."}) is None
    assert sentence_filter.cause({"en": "Das Café.", "de": "The café."}) is None


def test_sentence_left_out_for_another_reason_is_no_first_one() -> None:
    sentence_filter = SentenceFilter(FilterConfig(deduplicate=True, max_length_ratio=2), ["en", "de"])
    assert sentence_filter.cause({"en": "Yes.", "de": "Das ist wohl so."}) == "length ratio above 2"
    assert sentence_filter.cause({"en": "Yes.", "de": "Das ist wohl so."}) == "length ratio above 2"


def test_held_out_sentences_are_left_out(tmp_path: Path) -> None:
    test = tmp_path / "test.de"
    test.write_text("Zwei Hunde spielen im tiefen Schnee.\nVielen Dank.\n", encoding="utf-8")
    sentence_filter = SentenceFilter(FilterConfig(held_out=(test,)), ["en", "de"])
    left_out = "occurs in held-out data"
    assert sentence_filter.cause({"en": "Two dogs.", "de": "zwei HUNDE spielen im tiefen Schnee"}) == left_out
    assert (
        sentence_filter.cause({"en": "Look!", "de": "Schau! Zwei Hunde spielen im tiefen Schnee, sagt er."}) == left_out
    )
    assert sentence_filter.cause({"en": "Two cats.", "de": "Zwei Katzen spielen im tiefen Schnee."}) is None
    assert sentence_filter.cause({"en": "Thank you.", "de": "Vielen Dank."}) is None
    with pytest.raises(DataError, match=r"missing\.de' does not exist"):
        SentenceFilter(FilterConfig(held_out=(tmp_path / "missing.de",)), ["de"])


def test_missing_library_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "py3langid", None)
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    with pytest.raises(EmmettError, match=r"needs 'py3langid', .*pip install 'nemo_emmett\[langid\]'"):
        SentenceFilter(FilterConfig(language_id=True), ["en"])
    assert cause({"en": "x"}, deduplicate=True) is None


class TestLanguageIdentification:
    @pytest.fixture(autouse=True)
    def _library(self) -> None:
        pytest.importorskip("py3langid", reason="py3langid is not installed")

    def test_sentence_in_another_language_is_left_out(self) -> None:
        english, german = "The dog is running over the green lawn.", "Der Hund rennt über den grünen Rasen."
        assert cause({"en": english, "de": german}, language_id=True) is None
        assert cause({"en": english, "de": english}, language_id=True) == "not in German"
        assert cause({"fr": german, "de": german}, language_id=True) == "not in French"

    @pytest.mark.parametrize("text", ["OK", "2019", "Berlin", "...", "http://www.example.com", "Danke."])
    def test_a_text_too_short_to_identify_is_kept(self, text: str) -> None:
        assert cause({"de": text, "en": text}, language_id=True) is None

    def test_codes_with_script_or_region_and_of_other_names_are_understood(self) -> None:
        texts = {"zh-Hant": "孩子們在公園裡踢足球。", "pt-BR": "As crianças jogam futebol no parque."}
        assert cause(texts, language_id=True) is None
        assert cause({"nb": "Barna spiller fotball i parken hver eneste dag."}, language_id=True) is None

    def test_language_that_cannot_be_identified_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"filters\.language_id: 'ay' is not among the 1\d\d languages"):
            SentenceFilter(FilterConfig(language_id=True), ["en", "ay"])

    @pytest.mark.skipif(not CAPTIONS.is_dir(), reason="Multi30k is not at ../shared/data")
    def test_errors_on_real_captions_are_as_documented(self) -> None:
        languages = {"en": "de", "de": "en", "fr": "en", "cs": "de"}
        captions = {lang: (CAPTIONS / f"val.{lang}").read_text("utf-8").splitlines() for lang in languages}
        identifier = LanguageIdentifier(list(languages))
        wrong = [text for lang, texts in captions.items() for text in texts if not identifier.may_be(text, lang)]
        assert wrong == []
        missed = sum(identifier.may_be(text, other) for lang, other in languages.items() for text in captions[lang])
        assert missed <= 0.002 * 4056

        beginnings = {lang: [" ".join(text.split()[:3]) for text in texts] for lang, texts in captions.items()}
        wrong = [text for lang, texts in beginnings.items() for text in texts if not identifier.may_be(text, lang)]
        assert len(wrong) <= 0.0025 * 4056
