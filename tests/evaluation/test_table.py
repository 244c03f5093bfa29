"""The table lays evaluations side by side, in the terminal too."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from nemo_emmett.errors import DataError
from nemo_emmett.evaluation.results import Comparison, Score, from_json, to_json
from nemo_emmett.evaluation.table import print_table, result_table

from .samples import LANGUAGES, build_evaluation, build_translations


def with_bleu(evaluation, bleu: dict[tuple[str, str], float]):
    """The evaluation with given BLEU by (modality, source language)."""
    scores = [
        replace(one, metrics={**one.metrics, "BLEU": bleu[one.modality, one.source_lang]}) for one in evaluation.scores
    ]
    return replace(evaluation, scores=scores)


def printed(*arguments, width: int = 120, **options) -> list[str]:
    output = io.StringIO()
    print_table(*arguments, Console(file=output, width=width), **options)
    return output.getvalue().splitlines()


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_differences_are_shown_next_to_each_baseline(recordings, evaluation):
    text, speech = (build_translations(recordings, modality) for modality in ("text", "audio"))
    baselines = [build_evaluation(text, model="exp/t5"), build_evaluation(text + speech, model="exp/other")]
    now = {("text", lang): 80.0 for lang in LANGUAGES} | {("audio", lang): 60.0 for lang in LANGUAGES}
    before = {("text", "de"): 90.0, ("text", "en"): 80.0, ("text", "es"): 80.0, ("text", "fr"): 70.0}
    other = {("text", lang): 50.0 for lang in LANGUAGES} | {("audio", lang): 65.0 for lang in LANGUAGES}

    table = result_table(with_bleu(evaluation, now), [with_bleu(baselines[0], before), with_bleu(baselines[1], other)])

    assert (table.metrics, table.baselines) == (("BLEU", "chrF++"), ("exp/t5", "exp/other"))
    assert [(heading.title, heading.has_baseline) for heading in table.headings] == [
        ("text", (True, True)),
        ("speech", (False, True)),
    ]
    rows = {row.title: row for row in table.rows}
    assert len(rows) == 12
    text, speech = rows["de → en"].cells
    assert [(one.bleu, one.difference, one.p_value) for one in text.baselines] == [
        (90.0, -10.0, None),
        (50.0, 30.0, None),
    ]
    assert speech.baselines[0] is None
    assert (speech.baselines[1].bleu, speech.baselines[1].difference) == (65.0, -5.0)
    assert [one.difference for one in table.averages.cells[0].baselines] == [pytest.approx(0.0), pytest.approx(30.0)]
    assert table.averages.cells[1].bleu == pytest.approx(60.0)


def test_an_average_is_compared_only_with_one_over_the_same_directions(recordings, evaluation):
    translations = build_translations(recordings, "text")
    baseline = build_evaluation([one for one in translations if one.source_lang == "de"])
    table = result_table(evaluation, [baseline])
    assert table.averages.cells[0].baselines == (None,)
    assert [row.cells[0].baselines == (None,) for row in table.rows] == [False] * 3 + [True] * 9


def test_a_baseline_with_other_references_is_refused(recordings, evaluation):
    translations = build_translations(recordings, "text")
    translations[0] = replace(translations[0], reference="another reference altogether here")
    with pytest.raises(DataError, match="other references than this model in text de → en of test set 'test_text'"):
        result_table(evaluation, [build_evaluation(translations)])


def test_a_baseline_of_other_sentences_is_refused(recordings, evaluation):
    translations = build_translations(recordings, "text")[1:]
    with pytest.raises(DataError, match=r"other sentences than this model in text de → en .* \(2, not 3, or"):
        result_table(evaluation, [build_evaluation(translations)])


def test_a_baseline_on_other_data_is_refused(recordings, evaluation):
    other = [replace(one, test_set="news") for one in build_translations(recordings, "text")]
    with pytest.raises(DataError, match="no common direction"):
        result_table(evaluation, [build_evaluation(other)])


def test_the_terminal_shows_each_direction_the_averages_and_the_signature(evaluation):
    scores = [
        replace(one, metrics={"BLEU": 81.25 if one.modality == "text" else 62.5, "chrF++": 90.0})
        for one in evaluation.scores
    ]
    scores.append(Score("test_audio", "audio", "en", "en", 7, {"BLEU": 10.0, "chrF++": 20.0}))
    lines = printed(replace(evaluation, scores=scores))
    cells = [cells_of(line) for line in lines if "→" in line or "average  " in line]
    assert len(cells) == 12 + 1 + 1
    assert cells[0] == ["de → en", "3", "81.2", "90.0", "62.5", "90.0"]
    assert cells[12] == ["en → en", "7", "–", "–", "10.0", "20.0"]
    assert cells[13] == ["average", "36", "81.2", "90.0", "62.5", "90.0"]
    assert "average: mean over 12 directions between different languages" in lines
    assert f"BLEU: {evaluation.signatures['BLEU']}" in lines
    assert not any("bootstrap" in line for line in lines)


def test_a_narrow_terminal_gets_a_table_for_each_modality_with_nothing_cut_off(recordings, evaluation):
    baseline = build_evaluation(build_translations(recordings, "text"), model="exp/some_earlier_model")
    wide, narrow = (printed(evaluation, baselines=[baseline], width=width) for width in (120, 75))
    assert sum("average  " in line for line in wide) == 1
    averages = [cells_of(line) for line in narrow if "average  " in line]
    assert averages == [["average", "36", "100.0", "100.0", "100.0", "+0.0"], ["average", "36", "100.0", "100.0"]]
    assert not any("…" in line for line in narrow)


def test_differences_that_chance_does_not_explain_are_marked(recordings, evaluation):
    baseline = build_evaluation(build_translations(recordings, "text"), model="exp/t5")
    compared = [
        Comparison("exp/t5", "test_text", "text", "de", target, metric, 100.0, before, p_value)
        for target, before, p_value in [("en", 98.0, 0.0499), ("es", 97.0, 0.05)]
        for metric in ("BLEU", "chrF++")
    ]
    lines = printed(replace(evaluation, comparisons=compared), baselines=[baseline])
    cells = {cells_of(line)[0]: cells_of(line) for line in lines if "→" in line}
    assert cells["de → en"] == ["de → en", "3", "100.0", "100.0", "98.0", "+2.0*", "100.0", "100.0"]
    assert cells["de → es"][4:6] == ["97.0", "+3.0"]
    assert cells["de → fr"][4:6] == ["100.0", "+0.0"]
    assert "*: p < 0.05 by paired bootstrap" in lines


def test_transcripts_are_below_the_table(recordings, evaluation, tmp_path):
    assert not [line for line in printed(evaluation) if line.startswith("transcripts of")]
    speech = [
        replace(one, transcript=one.source_text, is_malformed=False) for one in build_translations(recordings, "audio")
    ]
    speech[0] = replace(speech[0], transcript=None, is_malformed=True)
    found = build_evaluation(speech)
    to_json(found, tmp_path / "evaluation.json")
    assert from_json(tmp_path / "evaluation.json") == found
    lines = [line for line in printed(found) if line.startswith("transcripts of")]
    assert len(lines) == 12
    assert "transcripts of test_audio, de → en: WER 33.3, 1 of 3 answers without a transcript" in lines
    assert "transcripts of test_audio, en → de: WER 0.0, 0 of 3 answers without a transcript" in lines
