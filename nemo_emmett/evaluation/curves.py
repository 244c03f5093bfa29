"""Training curves, read from a run's TensorBoard event files."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from nemo_emmett.errors import DataError

EVENT_FILES = "events.out.tfevents.*"


@dataclass(frozen=True)
class Curve:
    """One logged quantity over the training steps."""

    tag: str
    steps: list[int]
    values: list[float]


def read_curves(log_dir: str | os.PathLike[str]) -> dict[str, Curve]:
    """Read every scalar logged under a folder, by tag.

    A resumed run has several event files; of a step that was trained twice the last value counts.

    Args:
        log_dir: searched with all its subfolders (``version_0``, ...).

    Raises:
        DataError: if there is no event file, or none that holds a scalar.
    """
    log_dir = Path(log_dir)
    folders = sorted({file.parent for file in log_dir.rglob(EVENT_FILES)})
    if not folders:
        raise DataError(f"There are no TensorBoard event files ({EVENT_FILES}) under log_dir '{log_dir}'.")
    # lazy: importing TensorBoard takes longer than reading a run
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged: dict[str, dict[int, tuple[float, float]]] = defaultdict(dict)  # tag -> step -> (wall time, value)
    for folder in folders:
        # 0: all of them; by default TensorBoard keeps a sample of 10,000 events
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            for event in events.Scalars(tag):
                logged[tag][event.step] = max(logged[tag].get(event.step, (0.0, 0.0)), (event.wall_time, event.value))
    if not logged:
        raise DataError(f"The TensorBoard event files under log_dir '{log_dir}' hold no scalar.")
    return {
        tag: Curve(tag, steps=sorted(points), values=[points[step][1] for step in sorted(points)])
        for tag, points in sorted(logged.items())
    }
