"""What the folder of an exported model says about it, read without importing torch.

Commands check a folder with it before they load the model, which takes seconds.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from nemo_emmett.errors import ModelError
from nemo_emmett.models.exported_files import CONFIG_FILE, check_whole, read_json_object
from nemo_emmett.prompts.language_codes import normalized
from nemo_emmett.typed_config import is_number

TRAINING_KEY = "training"
"""Key of the config for what is known of the training: see ``nemo_emmett.training_record``."""

MAX_DURATION_KEY = "max_duration"
"""Key of it for the longest recordings of the training data, in seconds, where the recipe limits them."""

BASE_MODELS_KEY = "base_models"
"""Key of the config for the names of the pretrained parts: ``language_model``, ``speech_encoder``."""


def check_exported(folder: str | Path) -> dict[str, Any]:
    """Check that a folder holds an exported model, and that its files are whole.

    Returns:
        Its config.

    Raises:
        ModelError: if a file is missing or damaged.
    """
    config = read_json_object(find_config(folder))
    check_whole(Path(folder), config)
    return config


def find_config(folder: str | Path) -> Path:
    """The config of an exported model.

    Raises:
        ModelError: if there is none.
    """
    path = Path(folder, CONFIG_FILE)
    if not path.is_file():
        why = f"it has no {CONFIG_FILE}" if Path(folder).exists() else "there is no such folder"
        raise ModelError(f"'{folder}' is not an exported model: {why}; {_remedy(Path(folder))}.")
    return path


def model_name(folder: str | Path) -> str:
    """What a model is called: by its folder, or by the one above if it is called ``model``, as recipes call theirs.

    Example:
        >>> model_name("/exp/salm_t5/model"), model_name("/exp/salm_t5/best")
        ('salm_t5', 'best')
    """
    path = Path(folder).resolve()
    return path.parent.name or path.name if path.name == "model" else path.name


def _remedy(path: Path) -> str:
    """What to do with something that is no exported model."""
    found = [path] if path.suffix == ".ckpt" else sorted(path.glob("*.ckpt")) or sorted(path.glob("checkpoints/*.ckpt"))
    if found:
        command = f"nemo-emmett export {shlex.quote(str(found[0]))} FOLDER"
        return f"write the model of a checkpoint into a folder, such as by `{command}`"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not path.exists():
        return f"name a folder; a model on the Hugging Face Hub is fetched by `hf download {path} --local-dir FOLDER`"
    return "name the folder that `nemo-emmett train` (key export_dir) or `nemo-emmett export` has written"


def trained_directions(config: Mapping[str, Any], modality: str | None = None) -> set[tuple[str | None, str]]:
    """Source and target languages that a model was trained on, of text and speech; empty if its config does not say.

    A source language is None where the data did not name it.

    Args:
        config: of the exported model.
        modality: ``audio`` or ``text``; None: both.
    """
    training = config.get(TRAINING_KEY)
    directions = training.get("directions") if isinstance(training, Mapping) else None
    if not isinstance(directions, Mapping):
        return set()
    chosen = directions.values() if modality is None else [directions.get(modality) or []]
    return {(normalized(source), normalized(str(target))) for pairs in chosen for source, target in pairs}


def trained_targets(config: Mapping[str, Any]) -> set[str]:
    """The languages that a model was trained to translate to; empty if its config does not say."""
    return {target for _, target in trained_directions(config)}


def only_source(config: Mapping[str, Any], target_lang: str) -> str | None:
    """The source language if a model was trained to translate to the target language from that one alone, else None.

    Example:
        >>> only_source({"training": {"directions": {"text": [["en", "de"], ["de", "fr"], ["en", "fr"]]}}}, "de")
        'en'
    """
    sources = {source for source, target in trained_directions(config) if target == normalized(target_lang)}
    return sources.pop() if len(sources) == 1 else None


def chunk_seconds_of(config: Mapping[str, Any]) -> float:
    """Longest recording that a model translates at once: the ``max_duration`` of its training data, if its config says
    so, otherwise half a minute.

    Example:
        >>> chunk_seconds_of({"training": {"max_duration": 20.0}}), chunk_seconds_of({})
        (20.0, 30.0)
    """
    from nemo_emmett.audio_chunks import DEFAULT_CHUNK_SECONDS, LEAST_CHUNK_SECONDS  # imports NumPy

    training = config.get(TRAINING_KEY)
    longest = training.get(MAX_DURATION_KEY) if isinstance(training, Mapping) else None
    if is_number(longest) and 0 < longest < float("inf"):
        return max(float(longest), LEAST_CHUNK_SECONDS)
    return DEFAULT_CHUNK_SECONDS


def untrained_warning(config: Mapping[str, Any], target_langs: Collection[str]) -> str | None:
    """A sentence on the target languages that a model never saw in training; None if there are none, or none is known.

    Example:
        >>> untrained_warning({"training": {"directions": {"text": [["en", "de"]]}}}, ["fr"])
        'the model was not trained to translate to fr, but to de; expect translations in another language.'
    """
    trained = trained_targets(config)
    unseen = sorted(set(map(normalized, target_langs)) - trained)
    if not trained or not unseen:
        return None
    return (
        f"the model was not trained to translate to {', '.join(unseen)}, but to {', '.join(sorted(trained))}; expect "
        "translations in another language."
    )
