"""``nemo-emmett init``: its options, and the order of its work. NeMo is imported once they are checked."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from nemo_emmett.errors import ConfigError, EmmettError
from nemo_emmett.files import check_writable
from nemo_emmett.init import questions
from nemo_emmett.init.choices import Choices
from nemo_emmett.init.data_files import DataFile, describe_file, describe_pair, parse_columns
from nemo_emmett.run_log import quiet_console

_MODELS = ("salm_t5", "salm_gpt", "bestow_gpt")


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path), required=False)
@click.option(
    "--data",
    multiple=True,
    metavar="FILE",
    help="To train on: a NeMo manifest (.json, .jsonl), a TSV of speech or text, text in JSONL; may be repeated.",
)
@click.option(
    "--text",
    nargs=2,
    multiple=True,
    metavar="SOURCE TARGET",
    help="To train on: two line-aligned text files; may be repeated.",
)
@click.option("--dev", multiple=True, metavar="FILE", help="To validate on: as --data.")
@click.option("--dev-text", nargs=2, multiple=True, metavar="SOURCE TARGET", help="To validate on: as --text.")
@click.option("--from", "source_lang", help="Language of the source, such as en.  [default: that of the data]")
@click.option("--to", "target_lang", help="Language of the translation, such as de.  [default: that of the data]")
@click.option(
    "--column",
    multiple=True,
    metavar="FIELD=NAME",
    help="Column of TSV files for audio, source, target, id, duration, offset, source_lang or target_lang, by name, or "
    "by number from 0 without a header; may be repeated.  [default: usual names]",
)
@click.option("--audio-dir", help="Folder of the recordings that a TSV names.  [default: the TSV's]")
@click.option("--backbone", help="Language model: a Hugging Face folder or name.  [default: asked for]")
@click.option("--encoder", help="Speech encoder: a .nemo file, or the name of a NeMo ASR model.  [default: asked for]")
@click.option(
    "--model",
    type=click.Choice(_MODELS),
    help="salm_t5 for encoder-decoders, salm_gpt and bestow_gpt for decoder-only models.  [default: by the backbone]",
)
@click.option(
    "--gpu-memory", help="Of the device to plan batch sizes for, in GiB, or its name, such as H100.  [default: a rule]"
)
@click.option("--force", is_flag=True, help="Overwrite RECIPE.")
def init(recipe: Path | None, force: bool, **options: Any) -> None:
    """Write RECIPE, a commented recipe for your own data, language model and speech encoder.

    Its bins, weights and batch sizes are filled in from the data, and all that it names is built without weights to
    validate it. In a terminal, what is missing is asked for.
    """
    columns = parse_columns(options["column"])
    if recipe is not None:
        _check_recipe_path(recipe, force)
    with quiet_console("Looking at the data ..." if options["data"] or options["text"] else ""):
        choices = _choices(recipe, columns, options, force)
        _write(choices)


def _choices(recipe: Path | None, columns: Mapping[str, str], options: Mapping[str, Any], force: bool) -> Choices:
    """What is given by options and, in a terminal, by answers.

    Raises:
        EmmettError: if something is missing, or cannot be used.
    """
    train = _files(options, "data", "text", columns)
    dev = _files(options, "dev", "dev_text", columns)
    asked = questions.Answers(recipe, train, dev, *(options[name] for name in questions.TEXTS))
    if questions.is_terminal():
        asked = questions.ask(asked, lambda path, option: describe_file(path, option, columns, options["audio_dir"]))
        _check_recipe_path(asked.recipe, force)
    asked.refuse_missing()
    asked.check()
    choices = Choices(
        asked.recipe,
        tuple(asked.train),
        tuple(asked.dev),
        asked.source_lang,
        asked.target_lang,
        asked.backbone,
        asked.encoder,
        options["model"],
        _memory(options["gpu_memory"]),
    )
    for note in (f"{file.name}: {note}." for file in (*choices.train, *choices.dev) for note in file.notes):
        click.echo(note)
    return choices


def _files(options: Mapping[str, Any], files: str, pairs: str, columns: Mapping[str, str]) -> list[DataFile]:
    singles = [describe_file(path, f"--{files}", columns, options["audio_dir"]) for path in options[files]]
    return [*singles, *(describe_pair(*paths, f"--{pairs.replace('_', '-')}") for paths in options[pairs])]


def _memory(given: str | None) -> str | None:
    """A number is one of GiB; anything else is what ``nemo-emmett plan`` takes."""
    return f"{given}GiB" if given is not None and re.fullmatch(r"\d+(\.\d+)?", given) else given


def _check_recipe_path(recipe: Path, force: bool) -> None:
    if recipe.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"RECIPE: '{recipe}' does not end in .yaml; give the path of the recipe to write.")
    if recipe.exists() and not force:
        raise ConfigError(f"RECIPE: '{recipe}' exists already; name another file, or overwrite it with --force.")
    check_writable(recipe.parent, "RECIPE")


def _write(choices: Choices) -> None:
    click.echo(f"Importing NeMo, and measuring {', '.join(file.name for file in choices.train)} ...")
    from rich.console import Console

    from nemo_emmett.files import write_text
    from nemo_emmett.init.measuring import measure_choices
    from nemo_emmett.init.summary import print_summary
    from nemo_emmett.init.writing import recipe_text, validate
    from nemo_emmett.runner import compose_recipe

    console, path = Console(), choices.recipe
    measured = measure_choices(choices, console)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, recipe_text(measured.content, path))
    try:
        validate(compose_recipe(str(path)))
    except EmmettError as error:
        raise ConfigError(f"'{path}' is written, but cannot be trained as it is: {error}") from error
    print_summary(measured, console)
    command = shlex.quote(str(path))
    click.echo(f"\n'{path}' is written; all that it names was built without weights, and its data checked.")
    if choices.gpu_memory is None:
        click.echo(f"Batch sizes follow a rule; those for a GPU of 80 GiB: nemo-emmett plan {command} --memory 80GiB")
    click.echo(f"Next: nemo-emmett train {command}")
