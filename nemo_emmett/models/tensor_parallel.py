"""Tensor parallelism (Megatron-LM, arXiv 1909.08053): a decoder-only language model whose weights are split over the
ranks that Lightning's ``ModelParallelStrategy`` has in ``tensor_parallel``, which all read the same batch.

Which layers are split by rows and which by columns is what transformers says of each family
(``base_model_tp_plan`` of its config). So each rank computes some of the attention heads and of the hidden units of the
feed-forward layers; the hidden states between blocks are the same on all of them. Embeddings and output layer are split
by tokens, and so is the loss (:mod:`nemo_emmett.modules.vocabulary`). Speech encoder, modality adapter and BESTOW's
cross-attention are computed by each rank as a whole; FSDP2 shards their weights over all ranks
(:mod:`nemo_emmett.models.sharding`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch.distributed as dist
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from nemo_emmett.errors import ConfigError
from nemo_emmett.models.causal import unwrap_peft
from nemo_emmett.models.head import has_linear_head, output_layer
from nemo_emmett.modules.random_state import random_state, restore_random_state
from nemo_emmett.modules.vocabulary import VocabularyParallelEmbedding, VocabularyParallelLinear

KEY = "trainer.strategy.tensor_parallel_size"

_STYLES = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    # A norm of each head: a rank has some heads, and so a part of the gradient of its weight. All dimensions but the
    # last are alike to it; of three or four, the third is always there.
    "replicated_with_grad_allreduce": lambda: SequenceParallel(sequence_dim=2, use_local_output=True),
}
"""transformers' name of a style -> torch's."""

_WRAPPER = "_checkpoint_wrapped_module."  # of activation checkpointing, in the names of modules


def check_tensor_parallel(model: Any, size: int) -> None:
    """Refuse what cannot be split over so many ranks.

    Raises:
        ConfigError: naming the key, and what to do.
    """
    if (implementation := model.options.loss_implementation) not in ("auto", "chunked"):
        raise ConfigError(
            f"model.loss_implementation: {implementation} cannot compute the loss of a vocabulary that is split over "
            f"ranks ({KEY}: {size}); write auto."
        )
    for layer_name, layer in model.llm.named_modules():
        if isinstance(layer, BaseTunerLayer) and (
            not isinstance(layer, lora.Linear) or layer.lora_variant or layer is output_layer(model.llm)
        ):
            raise ConfigError(
                f"model.lora: LoRA in '{layer_name.removeprefix('base_model.model.')}' cannot be split over ranks "
                f"({KEY}: {size}), since it is in the embeddings or the output layer, or is not plain LoRA (DoRA); "
                "leave it out."
            )
    for language_model in (model, *model.teachers.language_models()):
        _check_layers(language_model.llm, type(model).__name__, size)


def _check_layers(llm: nn.Module, name: str, size: int) -> None:
    """Of the model's language model, or of a teacher."""
    config, kind = unwrap_peft(llm).config, unwrap_peft(llm).config.model_type
    plan = getattr(config, "base_model_tp_plan", None)
    unknown = sorted(set((plan or {}).values()) - _STYLES.keys())
    if config.is_encoder_decoder or not plan or unknown:
        reason = f"with {', '.join(map(repr, unknown))}" if unknown else "not at all"
        raise ConfigError(
            f"{KEY}: {size} is not possible for {name} on a language model of type '{kind}', which transformers splits "
            f"{reason}; set it to 1, and data_parallel_size to the number of devices, or take a model of the Llama, "
            "Qwen, Mistral or Gemma family."
        )
    for attribute in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        number = getattr(config, attribute, None)
        if number is not None and number % size:
            raise ConfigError(
                f"{KEY}: {size} does not divide {attribute} of the language model ({kind}), which is {number}; write "
                "a divisor of it."
            )
    if not has_linear_head(llm):
        raise ConfigError(f"{KEY}: {size} is not possible for the output layer of type '{kind}'; set it to 1.")


def parallelize(language_model: Any, mesh: DeviceMesh) -> None:
    """Split a language model over the ranks of a mesh, in place.

    Args:
        language_model: has ``llm``, and its token embeddings as ``embed_tokens``.
        mesh: of one dimension.
    """
    llm, embeddings = language_model.llm, language_model.embed_tokens
    decoder, head = unwrap_peft(llm).model, output_layer(llm)
    plan = unwrap_peft(llm).config.base_model_tp_plan.items()
    styles = [(re.compile(pattern.replace(".", r"\.").replace("*", r"\d+")), style) for pattern, style in plan]
    for name, module in list(decoder.named_modules()):
        for pattern, style in styles:
            if pattern.fullmatch(name.replace(_WRAPPER, "")):
                for part, of_part in _parts(module, style):
                    parallelize_module(part, mesh, of_part)
    are_tied = head.weight is embeddings.weight
    embeddings.weight = _distributed(embeddings.weight, mesh)
    for name, parameter in list(head.named_parameters(recurse=False)):
        is_tied = are_tied and name == "weight"
        head.register_parameter(name, embeddings.weight if is_tied else _distributed(parameter, mesh))
    head.__class__, kind = VocabularyParallelLinear, type(embeddings)
    # A class of its own, such as Gemma 3's, which scales what its base class returns.
    bases = (VocabularyParallelEmbedding,) if kind is nn.Embedding else (kind, VocabularyParallelEmbedding)
    embeddings.__class__ = type(f"VocabularyParallel{kind.__name__}", bases, {})


def make_alike(model: nn.Module, mesh: DeviceMesh) -> None:
    """Give all ranks of a mesh the weights and the random states of its first, for what each of them computes as a
    whole: dropout and dither are the same on all of them. A collective."""
    group = mesh.get_group()
    source = dist.get_global_rank(group, 0)
    for tensor in chain(model.parameters(), model.buffers()):
        if not isinstance(tensor, DTensor):
            sent = tensor.detach().to(mesh.device_type)  # the model is not on its device yet
            dist.broadcast(sent, source, group=group)
            tensor.detach().copy_(sent)
    with unset_fake_temporarily():  # in a plan, too, this has values
        states: list[Mapping[str, Any]] = [random_state()]
        dist.broadcast_object_list(states, source, group=group)
        restore_random_state(states[0])


def _parts(layer: nn.Module, style: str) -> list[tuple[nn.Module, ParallelStyle]]:
    """A layer, or its parts if it has LoRA: the product of the two small matrices is split as the layer's weight is."""
    if not isinstance(layer, lora.Linear):
        return [(layer, _STYLES[style]())]
    small = layer.lora_B if style == "colwise" else layer.lora_A
    return [(layer.base_layer, _STYLES[style]()), *((one, _STYLES[style]()) for one in small.values())]


def _distributed(parameter: nn.Parameter, mesh: DeviceMesh) -> nn.Parameter:
    return nn.Parameter(distribute_tensor(parameter, mesh, [Shard(0)]), requires_grad=parameter.requires_grad)
