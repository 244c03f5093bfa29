"""Scores are sacreBLEU's own; averages count each direction between different languages once."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest
import sacrebleu

from nemo_emmett.errors import DataError
from nemo_emmett.evaluation.results import Score, Translation
from nemo_emmett.evaluation.scoring import average, columns, score, signatures
from nemo_emmett.modules.bleu import corpus_bleu, signature

WORDS = ["the", "a", "red", "cat", "dog", "sat", "ran", "on", "over", "mat", "fence,", ".", "3.5", "l'été", "straße"]


def sentences(seed: int, number: int = 30) -> tuple[list[str], list[str]]:
    """Hypotheses and references that share most of their words."""
    draw = random.Random(seed)
    references = [" ".join(draw.choices(WORDS, k=draw.randint(5, 12))) for _ in range(number)]
    hypotheses = [" ".join(word for word in reference.split() if draw.random() > 0.1) for reference in references]
    return hypotheses, references


def translation(hypothesis="a", reference="a", source="en", target="de", test_set="test", modality="text"):
    return Translation(test_set, "1", modality, source, target, "source", reference, hypothesis)


def translations(seed: int, **where) -> list[Translation]:
    return [translation(hyp, ref, **where) for hyp, ref in zip(*sentences(seed), strict=True)]


def test_bleu_and_chrf_equal_the_sacrebleu_command_line_to_the_digit(tmp_path):
    hypotheses, references = sentences(seed=1)
    (tmp_path / "hyp").write_text("\n".join(hypotheses) + "\n", encoding="utf-8")
    (tmp_path / "ref").write_text("\n".join(references) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "sacrebleu", "ref", "-i", "hyp", "-m", "bleu", "chrf", "-w", "10"]
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    bleu, chrf = json.loads(output)

    (ours,) = score(translations(seed=1))

    assert f"{ours.bleu:.10f}" == f"{bleu['score']:.10f}"
    assert f"{ours.chrf:.10f}" == f"{chrf['score']:.10f}"
    assert 50 < ours.bleu < 99
    assert bleu["signature"] == signatures()["BLEU"] == signature()
    assert chrf["signature"] == signatures()["chrF"]


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
        hypotheses, references = sentences(seed)
        # The shuffle changes nothing: BLEU adds counts up over the corpus.
        assert scores[key].bleu == pytest.approx(sacrebleu.corpus_bleu(hypotheses, [references]).score, abs=1e-9)
        assert scores[key].chrf == pytest.approx(sacrebleu.corpus_chrf(hypotheses, [references]).score, abs=1e-9)
        assert scores[key].sentences == 30


def test_the_average_is_over_directions_not_sentences_and_leaves_same_language_out():
    (column,) = columns(
        [
            Score("test", "text", "en", "de", sentences=100, bleu=90.0, chrf=95.0),
            Score("test", "text", "de", "en", sentences=300, bleu=60.0, chrf=80.0),
            Score("test", "text", "en", "en", sentences=100, bleu=0.0, chrf=0.0),
        ]
    )
    mean = average(column)
    assert (mean.bleu, mean.chrf, mean.directions, mean.sentences) == (75.0, 87.5, 2, 400)


def test_a_column_of_one_language_has_no_average():
    (column,) = columns([Score("test", "audio", "en", "en", sentences=1, bleu=50.0, chrf=50.0)])
    assert average(column) is None


def test_test_sets_share_a_column_until_they_hold_the_same_direction():
    apart = [
        Score("en-de", "text", "en", "de", 1, 1.0, 1.0),
        Score("de-en", "text", "de", "en", 1, 1.0, 1.0),
        Score("speech", "audio", "de", "en", 1, 1.0, 1.0),
    ]
    assert [column.key for column in columns(apart)] == [("text", None), ("audio", None)]

    overlapping = [*apart, Score("news", "text", "de", "en", 1, 1.0, 1.0)]
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
