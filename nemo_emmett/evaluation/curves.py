"""Training curves, read from the TensorBoard event files that a run left behind."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from nemo_emmett.errors import DataError

EVENT_FILES = "events.out.tfevents.*"
ALL_EVENTS = {"scalars": 0}
"""TensorBoard keeps a sample of 10,000 unless told 0, which means all."""


@dataclass(frozen=True)
class Curve:
    """One logged quantity over the training steps."""

    tag: str
    steps: list[int]
    values: list[float]


def read_curves(log_dir: str | os.PathLike[str]) -> dict[str, Curve]:
    """Read every scalar logged under a folder, by tag.

    A run that was resumed leaves several event files; a step that was trained twice counts as it was trained last.

    Args:
        log_dir: searched with all its subfolders (``version_0``, ...).

    Raises:
        DataError: if there is no event file, or none that holds a scalar.
    """
    log_dir = Path(log_dir)
    folders = sorted({file.parent for file in log_dir.rglob(EVENT_FILES)})
    if not folders:
        raise DataError(f"There are no TensorBoard event files ({EVENT_FILES}) under log_dir '{log_dir}'.")
    logged: dict[str, dict[int, tuple[float, float]]] = defaultdict(dict)  # tag -> step -> (wall time, value)
    for folder in folders:
        for tag, event in _scalars(folder):
            logged[tag][event.step] = max(logged[tag].get(event.step, (0.0, 0.0)), (event.wall_time, event.value))
    if not logged:
        raise DataError(f"The TensorBoard event files under log_dir '{log_dir}' hold no scalar.")
    return {tag: _curve(tag, points) for tag, points in sorted(logged.items())}


def _scalars(folder: Path):
    """(tag, event) of every scalar in a folder's event files."""
    # Importing TensorBoard takes longer than reading a run; only those who want curves pay for it.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance=ALL_EVENTS).Reload()
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            yield tag, event


def _curve(tag: str, points: dict[int, tuple[float, float]]) -> Curve:
    steps = sorted(points)
    return Curve(tag=tag, steps=steps, values=[points[step][1] for step in steps])
