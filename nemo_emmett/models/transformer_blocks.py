"""The Transformer blocks of a language model: compiled, or checkpointed, one by one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from nemo_emmett.errors import ConfigError, ModelError
from nemo_emmett.models.targets import BUILD_FAULTS, first_line, parse_arguments


def transformer_blocks(llm: nn.Module) -> list[nn.Module]:
    """The Transformer blocks of a language model, in order: what it declares as not to be split between devices."""
    names = set(getattr(llm, "_no_split_modules", None) or ())
    return [module for module in llm.modules() if type(module).__name__ in names]


def compile_blocks(llm: nn.Module, arguments: Mapping[str, Any]) -> None:
    """``torch.compile`` each Transformer block in place: blocks are alike, so one compilation serves all of them.

    Args:
        llm: the language model.
        arguments: of ``torch.compile``. Lengths vary, so shapes are dynamic unless ``dynamic`` is given.

    Raises:
        ModelError: if the language model does not declare its blocks.
        ConfigError: for an argument that ``torch.compile`` does not take.
    """
    blocks = transformer_blocks(llm)
    if not blocks:
        raise ModelError(
            f"model.compile: {type(llm).__name__} does not declare its Transformer blocks; leave `compile` out."
        )
    options = parse_arguments(torch.compile, {"dynamic": True, **arguments}, "model.compile", ["model"])
    try:
        for block in blocks:
            block.compile(**options)
    except BUILD_FAULTS as error:
        raise ConfigError(f"model.compile: {options} cannot be used ({first_line(error)}); write true.") from error


def checkpoint_activations(llm: PreTrainedModel) -> None:
    """Compute the blocks' activations again in the backward pass (arXiv 1604.06174); ``llm`` with its embeddings."""
    llm.gradient_checkpointing_enable({"use_reentrant": False})
    if (gate := getattr(llm, "speech_gate", None)) is not None:
        for module in llm.modules():
            if hasattr(module, "_gradient_checkpointing_func"):  # transformers': what its blocks call
                module._gradient_checkpointing_func = gate.checkpoint
    # transformers gives every embedding a gradient, which only reentrant checkpointing needs; a frozen language model
    # would keep its activations of text for it.
    llm.disable_input_require_grads()
