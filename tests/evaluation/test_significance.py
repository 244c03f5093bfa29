"""Two models are compared sentence by sentence, as the sacrebleu command line compares them."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from nemo_emmett.evaluation.results import Evaluation, Translation
from nemo_emmett.evaluation.significance import by_key, compare

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
