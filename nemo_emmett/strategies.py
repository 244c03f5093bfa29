"""Lightning's strategies, where it has none: FSDP2 within groups of devices (HSDP)."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import init_device_mesh

from nemo_emmett.errors import ConfigError
from nemo_emmett.modules.data_ranks import REPLICAS, SHARDS
from nemo_emmett.typed_config import PositiveWhole, parse_value


class HybridShardedStrategy(ModelParallelStrategy):
    """Hybrid sharding (HSDP): weights, gradients and optimizer states are sharded over the devices of a group, usually
    those of a node, and each group has all of them. So weights are gathered within a node, and only gradients are
    exchanged between nodes.

    The mesh has the dimensions ``dp_replicate`` and ``dp_shard``, as that of NeMo's ``AutomodelParallelStrategy``, by
    which NeMo's datamodule knows the ranks of data, and ``tensor_parallel``; ``data_parallel`` names the first two
    together.

    Args:
        replicas: number of groups; usually the number of nodes.
        data_parallel_size: devices of all groups together; ``auto``: all devices that tensor parallelism leaves.
        tensor_parallel_size: devices that share each layer.
        others: of Lightning's ``ModelParallelStrategy``.

    Raises:
        ConfigError: where the devices cannot be divided into so many groups.

    Example:
        In a recipe, for four nodes of eight GPUs::

            trainer:
              num_nodes: 4
              devices: 8
              strategy:
                _target_: nemo_emmett.strategies.HybridShardedStrategy
                replicas: 4
    """

    def __init__(
        self, replicas: int, data_parallel_size: int | str = "auto", tensor_parallel_size: int = 1, **others: Any
    ) -> None:
        self.replicas = parse_value(PositiveWhole, replicas, "trainer.strategy.replicas")
        if data_parallel_size != "auto":
            data_parallel_size = parse_value(PositiveWhole, data_parallel_size, "trainer.strategy.data_parallel_size")
        tensor_parallel_size = parse_value(PositiveWhole, tensor_parallel_size, "trainer.strategy.tensor_parallel_size")
        super().__init__(data_parallel_size, tensor_parallel_size, **others)

    def setup_environment(self) -> None:
        """Lightning's, with another mesh."""
        parallel = self._tensor_parallel_size
        if self._data_parallel_size == "auto":
            self._data_parallel_size = self.num_nodes * self.num_processes // parallel
        if self._data_parallel_size % self.replicas:
            raise ConfigError(
                f"trainer.strategy.replicas: {self._data_parallel_size} devices cannot be divided into {self.replicas} "
                "groups of one size; set it to a divisor, such as the number of nodes."
            )
        super().setup_environment()
        shape = (self.replicas, self._data_parallel_size // self.replicas, parallel)
        mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=(REPLICAS, SHARDS, "tensor_parallel"))
        mesh[REPLICAS, SHARDS]._flatten("data_parallel")
        self._device_mesh = self.lightning_module._device_mesh = mesh
