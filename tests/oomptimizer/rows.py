"""A model of one matrix, whose batches are the rows of a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from omegaconf import DictConfig

from nemo_emmett.oomptimizer.adapters.base import Adapter, Extent
from nemo_emmett.oomptimizer.buckets import Bucket, Group, Shape

WIDTH = 4


class Rows(LightningModule):
    """The loss is the mean over a batch's rows; ``capacity``: more rows at once do not fit."""

    def __init__(self, capacity: int = 10**6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH)
        self.capacity = capacity
        self.ran: list[int] = []
        self.zeroed = 0

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> dict:
        if len(batch) > self.capacity:
            raise torch.OutOfMemoryError("does not fit")
        self.ran.append(len(batch))
        loss = self.second(self.first(batch).tanh()).square().mean()
        self.log("loss", loss)
        self.log("largest", batch.max(), on_step=True, on_epoch=True, batch_size=len(batch))
        return {"loss": loss, "mean": batch.mean(), "name": "rows"}

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.zeroed += 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class RowsAdapter(Adapter):
    """What OOMptimizer must know of :class:`Rows`."""

    def synthetic_batch(self, shape: Shape, size: int, device: torch.device) -> torch.Tensor:
        return torch.randn(size, WIDTH, device=device)

    def join(self, batches: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(batches))

    def extents(self, batch: torch.Tensor) -> list[Extent]:
        return [Extent("text", len(batch), 0.0, 5, 5)]

    def split_batch(self, batch: torch.Tensor, count: int) -> list[torch.Tensor]:
        return list(batch.tensor_split(min(count, len(batch))))

    def loss_weight(self, microbatch: torch.Tensor, whole: torch.Tensor) -> float:
        return len(microbatch) / len(whole)


def text_group(*bins: tuple[float, float]) -> Group:
    """A group of text with these bins."""
    buckets = (Bucket("", i, b, Shape("text", 0.0, int(b[0]), int(b[1]))) for i, b in enumerate(bins))
    return Group("", DictConfig({}), tuple(buckets))


def batches_of_rows(*sizes: int) -> list[torch.Tensor]:
    """Batches of so many rows; always the same."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, WIDTH, generator=generator) for size in sizes]
