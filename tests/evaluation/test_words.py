"""Words: counted and marked as a reader sees them."""

from __future__ import annotations

from nemo_emmett.evaluation.words import compare_words, split_words


def test_words_are_between_spaces_and_chinese_and_japanese_characters_alone():
    assert split_words("the  black cat, 黒猫です。 end") == [
        "the",
        "black",
        "cat,",
        "黒",
        "猫",
        "で",
        "す",
        "。",
        "end",
    ]
    assert split_words(" ") == []


def test_words_that_depart_from_the_reference_are_marked():
    assert compare_words("the red  cat sat", "the cat sat down") == [
        ("the ", False),
        ("red  ", True),
        ("cat ", False),
        ("sat", False),
    ]
    assert compare_words("", "the cat") == []


def test_a_chinese_sentence_is_marked_by_character():
    assert compare_words("黑猫", "黑狗") == [("黑", False), ("猫", True)]


def test_leading_space_is_kept_and_not_marked():
    assert compare_words("  cat", "cat") == [("  ", False), ("cat", False)]
