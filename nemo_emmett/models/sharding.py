"""Several ranks: which parts of a model they must enter together, and FSDP2, which shards weights, gradients and
optimizer states (docs/scaling.md).

FSDP2's units are those of NeMo's SALM: each Transformer block, the token embeddings, the output layer, and the speech
encoder with its adapter. Each unit is gathered when it is entered. The other parameters, and embeddings that share
their weights with the output layer, belong to the root, which is gathered throughout the step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils._python_dispatch import _disable_current_modes

from nemo_emmett.modules.batch import MODALITIES
from nemo_emmett.modules.data_ranks import REPLICAS, SHARDS
from nemo_emmett.modules.loss import sum_over_ranks

ENTRANCES = ("training_step", "validation_step", "test_step", "generate_answers")
"""The methods by which a step enters the model."""


def shard(root: nn.Module, units: Sequence[nn.Module], whole: Sequence[nn.Module], device_mesh: DeviceMesh) -> None:
    """Shard a model over the mesh's ``data_parallel`` ranks, in place.

    Args:
        root: the whole model, before its optimizer is made.
        units: parts that are gathered one by one.
        whole: such parts that tensor parallelism does not split: unless there are replicas, they are sharded over its
            ranks as well, which compute the same gradient for them.
        device_mesh: of Lightning's ``ModelParallelStrategy``, or of our hybrid one.
    """
    is_hybrid = REPLICAS in device_mesh.mesh_dim_names
    mesh = everywhere = device_mesh[REPLICAS, SHARDS] if is_hybrid else device_mesh["data_parallel"]
    if device_mesh["tensor_parallel"].size() > 1 and not is_hybrid:
        with _disable_current_modes():  # also in a plan the mesh has values
            everywhere = init_device_mesh(mesh.device_type, (dist.get_world_size(),), mesh_dim_names=("ranks",))
    split: set[nn.Parameter] = set()
    if mesh.size() == 1:
        # What tensor parallelism has split needs no other rank; FSDP2, which copies what it gathers, leaves it alone.
        mesh, split = everywhere, {parameter for parameter in root.parameters() if isinstance(parameter, DTensor)}
    for unit in units:
        fully_shard(unit, mesh=mesh, ignored_params=split)
    for unit in whole:
        fully_shard(unit, mesh=everywhere)
    # FSDP2 takes the first module that is entered for the root. Were it the language model, embeddings that are its
    # output layer too would not be gathered where the model uses them before it: hence the whole model is the root,
    # and since Lightning does not call its `forward`, the methods that it calls are hooked instead.
    fully_shard(root, mesh=mesh, ignored_params=split)
    for name in ENTRANCES:
        register_fsdp_forward_method(root, name)


def add_up_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Of a weight that each rank has whole, but uses for some of the heads, each has a part of the gradient: add them
    up, where FSDP2 has not. A collective."""
    for parameter in parameters:
        gradient = parameter.grad
        if isinstance(gradient, DTensor) and gradient.placements != parameter.placements:
            parameter.grad = gradient.redistribute(placements=parameter.placements)


def clip_gradients(parameters: Iterable[nn.Parameter], largest: float) -> None:
    """``torch.nn.utils.clip_grad_norm_`` of parameters that are sharded over different ranks, of which torch cannot add
    up the norms. A collective."""
    groups: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            groups.setdefault(getattr(parameter.grad, "device_mesh", None), []).append(parameter)
    norms = [get_total_norm([parameter.grad for parameter in group]) for group in groups.values()]
    if norms:
        norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
        total = torch.linalg.vector_norm(torch.stack(norms))
        for group in groups.values():
            clip_grads_with_norm_(group, largest, total)


def absent_modalities(
    present: Mapping[str, Any], totals_M: Tensor, is_sharded: bool, strategy_model: nn.Module | None, whole: str
) -> list[str]:
    """Modalities that a rank does not have in a training step, and for which a dummy batch must enter the model.

    Args:
        present: the rank's one-modality batches.
        totals_M: (M,) target tokens on all ranks.
        is_sharded: every rank enters what any rank enters.
        strategy_model: the module that Lightning's strategy trains.
        whole: the modality whose batches pass through every part of the model.
    """
    needed: list[str] = []
    if is_sharded:
        needed = [modality for modality, total in zip(MODALITIES, totals_M.tolist(), strict=True) if total] or [whole]
    # DDP waits in each step for the gradient of every parameter, unless it searches for unused ones, which takes
    # time in every step.
    if isinstance(strategy_model, DistributedDataParallel) and not strategy_model.find_unused_parameters:
        needed = [whole]
    return [modality for modality in needed if modality not in present]


def validated_parts(
    parts: Mapping[str, Mapping[str, Mapping]], is_sharded: bool, device: torch.device
) -> list[tuple[str, str]]:
    """Datasets and modalities with which a rank enters the model in a validation step, in the same order on all ranks.

    Args:
        parts: dataset -> the rank's one-modality batches.
        is_sharded: what any rank has is entered by all; then this is a collective.
        device: of the collective.
    """
    names = [(dataset, modality) for dataset in parts for modality in MODALITIES]
    numbers = torch.tensor([int(modality in parts[dataset]) for dataset, modality in names], device=device)
    if is_sharded:
        numbers = sum_over_ranks(numbers)
    return [name for name, number in zip(names, numbers.tolist(), strict=True) if number]
