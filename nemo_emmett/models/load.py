"""A model from the folder that ``save_pretrained`` wrote, ours or that of NeMo's SALM."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

from huggingface_hub.constants import CONFIG_NAME
from hydra.errors import InstantiationException
from hydra.utils import get_class
from nemo.collections.speechlm2.parts.hf_hub import SAFETENSORS_SINGLE_FILE

from nemo_emmett.errors import ModelError
from nemo_emmett.models.base import SpeechTextModel

_SALM_GPT = "nemo_emmett.models.salm_gpt.SALMGPT"


def load(folder: str | Path) -> SpeechTextModel:
    """Load an exported model, ready to translate.

    Args:
        folder: what ``save_pretrained`` wrote (``train.py`` exports to its recipe's ``export_dir``); a folder that NeMo
            wrote of its SALM becomes a :class:`~nemo_emmett.models.SALMGPT`.

    Returns:
        The model, in evaluation mode, on the CPU.

    Raises:
        ModelError: if the folder is not such an export, or its weights are not those of the model that it names.
    """
    folder = Path(folder)
    config_path = folder / CONFIG_NAME
    if not config_path.is_file():
        raise ModelError(
            f"'{folder}' is not an exported model: it has no config.json; train.py exports to `export_dir`."
        )
    model_class = _class_of(config_path)
    if not (folder / SAFETENSORS_SINGLE_FILE).is_file():
        raise ModelError(f"'{folder}' has no {SAFETENSORS_SINGLE_FILE}, so it is no complete export; export it again.")
    # huggingface_hub prints where it reads from; standard output belongs to the translations.
    with redirect_stdout(sys.stderr):
        return model_class.from_pretrained(str(folder)).eval()


def _class_of(config_path: Path) -> type[SpeechTextModel]:
    try:
        config = json.loads(config_path.read_text())
        # NeMo does not say which of its models wrote a folder; of those with an audio locator this is SALM.
        is_nemo_salm = "_target_" not in config and "audio_locator_tag" in config
        model_class = get_class(_SALM_GPT if is_nemo_salm else config["_target_"])
    except (ValueError, KeyError, TypeError, ImportError, AttributeError, InstantiationException) as error:
        raise ModelError(
            f"'{config_path}' names no model class that can be imported (`_target_`); was it written by nemo_emmett?"
        ) from error
    if not (isinstance(model_class, type) and issubclass(model_class, SpeechTextModel)):
        raise ModelError(f"'{config_path}': `_target_` names {model_class.__name__}, which is not a model of ours.")
    return model_class
