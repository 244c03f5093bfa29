"""Examples: which translations are drawn, and the content of their cards."""

from __future__ import annotations

from dataclasses import replace

from nemo_emmett.evaluation.changes import RankedSentence
from nemo_emmett.evaluation.examples import choose_examples, example
from nemo_emmett.evaluation.recordings import Recordings
from nemo_emmett.evaluation.results import Translation

from .samples import tone


def test_examples_are_the_same_each_time_and_spread_over_directions(evaluation):
    chosen = choose_examples(evaluation.translations, 10)
    assert chosen == choose_examples(evaluation.translations, 10)
    assert {one.modality for one in chosen} == {"audio"}
    assert len({(one.source_lang, one.target_lang) for one in chosen}) == 10


def test_text_fills_up_what_speech_leaves_and_long_recordings_are_passed_over(evaluation):
    translations = [
        one if one.modality == "text" or one.id == "0" else replace(one, duration=31.0)
        for one in evaluation.translations
    ]
    chosen = choose_examples(translations, 15)
    assert [one.modality for one in chosen] == ["audio"] * 12 + ["text"] * 3
    assert {one.id for one in chosen[:12]} == {"0"}


def test_a_sentence_comes_in_a_second_direction_only_when_no_other_is_left(evaluation):
    text = [one for one in evaluation.translations if one.modality == "text"]
    chosen = choose_examples(text, 24)
    sentences = [(one.source_lang, one.id) for one in chosen]
    assert len(set(sentences[:12])) == 12  # 4 languages, 3 sentences each


def test_a_card_shows_both_translations_and_what_was_gained(tmp_path):
    now = Translation("fleurs", "7", "audio", "eng_Latn", "de", "the cat", "die Katze", "die Katze")
    now = replace(now, audio_path=str(tone(tmp_path / "a.wav", hertz=200)), duration=0.1)
    card = example(RankedSentence(now, replace(now, hypothesis="die Maus")), Recordings(), ["ours", "theirs"])
    assert card.direction == "eng_Latn → de"
    assert (card.modality, card.seconds) == ("speech", 0.1)
    assert (card.source_tag, card.target_tag) == ("eng-Latn", "de")
    assert card.recording.uri.startswith("data:audio/flac;base64,")
    ours, theirs = card.hypotheses
    assert (ours.title, ours.is_exact, ours.chrf) == ("ours", True, 100)
    assert (theirs.title, theirs.is_exact, theirs.words) == ("theirs", False, [("die ", False), ("Maus", True)])
    assert card.change == ours.chrf - theirs.chrf


def test_a_card_without_baseline_shows_no_change():
    now = Translation("flores", "7", "text", "en", "de", None, "die Katze", "")
    card = example(RankedSentence(now), Recordings(), ["ours"])
    assert (card.change, card.recording) == (None, None)
    assert [one.words for one in card.hypotheses] == [[]]
