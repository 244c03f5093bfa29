"""Line charts as inline SVG: no script, no font, no request; colours follow the page's CSS.

:func:`charts` draws training curves over steps, :func:`bins_chart` BLEU over bins of lengths.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean

from nemo_emmett.evaluation.breakdown import Breakdown
from nemo_emmett.evaluation.curves import Curve
from nemo_emmett.evaluation.table import MODALITY_NAMES

# The size in CSS pixels of a phone's column: there the letters come out at their nominal size.
WIDTH, HEIGHT = 360, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 34
POINTS_PER_LINE = 240
"""As many as a line of this width can show; a long run is averaged down to it, and the page stays small."""
SMOOTHING_REACH = 6
"""Points on either side that a smoothed point is the mean of: a centred window does not lag behind as TensorBoard's."""
LOG_SCALE_ABOVE = 20.0
"""A panel whose largest value exceeds its smallest this often is drawn on a logarithmic scale."""

NUM_COLOURS = 6
"""Line colours in the page's CSS, ``series-0`` to ``series-5``."""
MODALITY_COLOURS = {"text": 0, "audio": 1, "speech": 1}
"""Colours of the series that name a modality, in every chart the same."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Panel:
    """Which curves one chart shows, told by how the models name what they log."""

    title: str
    tag: re.Pattern[str]  # its group is the series: a modality in training, a validation set in validation
    unit: str  # of the values
    smooth: bool = False  # for one noisy value per batch


PANELS = (
    Panel("Training loss", re.compile(r"(?:train_)?loss(?:_(.+))?"), "nats per token", smooth=True),
    Panel("Validation loss", re.compile(r"val_loss(?:_(.+))?"), "nats per token"),
    Panel("Validation BLEU", re.compile(r"val_bleu(?:_(.+))?"), "BLEU"),
)


@dataclass(frozen=True)
class Series:
    """What one colour shows: a bold line, and the thin lines that it sums up."""

    name: str
    colour: int
    bold: list[Point]
    thin: list[tuple[str, list[Point]]]  # (what the line is, its points)


@dataclass(frozen=True)
class Chart:
    """A chart ready for the page, which draws title, legend and note itself."""

    title: str
    note: str
    series: list[Series]
    svg: str


def charts(curves: Mapping[str, Curve]) -> list[Chart]:
    """Draw the panels that a run's curves can fill."""
    found = [(panel, _series(panel, curves)) for panel in PANELS]
    return [_draw(panel, series) for panel, series in found if series]


def _draw(panel: Panel, series: Sequence[Series]) -> Chart:
    points = [point for one in series for line in [one.bold, *(thin for _, thin in one.thin)] for point in line]
    x = _Linear.over([step for step, _ in points], LEFT, WIDTH - RIGHT)
    y = _value_axis([value for _, value in points])
    lines = [_thin(one, x, y) for one in series] + [_bold(one, x, y) for one in series]
    label = f"{panel.title} over training steps: {_in_words(series)}"
    svg = _svg(label, [_value_grid(y, panel.unit), _step_axis(x), *lines])
    return Chart(panel.title, _note(panel, series, y), list(series), svg)


def bins_chart(breakdown: Breakdown, names: Sequence[str]) -> Chart:
    """Draw BLEU over a breakdown's bins, a line per model.

    Args:
        breakdown: one modality along one measure of length.
        names: of the evaluation and of all its baselines, in the order that ``breakdown.models`` counts in.
    """
    x = _Linear(0, len(breakdown.bins), LEFT, WIDTH - RIGHT, ())
    y = _linear_axis([bleu for one in breakdown.bins for bleu in one.bleu])
    series = []
    for line, model in enumerate(breakdown.models):
        # In the middle of each bin; the first colour is this model's alone.
        points = [(number + 0.5, one.bleu[line]) for number, one in enumerate(breakdown.bins)]
        series.append(Series(names[model], 1 + (model - 1) % (NUM_COLOURS - 1) if model else 0, points, []))
    modality = MODALITY_NAMES.get(breakdown.modality, breakdown.modality)
    title = f"{modality.capitalize()}: BLEU by {breakdown.measure}"
    # This model is drawn last, over the others.
    lines = [_dotted(one, breakdown, x, y) for one in reversed(series)]
    svg = _svg(f"{title}: {_in_words(series)}", [_value_grid(y, "BLEU"), _bin_axis(breakdown, x), *lines])
    return Chart(title, "", series, svg)


