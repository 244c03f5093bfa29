"""A model from the folder that ``save_pretrained`` wrote, ours or that of NeMo's SALM."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import get_class

from nemo_emmett.errors import ModelError
from nemo_emmett.models.base import SpeechTextModel
from nemo_emmett.models.exported import find_config
from nemo_emmett.models.exported_files import read_json_object

_OWN_MODELS = "nemo_emmett.models."


def load(folder: str | Path, *, trust_remote_code: bool = False) -> SpeechTextModel:
    """Load an exported model, ready to translate.

    Args:
        folder: what ``save_pretrained`` wrote (a training exports to its recipe's ``export_dir``); a folder that NeMo
            wrote of its SALM becomes a :class:`~nemo_emmett.models.SALMGPT`.
        trust_remote_code: run code that came with the model, for a language model that transformers lacks. Only the
            caller decides this, not the folder (docs/security.md).

    Returns:
        The model, in evaluation mode, on the CPU.

    Raises:
        ModelError: if the folder is not such an export, or its weights are not those of the model that it names.
    """
    folder = Path(folder)
    path = find_config(folder)
    model_class = _class_of(read_json_object(path), path)
    # huggingface_hub prints where it reads from; standard output belongs to the translations.
    with redirect_stdout(io.StringIO()), _expected_type():
        return model_class.from_pretrained(str(folder), trust_remote_code=trust_remote_code).eval()


@contextmanager
def _expected_type() -> Iterator[None]:
    """Leave out transformers' warning that ``config.json``, next to the tokenizer, is not that of a language model."""
    logger = logging.getLogger("transformers.configuration_utils")
    is_other = lambda record: "You are using a model of type" not in record.getMessage()  # noqa: E731
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def _class_of(config: Mapping[str, Any], config_path: Path) -> type[SpeechTextModel]:
    try:
        # NeMo's folders do not name their class; the one with an audio locator is SALM.
        is_nemo_salm = "_target_" not in config and "audio_locator_tag" in config
        name = f"{_OWN_MODELS}salm_gpt.SALMGPT" if is_nemo_salm else config["_target_"]
        named = [point for point in entry_points(group="nemo_emmett.models") if point.value.replace(":", ".") == name]
        if name.startswith(_OWN_MODELS):
            model_class = get_class(name)
        elif named:
            model_class = named[0].load()
        else:  # not imported: a module that only the folder names would be run
            module, _, attribute = name.rpartition(".")
            model_class = getattr(sys.modules[module], attribute)
    except (ValueError, KeyError, TypeError, ImportError, AttributeError, InstantiationException) as error:
        raise ModelError(
            f"'{config_path}' names no model class that is known (`_target_`); was it written by nemo_emmett? A model "
            "of another package needs an entry point nemo_emmett.models, or to be imported first."
        ) from error
    if not (isinstance(model_class, type) and issubclass(model_class, SpeechTextModel)):
        raise ModelError(f"'{config_path}': `_target_` names {name}, which is not a model of ours.")
    return model_class
