"""``nemo-emmett translate``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from nemo_emmett.cli.parameters import PATH, trust_argument, trust_option


@click.command()
@click.argument("inputs", metavar="INPUT...", nargs=-1, required=True)
@click.option("--to", "target_lang", required=True, help="Language to translate to, such as de.")
@click.option("--from", "source_lang", help="Language to translate from, if the model needs it.")
@click.option(
    "--model", required=True, envvar="NEMO_EMMETT_MODEL", show_envvar=True, type=PATH, help="Folder of a saved model."
)
@trust_option
def translate(inputs: Sequence[str], model: Path, trust_remote_code: bool, **languages: str | None) -> None:
    """Translate each INPUT, a text or an audio file, and print one translation per line."""
    from nemo_emmett.models.inputs import check_inputs

    check_inputs(inputs)
    from nemo_emmett.models import load

    loaded = load(model, **trust_argument(trust_remote_code))
    for translation in loaded.translate(list(inputs), **languages):
        click.echo(translation)