def _svg(label: str, parts: Iterable[str]) -> str:
    opening = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label, quote=True)}">'
    return f"{opening}{''.join(parts)}</svg>"


def _series(panel: Panel, curves: Mapping[str, Curve]) -> list[Series]:
    """The series of a panel: those of modalities or validation sets if there are any, otherwise the overall curve."""
    found = {match.group(1): _points(curve) for tag, curve in curves.items() if (match := panel.tag.fullmatch(tag))}
    found = {name: points for name, points in found.items() if len(points) > 1}
    if len(found) > 1:
        found.pop(None, None)
    directions = {name: parent for name in found if (parent := _parent(name)) and parent in found}
    taken: set[int] = set()
    series = []
    for name in sorted(found.keys() - directions.keys(), key=lambda name: (_preferred_colour(name), str(name))):
        bold = _thinned(found[name])
        thin = [(child, _thinned(found[child])) for child, parent in directions.items() if parent == name]
        if panel.smooth:
            bold, thin = _smoothed(bold), [*thin, (f"{_series_title(name)}, as logged", bold)]
        series.append(Series(_series_title(name), _colour(name, taken), bold, thin))
    return series


def _points(curve: Curve) -> list[Point]:
    """Where a curve can be drawn: a loss that became NaN ends there."""
    return [point for point in zip(curve.steps, curve.values, strict=True) if math.isfinite(point[1])]


def _parent(name: str | None) -> str | None:
    """The validation set that ``dev_text_en-de`` may be a direction of; None for what is no direction."""
    match = re.fullmatch(r"(.+)_[^_-]+-[^_-]+", name or "")
    return match.group(1) if match else None


def _series_title(name: str | None) -> str:
    return "overall" if name is None else MODALITY_NAMES.get(name, name)


def _preferred_colour(name: str | None) -> int:
    """The colour of the modality in a name such as ``audio`` or ``dev_audio``; else the first that is nobody's."""
    words = re.split(r"[^a-z]+", (name or "").lower())
    return next((MODALITY_COLOURS[word] for word in words if word in MODALITY_COLOURS), 2)


def _colour(name: str | None, taken: set[int]) -> int:
    """The preferred colour, or the next free one; from the seventh series on colours come again."""
    preferred = _preferred_colour(name)
    order = [preferred, *range(2, NUM_COLOURS), *range(2)]
    colour = next((colour for colour in order if colour not in taken), preferred)
    taken.add(colour)
    return colour


def _thinned(points: list[Point]) -> list[Point]:
    """At most POINTS_PER_LINE points: neighbours averaged."""
    size = math.ceil(len(points) / POINTS_PER_LINE)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(fmean(step for step, _ in group), fmean(value for _, value in group)) for group in groups]


def _smoothed(points: list[Point]) -> list[Point]:
    """Centred moving average; its window shrinks at the ends, so that the line begins and ends where the curve does."""
    smooth = []
    for position, (step, _) in enumerate(points):
        reach = min(SMOOTHING_REACH, position, len(points) - 1 - position)
        window = points[position - reach : position + reach + 1]
        smooth.append((step, fmean(value for _, value in window)))
    return smooth


