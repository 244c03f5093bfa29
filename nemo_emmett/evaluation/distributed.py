"""The processes that share an evaluation, and how the first one gathers their results."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from lightning.fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment
from torch import distributed as dist

TIMEOUT = timedelta(days=2)
"""How long a process waits for the slowest: only one that died takes longer, and the launcher ends the others."""

T = TypeVar("T")


@dataclass(frozen=True)
class ProcessGroup:
    """This process among those that share an evaluation."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the process that scores, prints and writes."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """The GPU of this process, or the CPU where there is none."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        # A launcher may show each process its own GPU only.
        return torch.device("cuda", self.local_rank % torch.cuda.device_count())

    def gather(self, result: T) -> list[T] | None:
        """The results of all processes by rank; None in all but the first. A collective: every process must call it."""
        if self.world_size == 1:
            return [result]
        results: list[T | None] | None = [None] * self.world_size if self.is_global_zero else None
        dist.gather_object(result, results)
        return results


def is_global_zero() -> bool:
    """Whether this is the process that scores, prints and writes; works before :func:`process_group` is entered."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    environment = _environment()
    return environment is None or environment.global_rank() == 0


@contextmanager
def process_group() -> Iterator[ProcessGroup]:
    """Join the processes that ``torchrun`` or ``srun`` started with this one; a group of one if there are none.

    If torch's default process group is initialised already, it is used and not destroyed.
    """
    if dist.is_available() and dist.is_initialized():
        local_rank = int(os.environ.get("LOCAL_RANK", dist.get_rank()))
        yield ProcessGroup(dist.get_rank(), dist.get_world_size(), local_rank)
        return
    environment = _environment()
    if environment is None or environment.world_size() == 1:
        yield ProcessGroup()
        return
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = environment.main_address, str(environment.main_port)
    # Only the translations are sent, once: gloo on the CPU, so that no GPU is bound to a rank here.
    dist.init_process_group(
        "gloo", rank=environment.global_rank(), world_size=environment.world_size(), timeout=TIMEOUT
    )
    try:
        yield ProcessGroup(environment.global_rank(), environment.world_size(), environment.local_rank())
    finally:
        dist.destroy_process_group()


def _environment() -> ClusterEnvironment | None:
    """The launcher of this process, as Lightning detects it."""
    kinds = (TorchElasticEnvironment, SLURMEnvironment)
    return next((kind() for kind in kinds if kind.detect()), None)
