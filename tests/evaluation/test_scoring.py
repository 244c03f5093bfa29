"""Averages count each direction between different languages once; what cannot be scored is named."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import sacrebleu

from nemo_emmett.errors import DataError
from nemo_emmett.evaluation.results import Score, Translation
from nemo_emmett.evaluation.scoring import average, columns, score
from nemo_emmett.modules.metrics import corpus_bleu

from .samples import noisy_sentences


def translation(hypothesis="a", reference="a", source="en", target="de", test_set="test", modality="text"):
    return Translation(test_set, "1", modality, source, target, "source", reference, hypothesis)


def translations(seed: int, **where) -> list[Translation]:
    return [translation(hyp, ref, **where) for hyp, ref in zip(*noisy_sentences(seed), strict=True)]


def test_each_direction_test_set_and_modality_is_scored_apart():
    groups = {
        ("news", "text", "en", "de"): 1,
        ("news", "text", "de", "en"): 2,
        ("talks", "text", "en", "de"): 3,
        ("talks", "audio", "en", "de"): 4,
    }
    mixed = []
    for (test_set, modality, source, target), seed in groups.items():
        mixed += translations(seed, test_set=test_set, modality=modality, source=source, target=target)
    random.Random(0).shuffle(mixed)

    scores = {(one.test_set, one.modality, *one.direction): one for one in score(mixed)}

    assert scores.keys() == groups.keys()
    for key, seed in groups.items():
        hypotheses, references = noisy_sentences(seed)
        # The shuffle changes nothing: BLEU adds counts up over the corpus.
        assert scores[key].bleu == pytest.approx(sacrebleu.corpus_bleu(hypotheses, [references]).score, abs=1e-9)
        chrf = sacrebleu.corpus_chrf(hypotheses, [references], word_order=2).score
        assert scores[key].metrics["chrF++"] == pytest.approx(chrf, abs=1e-9)
        assert scores[key].sentences == 30


def test_the_average_is_over_directions_not_sentences_and_leaves_same_language_out():
    (column,) = columns(
        [
            Score("test", "text", "en", "de", sentences=100, metrics={"BLEU": 90.0, "TER": 5.0}),
            Score("test", "text", "de", "en", sentences=300, metrics={"BLEU": 60.0, "TER": 20.0}),
            Score("test", "text", "en", "en", sentences=100, metrics={"BLEU": 0.0, "TER": 0.0}),
        ]
    )
    mean = average(column)
    assert (mean.metrics, mean.directions, mean.sentences) == ({"BLEU": 75.0, "TER": 12.5}, 2, 400)


def test_a_column_of_one_language_has_no_average():
    (column,) = columns([Score("test", "audio", "en", "en", sentences=1, metrics={"BLEU": 50.0})])
    assert average(column) is None


def test_test_sets_share_a_column_until_they_hold_the_same_direction():
    apart = [
        Score("en-de", "text", "en", "de", 1, {"BLEU": 1.0}),
        Score("de-en", "text", "de", "en", 1, {"BLEU": 1.0}),
        Score("speech", "audio", "de", "en", 1, {"BLEU": 1.0}),
    ]
    assert [column.key for column in columns(apart)] == [("text", None), ("audio", None)]

    overlapping = [*apart, Score("news", "text", "de", "en", 1, {"BLEU": 1.0})]
    assert [column.key for column in columns(overlapping)] == [
        ("text", "de-en"),
        ("text", "en-de"),
        ("text", "news"),
        ("audio", None),
    ]


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ({"reference": None}, "'1' of test set 'test' has no reference"),
        ({"source": None}, "'1' of test set 'test' has no source language"),
        ({"target": None}, "'1' of test set 'test' has no target language"),
    ],
)
def test_what_cannot_be_scored_is_named(missing, sentence):
    with pytest.raises(DataError, match=sentence):
        score([translation(), translation(**missing)])


def test_nothing_to_score_is_an_error():
    with pytest.raises(DataError, match="no translation to score"):
        score([])
    with pytest.raises(DataError, match="no translation to score"):
        corpus_bleu([], [])


def test_unequal_lists_are_refused():
    with pytest.raises(DataError, match="2 translations cannot be scored against 1 references"):
        corpus_bleu(["a", "b"], ["a"])


def test_transcripts_of_answers_in_two_steps_have_an_error_rate():
    """Edits counted by hand: a substitution, an insertion and four deletions of ten words."""
    said = [("a red house", "a blue house"), ("two cars now", "two cars"), (None, "one old green door"), ("x", "x")]
    in_steps = [
        replace(translation(), source_text=reference, transcript=transcript, is_malformed=transcript is None)
        for transcript, reference in said
    ]
    (found,) = score([*in_steps, replace(translation(), source_text=None, transcript="any")])
    assert found.transcripts == {"WER": pytest.approx(60.0), "malformed": 1}
    assert found.bleu == score([translation()] * 5)[0].bleu
    (plain,) = score([translation()])
    assert plain.transcripts == {}
    (chinese,) = score([replace(translation(source="zh"), source_text="红色的猫", transcript="红色的狗")])
    assert chinese.transcripts == {"CER": pytest.approx(25.0), "malformed": 0}
    (unknown,) = score([replace(translation(), source_text=None, transcript="a")])
    assert unknown.transcripts == {"malformed": 0}
