"""Training steps of one model on one batch, as Lightning orders them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nemo_emmett.oomptimizer.meter import TensorMeter

from .batches import tensors_of


class Steps:
    """Forward pass, gradients of the step before dropped, backward pass, AdamW.

    Args:
        model: ours, or NeMo's SALM.
        batch: that it takes.
        fused: PyTorch's fused AdamW.
    """

    def __init__(self, model: Any, batch: Mapping, fused: bool | None = None) -> None:
        self.model = model
        self.batch = batch
        trained = (p for p in model.parameters() if p.requires_grad)
        self._optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=fused)

    def run(self) -> Tensor:
        """One step; its loss, nats per token."""
        said = self.model.training_step(self.batch, 0)
        loss = said["loss"] if isinstance(said, Mapping) else said
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        return loss.detach()

    def peak(self) -> int:
        """Bytes of tensors alive at the worst moment of a step that is not the first: weights, gradients, optimizer
        state and batch included."""
        meter = TensorMeter(torch.device("cpu"))
        parameters = list(self.model.parameters())
        meter.track([*parameters, *self.model.buffers(), *tensors_of(self.batch)])
        meter.track(p.grad for p in parameters if p.grad is not None)
        for moments in self._optimizer.state.values():
            meter.track(moments.values())
        with meter.measuring():
            self.run()
        return meter.peak
