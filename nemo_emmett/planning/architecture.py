"""Builds a model's architecture without its weights: shapes suffice to plan its memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo.utils import logging
from omegaconf import DictConfig, OmegaConf
from transformers import AutoConfig

from nemo_emmett.errors import ModelError
from nemo_emmett.models.initial_weights import INITIAL_WEIGHTS_KEYS
from nemo_emmett.models.perception import read_asr_config
from nemo_emmett.models.targets import first_line


def architecture_only(model: Mapping | DictConfig) -> dict[str, Any]:
    """The ``model`` section of a recipe that builds the same architecture with random weights.

    Neither the language model's weights nor those of the speech encoder are read; only the config of the encoder's
    ``.nemo`` file is. It is merged into ``perception`` as in NeMo's ``setup_speech_encoder``, with the recipe's own
    keys of the encoder.

    Args:
        model: of one of our models, or of NeMo's ``SALM``.

    Raises:
        ModelError: if the config of a pretrained part cannot be read.
    """
    section = OmegaConf.to_container(model, resolve=True) if isinstance(model, DictConfig) else dict(model)
    section = {key: value for key, value in section.items() if key not in INITIAL_WEIGHTS_KEYS}
    was_pretrained, section["pretrained_weights"] = section.get("pretrained_weights", True), False
    if was_pretrained and section.get("perception") is not None:
        section["perception"] = _perception(section)
    return section


def _perception(section: Mapping[str, Any]) -> dict[str, Any]:
    perception = dict(section["perception"])
    name, trusted = section.get("pretrained_asr"), section.get("trust_remote_code") is True
    with logging.temp_verbosity(logging.ERROR):
        asr = read_asr_config(name or "", trusted)
    own = {key: value for key, value in (perception.get("encoder") or {}).items() if value is not None}
    perception["preprocessor"] = asr["preprocessor"]
    perception["encoder"] = {**asr["encoder"], **own}
    perception["output_dim"] = _width_of_llm(section)
    adapter = perception.get("modality_adapter")
    if adapter is not None and "output_dim" in adapter:
        perception["modality_adapter"] = {**adapter, "output_dim": perception["output_dim"]}
    return perception


def _width_of_llm(section: Mapping[str, Any]) -> int:
    name = section.get("pretrained_llm")
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=section.get("trust_remote_code") is True).hidden_size
    except Exception as error:
        raise ModelError(
            f"model.pretrained_llm: the config of '{name}' cannot be read ({first_line(error)}); give a folder or a "
            "Hugging Face name."
        ) from error
