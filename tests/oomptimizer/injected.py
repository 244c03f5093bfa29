"""Trainings whose steps run out of memory on demand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from nemo_emmett.oomptimizer.guard import Guard
from nemo_emmett.oomptimizer.meter import Meter


class Bomb:
    """Runs out of memory where a module's output passes, in its forward or its backward pass, once for a charge.

    It waits for more than one example, since a single one could not be redone.

    Args:
        module: whose first output tensor passes through it.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.phase: str | None = None
        self.fired = 0
        module.register_forward_hook(self._pass)

    def check(self, tensor: torch.Tensor, phase: str) -> None:
        if self.phase == phase and len(tensor) > 1:
            self.phase = None
            self.fired += 1
            raise torch.OutOfMemoryError("injected: out of memory")

    def _pass(self, module: torch.nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, torch.Tensor):
            return _Fuse.apply(output, self)
        if isinstance(output, tuple):
            return (_Fuse.apply(output[0], self), *output[1:])
        name = next(iter(output))
        output[name] = _Fuse.apply(output[name], self)
        return output


class _Fuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, bomb: Bomb) -> torch.Tensor:
        bomb.check(tensor, "forward")
        ctx.bomb = bomb
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.bomb.check(gradient, "backward")
        return gradient, None


class Charges(Callback):
    """Charges a bomb before some batches.

    Args:
        bomb: that is charged.
        phases: by the number of the batch; ``optimizer`` is where weights are updated already.
    """

    def __init__(self, bomb: Bomb, phases: dict[int, str]) -> None:
        self.bomb, self.phases = bomb, phases

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.bomb.phase = self.phases.get(batch_idx)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(self._after_update)

    def _after_update(self, *_: Any) -> None:
        if self.bomb.phase == "optimizer":
            self.bomb.phase = None
            self.bomb.fired += 1
            raise torch.OutOfMemoryError("injected: out of memory")


class Guarded(Callback):
    """Puts a guard into a training, as OOMptimizer does."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.guard.install(trainer, module)

    def on_train_batch_start(self, *args: Any) -> None:
        self.guard.on_train_batch_start(*args)

    def on_train_batch_end(self, *args: Any) -> None:
        self.guard.on_train_batch_end(*args)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.guard.on_train_end(trainer, module)

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        try:
            self.guard.on_exception(exception)
        finally:
            self.guard.uninstall()

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        self.guard.uninstall()


class Blind(Meter):
    """A meter that sees nothing."""

    alive = peak = 0

    def track(self, tensors: Iterable[torch.Tensor]) -> None:
        pass

    @contextmanager
    def measuring(self) -> Iterator[None]:
        yield


class Logged(Callback):
    """What was logged and what the steps returned, batch by batch."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []
        self.outputs: list[dict] = []

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: dict, *args: Any) -> None:
        self.outputs.append(outputs)
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def fit(
    model: LightningModule,
    batches: Sequence[Any],
    folder: Path,
    callbacks: Iterable[Callback] = (),
    accumulate: int = 1,
    max_epochs: int = 1,
) -> Trainer:
    """Train on the batches, one after the other, with plain SGD, which does not blow up differences of rounding."""
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.003)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=max_epochs,
        accumulate_grad_batches=accumulate,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(model, DataLoader(batches, batch_size=None))
    return trainer


def weights(model: LightningModule) -> torch.Tensor:
    """All parameters of a model in one row."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
