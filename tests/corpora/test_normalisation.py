"""What of a sentence counts when two are compared, and how long sentences are in different scripts."""

from __future__ import annotations

import unicodedata

import pytest

from nemo_emmett.corpora.normalisation import count_words, display_width, normalise


@pytest.mark.parametrize(
    "written",
    [
        "Das Café öffnet um 8 Uhr, sagte er.",
        "DAS CAFÉ ÖFFNET UM 8 UHR SAGTE ER",
        unicodedata.normalize("NFD", "Das Café öffnet um 8 Uhr, sagte er."),
        "„Das Café“ öffnet – um 8 Uhr –, sagte er!",
        "  Das\u00a0Café öffnet\tum 8\u202fUhr , sagte er . ",
        "Das Ca\u00adfé öffnet\u200b um ８ Uhr sagte er\ufeff",
    ],
)
def test_writings_of_a_sentence_are_the_same(written: str) -> None:
    assert normalise(written) == "das café öffnet um 8 uhr sagte er"


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("1,234,567 people", "1234567 people"),
        ("1.234.567 people", "1234567 people"),
        ("1 234 567 people", "1234567 people"),
        ("1\u202f234 people", "1234 people"),
        ("1’234 people", "1234 people"),
        ("pi is 3.14", "pi is 3 14"),
        ("in 2019 200 people", "in 2019 200 people"),
        ("1,234.567", "1234 567"),  # one separator throughout, else it is a decimal point
        ("don’t, DON'T", "don t don t"),
        ("Straße", "strasse"),
        ("ΣΊΣΥΦΟΣ, Σίσυφος", "σίσυφοσ σίσυφοσ"),
        ("ﬁn", "fin"),
        ("我喜欢 茶。", "我 喜 欢 茶"),
        ("नमस्ते, दुनिया!", "नमस्ते दुनिया"),  # vowel signs are no punctuation
        ("?!…", ""),
    ],
)
def test_normal_form(text: str, normal: str) -> None:
    assert normalise(text) == normal
    assert normalise(normal) == normal


def test_accents_and_order_count() -> None:
    assert normalise("Sie schlägt") != normalise("Sie schlagt")
    assert normalise("a dog bites a man") != normalise("a man bites a dog")


def test_words_of_scripts_without_spaces_are_counted_by_their_width() -> None:
    assert count_words("Two dogs are playing in the snow.") == 7
    assert count_words("两只狗在雪地里玩耍。") == 5 + 1  # nine characters of two columns; the full stop counts apart
    assert count_words("iPhone 很好用") == 1 + 2
    assert display_width("雪地") == 4
    assert display_width(unicodedata.normalize("NFD", "é")) == display_width("é") == 1


TRANSLATIONS = {
    "en": "All human beings are born free and equal in dignity and rights.",
    "de": "Alle Menschen sind frei und gleich an Würde und Rechten geboren.",
    "ru": "Все люди рождаются свободными и равными в своем достоинстве и правах.",
    "zh": "人人生而自由，在尊严和权利上一律平等。",
    "ja": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "th": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ",
}
"""The first sentence of the Universal Declaration of Human Rights."""


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_width_compares_translations_across_scripts(language: str) -> None:
    english = display_width(TRANSLATIONS["en"])
    ratio = display_width(TRANSLATIONS[language]) / english
    assert 1 / 2 < ratio < 2
    # In characters the Chinese is less than a third.
    assert len(TRANSLATIONS["zh"]) < english / 3
