"""Line charts as inline SVG: no script, no font, no request; colours follow the page's CSS.

:func:`charts` draws training curves over steps, :func:`bins_chart` BLEU over bins of lengths.

matplotlib's SVG of the same six charts is three times as large (129 kB instead of 42 kB, in a page of 97 kB), its
colours do not follow the page's dark mode, its lines have no titles, and ``evaluate`` would depend on it.
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

# In CSS pixels, the width of a phone's screen: there letters have their nominal size.
WIDTH, HEIGHT = 360, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 34
POINTS_PER_LINE = 240
"""As many as a line of this width can show; longer runs are averaged, so that the page stays small."""
SMOOTHING_REACH = 6
"""Points on either side in the mean of a smoothed point: a centred window does not lag as TensorBoard's does."""
LOG_SCALE_ABOVE = 20.0
"""A panel whose largest value is more than this many times its smallest has a logarithmic scale."""

NUM_COLOURS = 6
"""Line colours in the page's CSS, ``series-0`` to ``series-5``."""
MODALITY_COLOURS = {"text": 0, "audio": 1, "speech": 1}
"""Colours of the modalities, the same in every chart."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Panel:
    """The curves of one chart, by the names under which the models log them."""

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
    """The lines of one colour: a bold one, and thin ones of its parts."""

    name: str
    colour: int
    bold: list[Point]
    thin: list[tuple[str, list[Point]]]  # (what the line is, its points)


@dataclass(frozen=True)
class Chart:
    """A chart for the page, whose template adds title, legend and note."""

    title: str
    note: str
    series: list[Series]
    svg: str


def charts(curves: Mapping[str, Curve]) -> list[Chart]:
    """Draw the panels that a run has curves for."""
    found = []
    for panel in PANELS:
        if series := _series(panel, curves):
            points = [point for one in series for line in (one.bold, *(thin for _, thin in one.thin)) for point in line]
            x = _Linear.over([step for step, _ in points], LEFT, WIDTH - RIGHT)
            y = _value_axis([value for _, value in points])
            lines = [
                f'<path class="thin series-{one.colour}" d="{_path(thin, x, y)}"><title>{escape(name)}</title></path>'
                for one in series
                for name, thin in one.thin
            ]
            lines += [_bold(one, x, y) for one in series]
            # Above 10,000 steps are counted in thousands.
            ticks = [(x(step), f"{step / 1000:g}k" if step >= 10_000 else f"{step:g}") for step in x.ticks]
            label = f"{panel.title} over training steps: {_in_words(series)}"
            svg = _svg(label, [_value_grid(y, panel.unit), _bottom_axis(ticks, "step"), *lines])
            found.append(Chart(panel.title, _note(panel, series, y), series, svg))
    return found


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
        # A point is in the middle of its bin; the first colour is only used for this model.
        points = [(number + 0.5, one.bleu[line]) for number, one in enumerate(breakdown.bins)]
        series.append(Series(names[model], 1 + (model - 1) % (NUM_COLOURS - 1) if model else 0, points, []))
    modality = MODALITY_NAMES.get(breakdown.modality, breakdown.modality)
    title = f"{modality.capitalize()}: BLEU by {breakdown.measure}"
    ticks = [(x(number + 0.5), one.label) for number, one in enumerate(breakdown.bins)]
    # reversed: this model is drawn last, over the others
    lines = [_dotted(one, breakdown, x, y) for one in reversed(series)]
    svg = _svg(
        f"{title}: {_in_words(series)}", [_value_grid(y, "BLEU"), _bottom_axis(ticks, breakdown.measure), *lines]
    )
    return Chart(title, "", series, svg)


def _svg(label: str, parts: Iterable[str]) -> str:
    opening = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label, quote=True)}">'
    return f"{opening}{''.join(parts)}</svg>"


def _series(panel: Panel, curves: Mapping[str, Curve]) -> list[Series]:
    """The series of a panel: those of modalities or validation sets if there are any, otherwise the overall curve."""
    found: dict[str | None, list[Point]] = {}
    for tag, curve in curves.items():
        # Without the points that are not finite: a loss may become NaN.
        points = [point for point in zip(curve.steps, curve.values, strict=True) if math.isfinite(point[1])]
        if (match := panel.tag.fullmatch(tag)) and len(points) > 1:
            found[match.group(1)] = points
    if len(found) > 1:
        found.pop(None, None)
    # dev_text_en-de is a direction of the validation set dev_text
    parts = {name: re.fullmatch(r"(.+)_[^_]+-[^_]+", name or "") for name in found}
    directions = {name: match.group(1) for name, match in parts.items() if match and match.group(1) in found}
    taken: set[int] = set()
    series = []
    for name in sorted(found.keys() - directions.keys(), key=lambda name: (_preferred_colour(name), str(name))):
        title = "overall" if name is None else MODALITY_NAMES.get(name, name)
        bold = _thinned(found[name])
        thin = [(child, _thinned(found[child])) for child, parent in directions.items() if parent == name]
        if panel.smooth:
            bold, thin = _smoothed(bold), [*thin, (f"{title}, as logged", bold)]
        # The preferred colour, or the next free one; from the seventh series on colours are reused.
        preferred = _preferred_colour(name)
        free = (colour for colour in (preferred, *range(2, NUM_COLOURS), *range(2)) if colour not in taken)
        colour = next(free, preferred)
        taken.add(colour)
        series.append(Series(title, colour, bold, thin))
    return series


def _preferred_colour(name: str | None) -> int:
    """The colour of the modality in a name such as ``audio`` or ``dev_audio``; else the first that is no modality's."""
    words = re.split(r"[^a-z]+", (name or "").lower())
    return next((MODALITY_COLOURS[word] for word in words if word in MODALITY_COLOURS), 2)


def _thinned(points: list[Point]) -> list[Point]:
    """At most POINTS_PER_LINE points, by averaging neighbours."""
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


def _bottom_axis(ticks: Iterable[tuple[float, str]], title: str) -> str:
    """The labels of the horizontal axis: (pixel, text) of each tick, and the axis's title."""
    labels = [_text("tick", x, HEIGHT - BOTTOM + 15, label) for x, label in ticks]
    return "".join([*labels, _text("label", (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 3, title)])


def _text(kind: str, x: float, y: float, text: str, placed: str = 'text-anchor="middle"') -> str:
    return f'<text class="{kind}" x="{_px(x)}" y="{_px(y)}" {placed}>{escape(text)}</text>'


def _dotted(series: Series, breakdown: Breakdown, x: _Linear, y: _Linear) -> str:
    """A model's line over the bins, with a dot for each, whose title (shown on hover) has its numbers."""
    dots = [
        f'<circle class="dot series-{series.colour}" cx="{_px(x(place))}" cy="{_px(y(bleu))}" r="3.5">'
        f"<title>{escape(f'{series.name}: BLEU {bleu:.1f} at {one.label} {breakdown.measure}')}</title></circle>"
        for (place, bleu), one in zip(series.bold, breakdown.bins, strict=True)
    ]
    return _bold(series, x, y) + "".join(dots)


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
    """The start and end of each bold line, for screen readers."""
    return "; ".join(f"{one.name} from {one.bold[0][1]:.2f} to {one.bold[-1][1]:.2f}" for one in series)


def _path(points: Sequence[Point], x: _Linear, y: _Linear) -> str:
    return "M" + "L".join(f"{_px(x(step))} {_px(y(value))}" for step, value in points)


def _px(pixels: float) -> str:
    return f"{pixels:.1f}"
