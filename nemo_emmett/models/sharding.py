"""FSDP2: a model's weights, gradients and optimizer states spread over the ranks (docs/scaling.md).

The units are NeMo's SALM's, each Transformer block, the token embeddings, the output layer and the speech encoder with
its adapter; they are gathered when they are entered. What is left, and embeddings that share their weights with the
output layer, stays gathered throughout the step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from nemo_emmett.errors import ConfigError
from nemo_emmett.models.building import transformer_blocks
from nemo_emmett.models.head import output_layer

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


@contextmanager
def stand_in(model: SpeechTextModel, modality: str) -> Iterator[dict[str, Tensor]]:
    """A batch of one short example, for a rank that has nothing of a modality which other ranks have.

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
