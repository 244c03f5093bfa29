"""A model from the folder that ``save_pretrained`` wrote."""

from __future__ import annotations

import json
from pathlib import Path

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
    target = json.loads(config_path.read_text()).get("_target_")
    if not target:
        raise ModelError(f"'{config_path}' names no model class under `_target_`; was it written by nemo_emmett?")
    return get_class(target).from_pretrained(str(folder)).eval()
