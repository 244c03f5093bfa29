"""Charts: lines of their own for modalities, directions and models, drawn where the numbers are."""

from __future__ import annotations

import re

import pytest

from nemo_emmett.evaluation.breakdown import Bin, Breakdown
from nemo_emmett.evaluation.charts import bins_chart, charts
from nemo_emmett.evaluation.curves import Curve


def curves() -> dict[str, Curve]:
    steps = list(range(0, 100, 10))
    tags = ["loss", "loss_text", "loss_audio", "val_loss_dev_text", "val_bleu_dev_text", "val_bleu_dev_text_en-de"]
    return {tag: Curve(tag, steps, [5.0 - 0.01 * step for step in steps]) for tag in tags}


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


def breakdown(models: tuple[int, ...], *bleu: tuple[float, ...]) -> Breakdown:
    return Breakdown(
        "audio", "source words", models, tuple(Bin(f"{i}–{i}", 20, scores) for i, scores in enumerate(bleu))
    )


def test_bleu_over_bins_has_a_line_for_each_model_that_is_in_all_bins():
    chart = bins_chart(breakdown((0, 2), (30.0, 10.0), (20.0, 0.4)), ["ours", "partial", "<theirs>"])
    assert chart.title == "Speech: BLEU by source words"
    assert [series.name for series in chart.series] == ["ours", "<theirs>"]
    assert [bleu for _, bleu in chart.series[1].bold] == [10.0, 0.4]
    assert "ours from 30.00 to 20.00; &lt;theirs&gt; from 10.00 to 0.40" in chart.svg
    assert "<theirs>" not in chart.svg


def test_bleu_is_drawn_from_zero_on_a_linear_scale():
    chart = bins_chart(breakdown((0,), (40.0,), (20.0,), (1.0,)), ["ours"])
    dots = [float(height) for height in re.findall(r'cy="([\d.]+)"', chart.svg)]
    axis = float(re.search(r'class="axis"[^>]*y1="([\d.]+)"', chart.svg).group(1))
    assert dots[0] < dots[1] < dots[2] < axis  # pixels count downwards
    assert (axis - dots[0]) / (axis - dots[1]) == pytest.approx(2, abs=0.01)
    assert (axis - dots[0]) / (axis - dots[2]) == pytest.approx(40, abs=2)


def test_a_bin_is_labelled_and_its_dot_has_its_number_as_title():
    chart = bins_chart(breakdown((0,), (40.0,), (20.0,)), ["ours"])
    assert ">1–1</text>" in chart.svg
    assert "<title>ours: BLEU 20.0 at 1–1 source words</title>" in chart.svg


def test_models_beyond_the_colours_never_take_this_models():
    models = tuple(range(13))
    chart = bins_chart(breakdown(models, models, models), [str(model) for model in models])
    assert chart.series[0].colour == 0
    assert {series.colour for series in chart.series[1:]} == {1, 2, 3, 4, 5}
