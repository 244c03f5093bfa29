"""``nemo-emmett <command>``. What a command needs is imported when it runs, so that ``--help`` is instant."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from nemo_emmett import __version__
from nemo_emmett.runner import mistakes_as_sentences


class Commands(click.Group):
    """A group of commands that tells a user's mistakes in one sentence and exits with code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        with mistakes_as_sentences():
            return super().invoke(ctx)


class Names(click.ParamType):
    """Names separated by commas."""

    name = "name,name,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Split them."""
        return tuple(name.strip() for name in value.split(",")) if isinstance(value, str) else tuple(value)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, prog_name="nemo-emmett")
def main() -> None:
    """Train one model on text and speech translation, with NeMo."""


@main.group()
def prepare() -> None:
    """Turn a corpus into manifests to train on."""


@prepare.command()
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--seed", type=int, default=0, help="The same seed gives the same bytes.")
@click.option("--languages", type=Names(), help="ISO 639-1 codes.  [default: en,de,es,fr]")
@click.option("--types", type=Names(), help="What is written and spoken.  [default: number,date,time,price]")
@click.option("--train-items", type=int, help="Items to train on, over all types.")
@click.option("--dev-items", type=int, help="Items to validate on.")
@click.option("--test-items", type=int, help="Items to test on.")
@click.option("--spoken-train-items", type=int, help="How many of the train items are spoken as well as written.")
@click.option("--renditions", type=int, help="Recordings of each spoken train item in each language.")
@click.option("--max-number", type=int, help="The largest number.")
@click.option("--variants", type=Names(), help="eSpeak NG's voice variants, such as f1,m1,m3.  [default: 11 of them]")
@click.option("--accents/--no-accents", default=None, help="Speak English and Spanish in two accents each.")
@click.option(
    "--jobs", type=int, help="Processes to speak with; the result does not depend on it.  [default: all cores]"
)
def phrasebook(out: Path, jobs: int | None, **options: Any) -> None:
    """Write and speak numbers, dates, times and prices in four languages into the folder OUT."""
    from nemo_emmett.corpora.phrasebook import PhrasebookConfig, prepare_phrasebook

    config = PhrasebookConfig(**{name: value for name, value in options.items() if value is not None})
    summary = prepare_phrasebook(out, config, num_jobs=jobs)
    state = "written" if summary.made_now else "there already"
    for split, items in summary.items.items():
        recordings, hours = sum(summary.recordings[split].values()), sum(summary.hours[split].values())
        click.echo(f"{split:>5}: {items} items, {recordings} recordings, {hours:.2f} hours ({state})")


@main.command()
@click.argument("inputs", metavar="INPUT...", nargs=-1, required=True)
@click.option("--to", "target_lang", required=True, help="Language to translate to, such as de.")
@click.option("--from", "source_lang", help="Language to translate from, where the model needs to know.")
@click.option(
    "--model",
    required=True,
    envvar="NEMO_EMMETT_MODEL",
    show_envvar=True,
    type=click.Path(path_type=Path),
    help="Folder of a saved model.",
)
def translate(inputs: Sequence[str], target_lang: str, source_lang: str | None, model: Path) -> None:
    """Translate each INPUT, a text or an audio file, and print one translation per line."""
    from nemo_emmett.models.inputs import check_inputs

    check_inputs(inputs)
    from nemo_emmett.models import load

    for translation in load(model).translate(list(inputs), target_lang=target_lang, source_lang=source_lang):
        click.echo(translation)


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("config", type=click.Path(path_type=Path))
@click.option(
    "--output", type=click.Path(path_type=Path, file_okay=False), help="Folder for evaluation.json and report.html."
)
@click.option("--num-beams", type=click.IntRange(min=1), help="1 is greedy search.  [default: the recipe's, or 1]")
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="Longest translation.  [default: the model's]")
@click.option("--log-dir", type=click.Path(path_type=Path), help="TensorBoard logs of the training, for its curves.")
@click.option("--baseline", type=click.Path(path_type=Path), help="An earlier evaluation.json to compare with.")
@click.option("--examples", type=click.IntRange(min=0), help="Translations in the report.  [default: 10]")
def evaluate(model: Path, config: Path, **options: Any) -> None:
    """Translate the test sets of the recipe CONFIG with the model in the folder MODEL, and score the translations.

    Options that are not given are the recipe's.
    """
    from nemo_emmett.evaluation import evaluate_recipe

    evaluate_recipe(config, model, **options)


@main.command()
def doctor() -> None:
    """Report versions, what is registered where, the devices, and what is missing; exit with 1 if unfit for use."""
    from rich.console import Console

    from nemo_emmett.doctor import report

    raise SystemExit(report(Console()))
