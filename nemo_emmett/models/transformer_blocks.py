"""The Transformer blocks of a language model: compiled, or checkpointed, one by one."""

from __future__ import annotations

from collections.abc import Mapping
from math import floor
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import PreTrainedModel

from nemo_emmett.errors import ConfigError, ModelError
from nemo_emmett.models.targets import BUILD_FAULTS, first_line, parse_arguments


def transformer_blocks(llm: nn.Module) -> list[nn.Module]:
    """The Transformer blocks of a language model, in order: what it declares as not to be split between devices."""
    names = set(getattr(llm, "_no_split_modules", None) or ())
    return [module for module in llm.modules() if type(module).__name__ in names]


def is_chosen(number: int, share: float) -> bool:
    """Whether a block, counted from 0, is one of a share of all, evenly spaced.

    Example:
        >>> [is_chosen(number, 0.5) for number in range(4)]
        [False, True, False, True]
    """
    return floor((number + 1) * share) > floor(number * share)


def checkpoint_encoder(encoder: nn.Module, share: float) -> None:
    """The same for a share of a speech encoder's layers, in place. All of them: NeMo's own function, which also wraps
    the subsampling before them."""
    layers = encoder.layers
    for number in range(len(layers)):
        if is_chosen(number, share):
            layers[number] = checkpoint_wrapper(layers[number])


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


def checkpoint_activations(llm: PreTrainedModel, share: float = 1.0) -> None:
    """Compute the blocks' activations again in the backward pass (arXiv 1604.06174).

    Args:
        llm: with its embeddings.
        share: of the blocks, evenly spaced; the others keep their activations.
    """
    llm.gradient_checkpointing_enable({"use_reentrant": False})
    for number, block in enumerate(transformer_blocks(llm) if share < 1 else ()):
        if not is_chosen(number, share):
            block.gradient_checkpointing = False
    if (gate := getattr(llm, "speech_gate", None)) is not None:
        for module in llm.modules():
            if hasattr(module, "_gradient_checkpointing_func"):  # transformers': what its blocks call
                module._gradient_checkpointing_func = gate.checkpoint
    # transformers gives every embedding a gradient, which only reentrant checkpointing needs; a frozen language model
    # would keep its activations of text for it.
    llm.disable_input_require_grads()
