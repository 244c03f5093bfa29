"""What ``nemo-emmett init`` prints of the data."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from nemo_emmett.init.measuring import Measured, MeasuredSource
from nemo_emmett.init.writing import MANY_PASSES


def print_summary(measured: Measured, console: Console) -> None:
    """Print a table of the data: records, hours, tokens, languages, what was skipped of it and why; and which groups
    are read so often that they will be memorised."""
    table = Table(box=None, pad_edge=False)
    table.add_column("data", overflow="fold")
    table.add_column("languages", no_wrap=True)
    for column in ("records", "examples", "hours", "tokens"):
        table.add_column(column, justify="right", no_wrap=True)
    _add(table, "", measured.train)
    _add(table, "validation: ", measured.dev)
    console.print(table, highlight=False)
    for group in measured.content.groups:
        for key, count in group.left_out.items():
            console.print(f"{group.name}: left out by {key}: {count:,} example(s).", highlight=False)
    for name, passes in measured.content.passes().items():
        if passes > MANY_PASSES:
            console.print(
                f"{name}: is read {passes:,.0f} times in trainer.max_steps={measured.content.max_steps}, and data that "
                f"is read more than some {MANY_PASSES} times is memorised; train for fewer steps, or add data.",
                highlight=False,
            )


def _add(table: Table, lead: str, sources: Sequence[MeasuredSource]) -> None:
    for source in sources:
        hours = f"{source.hours:,.3g}" if source.hours else ""
        tokens = f"{source.tokens:,}" if source.tokens else ""
        counts = (f"{source.records:,}", f"{source.examples:,}")
        table.add_row(lead + source.name, " → ".join(source.languages), *counts, hours, tokens)
        for cause, count in source.skipped.items():
            table.add_row(f"  skipped: {cause}", "", f"{count:,}")
