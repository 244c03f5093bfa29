"""The bar of a preparation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def counting(what: str, total: int | None, is_shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar that is advanced by calling what this yields; without a total it tells the count and the time."""
    time = TimeElapsedColumn() if total is None else TimeRemainingColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), time)
    with Progress(*columns, disable=not is_shown) as progress:
        task = progress.add_task(what, total=total)
        yield lambda number: progress.advance(task, number)
