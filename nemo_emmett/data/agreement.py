"""Ranks that agree on every batch, where a model cannot take an empty one and finite data must end in step."""

from __future__ import annotations

import torch
import torch.distributed as dist


class RanksInStep:
    """Asks all ranks whether each of them has a batch.

    The ranks have the same steps; but of a rank's batch nothing may be readable, which the others cannot know. If only
    that rank left it out, its pass would be a step shorter, and the others would wait for it at the end.

    The answer is a reduction over the CPU's network, so that no device has to be waited for.
    """

    def __init__(self) -> None:
        self._group: dist.ProcessGroup | None = None

    def all_have(self, has_batch: bool) -> bool:
        """Whether every rank has one; all of them must ask for each batch."""
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        flag = torch.tensor(int(has_batch))
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=self._group)
        return bool(flag)


def ranks_load_data(world_size: int) -> bool:
    """Whether the processes of this training are the ``world_size`` that load its data, all of them."""
    return world_size > 1 and dist.is_available() and dist.is_initialized() and dist.get_world_size() == world_size
