"""What the user has not given as options: asked for in a terminal, refused in one sentence elsewhere."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import click

from nemo_emmett.errors import ConfigError, DataError, EmmettError
from nemo_emmett.init.data_files import DataFile, describe_pair

TEXTS = ("source_lang", "target_lang", "backbone", "encoder")
"""Options that are a text each."""

Describe = Callable[[str, str], DataFile]
"""The source that a file is, by its path and the option that names it."""


@dataclass(frozen=True)
class Answers:
    """What is known so far; the attributes are those of :class:`~nemo_emmett.init.choices.Choices`."""

    recipe: Path | None
    train: list[DataFile]
    dev: list[DataFile]
    source_lang: str | None
    target_lang: str | None
    backbone: str | None
    encoder: str | None

    @property
    def files(self) -> list[DataFile]:
        """All data."""
        return [*self.train, *self.dev]

    @property
    def needs_target_lang(self) -> bool:
        """Whether the target language of some data is not known yet."""
        without = [file for file in self.files if not file.has_languages and file.languages[1] is None]
        return self.target_lang is None and bool(without)

    @property
    def needs_encoder(self) -> bool:
        """Whether there is speech and no speech encoder yet."""
        return self.encoder is None and any(file.is_speech for file in self.files)

    def refuse_missing(self) -> None:
        """
        Raises:
            ConfigError: naming the options that are missing.
        """
        missing = {
            "RECIPE": self.recipe is None,
            "--data or --text": not self.train,
            "--to": self.needs_target_lang,
            "--backbone": self.backbone is None,
            "--encoder": self.needs_encoder,
        }
        if names := [name for name, is_missing in missing.items() if is_missing]:
            raise ConfigError(
                f"{', '.join(names)}: missing; give {'it' if len(names) == 1 else 'them'}, or start the command in a "
                "terminal to be asked."
            )

    def check(self) -> None:
        """Check languages and paths of pretrained parts.

        Raises:
            ConfigError: for a language that is not known.
            DataError: for a path that is not there, or not of a model.
        """
        from nemo_emmett.prompts.languages import check_language

        for side, (option, code) in enumerate((("--from", self.source_lang), ("--to", self.target_lang))):
            if code is not None:
                self._refuse_unused(option, check_language(code, option), side)
        check_backbone(self.backbone)
        if self.encoder is not None:
            check_encoder(self.encoder)

    def _refuse_unused(self, option: str, code: str, side: int) -> None:
        """A language that no data is without, and that none has."""
        of_data = [file.languages[side] for file in self.files]
        if not of_data or None in of_data:
            return
        named = sorted({language.strip() for languages in of_data for language in languages.split(",")})
        if code not in named:
            raise ConfigError(
                f"{option}: '{code}' would have no effect, since all records name their languages "
                f"({', '.join(named)}); leave the option out, or correct the data."
            )


def check_backbone(backbone: str) -> None:
    """Refuse a path that is not the folder of a Hugging Face model; a name is looked up later.

    Raises:
        DataError: naming the path.
    """
    is_there = os.path.exists(backbone)
    if is_there and not os.path.isfile(os.path.join(backbone, "config.json")):
        raise DataError(f"--backbone: '{backbone}' has no config.json; give the folder of a Hugging Face model.")
    if not is_there and (backbone.startswith(("/", ".", "~")) or backbone.count("/") > 1):
        raise DataError(f"--backbone: there is no folder '{backbone}'; correct the path.")


def check_encoder(encoder: str) -> None:
    """Refuse a path that is not a .nemo file; a name is looked up later.

    Raises:
        DataError: naming the path.
    """
    is_path = encoder.startswith(("/", ".", "~")) or encoder.endswith(".nemo") or os.path.exists(encoder)
    if is_path and not (encoder.endswith(".nemo") and os.path.isfile(encoder)):
        what = "is not a .nemo file" if os.path.exists(encoder) else "does not exist"
        raise DataError(f"--encoder: '{encoder}' {what}; give the .nemo file of a NeMo ASR model.")


def is_terminal() -> bool:
    """Whether there is someone to ask."""
    return sys.stdin.isatty()


def ask(known: Answers, describe: Describe) -> Answers:
    """Ask for what is missing; an answer that cannot be used is asked for again."""
    if not known.train:
        known = replace(known, train=_ask_for_files("Data to train on", "--data", describe, is_needed=True))
    if not known.dev:
        known = replace(known, dev=_ask_for_files("Data to validate on", "--dev", describe, is_needed=False))
    if known.needs_target_lang:
        if known.source_lang is None:
            known = replace(known, source_lang=_language("Language of the source (en, ...)", "--from"))
        known = replace(known, target_lang=_language("Language of the translation (de, ...)", "--to"))
    if known.backbone is None:
        known = replace(known, backbone=_checked("Language model (folder or Hugging Face name)", check_backbone))
    if known.needs_encoder:
        known = replace(known, encoder=_checked("Speech encoder (.nemo file or name)", check_encoder))
    if known.recipe is None:
        known = replace(known, recipe=Path(click.prompt("Recipe to write", default="recipe.yaml")))
    return known


def _ask_for_files(what: str, option: str, describe: Describe, *, is_needed: bool) -> list[DataFile]:
    files: list[DataFile] = []
    hint = "a NeMo manifest, a TSV file, or two text files"
    while True:
        is_last = bool(files) or not is_needed
        question = f"{what} ({hint})" if not files else "More of it"
        answer = click.prompt(
            question + (" [Enter: none]" if is_last else ""), default="" if is_last else None, show_default=False
        ).strip()
        if not answer:
            return files
        paths = [answer] if os.path.lexists(answer) else shlex.split(answer)
        try:
            files.append(describe_pair(*paths, option) if len(paths) == 2 else describe(paths[0], option))
        except EmmettError as error:
            click.echo(str(error))


def _language(question: str, option: str) -> str:
    from nemo_emmett.prompts.languages import check_language

    return _checked(question, lambda code: check_language(code, option))


def _checked(question: str, check: Callable[[str], object]) -> str:
    while True:
        answer = click.prompt(question).strip()
        try:
            check(answer)
        except EmmettError as error:
            click.echo(str(error))
        else:
            return answer
