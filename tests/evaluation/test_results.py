"""An evaluation is kept whole in JSON and its sentences in text files; speeds add up."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from nemo_emmett.errors import DataError
from nemo_emmett.evaluation.results import (
    Comparison,
    Throughput,
    Translation,
    from_json,
    one_line,
    to_json,
    write_hypotheses,
)
from nemo_emmett.evaluation.table import throughput_lines


def test_an_evaluation_survives_json(evaluation, tmp_path):
    path = tmp_path / "deep" / "evaluation.json"
    compared = Comparison("exp/t5", "test_text", "text", "de", "en", "BLEU", 80.0, 79.0, 0.25)
    evaluation = replace(evaluation, comparisons=[compared])
    to_json(evaluation, path)
    assert from_json(path) == evaluation
    assert [entry.name for entry in path.parent.iterdir()] == ["evaluation.json"]


def test_languages_of_an_earlier_evaluation_are_read_in_one_form(evaluation, tmp_path):
    path = tmp_path / "evaluation.json"
    to_json(evaluation, path)
    path.write_text(path.read_text().replace('_lang": "de"', '_lang": "deu_Latn"'))
    assert "deu_Latn" in path.read_text()
    assert from_json(path) == evaluation


def test_an_interrupted_write_leaves_the_old_file(evaluation, tmp_path):
    path = tmp_path / "exp" / "evaluation.json"
    path.parent.mkdir()
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        to_json(replace(evaluation, name="half a file \ud800"), path)
    assert path.read_text() == "old"
    assert [entry.name for entry in path.parent.iterdir()] == ["evaluation.json"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read: No such file"),
        ("{", "is not JSON"),
        ('{"format": "another/1"}', "is not an evaluation of format"),
        ("[]", "is not an evaluation of format"),
        ('{"format": "nemo_emmett.evaluation/2", "scores": []}', "damaged evaluation"),
        ('{"format": "nemo_emmett.evaluation/1", "scores": []}', "evaluation/1, not .*: evaluate that model again"),
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
    total = Throughput(2.0, 10, 60, audio_seconds=30.0).combined_with(Throughput(3.0, 40, 90, audio_seconds=70.0))
    assert total == Throughput(5.0, 50, tokens=150, audio_seconds=100.0)
    assert total.sentences_per_second == 10.0
    assert total.tokens_per_second == 30.0
    assert total.real_time_factor == 0.05


def test_processes_side_by_side_take_as_long_as_the_slowest():
    other = Throughput(3.0, 40, 90, audio_seconds=70.0)
    total = Throughput(2.0, 10, 60, audio_seconds=30.0).combined_with(other, in_parallel=True)
    assert total == Throughput(3.0, 50, tokens=150, audio_seconds=100.0, processes=2)


def test_text_has_no_real_time_factor():
    assert Throughput(2.0, 10).combined_with(Throughput(2.0, 10)).real_time_factor is None


def test_throughput_in_words(evaluation):
    assert throughput_lines(evaluation) == [
        "text: 36 sentences in 2.0 s, 18.0 sentences/s, 126.0 tokens/s",
        "speech: 36 sentences in 2.0 s, 18.0 sentences/s, 126.0 tokens/s, real-time factor 0.250",
    ]


def test_sentences_are_written_a_line_each_in_files_that_fit_together(evaluation, tmp_path):
    folder = tmp_path / "hypotheses"
    broken = Translation("a/b", "1", "text", "en", "de", "x", "eins\nzwei", "drei\u2028vier\r\n")
    write_hypotheses(replace(evaluation, translations=[broken, replace(broken, id="2", hypothesis="")]), folder)
    assert (folder / "a_b.text.en-de.hyp").read_text() == "drei vier\n\n"
    assert (folder / "a_b.text.en-de.ref").read_text() == "eins zwei\n" * 2

    (folder / "notes.txt").write_text("mine")
    write_hypotheses(evaluation, folder)
    directions = {f"{one.test_set}.{one.modality}.{one.source_lang}-{one.target_lang}" for one in evaluation.scores}
    assert {path.name for path in folder.iterdir()} == {"notes.txt"} | {
        f"{direction}.{kind}" for direction in directions for kind in ("hyp", "ref")
    }


def test_test_sets_whose_files_would_share_a_name_have_files_of_their_own(evaluation, tmp_path):
    one = Translation("a/b", "1", "text", "en", "de", "x", "eins", "eins")
    write_hypotheses(replace(evaluation, translations=[one, replace(one, test_set="a_b", hypothesis="zwei")]), tmp_path)
    assert (tmp_path / "a_b.text.en-de.hyp").read_text() == "eins\n"
    assert (tmp_path / "a_b-2.text.en-de.hyp").read_text() == "zwei\n"


def test_a_line_is_one_line():
    assert one_line("zwei \n Zeilen \t") == "zwei   Zeilen"
    assert one_line(None) == ""
