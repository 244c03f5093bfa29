"""The page: complete, self-contained, escaped."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import soundfile

from nemo_emmett.errors import DataError
from nemo_emmett.evaluation.charts import charts
from nemo_emmett.evaluation.curves import Curve
from nemo_emmett.evaluation.report import choose_examples, compare_words, write_report

from .samples import DIRECTIONS, build_evaluation, build_translations

VOID = {"meta", "link", "br", "wbr"}


class Page(HTMLParser):
    """Tags with attributes, table rows, and text by tag; fails on tags that do not match."""

    def __init__(self, path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.rows: list[list[str]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if any(tag in ("td", "th") for tag in self.open):
            self.rows[-1][-1] += data.strip()

    def all(self, name: str) -> list[dict]:
        return [attributes for tag, attributes in self.tags if tag == name]


def curves() -> dict[str, Curve]:
    steps = list(range(0, 100, 10))
    tags = ["loss", "loss_text", "loss_audio", "val_loss_dev_text", "val_bleu_dev_text", "val_bleu_dev_text_en-de"]
    return {tag: Curve(tag, steps, [5.0 - 0.01 * step for step in steps]) for tag in tags}


@pytest.fixture
def page(evaluation, recordings) -> Page:
    write_report(evaluation, recordings / "report.html", curves=curves())
    return Page(recordings / "report.html")


def test_the_table_has_a_row_for_each_direction_and_the_average(page):
    rows = {row[0]: row[1:] for row in page.rows}
    for source, target in DIRECTIONS:
        assert rows[f"{source} → {target}"] == ["3", "100.0", "100.0", "100.0", "100.0"]
    assert rows["average"] == ["36", "100.0", "100.0", "100.0", "100.0"]


def test_the_signatures_stand_on_the_page(page, evaluation):
    assert evaluation.signatures["BLEU"] in page.text
    assert evaluation.signatures["chrF"] in page.text


def test_ten_recordings_play_from_the_page_itself(page, recordings):
    players = page.all("audio")
    assert len(players) == 10
    originals = [soundfile.read(path, dtype="int16")[0] for path in recordings.glob("*.wav")]
    for player in players:
        assert "controls" in player
        kind, content = player["src"].split(";base64,")
        assert kind == "data:audio/flac"
        samples, sampling_rate = soundfile.read(io.BytesIO(base64.b64decode(content)), dtype="int16")
        assert sampling_rate == 16000
        assert any(np.array_equal(samples, original) for original in originals)


def test_no_request_leaves_the_page(page):
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            assert attributes.get(name, "data:").startswith("data:")
    assert page.all("script") == []
    text = "".join(page.text)
    assert "url(" not in text
    assert "@import" not in text


def test_table_headers_have_a_scope_and_charts_a_description(page):
    assert all(header.get("scope") for header in page.all("th"))
    assert len(page.all("svg")) == 3
    assert all(chart["role"] == "img" and "from 5.00 to" in chart["aria-label"] for chart in page.all("svg"))


def test_markup_in_the_data_is_shown_not_run(recordings):
    nasty = '<script>alert("1")</script> & "quoted"'
    translations = [
        replace(one, hypothesis=nasty, source_text=nasty, reference=nasty + "!")
        for one in build_translations(recordings, "audio")
    ]
    evaluation = replace(build_evaluation(translations, model=nasty), command=nasty, versions={nasty: nasty})
    write_report(
        evaluation, recordings / "report.html", curves={"loss_<script>": Curve("loss_<script>", [1, 2], [1, 2])}
    )
    page = Page(recordings / "report.html")
    assert page.all("script") == []
    assert "".join(page.text).count('<script>alert("1")</script>') >= 30
    assert any(player["aria-label"] == f"Recording of: {nasty}" for player in page.all("audio"))


def test_the_baseline_stands_beside_the_scores(evaluation, recordings):
    scores = [replace(one, bleu=90.0) for one in evaluation.scores if one.modality == "text"]
    baseline = replace(build_evaluation(build_translations(recordings, "text"), model="exp/t5"), scores=scores)
    write_report(evaluation, recordings / "report.html", baseline=baseline)
    page = Page(recordings / "report.html")
    rows = {row[0]: row[1:] for row in page.rows}
    assert rows["de → en"] == ["3", "100.0", "100.0", "90.0", "+10.0", "100.0", "100.0"]
    assert rows["average"] == ["36", "100.0", "100.0", "90.0", "+10.0", "100.0", "100.0"]
    assert any("exp/t5" in text for text in page.text)


def test_a_page_without_recordings_shows_text_examples(recordings):
    write_report(build_evaluation(build_translations(recordings, "text")), recordings / "report.html", examples=4)
    page = Page(recordings / "report.html")
    assert page.all("audio") == []
    assert page.text.count("Translation") == 4


def test_a_recording_that_is_none_is_named(evaluation, recordings):
    for recording in recordings.glob("*.wav"):
        recording.write_bytes(b"not audio")
    with pytest.raises(DataError, match=r"recording .*\.wav of the test set cannot be read"):
        write_report(evaluation, recordings / "report.html")
    assert not (recordings / "report.html").exists()


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


def test_words_that_depart_from_the_reference_are_marked():
    assert compare_words("the red  cat sat", "the cat sat down") == [
        ("the ", False),
        ("red  ", True),
        ("cat ", False),
        ("sat", False),
    ]
    assert compare_words("", "the cat") == []


def test_single_directions_are_thin_lines_of_their_validation_set():
    training, loss, bleu = charts(curves())
    assert [series.name for series in training.series] == ["text", "speech"]
    assert [series.name for series in loss.series] == ["dev_text"]
    (series,) = bleu.series
    assert series.name == "dev_text"
    assert [name for name, _ in series.thin] == ["dev_text_en-de"]


def test_the_overall_curve_is_drawn_where_there_is_no_other():
    (chart,) = charts({"val_loss": Curve("val_loss", [1, 2, 3], [3.0, 2.0, 1.0])})
    assert [series.name for series in chart.series] == ["overall"]


def test_series_have_colours_of_their_own():
    tags = ["val_bleu_flores_text", "val_bleu_news_text", "val_bleu_fleurs_audio", "val_bleu_other"]
    (chart,) = charts({tag: Curve(tag, [1, 2], [1.0, 2.0]) for tag in tags})
    assert len({series.colour for series in chart.series}) == 4


def test_a_loss_that_spans_decades_is_drawn_on_a_logarithmic_scale():
    (chart,) = charts({"val_loss": Curve("val_loss", [0, 1, 2], [10.0, 1.0, 0.1])})
    assert "logarithmic scale" in chart.note
    path = chart.svg.split('d="M')[1].split('"')[0]
    heights = [float(point.split()[1]) for point in path.split("L")]
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.11)


def test_a_loss_that_became_nan_is_drawn_until_then():
    (chart,) = charts({"loss": Curve("loss", [1, 2, 3], [2.0, 1.0, float("nan")])})
    assert "nan" not in chart.svg
    assert [step for step, _ in chart.series[0].bold] == [1, 2]


def test_a_long_run_is_drawn_with_as_many_points_as_can_be_seen():
    steps = list(range(100_000))
    (chart,) = charts({"val_loss": Curve("val_loss", steps, [1.0 + step for step in steps])})
    (series,) = chart.series
    assert len(series.bold) == 240
    size = 417  # ceil(100,000 / 240)
    assert series.bold[0] == pytest.approx(((size - 1) / 2, 1 + (size - 1) / 2))
