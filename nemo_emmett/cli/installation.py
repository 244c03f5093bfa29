"""``nemo-emmett doctor``."""

from __future__ import annotations

from pathlib import Path

import click

from nemo_emmett.cli.parameters import FOLDER, loading


@click.command(short_help="Check the installation and this machine, and show what is missing and what it would enable.")
@click.option("--output", type=FOLDER, default=Path(), help="Folder of trainings, whose free space is checked.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(output: Path, as_json: bool) -> None:
    """Report versions, what is registered where, the devices, and what is missing with what it would enable.

    The exit code is 1 if nemo_emmett cannot be used as it is. What is missing for one purpose alone does not count.
    """
    with loading("all that it uses"):
        from rich.console import Console

        from nemo_emmett.doctor import report

        raise SystemExit(report(Console(), output, as_json))
