"""Two models are compared sentence by sentence, as the sacrebleu command line compares them."""

from __future__ import annotations

import itertools
import random
import re
import subprocess
import sys
from dataclasses import replace
from statistics import fmean

import numpy as np
import pytest
import sacrebleu

from nemo_emmett.errors import DataError
from nemo_emmett.evaluation.results import Evaluation, Translation
from nemo_emmett.evaluation.significance import by_key, compare, compare_over_seeds

from .samples import build_evaluation, noisy_sentences

_, REFERENCES = noisy_sentences(seed=3, number=60)


def evaluation(noise: float, model: str) -> Evaluation:
    draw = random.Random(model)
    kept = [" ".join(word for word in one.split() if draw.random() > noise) for one in REFERENCES]
    translations = [
        Translation("test", f"id{number}", "text", "en", "de", "source", reference, hypothesis)
        for number, (hypothesis, reference) in enumerate(zip(kept, REFERENCES, strict=True))
    ]
    return build_evaluation(translations, model)


def shuffled(one: Evaluation) -> Evaluation:
    return replace(one, translations=random.Random(5).sample(one.translations, len(one.translations)))


@pytest.mark.parametrize("noise", [0.1, 0.4])
def test_p_values_equal_the_sacrebleu_command_line_whatever_the_order_of_the_sentences(noise, tmp_path):
    ours, baseline = evaluation(0.1, "exp/ours"), evaluation(noise, "exp/before")
    # Resampling draws places, so that the command line needs the order in which sentences are paired: by id.
    in_order = by_key(ours.translations)["test", "text", "en", "de"]
    of_baseline = by_key(baseline.translations)["test", "text", "en", "de"]
    columns = {
        "ref": [one.reference for one in in_order],
        "before": [one.hypothesis for one in of_baseline],
        "ours": [one.hypothesis for one in in_order],
    }
    for name, lines in columns.items():
        (tmp_path / name).write_text("".join(line + "\n" for line in lines))
    command = [sys.executable, "-m", "sacrebleu", "ref", "-i", "before", "ours", "-m", "bleu", "chrf"]
    command += ["--chrf-word-order", "2", "--paired-bs", "--format", "latex", "-w", "10"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    # A score is followed by its mean and interval over the resamples, and from the second system on by p.
    scores = re.findall(r"(\d+\.\d{10}) \(", run.stdout)
    p_values = re.findall(r"p = (\d\.\d{4})", run.stdout)

    compared = compare(shuffled(ours), shuffled(baseline))

    assert [one.metric for one in compared] == ["BLEU", "chrF++"]
    assert [f"{one.baseline_score:.10f}" for one in compared] + [f"{one.score:.10f}" for one in compared] == scores
    assert [f"{one.p_value:.4f}" for one in compared] == p_values
    assert [one.is_significant for one in compared] == [noise == 0.4] * 2
    assert {one.baseline for one in compared} == {"exp/before"}


def test_a_model_does_not_differ_from_itself():
    ours = evaluation(0.1, "exp/ours")
    assert [(one.difference, one.p_value, one.is_significant) for one in compare(ours, ours)] == [(0.0, 1.0, False)] * 2


def test_nothing_is_no_significant_difference_though_the_translations_differ():
    """Of two models that get everything wrong, each resample has a BLEU of 0, too."""
    ours, baseline = evaluation(0.1, "exp/ours"), evaluation(0.1, "exp/before")
    wrong = [
        replace(one, translations=[replace(each, hypothesis=word) for each in one.translations])
        for one, word in ((ours, "x"), (baseline, "y"))
    ]
    bleu, _ = compare(*wrong)
    assert (bleu.score, bleu.baseline_score, bleu.p_value) == (0.0, 0.0, 1.0)


def test_recordings_that_share_an_id_are_paired_by_what_was_said_and_their_file():
    """As where several speakers read one sentence, and where one file of ids serves two corpora."""
    one = Translation("test", "7", "audio", "en", "de", "one", "eins", "first", audio_path="a.wav")
    others = [
        replace(one, audio_path="b.wav", hypothesis="second"),
        replace(one, reference="zwei", source_text="two", hypothesis="third"),
    ]
    for order in ([one, *others], [*others[::-1], one]):
        (paired,) = by_key(order).values()
        assert [translation.hypothesis for translation in paired] == ["first", "second", "third"]


# Over seeds.


def of_seeds(noises: list[float], name: str, sentences: int = 20) -> list[list[Translation]]:
    """A seed's translations into two languages for each noise; items are numbers of sentences."""
    seeds = [evaluation(noise, f"{name} {number}").translations[:sentences] for number, noise in enumerate(noises)]
    return [
        [replace(one, target_lang=lang, id=f"{one.id}-{lang}") for lang in ("de", "fr") for one in translations]
        for translations in seeds
    ]


def item(translation: Translation) -> str:
    return translation.id.partition("-")[0]


def test_a_bootstrap_over_seeds_scores_the_sentences_that_were_drawn():
    """The same draws, with the corpora written out."""
    ours, theirs = of_seeds([0.1, 0.2, 0.3], "ours"), of_seeds([0.2, 0.3, 0.3], "theirs")
    compared = compare_over_seeds(ours, theirs, item_of=item, resamples=40)

    def bleu(translations: list[Translation], numbers: list[int]) -> float:
        scores = []
        for lang in ("de", "fr"):
            by_item = {
                item(one): one for one in sorted(translations, key=lambda one: one.id) if one.target_lang == lang
            }
            drawn = [list(by_item.values())[number] for number in numbers]
            found = sacrebleu.corpus_bleu([one.hypothesis for one in drawn], [[one.reference for one in drawn]])
            scores.append(found.score)
        return fmean(scores)

    draw = np.random.default_rng(12345)
    differences = []
    for _ in range(40):
        numbers = sorted(draw.integers(20, size=20))
        seeds = draw.integers(3, size=3)
        differences.append(fmean(bleu(ours[seed], numbers) - bleu(theirs[seed], numbers) for seed in seeds))
    everything = list(range(20))
    assert compared.differences == pytest.approx(
        [bleu(mine, everything) - bleu(other, everything) for mine, other in zip(ours, theirs, strict=True)]
    )
    assert compared.difference == pytest.approx(fmean(compared.differences))
    assert (compared.low, compared.high) == pytest.approx(tuple(np.quantile(differences, [0.025, 0.975])))
    other_side = min(sum(one <= 0 for one in differences), sum(one >= 0 for one in differences))
    assert compared.p_value == pytest.approx(min(1.0, 2 * (other_side + 1) / 41))


def test_seeds_are_drawn_too():
    """With one item each resample is a draw of seeds: 27 are possible, and their share of losses can be counted."""
    reference = "a b c d e f g h"
    one = Translation("test", "0", "text", "en", "de", "source", reference, reference)
    half = replace(one, hypothesis="a b c d x y z w")
    ours, theirs = [[one], [one], [half]], [[half], [half], [one]]
    compared = compare_over_seeds(ours, theirs, resamples=4000)
    first, second, third = compared.differences
    assert first == second == -third > 0
    losses = sum(sum(draw) <= 0 for draw in itertools.product(compared.differences, repeat=3)) / 27
    assert losses == 7 / 27  # two or three draws of the third seed
    assert compared.p_value == pytest.approx(2 * losses, abs=0.05)
    assert compare_over_seeds(ours[:2], theirs[:2]).p_value == pytest.approx(2 / 1001)


def test_the_same_translations_differ_by_nothing_over_seeds():
    ours = of_seeds([0.1, 0.2], "ours")
    for metric in ("BLEU", "chrF++"):
        compared = compare_over_seeds(ours, ours, metric, resamples=20)
        assert (compared.difference, compared.low, compared.high, compared.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_the_scores_over_seeds_are_those_of_each_evaluation():
    ours, theirs = of_seeds([0.1], "ours"), of_seeds([0.4], "theirs")
    found = {one.metric: one for one in compare(build_evaluation(ours[0], "a"), build_evaluation(theirs[0], "b"))}
    for metric in ("BLEU", "chrF++"):
        compared = compare_over_seeds(ours, theirs, metric, resamples=5)
        assert compared.score == pytest.approx(found[metric].score)
        assert compared.baseline_score == pytest.approx(found[metric].baseline_score)


def test_seeds_of_other_sentences_are_refused():
    ours = of_seeds([0.1, 0.2], "ours")
    with pytest.raises(DataError, match=r"^2 seeds cannot be compared with 1"):
        compare_over_seeds(ours, ours[:1])
    with pytest.raises(DataError, match=r"^The seeds were tested on different sentences"):
        compare_over_seeds(ours, [ours[0], ours[1][:-1]])
