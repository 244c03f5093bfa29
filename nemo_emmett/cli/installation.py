"""``nemo-emmett doctor``."""

from __future__ import annotations

import click


@click.command()
def doctor() -> None:
    """Report versions, what is registered where, the devices, and what is missing; exit with 1 if unfit for use."""
    from rich.console import Console

    from nemo_emmett.doctor import report

    raise SystemExit(report(Console()))
