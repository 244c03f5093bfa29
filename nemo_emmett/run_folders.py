"""Folders that a training writes to: locked, checked for space, and given the resolved recipe."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from nemo.constants import NEMO_ENV_VARNAME_VERSION
from nemo.utils import logging
from nemo.utils.get_rank import is_global_rank_zero
from omegaconf import DictConfig, OmegaConf

from nemo_emmett.early_checks import RECIPE_FILE
from nemo_emmett.files import check_writable, existing_folder, hold_folder, shown, write_text


def lock_folders(cfg: DictConfig, locks: ExitStack, existing_only: bool = False) -> None:
    """Lock the folders that a training writes to, on rank 0, until ``locks`` is closed.

    Args:
        cfg: the recipe.
        locks: receives the locks.
        existing_only: skip folders that do not exist yet: NeMo's experiment manager warns if it finds them.

    Raises:
        ConfigError: if another process has locked one of them, or it cannot be written to.
    """
    if not is_global_rank_zero():
        return
    folders: dict[str, Any] = {}
    manager = cfg.get("exp_manager")
    if manager is not None and not cfg.trainer.get("fast_dev_run"):
        version = manager.get("version") or os.environ.get(NEMO_ENV_VARNAME_VERSION)
        if manager.get("explicit_log_dir"):
            folders["exp_manager.explicit_log_dir"] = manager.explicit_log_dir
        elif version or manager.get("resume_if_exists"):  # otherwise NeMo makes a new folder at each start
            folder = Path(manager.get("exp_dir") or "nemo_experiments", manager.get("name") or "default")
            folders["exp_manager.exp_dir"] = folder / version if version else folder
        dirpath = OmegaConf.select(manager, "checkpoint_callback_params.dirpath")
        folders["exp_manager.checkpoint_callback_params.dirpath"] = dirpath
    folders["export_dir"] = cfg.get("export_dir")
    for key, folder in folders.items():
        if folder and "://" not in str(folder):
            check_writable(Path(folder), key)
            if Path(folder).exists() or not existing_only:
                locks.enter_context(hold_folder(Path(folder), key))


def check_space(trainer: Trainer, model: LightningModule, export_dir: str | None) -> None:
    """Check that the disks have room for the export and one checkpoint; warn if all checkpoints may not fit.

    Raises:
        ConfigError: if the export, or a checkpoint of the weights alone, does not fit.
    """
    if not trainer.is_global_zero:
        return
    unsaved = {id(t) for t in getattr(model, "teachers", torch.nn.Module()).parameters()}
    tensors = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in unsaved]
    weights = sum(t.numel() * t.element_size() for t in tensors)
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    checkpoint = trainer.checkpoint_callback
    saves = checkpoint is not None and bool(checkpoint.save_top_k or checkpoint.save_last)
    folders = {"export_dir": Path(export_dir)} if export_dir else {}
    if saves and checkpoint.dirpath and "://" not in str(checkpoint.dirpath):
        folders["exp_manager"] = Path(checkpoint.dirpath)
    disks = {key: existing_folder(folder).stat().st_dev for key, folder in folders.items()}
    for key, folder in folders.items():
        check_writable(folder, key, needed=weights * list(disks.values()).count(disks[key]))
    if "exp_manager" not in folders:
        return
    # Adam keeps two numbers for each weight; the new checkpoint is written before the oldest is removed.
    optimizer = OmegaConf.select(OmegaConf.create(getattr(model, "cfg", {})), "optimizer._target_")
    states = 2 * trained if "adam" in str(optimizer).lower() else 0
    present = sum(file.stat().st_size for file in folders["exp_manager"].rglob("*") if file.is_file())
    expected = (max(checkpoint.save_top_k, 1) + bool(checkpoint.save_last) + 1) * (weights + states) - present
    free = shutil.disk_usage(existing_folder(folders["exp_manager"])).free
    if free < expected:
        logging.warning(
            f"exp_manager: '{folders['exp_manager']}' has {shown(free)} free; with checkpoints of about "
            f"{shown(weights + states)} the training may take {shown(expected)}: make room, or lower "
            "exp_manager.checkpoint_callback_params.save_top_k."
        )


class SaveRecipe(Callback):
    """Writes the resolved recipe into the folder of the checkpoints when training starts.

    An earlier recipe there that differs is kept under a numbered name.

    Args:
        cfg: the recipe.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self._text = OmegaConf.to_yaml(cfg, resolve=True)  # now: building the model adds keys to it

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it, on rank 0."""
        folder = getattr(trainer.checkpoint_callback, "dirpath", None)
        if not trainer.is_global_zero or not folder or "://" in str(folder):
            return
        path = Path(folder, RECIPE_FILE)
        if path.is_file() and (before := path.read_text(encoding="utf-8")) != self._text:
            numbers = (Path(folder, f"recipe.{number}.yaml") for number in range(1, 1_000_000))
            kept = next(candidate for candidate in numbers if not candidate.exists())
            os.replace(path, kept)
            changed = ", ".join(_differences(yaml.safe_load(before), yaml.safe_load(self._text)))
            logging.info(f"The recipe differs from that of the checkpoints in {changed}; that one is now in {kept}.")
        write_text(path, self._text)


def _differences(before: Any, now: Any, place: str = "") -> Iterator[str]:
    """The places where two recipes differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            yield from _differences(before.get(key), now.get(key), f"{place}.{key}".lstrip("."))
    elif before != now:
        yield place
