"""``nemo-emmett prepare``: corpora, spoken or public, and test sentences in training data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nemo_emmett.cli.parameters import FOLDER, PATH, jobs_option
from nemo_emmett.corpora.commands import CorpusCommands, Names

if TYPE_CHECKING:
    from nemo_emmett.corpora.phrasebook.speaking import SpokenSummary


@click.group(cls=CorpusCommands, short_help="Turn a corpus into manifests and text to train on.")
def prepare() -> None:
    """Turn a corpus into manifests to train on: one of those below, from the files that its publisher distributes."""


@prepare.command(short_help="Write and speak numbers, dates, times and prices in four languages.")
@click.argument("out", type=FOLDER)
@click.option("--seed", type=int, default=0, help="The same seed gives the same bytes.")
@click.option("--languages", type=Names(), help="ISO 639-1 codes.  [default: en,de,es,fr]")
@click.option("--types", type=Names(), help="What is written and spoken.  [default: number,date,time,price]")
@click.option("--train-items", type=int, help="Items to train on, over all types.  [default: 1600]")
@click.option("--dev-items", type=int, help="Items to validate on.  [default: 80]")
@click.option("--test-items", type=int, help="Items to test on.  [default: 120]")
@click.option("--spoken-train-items", type=int, help="Train items that are spoken as well.  [default: all]")
@click.option("--renditions", type=int, help="Recordings of each spoken train item in each language.  [default: 1]")
@click.option("--max-number", type=int, help="The largest number.  [default: 9999]")
@click.option("--variants", type=Names(), help="eSpeak NG's voice variants, such as f1,m1,m3.  [default: 11 of them]")
@click.option(
    "--accents/--no-accents", default=None, help="Speak English and Spanish in two accents.  [default: accents]"
)
@jobs_option
def phrasebook(out: Path, jobs: int | None, **options: Any) -> None:
    """Write and speak numbers, dates, times and prices in four languages into the folder OUT."""
    from nemo_emmett.corpora.phrasebook import PhrasebookConfig, prepare_phrasebook

    config = PhrasebookConfig(**{name: value for name, value in options.items() if value is not None})
    _print_spoken(prepare_phrasebook(out, config, num_jobs=jobs), "items")


@prepare.command(short_help="Speak captions that are line-aligned in several languages (Multi30k).")
@click.argument("source", type=PATH)
@click.argument("out", type=PATH)
@click.option("--languages", type=Names(), help="Of the text.  [default: en,de,fr]")
@click.option("--spoken-languages", type=Names(), help="Among en, de, es and fr.  [default: en]")
@click.option("--max-words", type=int, help="Leave out captions of more words in any language.  [default: none]")
@click.option("--train-captions", type=int, help="The first so many of those left.  [default: all]")
@click.option("--spoken-train-captions", type=int, help="How many of them are spoken as well.  [default: all]")
@click.option("--dev-captions", type=int, help="Of the validation set; the others are the test split.  [default: 100]")
@click.option("--accents/--no-accents", default=None, help="Speak English and Spanish in two accents.  [default: no]")
@click.option("--variants", type=Names(), help="eSpeak NG's voice variants.  [default: f1,m1,m3]")
@click.option(
    "--speed", metavar="MIN MAX", type=(int, int), help="Words a minute, slowest and fastest.  [default: 190 210]"
)
@click.option(
    "--pitch", metavar="MIN MAX", type=(int, int), help="Of eSpeak NG's 0 to 99, lowest and highest.  [default: 40 60]"
)
@click.option("--seed", type=int, help="Of the voices.  [default: 0]")
@jobs_option
def captions(source: Path, out: Path, jobs: int | None, **options: Any) -> None:
    """Speak captions that are line-aligned in several languages, from the folder SOURCE (Multi30k), into OUT."""
    from nemo_emmett.corpora.captions import CaptionsConfig, prepare_captions

    config = CaptionsConfig(**{name: value for name, value in options.items() if value is not None})
    _print_spoken(prepare_captions(source, out, config, num_jobs=jobs), "captions")


def _print_spoken(summary: SpokenSummary, unit: str) -> None:
    """Print the size of each split of a spoken corpus."""
    state = "written" if summary.made_now else "there already"
    for split, items in summary.items.items():
        recordings, hours = sum(summary.recordings[split].values()), sum(summary.hours[split].values())
        click.echo(f"{split:>5}: {items} {unit}, {recordings} recordings, {hours:.2f} hours ({state})")


@prepare.command(short_help="Find test sentences in training data; exit with 1 if there are any.")
@click.argument("training", type=PATH, nargs=-1, required=True)
@click.option(
    "--held-out",
    type=PATH,
    multiple=True,
    required=True,
    help="Test data: text, a manifest or a prepared corpus; may be repeated.",
)
@click.option("--examples", type=click.IntRange(min=0), default=10, help="Leaks shown of each kind, at most.")
@click.option("--near/--no-near", default=True, help="Look for test sentences with a few words changed, too.")
def leaks(training: Sequence[Path], held_out: Sequence[Path], examples: int, near: bool) -> None:
    """Find test sentences in TRAINING: text, manifests or prepared corpora; exit with 1 if there are any."""
    from nemo_emmett.corpora.leaks_command import print_leaks

    raise SystemExit(int(print_leaks(training, held_out, examples=examples, near=near)))
