"""What a user has chosen, by options or by answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_emmett.init.data_files import DataFile


@dataclass(frozen=True)
class Choices:
    """What a recipe is written for.

    Args:
        recipe: path of the recipe.
        train: the training data.
        dev: the validation data.
        source_lang: of all data whose records or names do not have theirs.
        target_lang: in the same way.
        backbone: folder or name of the language model.
        encoder: ``.nemo`` file or name of the speech encoder; None: the data is text alone.
        model: short name of the model; None: by the backbone.
        gpu_memory: to plan batch sizes for (``80GiB``, ``H100``); None: by a rule.
    """

    recipe: Path
    train: tuple[DataFile, ...]
    dev: tuple[DataFile, ...]
    source_lang: str | None
    target_lang: str | None
    backbone: str
    encoder: str | None = None
    model: str | None = None
    gpu_memory: str | None = None

    def languages_of(self, file: DataFile) -> tuple[str | None, str | None]:
        """Source and target language of a file, for the summary."""
        source, target = file.languages
        return source or self.source_lang, target or (None if file.has_languages else self.target_lang)

    def entry(self, file: DataFile) -> dict[str, Any]:
        """The file's entry in ``input_cfg``, with the languages that its records do not have."""
        keys = {}
        if not file.has_languages:
            keys = dict(zip(("source_lang", "target_lang"), self.languages_of(file), strict=True))
        elif self.source_lang is not None and file.languages[0] is None:
            keys = {"source_lang": self.source_lang}
        return {**file.entry, **{key: language for key, language in keys.items() if language is not None}}
