"""``nemo-emmett translate``."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nemo_emmett.cli.parameters import (
    COUNT,
    FILE,
    MODEL,
    available_device,
    check_device,
    chunk_seconds_option,
    device_option,
    loading,
    max_new_tokens_option,
    overwrite_option,
    trust_argument,
    trust_option,
    warn,
)

if TYPE_CHECKING:
    from nemo_emmett.translation.requests import Request

_WINDOW = 32
"""Inputs of standard input that are read before they are translated, unless a batch size is given."""

_SHOWN_FAULTS = 20
"""Records at fault that are named on the terminal; a JSONL output holds all of them."""


@click.command(short_help="Translate texts and recordings with an exported model.")
@click.argument("inputs", metavar="[INPUT]...", nargs=-1)
@click.option(
    "--to",
    "target_lang",
    metavar="LANGUAGE",
    help="Code of the language to translate to, such as de.  "
    "[default: target_lang of each record of a TSV or manifest]",
)
@click.option(
    "--from",
    "source_lang",
    metavar="LANGUAGE",
    help="Code of the language to translate from.  [default: that of each record, or the one that the target language "
    "was trained from, if it is only one; otherwise none is named to the model]",
)
@click.option(
    "--model",
    required=True,
    envvar="NEMO_EMMETT_MODEL",
    show_envvar=True,
    type=MODEL,
    help="Folder of an exported model.",
)
@click.option("--tsv", type=FILE, multiple=True, help="Table with named columns to translate; may be repeated.")
@click.option(
    "--column",
    metavar="NAME",
    help="Column of the table to translate.  [default: audio or path, else source, sentence or text]",
)
@click.option(
    "--manifest",
    "manifests",
    type=FILE,
    multiple=True,
    help="NeMo manifest to translate: recordings or parts of them; may be repeated.",
)
@click.option(
    "--output",
    type=FILE,
    help="File for the translations, which appears when all are there; one that ends in "
    ".jsonl gets id, input, translation and languages.  [default: standard output, as they come]",
)
@click.option(
    "--format",
    "format_",
    type=click.Choice(("lines", "jsonl")),
    help="Of the output.  [default: jsonl for a file named so, otherwise lines]",
)
@overwrite_option
@click.option("--num-beams", type=COUNT, help="Beams of the search; 1 is greedy.  [default: 1]")
@click.option(
    "--batch-size",
    type=COUNT,
    help="Most inputs of a batch.  [default: as many as 4096 tokens hold]",
)
@max_new_tokens_option
@chunk_seconds_option
@device_option
@trust_option
def translate(
    inputs: Sequence[str],
    model: Path,
    tsv: Sequence[Path],
    column: str | None,
    manifests: Sequence[Path],
    output: Path | None,
    format_: str | None,
    overwrite: bool,
    source_lang: str | None,
    target_lang: str | None,
    device: str | None,
    trust_remote_code: bool,
    **options: Any,
) -> None:
    """Translate texts and recordings with an exported model, one line for each, in their order.

    An INPUT is a text, an audio file, a folder (its audio files, by name, those of its subfolders too), or - for the
    lines of standard input, which are read if nothing is given. A line is a text, or the path of an audio file.

    The files that the command line names are looked for first: if one does not exist, nothing is translated. A line, a
    recording, or a record of a TSV or manifest that cannot be translated is reported with its cause, and the others
    are translated; then the exit code is 1. Its line is empty, as is that of an empty line.

    A recording that is longer than --chunk-seconds is translated in parts, with a bar; its line is their translations
    in their order, and in JSON it has them and their times as well.
    """
    from nemo_emmett.models.exported import check_exported, chunk_seconds_of, untrained_warning
    from nemo_emmett.prompts.language_codes import normalized
    from nemo_emmett.translation.requests import STDIN, Languages, read_requests
    from nemo_emmett.translation.results import check_output, format_of

    if not (inputs or tsv or manifests):
        inputs = (STDIN,)
    check_device(device)
    check_output(output, overwrite)
    languages = Languages(source_lang, target_lang)
    requests = read_requests(inputs, tsv, manifests, stdin=sys.stdin, languages=languages, column=column)
    config = check_exported(model)
    if target_lang is not None and (sentence := untrained_warning(config, [target_lang])):
        warn(f"--to: {sentence}")
    with loading("the model"):
        from nemo_emmett.models import load

        loaded = load(model, **trust_argument(trust_remote_code)).to(available_device(device))
        if target_lang is not None:
            loaded.warned_targets = frozenset([normalized(target_lang)])
        if STDIN in inputs and sys.stdin.isatty():
            click.echo("Enter a text on each line; end with Ctrl-D.", err=True)
        window = _window(options["batch_size"], is_live=STDIN in inputs)
        given = {name: value for name, value in options.items() if value is not None}
        requests = _with_only_sources(requests, config)
        longest = options["chunk_seconds"] or chunk_seconds_of(config)
        failed = _write(
            loaded, requests, window, given, output, format_of(output, format_), target_lang is None, longest
        )
        raise SystemExit(int(failed))


def _write(
    model: Any,
    requests: Any,
    window: int,
    options: dict[str, Any],
    output: Path | None,
    format_: str,
    languages_vary: bool,
    chunk_seconds: float,
) -> bool:
    """Write the translations of all requests; whether one could not be translated."""
    from tqdm import tqdm

    from nemo_emmett.translation.results import as_line, opened
    from nemo_emmett.translation.run import translate_requests

    done = faults = 0
    # Where translations come on standard output, they are the progress.
    with opened(output) as file, tqdm(unit="input", disable=True if output is None else None) as bar:
        for results in translate_requests(
            model, requests, window, options, languages_vary=languages_vary, chunk_seconds=chunk_seconds
        ):
            for result in results:
                print(as_line(result, format_), file=file)
                if result.fault:
                    faults += 1
                    if faults <= _SHOWN_FAULTS:
                        stop = "" if result.fault.endswith("?") else "."
                        click.echo(f"Not translated: {result.request.id}: {result.fault}{stop}", err=True)
            file.flush()
            done += len(results)
            bar.update(len(results))
    if faults:
        click.echo(f"{faults} of {done} could not be translated.", err=True)
    if output is not None:
        click.echo(f"Translations: {output}", err=True)
    return faults > 0


def _with_only_sources(requests: Iterable[Request], config: Mapping[str, Any]) -> Iterator[Request]:
    """The requests; those without a source language get the only one that their target was trained from."""
    from nemo_emmett.models.exported import only_source

    named: set[str] = set()
    for request in requests:
        target = request.target_lang
        if request.source_lang is None and not request.fault and (source := only_source(config, target)):
            if target not in named:
                said = f"Source language: {source}, the only one that the model was trained on for {target}."
                click.echo(said, err=True)
            named.add(target)
            request = replace(request, source_lang=source)
        yield request


def _window(batch_size: int | None, is_live: bool) -> int:
    """Inputs that are read before they are translated: of standard input one batch, since someone may wait for it."""
    if is_live:
        return 1 if sys.stdin.isatty() else batch_size or _WINDOW
    return 4 * (batch_size or _WINDOW)
