"""What a recipe may not ask for where LoRA acts on speech alone (``lora_modality: audio``): text would change."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch.nn import Parameter

from nemo_emmett.errors import ConfigError
from nemo_emmett.models.config import LORA_PARAMETERS, PARTS, ModelConfig

_REMEDY = "leave it out, or write model.lora_modality: all"

_CHANGES_TEXT = {
    "modules_to_save": "trains copies of layers that text uses",
    "trainable_token_indices": "trains embeddings that text uses",
    "target_parameters": "changes weights that text uses",
    "layer_replication": "adds layers that text uses",
    "alora_invocation_tokens": "has another rule for where LoRA acts",
    "arrow_config": "has another rule for where LoRA acts",
}
"""Arguments of peft's ``LoraConfig`` -> why they are refused."""

KEEP_BASE_WEIGHTS = ("true", "false", "gaussian", "orthogonal", "eva")
"""Values of ``init_lora_weights`` that leave the language model's weights as they are."""


def check_lora_modality(config: ModelConfig) -> None:
    """Check the keys that ``lora_modality: audio`` depends on.

    Raises:
        ConfigError: for one under which text would not be untouched, or the adapter would never act.
    """
    if config.lora_modality == "all":
        return
    for key, what in (("lora", "LoRA to act"), ("perception", "speech to act on")):
        if getattr(config, key) is None:
            raise ConfigError(
                f"model.lora_modality: audio needs {what}, and the recipe has no model.{key}; add it, or leave "
                "model.lora_modality out."
            )
    if config.compile and config.activation_checkpointing:
        # torch.compile, which traces checkpoints, knows no context in which they are computed again.
        raise ConfigError(
            "model.compile: is not possible together with model.activation_checkpointing where model.lora_modality is "
            "audio; leave one of the three out."
        )
    if "retention" in config.objectives:
        raise ConfigError(
            "model.objectives.retention: trains nothing with model.lora_modality: audio, under which text stays as it "
            "is; leave either out."
        )
    lora: Mapping[str, Any] = config.lora or {}
    for key, reason in _CHANGES_TEXT.items():
        if lora.get(key):
            raise ConfigError(f"model.lora.{key}: {lora[key]!r} {reason}; {_REMEDY}.")
    initialisation = lora.get("init_lora_weights", True)
    if str(initialisation).lower() not in KEEP_BASE_WEIGHTS:
        raise ConfigError(
            f"model.lora.init_lora_weights: {initialisation!r} changes weights that text uses; {_REMEDY}."
        )


def refuse_trained_text_weights(parameters: Iterable[tuple[str, Parameter]]) -> None:
    """Check that nothing of the language model but LoRA is trained.

    Args:
        parameters: of the whole model, by name, once all are frozen that are to be.

    Raises:
        ConfigError: naming the first one that is trained.
    """
    of_llm, lora = re.compile(PARTS["llm"]), re.compile(LORA_PARAMETERS)
    for name, parameter in parameters:
        if parameter.requires_grad and of_llm.match(name) and not lora.match(name):
            raise ConfigError(
                f"model.prevent_freeze_params: trains '{name}', which text uses, but with model.lora_modality: audio "
                f"text stays as it is; {_REMEDY}."
            )
