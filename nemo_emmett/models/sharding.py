"""Several ranks: what they must enter together, and FSDP2, which spreads a model's weights, gradients and optimizer
states over them (docs/scaling.md).

FSDP2's units are those of NeMo's SALM, each Transformer block, the token embeddings, the output layer and the speech
encoder with its adapter; they are gathered when they are entered. What is left, and embeddings that share their weights
with the output layer, stays gathered throughout the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from nemo_emmett.errors import ConfigError
from nemo_emmett.models.building import transformer_blocks
from nemo_emmett.models.head import output_layer
from nemo_emmett.modules.batch import MODALITIES
from nemo_emmett.modules.loss import sum_over_ranks

if TYPE_CHECKING:
    from nemo_emmett.models.base import SpeechTextModel

ENTRANCES = ("training_step", "validation_step", "test_step", "generate_answers")
"""The methods by which a step enters the model; before each, the root's weights are gathered."""

_STAND_IN_SECONDS = 0.2


def shard(model: SpeechTextModel, device_mesh: DeviceMesh) -> None:
    """Shard a model over the mesh's ``data_parallel`` ranks, in place.

    Args:
        model: before its optimizer is made.
        device_mesh: of Lightning's ``ModelParallelStrategy``.

    Raises:
        ConfigError: for tensor parallelism, which our models do not have.
    """
    if (size := device_mesh["tensor_parallel"].size()) > 1:
        raise ConfigError(
            f"trainer.strategy.tensor_parallel_size: {size} is not possible for {type(model).__name__}; set it to 1, "
            "and data_parallel_size to the number of devices."
        )
    mesh = device_mesh["data_parallel"]
    units = [*transformer_blocks(model.llm)]
    head = output_layer(model.llm)
    if model.token_embedding.weight is not head.weight and hasattr(model, "embed_tokens"):
        units += [model.token_embedding, head]
    if model.perception is not None:
        units.append(model.perception)
    for unit in units:
        fully_shard(unit, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for name in ENTRANCES:
        register_fsdp_forward_method(model, name)


def absent_modalities(model: SpeechTextModel, parts: Mapping[str, Mapping], totals_M: Tensor) -> list[str]:
    """Modalities that a rank does not have in a training step, and for which a stand-in must enter the model.

    Args:
        model: in training.
        parts: the rank's one-modality batches.
        totals_M: (M,) target tokens on all ranks.
    """
    needed: list[str] = []
    if model.is_sharded:  # all ranks enter what any rank enters
        needed = [modality for modality, total in zip(MODALITIES, totals_M.tolist(), strict=True) if total]
    if (model.is_sharded and not needed) or _waits_for_all_gradients(model):
        needed = [modality_of_all_parts(model)]
    return [modality for modality in needed if modality not in parts]


def modality_of_all_parts(model: SpeechTextModel) -> str:
    """The modality whose batches pass through every part of a model."""
    return "text" if model.perception is None else "audio"


def _waits_for_all_gradients(model: SpeechTextModel) -> bool:
    """Whether DDP waits in each step for the gradient of every parameter, used or not: unless it is told to look for
    unused ones, which takes time in every step, it would wait for ever."""
    wrapper = None if model._trainer is None else model.trainer.strategy.model
    return isinstance(wrapper, DistributedDataParallel) and not wrapper.find_unused_parameters


def validated_parts(model: SpeechTextModel, parts: Mapping[str, Mapping[str, Mapping]]) -> list[tuple[str, str]]:
    """Datasets and modalities that a rank has to enter the model with in a validation step, all ranks in one order.

    Args:
        model: if it is sharded this is a collective, and what any rank has is entered by all.
        parts: dataset -> the rank's one-modality batches.
    """
    names = [(dataset, modality) for dataset in parts for modality in MODALITIES]
    numbers = torch.tensor([int(modality in parts[dataset]) for dataset, modality in names], device=model.device)
    if model.is_sharded:
        numbers = sum_over_ranks(numbers)
    return [name for name, number in zip(names, numbers.tolist(), strict=True) if number]


@contextmanager
def dummy_batch(model: SpeechTextModel, modality: str) -> Iterator[dict[str, Tensor]]:
    """A batch of one short example, for a rank that has nothing of a modality whose parts it must enter.

    Meanwhile the speech encoder is in evaluation mode, so that its batch norms do not learn from it.
    """
    is_speech = modality == "audio"
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    length = torch.ones(1, dtype=torch.long, device=model.device)
    context = torch.full_like(token, model.audio_locator_id) if is_speech else token
    batch = {
        "context_ids": torch.cat([token, context], 1),
        "context_lens": 2 * length,
        "answer_ids": token,
        "answer_lens": length,
    }
    if is_speech:
        samples = round(_STAND_IN_SECONDS * model.sampling_rate)
        batch |= {"audios": torch.zeros(1, samples, device=model.device), "audio_lens": samples * length}
    modes = {module: module.training for module in model.modules()}
    try:
        if model.perception is not None:
            model.perception.eval()
        yield batch
    finally:
        for module, training in modes.items():
            module.training = training
