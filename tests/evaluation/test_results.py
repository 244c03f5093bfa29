"""An evaluation is kept whole in JSON; speeds add up; the table lays two evaluations side by side."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from nemo_emmett.errors import DataError
from nemo_emmett.evaluation.results import Score, Throughput, from_json, to_json, write_text
from nemo_emmett.evaluation.table import print_table, result_table, throughput_lines

from .samples import build_evaluation, build_translations


def test_an_evaluation_survives_json(evaluation, tmp_path):
    path = tmp_path / "deep" / "evaluation.json"
    to_json(evaluation, path)
    assert from_json(path) == evaluation
    assert [entry.name for entry in path.parent.iterdir()] == ["evaluation.json"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "evaluation.json"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half a file \ud800")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["evaluation.json"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read: No such file"),
        ("{", "is not JSON"),
        ('{"format": "another/1"}', "is not an evaluation of format"),
        ("[]", "is not an evaluation of format"),
        ('{"format": "nemo_emmett.evaluation/1", "scores": []}', "damaged evaluation"),
    ],
)
def test_what_is_no_evaluation_is_refused_in_one_sentence(content, sentence, tmp_path):
    path = tmp_path / "evaluation.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=sentence):
        from_json(path)


def test_json_holds_every_hypothesis(evaluation, tmp_path):
    to_json(evaluation, tmp_path / "evaluation.json")
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert len(record["translations"]) == 2 * 12 * 3
    assert record["translations"][0]["hypothesis"] == "en sentence number 0 of the test set"


def test_throughput_adds_up():
    total = Throughput(2.0, 10, audio_seconds=30.0) + Throughput(3.0, 40, audio_seconds=70.0)
    assert (total.seconds, total.sentences, total.audio_seconds) == (5.0, 50, 100.0)
    assert total.sentences_per_second == 10.0
    assert total.real_time_factor == 0.05


def test_text_has_no_real_time_factor():
    assert (Throughput(2.0, 10) + Throughput(2.0, 10)).real_time_factor is None


def test_throughput_in_words(evaluation):
    assert throughput_lines(evaluation) == [
        "text: 36 sentences in 2.0 s, 18.0 sentences/s",
        "speech: 36 sentences in 2.0 s, 18.0 sentences/s, real-time factor 0.250",
    ]


def with_bleu(evaluation, bleu: dict[tuple[str, str], float]):
    """The evaluation with given BLEU by (modality, source language)."""
    scores = [replace(one, bleu=bleu[one.modality, one.source_lang]) for one in evaluation.scores]
    return replace(evaluation, scores=scores)


def test_the_table_shows_gains_and_losses_against_the_baseline(recordings, evaluation):
    baseline = build_evaluation(build_translations(recordings, "text"), model="exp/t5")
    now = {("text", lang): 80.0 for lang in ("de", "en", "es", "fr")} | {
        ("audio", lang): 60.0 for lang in ("de", "en", "es", "fr")
    }
    before = {("text", "de"): 90.0, ("text", "en"): 80.0, ("text", "es"): 80.0, ("text", "fr"): 70.0}

    table = result_table(with_bleu(evaluation, now), with_bleu(baseline, before))

    assert [(heading.title, heading.has_baseline) for heading in table.headings] == [("text", True), ("speech", False)]
    rows = {row.title: row for row in table.rows}
    assert len(rows) == 12
    text, speech = rows["de → en"].cells
    assert (text.bleu, text.baseline_bleu, text.difference) == (80.0, 90.0, -10.0)
    assert (speech.bleu, speech.baseline_bleu) == (60.0, None)
    assert table.averages.cells[0].difference == pytest.approx(0.0)
    assert table.averages.cells[1].bleu == pytest.approx(60.0)


def test_an_average_is_compared_only_with_one_over_the_same_directions(recordings, evaluation):
    translations = build_translations(recordings, "text")
    baseline = build_evaluation([one for one in translations if one.source_lang == "de"])
    table = result_table(evaluation, baseline)
    assert table.averages.cells[0].baseline_bleu is None
    assert [row.cells[0].baseline_bleu is None for row in table.rows] == [False] * 3 + [True] * 9


def test_a_baseline_with_other_references_is_refused(recordings, evaluation):
    translations = build_translations(recordings, "text")
    translations[0] = replace(translations[0], reference="another reference altogether here")
    with pytest.raises(DataError, match="other references than this model in text de → en of test set 'test_text'"):
        result_table(evaluation, build_evaluation(translations))


def test_a_baseline_on_other_data_is_refused(recordings, evaluation):
    other = [replace(one, test_set="news") for one in build_translations(recordings, "text")]
    with pytest.raises(DataError, match="no common direction"):
        result_table(evaluation, build_evaluation(other))


def test_the_terminal_shows_each_direction_the_averages_and_the_signature(evaluation):
    scores = [replace(one, bleu=81.25 if one.modality == "text" else 62.5) for one in evaluation.scores]
    scores.append(Score("test_audio", "audio", "en", "en", 7, 10.0, 20.0))
    output = io.StringIO()
    print_table(replace(evaluation, scores=scores), Console(file=output, width=100))
    lines = output.getvalue().splitlines()
    cells = [
        [cell.strip() for cell in line.strip("│").split("│")] for line in lines if "→" in line or "average  " in line
    ]
    assert len(cells) == 12 + 1 + 1
    assert cells[0] == ["de → en", "3", "81.2", "100.0", "62.5", "100.0"]
    assert cells[12] == ["en → en", "7", "–", "–", "10.0", "20.0"]
    assert cells[13] == ["average", "36", "81.2", "100.0", "62.5", "100.0"]
    assert "average: mean over 12 directions between different languages" in lines
    assert f"BLEU: {evaluation.signatures['BLEU']}" in lines
