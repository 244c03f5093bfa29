"""The weights of a folder by the names that vLLM's language models have, with LoRA merged into them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from nemo_emmett.errors import ModelError
from nemo_emmett.models.checkpoint import listed

_PEFT = "base_model.model."
_BASE, _A, _B = ".base_layer.", ".lora_A.default.", ".lora_B.default."
_EMBEDDINGS, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


def language_model_weights(
    weights: Iterable[tuple[str, Tensor]], lora: Mapping[str, Any] | None, is_tied: bool
) -> Iterator[tuple[str, Tensor]]:
    """Weights of the language model by Hugging Face's names.

    Args:
        weights: of ``embed_tokens`` and ``llm``, by the names of our models.
        lora: arguments of peft's ``LoraConfig``, which the model was trained with.
        is_tied: embeddings and output layer are one; the folder has it under either name.

    Raises:
        ModelError: for LoRA that cannot be merged, or a part of it that is missing.
    """
    scale = 0.0 if lora is None else _scale(lora)
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in weights:
        name = name.removeprefix("llm.").removeprefix(_PEFT)
        if name == "embed_tokens.weight" or (is_tied and name == _OUTPUT):
            yield _EMBEDDINGS, value
            continue
        kind = next((kind for kind in (_BASE, _A, _B) if f"{kind}weight" in name), None)
        if kind is None:
            if ".lora_" in name or ".modules_to_save." in name or ".trainable_tokens" in name:
                raise ModelError(
                    f"model.lora: '{name}' cannot be merged into the language model's weights, which vLLM needs; serve "
                    "the model with `nemo-emmett serve`."
                )
            yield name.replace(_BASE, "."), value
            continue
        merged = name.replace(kind, ".")
        of_weight = parts.setdefault(merged, {})
        of_weight[kind] = value
        if len(of_weight) == len((_BASE, _A, _B)):
            update = scale * (of_weight[_B].float() @ of_weight[_A].float())
            yield merged, (of_weight[_BASE].float() + update).to(of_weight[_BASE].dtype)
            del parts[merged]
    if parts:
        raise ModelError(f"model.safetensors lacks a part of the LoRA of '{min(parts)}'; export the model again.")


def _scale(lora: Mapping[str, Any]) -> float:
    for key in ("use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "modules_to_save"):
        if lora.get(key):
            raise ModelError(
                f"model.lora.{key}: {lora[key]!r} cannot be merged into the language model's weights here; serve the "
                "model with `nemo-emmett serve`."
            )
    rank = lora.get("r", 8)  # peft's defaults
    return lora.get("lora_alpha", 8) / (rank**0.5 if lora.get("use_rslora") else rank)


def checked_weights(
    weights: Iterable[tuple[str, Tensor]], expected: Mapping[str, Tensor], part: str
) -> Iterator[tuple[str, Tensor]]:
    """The weights, once each is known to be the model's.

    Args:
        weights: names and values.
        expected: the model's own, of which the shapes are read.
        part: of the model, for messages.

    Raises:
        ModelError: at a weight that the model does not have, or of another shape; after the last one, if some are
            missing.
    """
    found = set()
    for name, value in weights:
        if name not in expected:
            raise _other(f"holds the surplus '{name}'", part)
        if value.shape != expected[name].shape:
            shapes = f"{tuple(value.shape)}, not {tuple(expected[name].shape)}"
            raise _other(f"has '{name}' in the shape {shapes}", part)
        found.add(name)
        yield name, value
    if missing := sorted(set(expected) - found):
        raise _other(f"lacks {listed(missing)}", part)


def language_model_shapes(config: PretrainedConfig) -> dict[str, Tensor]:
    """The language model's weights as transformers has them, without their values."""
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config, dtype=torch.float32).state_dict()
    if config.tie_word_embeddings:
        state.pop(_OUTPUT, None)
    return state


def _other(what: str, part: str) -> ModelError:
    return ModelError(
        f"model.safetensors {what} of the {part}: it is not of the model that its config.json describes; export the "
        "model again."
    )
