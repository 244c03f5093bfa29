"""The processes that share an evaluation, and how what they found comes together in the first of them."""

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

PATIENCE = timedelta(days=2)
"""How long a process waits for the slowest: only one that died takes longer, and its launcher ends the others."""

Found = TypeVar("Found")


@dataclass(frozen=True)
class Processes:
    """This process among those that share an evaluation."""

    rank: int = 0
    number: int = 1
    local_rank: int = 0  # among those on the same machine

    @property
    def is_first(self) -> bool:
        """Whether this is the process that scores, prints and writes."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """The GPU of this process, or the CPU where there is none."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        # A launcher may show each process its own GPU only.
        return torch.device("cuda", self.local_rank % torch.cuda.device_count())

    def gather(self, found: Found) -> list[Found] | None:
        """What each process found, in the order of their ranks; None but in the first. Every process must call it."""
        if self.number == 1:
            return [found]
        of_all: list[Found | None] | None = [None] * self.number if self.is_first else None
        dist.gather_object(found, of_all)
        return of_all


def is_first_process() -> bool:
    """Whether this is the process that scores, prints and writes, before the processes have joined."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    environment = _environment()
    return environment is None or environment.global_rank() == 0


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """Join the processes that ``torchrun`` or ``srun`` started with this one; alone, if there are none.

    Where torch's default process group stands already, it is used, and left as it is.
    """
    if dist.is_available() and dist.is_initialized():
        local_rank = int(os.environ.get("LOCAL_RANK", dist.get_rank()))
        yield Processes(dist.get_rank(), dist.get_world_size(), local_rank)
        return
    environment = _environment()
    if environment is None or environment.world_size() == 1:
        yield Processes()
        return
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = environment.main_address, str(environment.main_port)
    # All that travels are the translations, once: CPU to CPU, so that no GPU is bound to a rank here.
    dist.init_process_group(
        "gloo", rank=environment.global_rank(), world_size=environment.world_size(), timeout=PATIENCE
    )
    try:
        yield Processes(environment.global_rank(), environment.world_size(), environment.local_rank())
    finally:
        dist.destroy_process_group()


def _environment() -> ClusterEnvironment | None:
    """What started this process, as Lightning tells it."""
    kinds = (TorchElasticEnvironment, SLURMEnvironment)
    return next((kind() for kind in kinds if kind.detect()), None)
