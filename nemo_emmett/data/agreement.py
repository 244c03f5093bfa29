"""Agreement of all ranks on each batch, for models that cannot take an empty batch of finite data."""

from __future__ import annotations

import torch
import torch.distributed as dist


class RanksInStep:
    """Finds out by a reduction whether all ranks have a batch.

    The ranks have the same steps, but all examples of one rank's batch may have been skipped. If only that rank left
    the batch out, its pass would be a step shorter, and the others would wait for it at the end.

    The reduction runs on the CPU, so that it does not synchronise with the device.
    """

    def __init__(self) -> None:
        self._group: dist.ProcessGroup | None = None

    def all_have(self, has_batch: bool) -> bool:
        """Whether every rank has a batch; all ranks must call this for each batch."""
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        flag = torch.tensor(int(has_batch))
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=self._group)
        return bool(flag)


def ranks_load_data(world_size: int) -> bool:
    """Whether all ``world_size`` processes of this training load its data."""
    return world_size > 1 and dist.is_available() and dist.is_initialized() and dist.get_world_size() == world_size
