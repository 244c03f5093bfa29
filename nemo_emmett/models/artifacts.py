"""The files of an export besides its weights, its config and its card, which transformers and vLLM read as well.

- the tokenizer's files, with the prompt format as its chat template where it is a format of chats;
- ``generation_config.json``: how the model generates: greedily, to the tokens that end an answer;
- ``preprocessor_config.json``: how recordings become features, by the names of Hugging Face's feature extractors;
- ``llm_backbone/config.json``: the language model's own config.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo.collections.common.prompts import PromptFormatter
from nemo.collections.speechlm2.data.utils import get_pad_id
from nemo.collections.speechlm2.parts.hf_hub import LLM_BACKBONE_DIR
from nemo.utils import logging
from torch import nn
from transformers.utils import FEATURE_EXTRACTOR_NAME, GENERATION_CONFIG_NAME

from nemo_emmett.models.config import ModelConfig
from nemo_emmett.models.public_names import clean_folder
from nemo_emmett.prompts.chat_template import chat_template, is_chat
from nemo_emmett.prompts.families import prompt_formatter, stop_ids

_NAMES = {
    "sampling_rate": "sample_rate",
    "feature_size": "nfilt",
    "hop_length": "hop_length",
    "win_length": "win_length",
    "n_fft": "n_fft",
    "preemphasis": "preemph",
}
"""Hugging Face's names of what NeMo's featurizers compute with."""

_PARAKEET = {
    "window": "hann",
    "normalize": "per_feature",
    "exact_pad": False,
    "frame_splicing": 1,
    "log": True,
    "log_zero_guard_type": "add",
    "log_zero_guard_value": 2**-24,
    "lowfreq": 0,
    "highfreq": None,
    "mag_power": 2.0,
    "mel_norm": "slaney",
    "pad_value": 0,
}
"""Values of NeMo's defaults with which transformers' ``ParakeetFeatureExtractor`` computes the same features."""


def write_artifacts(folder: Path, model: nn.Module, config: Mapping[str, Any]) -> None:
    """Write these files.

    Args:
        folder: exists.
        model: one of ours, or NeMo's SALM: its tokenizer, language model and speech encoder.
        config: of the export. Without a ``prompt_format``, as NeMo's may be, the tokenizer keeps its own chat template.
    """
    name, tokenizer = config.get("prompt_format"), model.tokenizer.tokenizer
    formatter = prompt_formatter(name, model.tokenizer) if name else None
    own_template = tokenizer.chat_template
    if formatter is not None:
        tokenizer.chat_template = _chat_template(formatter, config["audio_locator_tag"])
    try:
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.chat_template = own_template
    model.llm.config.save_pretrained(folder / LLM_BACKBONE_DIR)
    clean_folder(folder)
    stops = [model.tokenizer.eos_id] if formatter is None else stop_ids(formatter, model.tokenizer)
    generation = {
        "do_sample": False,
        "temperature": 0.0,  # by which vLLM, which does not read do_sample, searches greedily
        "max_new_tokens": config.get("max_new_tokens", ModelConfig.max_new_tokens),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": stops,
        "pad_token_id": get_pad_id(model.tokenizer),
        "decoder_start_token_id": getattr(model.llm.config, "decoder_start_token_id", None),
    }
    _write_json(folder / GENERATION_CONFIG_NAME, generation)
    if model.perception is not None:
        _write_json(folder / FEATURE_EXTRACTOR_NAME, preprocessor_settings(model.perception, config))


def _chat_template(formatter: PromptFormatter, locator: str) -> str | None:
    if not is_chat(formatter):
        return None
    template = chat_template(formatter, locator)
    if template is None:
        logging.warning(
            f"No chat template is exported: with this tokenizer no text has the ids of prompt_format {formatter.NAME}; "
            "other programs cannot make its prompts."
        )
    return template


def preprocessor_settings(perception: nn.Module, config: Mapping[str, Any]) -> dict[str, Any]:
    """How recordings become features and embeddings, by the names of Hugging Face's feature extractors.

    Args:
        perception: NeMo's ``AudioPerceptionModule``.
        config: of the export.

    Returns:
        ``sampling_rate`` (Hz), ``feature_size``, ``hop_length``, ``win_length`` and ``n_fft`` (samples) and others;
        ``seconds_per_token``, of audio behind one embedding; and ``feature_extractor_type``, where transformers has a
        feature extractor that computes the same.
    """
    features, section = perception.preprocessor.featurizer, config["perception"].get("preprocessor") or {}
    settings = {key: getattr(features, own, None) for key, own in _NAMES.items()}
    settings |= {"padding_value": 0.0, "padding_side": "right", "return_attention_mask": True}
    is_mel = str(section.get("_target_")).endswith(".AudioToMelSpectrogramPreprocessor")
    if is_mel and all(section.get(key, value) == value for key, value in _PARAKEET.items()):
        settings["feature_extractor_type"] = "ParakeetFeatureExtractor"
    return settings | {
        "audio_token": config["audio_locator_tag"],
        "seconds_per_token": perception.token_equivalent_duration,
        "encoder_chunk_size_seconds": config.get("encoder_chunk_size_seconds"),
    }


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    """A file without the values that are None."""
    values = {key: value for key, value in values.items() if value is not None}
    path.write_text(json.dumps(values, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
