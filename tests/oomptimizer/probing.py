"""Trainings with probes at fit start, and what such probes must not change."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nemo_emmett.oomptimizer.cuda_meter import meter_for
from nemo_emmett.oomptimizer.steps import TrainingSteps

STEPS = 20


def trainer_for(*callbacks: Callback, max_steps: int = STEPS, **options: Any) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": max_steps,
            "limit_val_batches": 0,
            "log_every_n_steps": 1,
            "use_distributed_sampler": False,
            "callbacks": list(callbacks),
            **quiet,
            **options,
        }
    )


class Probing(Callback):
    """Runs some function with the steps, at fit start."""

    def __init__(self, probe: Callable[[TrainingSteps], None]) -> None:
        self.probe = probe
        self.before: dict[str, Any] = {}
        self.after: dict[str, Any] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Gradients of before, as a second fit of a model finds them.
        for parameter in list(pl_module.parameters())[::2]:
            parameter.grad = torch.full_like(parameter, 0.5)
        self.before = state_of(trainer, pl_module)
        with TrainingSteps(trainer, pl_module, meter_for(trainer.strategy.root_device)) as steps:
            self.probe(steps)
        self.after = state_of(trainer, pl_module)
        pl_module.zero_grad()


class Losses(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(outputs["loss"].item())


def state_of(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """All that must not change, as bytes and plain values, gathered without the code under test."""
    return {
        "parameters": {name: raw(value) for name, value in module.named_parameters()},
        "gradients": {name: (id(p.grad), raw(p.grad)) for name, p in module.named_parameters()},
        "buffers": {name: (id(value), raw(value)) for name, value in module.named_buffers()},
        "modes": {name: part.training for name, part in module.named_modules()},
        "attributes": {name: plain_attributes(part) for name, part in module.named_modules()},
        "optimizer": [repr(optimizer.state_dict()) for optimizer in trainer.optimizers],
        "optimizer attributes": [sorted(vars(optimizer)) for optimizer in trainer.optimizers],
        "schedules": [repr(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs],
        "python": random.getstate(),
        "numpy": repr(np.random.get_state()),
        "torch": raw(torch.get_rng_state()),
        "logged": (dict(trainer.logged_metrics), dict(trainer.callback_metrics), repr(trainer._results)),
        "counters": (trainer.global_step, trainer.current_epoch, repr(trainer.fit_loop.state_dict())),
        "observers": (list(map(id, trainer.callbacks)), list(map(id, trainer.loggers)), id(trainer.profiler)),
    }


def raw(tensor: Tensor | None) -> bytes | None:
    return None if tensor is None else tensor.detach().flatten().clone().view(torch.uint8).cpu().numpy().tobytes()


def plain_attributes(part: nn.Module) -> dict[str, Any]:
    plain = {name: value for name, value in vars(part).items() if isinstance(value, (bool, int, float, str, list))}
    generators = {name: value.getstate() for name, value in vars(part).items() if isinstance(value, random.Random)}
    return {"names": sorted(vars(part)), "plain": repr(plain), "generators": generators}


def losses_of(make_model: Callable[[], LightningModule], batches: list, *callbacks: Callback, **options) -> list[float]:
    model = make_model()
    seed_everything(1, verbose=False)
    losses = Losses()
    trainer_for(*callbacks, losses, **options).fit(model, DataLoader(batches, batch_size=None))
    return losses.losses


def assert_no_side_effects(probing: Probing) -> None:
    assert probing.before.keys() == probing.after.keys()
    for what, before in probing.before.items():
        assert before == probing.after[what], what
