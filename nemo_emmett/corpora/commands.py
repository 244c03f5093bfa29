"""The commands ``nemo-emmett prepare CORPUS``, one for each public corpus of the registry."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from nemo_emmett.config import nearest
from nemo_emmett.corpora.corpus import Corpus, Selection
from nemo_emmett.corpora.preparing import AUDIO, SHARD_SIZE, CorpusSummary, prepare_corpus
from nemo_emmett.corpora.registry import CORPORA, SPEECH, find_corpus
from nemo_emmett.errors import ConfigError

_FILTERS = ("max_length_ratio", "min_words", "max_words", "language_id", "deduplicate", "held_out")


class Names(click.ParamType):
    """Names separated by commas."""

    name = "name,name,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Split them."""
        return tuple(name.strip() for name in value.split(",")) if isinstance(value, str) else tuple(value)


class NamedPath(click.Path):
    """A path; an empty one, which pathlib would take for the current folder, is refused."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(**{"path_type": Path, **options})
        self.name = name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse the path."""
        if value == "":
            self.fail("is empty; name a path, or leave it out.", param, ctx)
        return super().convert(value, param, ctx)


class NumberRange(click.FloatRange):
    """A number within bounds; ``nan``, which is within any for click, is refused."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse the number."""
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value!r} is no number.", param, ctx)
        return number


class CorpusCommands(click.Group):
    """A group with a command for each corpus, in addition to those that are added to it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, sorted."""
        return sorted({*super().list_commands(ctx), *(name.replace("_", "-") for name in CORPORA)})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
        """The command of that name; that of a corpus is built when it is needed.

        Raises:
            ConfigError: if there is none, with the nearest name.
        """
        if (command := super().get_command(ctx, cmd_name)) is not None:
            return command
        if cmd_name.replace("-", "_") not in CORPORA and (suggestion := nearest(cmd_name, self.list_commands(ctx))):
            raise ConfigError(f"'{cmd_name}' is no corpus that can be prepared; did you mean '{suggestion}'?")
        return corpus_command(find_corpus(cmd_name))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a line on each command, without importing the readers."""
        own = {name: command.get_short_help_str(limit=1000) for name, command in self.commands.items()}
        lines = own | {name.replace("_", "-"): line for name, line in CORPORA.items()}
        with formatter.section("Commands"):
            formatter.write_dl(sorted(lines.items()))


def corpus_command(corpus: Corpus) -> click.Command:
    """The command that prepares a corpus."""

    def run(source: Path, out: Path, **options: Any) -> None:
        extra = {name: options.pop(name.replace("-", "_")) for name in corpus.extra_sources}
        extra = {name: path for name, path in extra.items() if path is not None}
        selection = Selection(options.pop("languages"), options.pop("splits"), extra)
        filters = {name: value for name in _FILTERS if (value := options.pop(name)) not in (None, False, ())}
        if filters:
            from nemo_emmett.corpora.filtering import FilterConfig

            options["filters"] = FilterConfig(**filters)
        summary = prepare_corpus(corpus, source, out, selection=selection, num_jobs=options.pop("jobs"), **options)
        click.echo(_report(summary))

    text = (
        f"Write {corpus.title} into the folder OUT, from SOURCE, the folder or archive with its files.\n\n"
        f"Needed: {corpus.files}\n\nRelease: {corpus.release}. Licence: {corpus.licence}. From {corpus.url}"
    )
    return click.Command(corpus.name.replace("_", "-"), callback=run, params=_parameters(corpus), help=text)


def _parameters(corpus: Corpus) -> list[click.Parameter]:
    path, count = NamedPath("path"), click.IntRange(min=1)
    audio_help = "Recordings as they are, or in 16 kHz FLAC as files, in NeMo's tars or in Lhotse Shar."
    of_speech = [
        click.Option(["--audio"], type=click.Choice(AUDIO), default="keep", help=audio_help),
        click.Option(["--shard-size"], type=count, default=SHARD_SIZE, help="Recordings in a shard."),
    ]
    return [
        click.Argument(["source"], type=path),
        click.Argument(["out"], type=path),
        *(click.Option([f"--{name}"], type=path, help=_sentence(what)) for name, what in corpus.extra_sources.items()),
        click.Option(["--languages"], type=Names(), help="Codes of languages.  [default: all that are there]"),
        click.Option(["--splits"], type=Names(), help="The publisher's names.  [default: all that are there]"),
        *(of_speech if corpus.name in SPEECH else ()),
        click.Option(
            ["--max-length-ratio"],
            type=NumberRange(min=1),
            help="Leave out training sentences with a text this many times as long as another.  [default: none]",
        ),
        click.Option(["--min-words"], type=count, help="Leave out shorter training sentences.  [default: none]"),
        click.Option(["--max-words"], type=count, help="Leave out longer training sentences.  [default: none]"),
        click.Option(["--language-id"], is_flag=True, help="Leave out training sentences in another language."),
        click.Option(["--deduplicate"], is_flag=True, help="Leave out training text that occurred before."),
        click.Option(
            ["--held-out"],
            type=path,
            multiple=True,
            help="Text or manifest of a test set, whose sentences are left out of training; may be repeated.",
        ),
        click.Option(
            ["--jobs"],
            type=count,
            help="Processes to work with; the result does not depend on it.  [default: all cores]",
        ),
    ]


def _sentence(what: str) -> str:
    return f"{what[0].upper()}{what[1:]}.  [default: none]"


def _report(summary: CorpusSummary) -> str:
    state = "written" if summary.made_now else "there already"
    lines = []
    for part in summary.parts:
        hours = f", {part.hours:.2f} hours of {part.spoken}" if part.spoken else ""
        skipped = ", ".join(f"{cause}: {count:,}" for cause, count in part.skipped.items())
        lines.append(
            f"{part.name}: {part.sentences:,} sentences in {', '.join(part.languages)}{hours} ({state})"
            + (f"; skipped: {skipped}" if skipped else "")
        )
    if summary.missing:
        lines.append(f"asked for and not there: {', '.join(summary.missing)}")
    return "\n".join(lines)
