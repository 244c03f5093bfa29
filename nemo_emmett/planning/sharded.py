"""Ranks that are not there, for plans of models that FSDP2 and tensor parallelism shard over them.

This process is the first of so many ranks, in a process group whose collectives do nothing (torch's ``fake`` backend).
FSDP2 shards fake weights over it, gathers a unit before it is entered, frees it, and scatters gradients, all in the
order of a real step, so that what this rank holds of each is counted as on a device. All ranks have the same batch, as
in a calibration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.environments import ClusterEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes

from nemo_emmett.errors import ConfigError
from nemo_emmett.models import training_step
from nemo_emmett.oomptimizer.snapshot import replaced
from nemo_emmett.strategies import HybridShardedStrategy


@contextmanager
def fake_ranks(number: int) -> Iterator[None]:
    """Inside, this process is the first of so many ranks to a trainer whose strategy is ``ModelParallelStrategy``.

    Args:
        number: of ranks; 1: nothing is changed.

    Raises:
        ConfigError: if it is a rank of others already.
    """
    if number == 1:
        yield
        return
    if dist.is_initialized():
        raise ConfigError("plan: runs in one process, whatever the number of devices; start it without torchrun.")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=number)
    original, set_up = ModelParallelStrategy.__init__, ModelParallelStrategy.setup_environment

    @wraps(original)
    def as_first_rank(self: ModelParallelStrategy, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.cluster_environment = _FirstRank(number)

    try:
        # Which modalities no rank lacks is read from the counts of all ranks: here all ranks have the same.
        with (
            replaced(training_step, absent_modalities=lambda *_: []),
            replaced(ModelParallelStrategy, __init__=as_first_rank, setup_environment=_with_values(set_up)),
            replaced(DeviceMesh, __init__=_with_values(DeviceMesh.__init__)),
            replaced(HybridShardedStrategy, setup_environment=_with_values(HybridShardedStrategy.setup_environment)),
        ):
            yield
    finally:
        dist.destroy_process_group()


def _with_values(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that computes with values even where tensors are fake: a mesh of ranks has them."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return call


class CheckSharded(Callback):
    """Refuses a model that is whole on each rank, whatever the strategy."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Once the model is configured."""
        if trainer.world_size > 1 and not any(isinstance(parameter, DTensor) for parameter in pl_module.parameters()):
            raise ConfigError(
                f"trainer.strategy: {type(pl_module).__name__} does not shard itself in `configure_model`; plan it "
                "with emmett_strategy=ddp."
            )


class _FirstRank(ClusterEnvironment):
    """One process, which somebody else has started as the first of several."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self._ranks = ranks

    creates_processes_externally = True
    main_address = "127.0.0.1"
    main_port = 0

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self._ranks

    def set_world_size(self, size: int) -> None:
        pass

    def global_rank(self) -> int:
        return 0

    def set_global_rank(self, rank: int) -> None:
        pass

    def local_rank(self) -> int:
        return 0

    def node_rank(self) -> int:
        return 0

    def teardown(self) -> Any:
        pass
