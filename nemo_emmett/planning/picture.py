"""Draws a profile: batch size and memory of each bucket; and what all pictures of the commands have in common."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_emmett.errors import DataError, EmmettError
from nemo_emmett.oomptimizer.memory import shown as shown_bytes
from nemo_emmett.oomptimizer.profile import Measure, Profile, shown

_GIB = 2**30
_SIZE, _PEAK, _RESERVED, _BUDGET = "#1f5a85", "#9ecae1", "#d9d9d9", "#d1495b"
_MOST_LABELS = 40
"""Labels that fit below the axis."""


def draw_profile(profile: Profile, budget: float, path: str | Path) -> None:
    """Draw batch sizes above and memory below, a column of panels for each group.

    Args:
        profile: with measures.
        budget: bytes that a step may take.
        path: of the PNG.

    Raises:
        EmmettError: if matplotlib is not installed.
        DataError: if the picture cannot be written.
    """
    widths = [max(4.0, 0.28 * len(measures)) for measures in profile.measures.values()]
    figure = new_figure(sum(widths) + 1.5, 6.4)
    panels = figure.subplots(2, len(widths), squeeze=False, sharex="col", width_ratios=widths)
    for column, (name, measures) in enumerate(profile.measures.items()):
        sizes = profile.groups[name].bucket_batch_size
        bars = panels[0, column].bar(range(len(sizes)), sizes, color=_SIZE, width=0.8)
        if len(sizes) <= _MOST_LABELS:
            panels[0, column].bar_label(bars, fontsize=6, padding=1)
        panels[0, column].set_title(name or "train_ds", fontsize=10, loc="left")
        _draw_memory(panels[1, column], measures, budget)
        for axes in panels[:, column]:
            axes.margins(x=0.01)
            axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel("batch size (examples)")
    panels[1, 0].set_ylabel("memory of a step (GiB)")
    save_figure(figure, path)


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches.

    Raises:
        EmmettError: if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise EmmettError("The picture needs 'matplotlib'; run: pip install 'nemo_emmett[charts]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: str | Path) -> None:
    """Write a figure's PNG.

    Raises:
        DataError: if it cannot be written.
    """
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise DataError(
            f"--output: '{path}' cannot be written ({error}); name a .png in a folder that exists."
        ) from error


def _draw_memory(axes: Any, measures: Sequence[Measure], budget: float) -> None:
    places = range(len(measures))
    if all(measure.reserved for measure in measures):
        reserved = [measure.reserved / _GIB for measure in measures]
        axes.bar(places, reserved, color=_RESERVED, width=0.8, label="held by the allocator")
    peaks = [(measure.confirmed_peak or measure.predicted_peak) / _GIB for measure in measures]
    axes.bar(places, peaks, color=_PEAK, width=0.8, label="peak")
    predicted = [measure.predicted_peak / _GIB for measure in measures]
    axes.plot(places, predicted, ".", color=_SIZE, markersize=4, label="predicted")
    axes.axhline(budget / _GIB, color=_BUDGET, linewidth=1.2, label=f"budget, {shown_bytes(budget)}")
    axes.set_ylim(0, 1.18 * max(budget / _GIB, *peaks))
    axes.legend(loc="upper center", fontsize=7, frameon=False, ncols=4)
    step = -(-len(measures) // _MOST_LABELS)
    axes.set_xticks(places[::step], [shown(m.bin) for m in measures[::step]], rotation=90, fontsize=6)
    axes.set_xlabel("bin")
