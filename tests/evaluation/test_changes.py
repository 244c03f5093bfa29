"""The worst sentences and those that changed most: by sentence chrF, each once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sacrebleu

from nemo_emmett.evaluation.changes import most_changed, sentence_chrf, worst
from nemo_emmett.evaluation.results import Translation

REFERENCE = "the quick brown fox jumps over the lazy dog"


def translation(number: str, hypothesis: str, **changes) -> Translation:
    values = {
        "test_set": "news",
        "modality": "text",
        "source_lang": "de",
        "target_lang": "en",
        "source_text": f"Satz {number}",
        "reference": REFERENCE,
    }
    return Translation(id=number, hypothesis=hypothesis, **(values | changes))


def first_words(number: int) -> str:
    return " ".join(REFERENCE.split()[:number])


def ids(chosen) -> list[str]:
    return [one.translation.id for one in chosen]


def test_sentence_chrf_is_sacrebleus():
    one = translation("1", "the quick brown dog")
    assert sentence_chrf(one) == sacrebleu.sentence_chrf(one.hypothesis, [REFERENCE]).score
    assert sentence_chrf(translation("2", "")) == 0


def test_the_worst_come_in_order_and_no_more_than_asked_for():
    translations = [translation(str(words), first_words(words)) for words in (9, 3, 1, 5)]
    assert ids(worst(translations, 3)) == ["1", "3", "5"]
    assert ids(worst(translations, 10)) == ["1", "3", "5", "9"]
    assert worst(translations, 0) == []


def test_ties_are_in_the_order_of_ids():
    # No character in common with the reference: each has a chrF of 0.
    translations = [translation(name, "1" * length) for name, length in (("c", 1), ("a", 2), ("b", 3))]
    assert ids(worst(translations, 3)) == ["a", "b", "c"]


def test_a_sentence_is_shown_in_one_direction_only():
    translations = [
        translation("7", "1", target_lang="en"),
        translation("7", "2", target_lang="fr"),
        translation("8", "the fox"),
    ]
    assert [(one.translation.id, one.translation.target_lang) for one in worst(translations, 3)] == [
        ("7", "en"),
        ("8", "en"),
    ]


def test_a_translation_given_again_and_again_is_shown_once():
    translations = [translation(name, "") for name in "abc"] + [translation("d", "the fox")]
    assert ids(worst(translations, 3)) == ["a", "d"]


def test_modalities_take_turns_and_text_comes_first():
    speech = [translation(f"s{i}", "1" * (i + 1), modality="audio") for i in range(5)]
    text = [translation(f"t{words}", first_words(words)) for words in (1, 2, 3)]
    assert ids(worst(speech + text, 4)) == ["t1", "t2", "s0", "s1"]
    assert ids(worst(speech + text, 7)) == ["t1", "t2", "t3", "s0", "s1", "s2", "s3"]


def test_gains_and_losses_come_from_the_largest_on():
    before = [translation(name, first_words(5)) for name in "abcdef"]
    now = [
        translation("a", first_words(9)),
        translation("b", first_words(7)),
        translation("c", first_words(5)),
        translation("d", first_words(1)),
        translation("e", first_words(3)),
        translation("f", "the quick brown fox jumped"),
    ]
    before[1] = replace(before[1], hypothesis=first_words(4))
    before[4] = replace(before[4], hypothesis=first_words(6))
    before[5] = replace(before[5], hypothesis="quick brown fox jumped a")
    changes = most_changed(now, list(reversed(before)), 10)
    assert (changes.compared, changes.differing) == (6, 5)
    gains = {one.id: gain(one, other) for one, other in zip(now, before, strict=True)}
    assert ids(changes.gained) == sorted(ids(changes.gained), key=gains.get, reverse=True)
    assert set(ids(changes.gained)) == {"a", "b", "f"}
    assert ids(changes.lost) == ["d", "e"]
    assert changes.gained[0].change == pytest.approx(max(gains.values()))
    assert ids(most_changed(now, before, 1).lost) == ["d"]


def gain(now: Translation, before: Translation) -> float:
    scores = [sacrebleu.sentence_chrf(one.hypothesis, [one.reference]).score for one in (now, before)]
    return scores[0] - scores[1]


def test_directions_that_the_baseline_lacks_are_not_compared():
    now = [translation("a", "the fox"), translation("a", "le renard", target_lang="fr")]
    changes = most_changed(now, [translation("a", REFERENCE)], 10)
    assert changes.compared == 1
    assert [one.translation.target_lang for one in changes.lost] == ["en"]
    assert changes.gained == []


def test_sentences_of_one_id_are_paired_by_their_recordings():
    readers = [
        translation("5", f"{first_words(4)} {reader}", modality="audio", audio_path=f"{reader}.wav") for reader in "abc"
    ]
    changes = most_changed(readers, list(reversed(readers)), 10)
    assert (changes.compared, changes.differing) == (3, 0)
