"""A model from the folder that ``save_pretrained`` wrote."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

from hydra.errors import InstantiationException
from hydra.utils import get_class

from nemo_emmett.errors import ModelError
from nemo_emmett.models.base import SpeechTextModel


def load(folder: str | Path) -> SpeechTextModel:
    """Load an exported model, ready to translate.

    Args:
        folder: what ``save_pretrained`` wrote (``train.py`` exports to its recipe's ``export_dir``).

    Returns:
        The model, in evaluation mode, on the CPU.

    Raises:
        ModelError: if the folder is not such an export.
    """
    folder = Path(folder)
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise ModelError(
            f"'{folder}' is not an exported model: it has no config.json; train.py exports to `export_dir`."
        )
    try:
        model_class = get_class(json.loads(config_path.read_text())["_target_"])
    except (ValueError, KeyError, TypeError, ImportError, AttributeError, InstantiationException) as error:
        raise ModelError(
            f"'{config_path}' names no model class that can be imported (`_target_`); was it written by nemo_emmett?"
        ) from error
    if not (isinstance(model_class, type) and issubclass(model_class, SpeechTextModel)):
        raise ModelError(f"'{config_path}': `_target_` names {model_class.__name__}, which is not a model of ours.")
    # huggingface_hub prints where it reads from; standard output belongs to the translations.
    with redirect_stdout(sys.stderr):
        return model_class.from_pretrained(str(folder)).eval()
