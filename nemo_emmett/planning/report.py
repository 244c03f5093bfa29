"""Tables of the commands: batch sizes as they are found, and a comparison of plans."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from nemo_emmett.oomptimizer.memory import shown
from nemo_emmett.oomptimizer.search import Result
from nemo_emmett.planning.bins_and_sizes import BinPlan

_BAR_WIDTH = 24
_BAR_STYLE = dict.fromkeys(("complete_style", "finished_style"), "cyan")


@dataclass
class LiveTable:
    """A table of the batch sizes found so far, redrawn with each.

    Args:
        title: above the table.
        budget: returns the bytes that a step may take; called once there is a result, and so a device.
        console: to draw on.
        is_timed: steps are computed, so their times are shown.
    """

    title: str
    budget: Callable[[], float]
    console: Console
    is_timed: bool = True
    results: list[Result] = field(default_factory=list)
    _live: Live | None = field(default=None, init=False, repr=False)

    def add(self, result: Result) -> None:
        """Add a bucket's result, or replace it."""
        self.results = [r for r in self.results if r.bucket != result.bucket] + [result]
        if self._live is not None:
            self._live.update(self._drawing(), refresh=True)

    @contextmanager
    def shown(self) -> Iterator[LiveTable]:
        """Draw the table while the search runs; it stays on the screen."""
        try:
            with Live(self._drawing(), console=self.console, auto_refresh=False) as self._live:
                yield self
        finally:
            self._live = None
            if not self.console.is_terminal:
                self.console.print()  # Live does not end the line if it does not draw

    def _drawing(self) -> Group:
        steps = sum(result.probes for result in self.results)
        found = f"{len(self.results)} buckets, {steps} steps"
        if self.results:
            found += f"; a step may take {shown(self.budget())}"
        return Group(Text(self.title), self.table(), Text(found))

    def table(self) -> Table:
        """The results in the order of the buckets."""
        budget = self.budget() if self.results else 0.0
        table = Table(box=None, pad_edge=False)
        table.add_column("bucket", no_wrap=True)
        for name in ("batch size", "memory"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("", max_width=_BAR_WIDTH)  # the column that shrinks on narrow terminals
        for name in ("share", "steps", *(["seconds"] if self.is_timed else [])):
            table.add_column(name, justify="right", no_wrap=True)
        for result in sorted(self.results, key=lambda r: (r.bucket.group, r.bucket.index)):
            peak = result.confirmed.peak
            table.add_row(
                str(result.bucket),
                str(result.batch_size),
                shown(peak),
                ProgressBar(total=budget, completed=min(peak, budget), **_BAR_STYLE),
                f"{100 * peak / budget:.1f} %",
                str(result.probes),
                *([f"{result.confirmed.seconds:.3f}"] if self.is_timed else []),
            )
        return table


def comparison(plans: Mapping[str, BinPlan], where: str) -> Table:
    """Plans side by side, the first of them the one to compare with."""
    reference = next(iter(plans.values())).epoch_seconds
    table = Table(title=where, title_justify="left", box=None, pad_edge=False)
    table.add_column("bins", no_wrap=True)
    for name in ("buckets", "padding", "batch sizes", "examples/s", "epoch", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, plan in plans.items():
        table.add_row(
            name,
            str(len(plan.bins)),
            f"{100 * plan.padding:.2f} %",
            f"{min(plan.sizes)} to {max(plan.sizes)}",
            f"{plan.examples_per_second:,.1f}",
            duration(plan.epoch_seconds),
            f"x {plan.epoch_seconds / reference:.3f}",
        )
    return table


def duration(seconds: float) -> str:
    """Seconds in a readable form: ``1:02:03``; below ten minutes in seconds.

    Example:
        >>> duration(3723), duration(12.345)
        ('1:02:03', '12.3 s')
    """
    if seconds >= 600:
        return str(timedelta(seconds=round(seconds)))
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.2g} s"
