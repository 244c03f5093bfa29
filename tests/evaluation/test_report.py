"""The page: complete, self-contained, escaped; its numbers those of the table."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import soundfile

from nemo_emmett.errors import DataError
from nemo_emmett.evaluation import report
from nemo_emmett.evaluation.breakdown import breakdowns
from nemo_emmett.evaluation.curves import Curve
from nemo_emmett.evaluation.recordings import Recordings
from nemo_emmett.evaluation.report import write_report
from nemo_emmett.evaluation.results import Comparison, Evaluation, Translation
from nemo_emmett.evaluation.table import ResultTable, Row, result_table

from .samples import DIRECTIONS, build_evaluation, build_translations

VOID = {"meta", "link", "br", "wbr"}
LOADING = ("src", "href", "srcset", "data", "action", "formaction", "poster", "xlink:href", "background", "ping")
"""Attributes of HTML and SVG that name what a browser fetches."""


class Page(HTMLParser):
    """Tags with attributes, tables as rows of texts, and text by tag; fails on tags that do not match."""

    def __init__(self, path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.tables: list[list[list[str]]] = []
        self.text: list[str] = []
        self.headings: list[str] = []
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag in ("h1", "h2", "h3"):
            self.headings.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if any(tag in ("td", "th") for tag in self.open):
            self.tables[-1][-1][-1] += data
        if any(tag in ("h1", "h2", "h3") for tag in self.open):
            self.headings[-1] += data

    @property
    def words(self) -> str:
        return " ".join("".join(self.text).split())

    def rows(self, table: int = 0) -> dict[str, list[str]]:
        """The rows of a table by their first cell."""
        return {row[0]: row[1:] for row in self.tables[table]}

    def all(self, name: str) -> list[dict]:
        return [attributes for tag, attributes in self.tags if tag == name]


def curves() -> dict[str, Curve]:
    steps = list(range(0, 100, 10))
    tags = ["loss", "loss_text", "loss_audio", "val_loss_dev_text", "val_bleu_dev_text", "val_bleu_dev_text_en-de"]
    return {tag: Curve(tag, steps, [5.0 - 0.01 * step for step in steps]) for tag in tags}


def worse(translations: list[Translation], words: int) -> list[Translation]:
    """The same sentences, all but the first words of each translation lost."""
    return [replace(one, hypothesis=" ".join((one.reference or "").split()[:words])) for one in translations]


def number(value: float, signed: bool = False) -> str:
    return f"{value:+.1f}".replace("-", "−") if signed else f"{value:.1f}"


def cells_of(table: ResultTable, row: Row) -> list[str]:
    """What a row of the page must hold, by the table that the terminal prints too."""
    texts = [row.sentences]
    for heading, cell in zip(table.headings, row.cells, strict=True):
        if cell is None:
            texts += ["–"] * (len(table.metrics) + 2 * sum(heading.has_baseline))
            continue
        interval = "" if cell.interval is None else f" ± {cell.interval:.1f}"
        texts += [number(cell.bleu) + interval, *(number(cell.metrics[name]) for name in table.metrics[1:])]
        for shown, other in zip(heading.has_baseline, cell.baselines, strict=True):
            if shown and other is None:
                texts += ["–", "–"]
            elif shown:
                texts += [number(other.bleu), number(other.difference, signed=True) + "*" * other.is_significant]
    return texts


@pytest.fixture(autouse=True)
def quick_intervals(monkeypatch):
    """Resampling takes longer than all else here, and is tested elsewhere."""
    monkeypatch.setattr("nemo_emmett.evaluation.scoring.interval", lambda *_: 0.5)


@pytest.fixture
def page(evaluation, recordings) -> Page:
    write_report(evaluation, recordings / "report.html", curves=curves())
    return Page(recordings / "report.html")


@pytest.fixture
def text(recordings) -> Evaluation:
    return build_evaluation(worse(build_translations(recordings, "text"), 6), model="exp/nmt")


@pytest.fixture
def both(recordings) -> Evaluation:
    translations = build_translations(recordings, "text") + build_translations(recordings, "audio")
    return build_evaluation(worse(translations, 4), model="exp/ast")


def test_every_number_of_the_page_is_the_tables(evaluation, text, both, recordings):
    compared = [
        Comparison("exp/nmt", "test_text", "text", *direction, "BLEU", 90.0 + place, 81.5, p_value=0.01 * place)
        for place, direction in enumerate(DIRECTIONS)
    ]
    ours = replace(
        evaluation,
        scores=[
            replace(
                one, metrics={"BLEU": 10.5 + place, "chrF++": 31.25 + place, "TER": 70.0 - place}, interval=place / 7
            )
            for place, one in enumerate(evaluation.scores[:-1])  # one direction has no text
        ],
        comparisons=compared,
    )
    write_report(ours, recordings / "report.html", baselines=[text, both])
    rows, table = Page(recordings / "report.html").rows(), result_table(ours, [text, both])
    for row in [*table.rows, table.averages]:
        assert rows[row.title] == cells_of(table, row)
    # Behind the first baseline's difference: p from 0 to 0.04.
    assert sum(rows[row.title][5].endswith("*") for row in table.rows) == 5
    assert rows["fr → es"][1:8] == ["–"] * 7


def test_perfect_translations_have_a_full_score(page):
    for source, target in DIRECTIONS:
        assert [cell.split(" ±")[0] for cell in page.rows()[f"{source} → {target}"]] == ["3"] + ["100.0"] * 4
    assert page.rows()["average"] == ["36"] + ["100.0"] * 4


def test_each_model_is_named_over_its_numbers(evaluation, text, both, recordings):
    write_report(evaluation, recordings / "report.html", baselines=[text, both])
    page = Page(recordings / "report.html")
    assert page.tables[0][:3] == [
        ["direction", "n", "text", "speech"],
        ["exp/model", "exp/nmt", "exp/ast", "exp/model", "exp/ast"],
        ["BLEU", "chrF++", "BLEU", "diff.", "BLEU", "diff.", "BLEU", "chrF++", "BLEU", "diff."],
    ]
    spans = [int(attributes["colspan"]) for attributes in page.all("th") if "colspan" in attributes]
    assert spans == [6, 4, 2, 2, 2, 2, 2]


def test_the_tiles_show_what_was_gained_against_each_baseline(evaluation, text, recordings):
    write_report(evaluation, recordings / "report.html", baselines=[text])
    earlier = result_table(evaluation, [text]).averages.cells[0].baselines[0].bleu
    assert f"+{100 - earlier:.1f} against {earlier:.1f} of exp/nmt" in Page(recordings / "report.html").words


def test_the_signature_of_each_metric_is_on_the_page(page, evaluation):
    assert set(evaluation.signatures) == {"BLEU", "chrF++"}
    for metric, signature in evaluation.signatures.items():
        assert f"{metric}: {signature}" in page.words


def test_bleu_by_length_is_drawn_and_tabled(recordings):
    ours = build_translations(recordings, "audio")
    # Sentences of two lengths and durations, enough of each for a bin.
    ours = [
        replace(
            one, id=f"{one.id}{copy}", source_text=one.source_text + " longer" * (copy % 2), duration=0.1 + copy % 2
        )
        for copy in range(4)
        for one in ours
    ]
    evaluation = build_evaluation(worse(ours, 5))
    baseline = build_evaluation(worse(ours, 7), model="exp/base")
    write_report(evaluation, recordings / "report.html", baselines=[baseline])
    page = Page(recordings / "report.html")
    found = breakdowns(evaluation, [baseline])
    assert [one.measure for one in found] == ["source words", "seconds of speech"]
    assert len(page.all("svg")) == 2
    for place, breakdown in enumerate(found, start=1):
        header, *rows = page.tables[place]
        assert header == [breakdown.measure, "n", "exp/model", "exp/base"]
        assert rows == [[one.label, str(one.sentences), *map(number, one.bleu)] for one in breakdown.bins]
        assert [row[1] for row in rows] == ["72", "72"]


def test_a_baseline_without_a_modality_is_said_not_to_be_drawn(recordings, monkeypatch):
    monkeypatch.setattr("nemo_emmett.evaluation.breakdown.MIN_SENTENCES", 5)
    directions = [
        replace(one, source_text=one.source_text + " word" * (int(one.id) * 2))
        for modality in ("text", "audio")
        for one in build_translations(recordings, modality)
    ]
    baseline = build_evaluation([one for one in directions if one.modality == "text"], model="exp/nmt")
    write_report(build_evaluation(directions), recordings / "report.html", baselines=[baseline])
    words = Page(recordings / "report.html").words
    assert words.count("not drawn: exp/nmt, which has not all of these sentences") == 1
    assert "not drawn: exp/model" not in words


def test_worst_gained_lost_and_random_sentences_have_a_section_each(recordings):
    ours, theirs = build_translations(recordings, "text"), build_translations(recordings, "text")
    # Of each direction one sentence got better, one worse, one stayed as it was.
    ours = [worse([one], 3)[0] if one.id == "1" else one for one in ours]
    theirs = [worse([one], 2)[0] if one.id == "0" else one for one in theirs]
    baseline = build_evaluation(theirs, model="exp/base")
    write_report(build_evaluation(ours), recordings / "report.html", examples=3, baselines=[baseline])
    page = Page(recordings / "report.html")
    sections = [attributes["aria-labelledby"] for attributes in page.all("section")]
    assert sections == ["scores", "worst", "gained", "lost", "random", "details"]
    assert page.words.count("24 of 36 translations differ from those of exp/base.") == 2
    assert page.words.count("test_text, 1") >= 3 + 3  # the worst are the lost
    assert page.words.count("exp/base, chrF") == 6
    assert len([heading for heading in page.headings if " → " in heading]) == 4 * 3


def test_no_examples_are_shown_where_none_are_asked_for(evaluation, text, recordings):
    write_report(evaluation, recordings / "report.html", examples=0, baselines=[text])
    page = Page(recordings / "report.html")
    sections = [attributes["aria-labelledby"] for attributes in page.all("section")]
    assert sections == ["scores", "details"]
    assert page.all("audio") == []


def test_empty_translations_are_counted(recordings):
    translations = build_translations(recordings, "text")
    evaluation = build_evaluation([*worse(translations[:5], 0), *translations[5:]])
    write_report(evaluation, recordings / "report.html")
    words = Page(recordings / "report.html").words
    assert "5 of 36 translations are empty." in words
    assert "(empty)" in words


def test_ten_recordings_play_from_the_page_itself(page, recordings):
    originals = [soundfile.read(path, dtype="int16")[0] for path in recordings.glob("*.wav")]
    assert len(page.all("audio")) >= 10
    for player in page.all("audio"):
        assert "controls" in player
        kind, content = player["src"].split(";base64,")
        assert kind == "data:audio/flac"
        samples, sampling_rate = soundfile.read(io.BytesIO(base64.b64decode(content)), dtype="int16")
        assert sampling_rate == 16000
        assert any(np.array_equal(samples, original) for original in originals)


def test_a_page_that_is_full_says_which_recordings_it_leaves_out(evaluation, recordings, monkeypatch):
    monkeypatch.setattr(report, "Recordings", lambda: Recordings(budget=0))
    write_report(evaluation, recordings / "report.html", examples=4)
    page = Page(recordings / "report.html")
    assert page.all("audio") == []
    left_out = page.words.count("Recording left out: the page holds")
    assert left_out >= 4
    assert f"{left_out} left out: the page holds at most 0 MB of them" in page.words


@pytest.mark.parametrize("with_baseline", [False, True])
def test_no_request_leaves_the_page(evaluation, both, recordings, with_baseline):
    write_report(evaluation, recordings / "report.html", curves=curves(), baselines=[both] if with_baseline else [])
    page = Page(recordings / "report.html")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    for tag, attributes in page.tags:
        for name in LOADING:
            target = attributes.get(name, "data:")
            assert target.startswith("data:") or (tag == "a" and target[0] == "#" and target[1:] in ids)
        assert not any(name.startswith("on") for name in attributes)
        assert "url(" not in attributes.get("style", "")
    for tag in ("script", "iframe", "object", "embed", "base", "form"):
        assert page.all(tag) == []
    text = "".join(page.text)
    assert not re.search(r"url\(|@import|@font-face|image-set\(", text)


def test_the_policy_forbids_the_browser_to_load_anything(page):
    [policy] = [one["content"] for one in page.all("meta") if one.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["style-src"] == "'unsafe-inline'"
    assert rules["img-src"] == rules["media-src"] == "data:"
    assert not re.search(r"http|\*|script-src|self", policy)


def test_readers_who_hear_the_page_find_their_way(page):
    assert all(header.get("scope") for header in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))
    assert len(page.all("svg")) == 3
    assert all(chart["role"] == "img" and "from 5.00 to" in chart["aria-label"] for chart in page.all("svg"))
    assert all(player["aria-label"].startswith("Recording of: ") for player in page.all("audio"))
    assert all(
        one["tabindex"] == "0" and one["role"] == "region" for one in page.all("div") if "scroll" in one["class"]
    )
    assert len(page.all("h1")) == 1


def test_sentences_carry_their_language_and_run_in_its_direction(recordings):
    translations = [
        replace(one, target_lang="arb_Arab", reference=f"قطة {one.id}", hypothesis="قطة")
        for one in build_translations(recordings, "text")
        if (one.source_lang, one.target_lang) == ("en", "de")
    ]
    write_report(build_evaluation(translations), recordings / "report.html", examples=1)
    sentences = [one for one in Page(recordings / "report.html").all("dd") if "lang" in one]
    assert [one["lang"] for one in sentences] == ["en", "arb-Arab", "arb-Arab"] * 2
    assert {one["dir"] for one in sentences} == {"auto"}


def test_markup_in_the_data_is_shown_not_run(recordings):
    nasty = '<script>alert("1")</script> & "quoted"'
    translations = [
        replace(one, hypothesis=nasty, source_text=nasty, reference=nasty + "!", id=nasty + one.id, test_set=nasty)
        for one in build_translations(recordings, "audio")
    ]
    evaluation = replace(build_evaluation(translations), name=nasty, command=nasty, versions={nasty: nasty})
    others = [replace(one, hypothesis="other" + one.id) for one in translations]
    baseline = replace(build_evaluation(others, model=nasty), name=nasty + "2")
    write_report(
        evaluation,
        recordings / "report.html",
        curves={"loss_<script>": Curve("loss_<script>", [1, 2], [1, 2])},
        baselines=[baseline],
    )
    page = Page(recordings / "report.html")
    assert page.all("script") == []
    assert page.words.count('<script>alert("1")</script>') >= 30
    assert any(player["aria-label"] == f"Recording of: {nasty}" for player in page.all("audio"))


def test_a_page_without_recordings_shows_text_examples(recordings):
    write_report(build_evaluation(build_translations(recordings, "text")), recordings / "report.html", examples=4)
    page = Page(recordings / "report.html")
    assert page.all("audio") == []
    assert len([heading for heading in page.headings if " → " in heading]) == 4 + 4


def test_a_recording_that_is_none_is_named(evaluation, recordings):
    for recording in recordings.glob("*.wav"):
        recording.write_bytes(b"not audio")
    with pytest.raises(DataError, match=r"recording .*\.wav of the test set cannot be read"):
        write_report(evaluation, recordings / "report.html")
    assert not (recordings / "report.html").exists()


def test_a_baseline_of_other_test_sets_is_refused(evaluation, recordings):
    others = [replace(one, test_set="other") for one in build_translations(recordings, "text")]
    with pytest.raises(DataError, match="in no common direction"):
        write_report(evaluation, recordings / "report.html", baselines=[build_evaluation(others)])
    assert not (recordings / "report.html").exists()
