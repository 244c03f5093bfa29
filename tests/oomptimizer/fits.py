"""Training runs of tiny models, up to the first step: what OOMptimizer sees in ``on_fit_start``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from omegaconf import OmegaConf


class Data(LightningDataModule):
    """Only a config, and a loader that is never read unless batches are given."""

    def __init__(self, train_ds: dict, batches: list | None = None) -> None:
        super().__init__()
        self.cfg = OmegaConf.create({"train_ds": train_ds})
        OmegaConf.set_struct(self.cfg, True)
        self.batches = batches or []
        self.seen: dict[str, Any] = {}

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        self.seen = OmegaConf.to_container(self.cfg.train_ds)
        return torch.utils.data.DataLoader(self.batches, batch_size=None)


class AtFitStart(Callback):
    """Calls a function in ``on_fit_start``."""

    def __init__(self, function: Callable[[Trainer, LightningModule], None]) -> None:
        self.function = function

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.function(trainer, pl_module)


def trainer_with(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    """A quiet trainer, for one pass; on the CPU by default."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(
        devices=1,
        callbacks=list(callbacks),
        default_root_dir=folder,
        enable_model_summary=False,
        **{"accelerator": "cpu", "max_epochs": 1, "num_sanity_val_steps": 0, **quiet, **options},
    )
