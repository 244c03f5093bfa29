"""Ranks that read different data: all of them, but for tensor parallelism, where a group of ranks reads the same; and
the dimensions of a mesh of ranks."""

from __future__ import annotations

from lightning.pytorch import LightningModule

REPLICAS = "dp_replicate"
"""Dimension of a mesh: groups of ranks, each of which has a whole model (nemo_emmett/strategies.py); NeMo's name."""

SHARDS = "dp_shard"
"""Dimension of a mesh: the ranks of such a group; NeMo's name."""


def reads_first(module: LightningModule) -> bool:
    """Whether this rank is the first of those that read the same batches, so that each batch is counted once."""
    mesh = getattr(module, "device_mesh", None)
    return mesh is None or mesh["tensor_parallel"].get_local_rank() == 0


def number_of_data_ranks(module: LightningModule, world_size: int) -> int:
    """How many of all ranks read different data."""
    mesh = getattr(module, "device_mesh", None)
    return world_size if mesh is None else world_size // mesh["tensor_parallel"].size()