@dataclass(frozen=True)
class _Linear:
    """Maps values from ``low`` to ``high`` onto pixels from ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]

    @classmethod
    def over(cls, values: Iterable[float], start: float, end: float) -> _Linear:
        values = list(values)
        low, high = min(values), max(values)
        ticks = _round_ticks(low, high)
        return cls(low, high if high > low else low + 1, start, end, tuple(t for t in ticks if low <= t <= high))

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


@dataclass(frozen=True)
class _Logarithmic(_Linear):
    """The same on a logarithmic scale; ``low`` is above zero."""

    def __call__(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)


def _value_axis(values: list[float]) -> _Linear:
    """From bottom to top; logarithmic where the values span decades, otherwise from a round number to a round one."""
    low, high, bottom = min(values), max(values), HEIGHT - BOTTOM
    if low > 0 and high / low > LOG_SCALE_ABOVE:
        ticks = [m * 10.0**e for e in range(-12, 13) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
        if len(ticks) > 7:
            ticks = [tick for tick in ticks if math.isclose(math.log10(tick), round(math.log10(tick)), abs_tol=1e-9)]
        return _Logarithmic(low, high, bottom, TOP, tuple(ticks))
    return _linear_axis(values)


def _linear_axis(values: list[float]) -> _Linear:
    """From bottom to top, from a round number to a round one; from 0 unless a value is below it."""
    ticks = _round_ticks(min(*values, 0.0), max(values))
    return _Linear(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP, tuple(ticks))


def _round_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers, 1, 2 or 5 times a power of ten apart, from at or below ``low`` to at or above ``high``."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(factor * power for factor in (1, 2, 5, 10) if span / (factor * power) <= about)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def _value_grid(y: _Linear, unit: str) -> str:
    bottom = HEIGHT - BOTTOM
    parts = []
    for tick in y.ticks:
        height = _px(y(tick))
        parts.append(f'<line class="gridline" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height}" y2="{height}"/>')
        parts.append(_text("tick", LEFT - 6, y(tick), f"{tick:g}", 'dy="0.32em" text-anchor="end"'))
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    middle = (TOP + bottom) / 2
    parts.append(
        f'<text class="label" transform="translate(10 {middle}) rotate(-90)" text-anchor="middle">{escape(unit)}</text>'
    )
    return "".join(parts)


def _step_axis(x: _Linear) -> str:
    bottom = HEIGHT - BOTTOM
    ticks = [_text("tick", x(tick), bottom + 15, _steps(tick)) for tick in x.ticks]
    return "".join([*ticks, _text("label", (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 3, "step")])


def _bin_axis(breakdown: Breakdown, x: _Linear) -> str:
    labels = [
        _text("tick", x(number + 0.5), HEIGHT - BOTTOM + 15, one.label) for number, one in enumerate(breakdown.bins)
    ]
    return "".join([*labels, _text("label", (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 3, breakdown.measure)])


def _text(kind: str, x: float, y: float, text: str, placed: str = 'text-anchor="middle"') -> str:
    return f'<text class="{kind}" x="{_px(x)}" y="{_px(y)}" {placed}>{escape(text)}</text>'


def _dotted(series: Series, breakdown: Breakdown, x: _Linear, y: _Linear) -> str:
    """A model's line over the bins, a dot for each, which tells its numbers to a mouse that rests there."""
    dots = [
        f'<circle class="dot series-{series.colour}" cx="{_px(x(place))}" cy="{_px(y(bleu))}" r="3.5">'
        f"<title>{escape(f'{series.name}: BLEU {bleu:.1f} at {one.label} {breakdown.measure}')}</title></circle>"
        for (place, bleu), one in zip(series.bold, breakdown.bins, strict=True)
    ]
    return _bold(series, x, y) + "".join(dots)


def _thin(series: Series, x: _Linear, y: _Linear) -> str:
    return "".join(
        f'<path class="thin series-{series.colour}" d="{_path(points, x, y)}"><title>{escape(name)}</title></path>'
        for name, points in series.thin
    )


def _bold(series: Series, x: _Linear, y: _Linear) -> str:
    path = _path(series.bold, x, y)
    return f'<path class="bold series-{series.colour}" d="{path}"><title>{escape(series.name)}</title></path>'


def _note(panel: Panel, series: Sequence[Series], y: _Linear) -> str:
    notes = []
    if panel.smooth:
        notes.append("bold: smoothed")
    elif any(one.thin for one in series):
        notes.append("thin: single directions")
    if isinstance(y, _Logarithmic):
        notes.append("logarithmic scale")
    return ", ".join(notes)


def _in_words(series: Sequence[Series]) -> str:
    """Where each bold line starts and ends, for those who cannot see it."""
    return "; ".join(f"{one.name} from {one.bold[0][1]:.2f} to {one.bold[-1][1]:.2f}" for one in series)


def _path(points: Sequence[Point], x: _Linear, y: _Linear) -> str:
    return "M" + "L".join(f"{_px(x(step))} {_px(y(value))}" for step, value in points)


def _px(pixels: float) -> str:
    return f"{pixels:.1f}"


def _steps(step: float) -> str:
    return f"{step / 1000:g}k" if step >= 10_000 else f"{step:g}"
