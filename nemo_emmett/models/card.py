"""The model card of an export: ``README.md`` with Hugging Face's metadata, made of the export's ``config.json``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from nemo_emmett.errors import ModelError
from nemo_emmett.files import write_text
from nemo_emmett.models.exported import BASE_MODELS_KEY, TRAINING_KEY, model_name
from nemo_emmett.prompts.languages import language_name

CARD_FILE = "README.md"
"""Hugging Face's name of a model card."""

_SCORES = re.compile(r"(<!-- scores -->\n).*?(\n<!-- end of scores -->)", re.DOTALL)
_METADATA = re.compile(r"\A---\n(.*?\n)---\n", re.DOTALL)
_EARLIER_RESULTS = re.compile(r"^model-index:\n(?:[ -].*\n)*", re.MULTILINE)
_MODALITIES = {"audio": "speech", "text": "text"}


def model_card(config: Mapping[str, Any]) -> str:
    """The card of a model.

    Args:
        config: what is written to ``config.json``.
    """
    training = config.get(TRAINING_KEY) or {}
    directions = training.get("directions") or {}
    parts = dict(config.get(BASE_MODELS_KEY) or {})
    codes = sorted({str(code) for pairs in directions.values() for pair in pairs for code in pair if code})
    reads_speech = config.get("perception") is not None
    metadata = {
        "license": "unknown",
        **({"language": codes} if codes else {}),
        "library_name": "nemo_emmett",
        "pipeline_tag": "translation",
        "tags": ["translation", *(["speech-translation", "speech"] if reads_speech else []), "nemo", "emmett"],
        # Of the Hub alone: the name of a local folder would be linked to another's model.
        **({"base_model": hub} if (hub := [name for name in parts.values() if name.count("/") == 1]) else {}),
    }
    environment = Environment(
        loader=PackageLoader("nemo_emmett.models", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    pairs = [pair for of_modality in directions.values() for pair in of_modality]
    pairs.sort(key=lambda pair: pair[0] == pair[1])  # a translation, if there is one
    target = pairs[0][1] if pairs else "de"
    source = next((source for source, other in pairs if other == target and source), None)
    return environment.get_template("card.md.j2").render(
        metadata=yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True),
        architecture=str(config.get("_target_") or "nemo.collections.speechlm2.models.SALM").rpartition(".")[2],
        languages=[f"{language_name(code)} ({code})" for code in codes],
        reads_speech=reads_speech,
        directions={_MODALITIES.get(name, name): _in_words(pairs) for name, pairs in directions.items()},
        parts=parts,
        training=training,
        validation=training.get("validation") or {},
        modalities=_MODALITIES,
        source=source,
        target=target,
    )


def _in_words(pairs: Sequence[Sequence[str | None]]) -> str:
    return ", ".join(f"{source or 'unnamed'} → {target}" for source, target in pairs)


def check_card(folder: str | Path) -> None:
    """Check that the card of an export has a place for scores.

    Raises:
        ModelError: if it is missing, or has none.
    """
    path = Path(folder, CARD_FILE)
    if not (path.is_file() and _SCORES.search(path.read_text(encoding="utf-8"))):
        raise ModelError(
            f"'{path}' has no place for scores (<!-- scores --> ... <!-- end of scores -->); export the model again."
        )


def write_scores(folder: str | Path, scores: str, results: Sequence[Mapping[str, Any]] = ()) -> None:
    """Put the scores of an evaluation into the card of an export, in the place of earlier ones.

    Args:
        folder: of the export.
        scores: in Markdown.
        results: the same as Hugging Face's ``model-index`` has them, for the card's metadata.

    Raises:
        ModelError: if the card is missing, or has no place for scores.
    """
    check_card(folder)
    path = Path(folder, CARD_FILE)
    text = path.read_text(encoding="utf-8")
    text = _SCORES.sub(lambda found: f"{found[1]}{scores.strip()}{found[2]}", text)
    index = {"model-index": [{"name": model_name(folder), "results": [dict(one) for one in results]}]}
    index = yaml.safe_dump(index, sort_keys=False, allow_unicode=True)
    write_text(path, _METADATA.sub(lambda found: f"---\n{_EARLIER_RESULTS.sub('', found[1])}{index}---\n", text))
