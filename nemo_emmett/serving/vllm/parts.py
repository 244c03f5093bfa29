"""What follows from the model's config: speech encoder, lengths of recordings, prompt format, languages."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from nemo.collections.common.prompts import PromptFormatter
from nemo.collections.speechlm2.modules.perception import AudioPerceptionModule
from nemo.collections.speechlm2.parts.hf_hub import _inject_local_artifact_paths
from torch._subclasses.fake_tensor import FakeTensorMode

from nemo_emmett.models.building import build_tokenizer
from nemo_emmett.models.config import ModelConfig
from nemo_emmett.models.perception import build_perception
from nemo_emmett.modules.perception_lengths import PerceptionLengths
from nemo_emmett.prompts.families import default_prompt_format, prompt_formatter
from nemo_emmett.serving.directions import Direction, Directions
from nemo_emmett.serving.vllm.config import ExportedConfig


def options_of(config: ExportedConfig) -> ModelConfig:
    """The folder's config, with the paths of its tokenizer and language model."""
    section = {key: value for key, value in config.section.items() if key != "_target_"}
    _inject_local_artifact_paths(section, config.folder, {})
    return ModelConfig.from_section(section | {"pretrained_weights": False}, "SALMGPT", for_loading=True)


def perception_of(config: ExportedConfig) -> AudioPerceptionModule | None:
    """Speech encoder and adapter, with random weights; None for a model that reads text only."""
    options = options_of(config)
    if options.perception is None:
        return None
    return build_perception(options, SimpleNamespace(config=config.text_config), trusted=False)[0].eval()


def lengths_of(config: ExportedConfig) -> PerceptionLengths | None:
    """Positions that recordings take; None for a model that reads text only."""
    if config.folder not in _LENGTHS:
        with FakeTensorMode():  # without the memory of the weights
            perception = perception_of(config)
        seconds = options_of(config).encoder_chunk_size_seconds
        _LENGTHS[config.folder] = None if perception is None else PerceptionLengths(perception, seconds)
    return _LENGTHS[config.folder]


def formatter_of(config: ExportedConfig) -> PromptFormatter:
    """The prompt format that the model was trained with, with the folder's tokenizer."""
    if config.folder not in _FORMATTERS:
        options = options_of(config)
        tokenizer = build_tokenizer(options, trusted=False)
        name = options.prompt_format or default_prompt_format(tokenizer, config.text_config)
        _FORMATTERS[config.folder] = prompt_formatter(name, tokenizer)
    return _FORMATTERS[config.folder]


def direction_of(section: Mapping[str, Any], task: str, language: str | None, to_language: str | None) -> Direction:
    """The languages of a request for a recording.

    Args:
        section: the folder's config.
        task: ``transcribe`` or ``translate``.
        language: code of the language that is spoken, where named.
        to_language: code of the translation's, where named.

    Raises:
        RequestError: for a language that is missing, or not the model's.
    """
    directions = Directions(section)
    if task == "transcribe":
        return directions.transcription(language)
    return directions.translation("audio", language, to_language)


# A process serves one folder.
_LENGTHS: dict[str, PerceptionLengths | None] = {}
_FORMATTERS: dict[str, PromptFormatter] = {}
