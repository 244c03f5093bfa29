"""BLEU by length: bins by quantiles, each scored as a corpus, all models on the same sentences."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
from sacrebleu.metrics import BLEU

from nemo_emmett.evaluation.breakdown import MIN_SENTENCES, breakdowns, upper_bounds
from nemo_emmett.evaluation.results import Evaluation, Translation

WORDS = ["the", "a", "cat", "dog", "house", "sees", "runs", "over", "under", "red", "green", "tree", "river", "bird"]


def sentence(length: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=length))


def translation(number: int, length: int, share: float = 0.7, **changes) -> Translation:
    """A sentence of so many words in source and reference, of which the hypothesis keeps a share."""
    reference = sentence(length, seed=number)
    chance = random.Random(f"{number} {share}")
    hypothesis = " ".join(word if chance.random() < share else "wrong" for word in reference.split())
    values = {
        "test_set": "news",
        "id": f"{number:03d}",
        "modality": "text",
        "source_lang": "en",
        "target_lang": "de" if number % 2 else "fr",
        "source_text": sentence(length, seed=number + 1000),
        "reference": reference,
        "hypothesis": hypothesis,
    }
    return Translation(**(values | changes))


def evaluation(translations: list[Translation], name: str = "model") -> Evaluation:
    return Evaluation(
        model=name, name=name, date="2026-01-01", scores=[], translations=translations, throughput={}, signatures={}
    )


def lengths_of_a_hundred() -> list[int]:
    return [5 + number % 10 for number in range(100)]  # ten sentences of each length from 5 to 14


def test_bins_are_bounded_by_quantiles_and_hold_every_sentence():
    [found] = breakdowns(evaluation([translation(i, length) for i, length in enumerate(lengths_of_a_hundred())]))
    assert (found.modality, found.measure, found.models) == ("text", "source words", (0,))
    assert [one.label for one in found.bins] == ["5–6", "7–8", "9–10", "11–12", "13–14"]
    assert [one.sentences for one in found.bins] == [20] * 5


def test_a_bin_is_scored_as_one_corpus_over_all_directions():
    translations = [translation(i, length) for i, length in enumerate(lengths_of_a_hundred())]
    [found] = breakdowns(evaluation(translations))
    inside = [one for one in translations if len(one.source_text.split()) in (9, 10)]
    expected = BLEU().corpus_score([one.hypothesis for one in inside], [[one.reference for one in inside]]).score
    assert 0 < expected < 100
    assert found.bins[2].bleu == (pytest.approx(expected, abs=1e-9),)


def test_each_target_language_is_tokenised_as_it_is_scored():
    chinese = [
        translation(i, 5, target_lang="zh", reference="一只黑色的猫在房子里睡觉", hypothesis="一只黑色的狗在房子里睡觉")
        for i in range(20)
    ]
    english = [translation(i, 9, target_lang="en", source_lang="de") for i in range(20)]
    [found] = breakdowns(evaluation(chinese + english))
    hypotheses, references = [one.hypothesis for one in chinese], [one.reference for one in chinese]
    expected = BLEU(tokenize="zh").corpus_score(hypotheses, [references]).score
    assert expected > 50
    assert found.bins[0].bleu == (pytest.approx(expected, abs=1e-9),)


def test_all_models_are_scored_on_the_same_sentences_whatever_their_order():
    ours = [translation(i, length) for i, length in enumerate(lengths_of_a_hundred())]
    theirs = [translation(i, length, share=0.9) for i, length in enumerate(lengths_of_a_hundred())]
    shuffled = random.Random(0).sample(theirs, len(theirs))
    [found] = breakdowns(evaluation(ours), [evaluation(shuffled)])
    [alone] = breakdowns(evaluation(theirs))
    assert found.models == (0, 1)
    assert [one.bleu[1] for one in found.bins] == [one.bleu[0] for one in alone.bins]


def test_a_baseline_that_lacks_a_direction_is_left_out():
    ours = [translation(i, length) for i, length in enumerate(lengths_of_a_hundred())]
    partial = evaluation([one for one in ours if one.target_lang == "de"])
    [found] = breakdowns(evaluation(ours), [partial, evaluation(ours)])
    assert found.models == (0, 2)


def test_speech_is_broken_down_by_words_and_by_seconds():
    speech = [
        translation(i, length, modality="audio", duration=length / 2 + 0.04)
        for i, length in enumerate(lengths_of_a_hundred())
    ]
    words, seconds = breakdowns(evaluation(speech))
    assert (words.modality, words.measure) == ("audio", "source words")
    assert seconds.measure == "seconds of speech"
    assert [one.label for one in seconds.bins] == ["2.5–3.0", "3.1–4.0", "4.1–5.0", "5.1–6.0", "6.1–7.0"]
    assert [one.sentences for one in seconds.bins] == [20] * 5


def test_reference_words_count_where_a_source_text_is_missing():
    speech = [
        translation(i, length, modality="audio", source_text=None if i == 3 else "some text", duration=None)
        for i, length in enumerate(lengths_of_a_hundred())
    ]
    [found] = breakdowns(evaluation(speech))
    assert found.measure == "reference words"
    assert found.bins[0].label == "5–6"


def test_transcripts_in_the_same_language_are_no_translations():
    ours = [translation(i, length) for i, length in enumerate(lengths_of_a_hundred())]
    same = [translation(i, 30, target_lang="en") for i in range(50)]
    [found] = breakdowns(evaluation(ours + same))
    assert sum(one.sentences for one in found.bins) == 100
    assert breakdowns(evaluation(same)) == []


def test_few_sentences_or_one_length_make_no_breakdown():
    assert breakdowns(evaluation([translation(i, 5 + i) for i in range(2 * MIN_SENTENCES - 1)])) == []
    assert breakdowns(evaluation([translation(i, 8) for i in range(100)])) == []


@pytest.mark.parametrize("seed", range(20))
def test_every_bin_has_enough_sentences_and_none_is_lost(seed):
    draw = np.random.default_rng(seed)
    lengths = np.concatenate([draw.integers(3, 40, draw.integers(1, 60)), np.full(draw.integers(20, 90), 7), [200]])
    bounds = upper_bounds(lengths)
    assert bounds == sorted(set(bounds))
    assert bounds[-1] == 200
    edges = [0, *bounds]
    sizes = [np.count_nonzero((lengths > low) & (lengths <= high)) for low, high in pairwise(edges)]
    assert sum(sizes) == len(lengths)
    assert min(sizes) >= MIN_SENTENCES
