"""Chooses the checkpoint that a run resumes from: the newest complete one.

NeMo's ``exp_manager`` resumes from the file that ends in ``-last.ckpt``. It raises if there are two (a run was killed
between writing one and removing the other) or if the file is marked as unfinished, and Lightning fails on a truncated
file (a full disk). A requeued job would fail at every start.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from nemo.utils import logging
from nemo.utils.callbacks.nemo_model_checkpoint import NeMoModelCheckpoint
from nemo.utils.exp_manager import get_log_dir
from omegaconf import DictConfig, OmegaConf

UNREADABLE, OLDER = ".unreadable", ".older"
"""Suffixes for checkpoints that are not resumed from; nothing is deleted."""

_LAST = re.compile(r"last(-v\d+)?(\.ckpt)?$")
"""Lightning appends -v1 if a file of that name exists."""


def with_resume_point(config: DictConfig, trainer: Trainer) -> DictConfig:
    """The ``exp_manager`` section of a recipe, changed so that NeMo resumes from the newest complete checkpoint.

    Of the run's ``-last`` checkpoints the newest complete one keeps its name; the others are renamed, and one warning
    names them and the one that is used. If none is complete, training resumes from the newest complete checkpoint of
    the folder, or else starts from the beginning.

    Args:
        config: with ``resume_if_exists: true``; any other is returned as it is.
        trainer: without a logger of its own if ``explicit_log_dir`` is set.
    """
    if not config.get("resume_if_exists"):
        return config
    folder = _checkpoint_folder(config, trainer)
    last = _by_age(path for path in folder.glob("*") if _LAST.search(path.name))
    faults = {path: fault for path in last if (fault := checkpoint_fault(path))}
    complete = [path for path in last if path not in faults]
    if not complete and (faults or any(folder.glob(f"*{UNREADABLE}*"))):  # unreadable now, or at an earlier start
        others = _by_age(path for path in folder.glob("*.ckpt") if path not in last)
        complete = [path for path in others if not checkpoint_fault(path)][-1:]
    chosen = complete[-1] if complete else None
    renamed = {path: f"{fault}, renamed to {_rename(path, UNREADABLE)}" for path, fault in faults.items()}
    for path in complete[:-1]:
        renamed[path] = f"it is older, renamed to {_rename(path, OLDER)}"
    if renamed:
        skipped = "; ".join(f"{path} ({reason})" for path, reason in renamed.items())
        rest = f"Training resumes from {chosen}." if chosen else "Training starts from the beginning."
        logging.warning(f"Not resumed from: {skipped}. {rest}")
    if chosen is not None:  # it is complete, but NeMo would refuse it for the marker file of a killed run
        NeMoModelCheckpoint.format_checkpoint_unfinished_marker_path(chosen).unlink(missing_ok=True)
    if chosen is None or chosen.name.endswith(("last.ckpt", "last")):
        return config
    return OmegaConf.merge(config, {"resume_from_checkpoint": str(chosen), "resume_ignore_no_checkpoint": True})


def checkpoint_fault(path: str | os.PathLike[str]) -> str | None:
    """The reason why a checkpoint is unusable; None if it is complete. Nothing is unpickled.

    Args:
        path: a Lightning checkpoint: a file, or the folder of a sharded one (``ModelParallelStrategy``).
    """
    path = Path(path)
    if path.is_dir():
        # torch writes .metadata when all shards are on the disk, Lightning writes meta.pt after that.
        if not (path / ".metadata").is_file() or not (path / "meta.pt").is_file():
            return "not all of its shards were written"
        path = path / "meta.pt"
    try:
        with zipfile.ZipFile(path) as archive:
            if not any(name.endswith("/data.pkl") for name in archive.namelist()):
                return "it is not a checkpoint"
            # torch.load does not verify checksums, so training would continue with damaged weights.
            damaged = archive.testzip() if torch.serialization.get_crc32_options() else None
    except (zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
        return f"it is cut short or damaged ({error})"
    return f"its part {damaged} is damaged" if damaged else None


def _checkpoint_folder(config: DictConfig, trainer: Trainer) -> Path:
    """The folder in which ``exp_manager`` looks for checkpoints."""
    params: Mapping = config.get("checkpoint_callback_params") or {}
    if params.get("dirpath"):
        return Path(params["dirpath"])
    if config.get("explicit_log_dir"):
        return Path(config.explicit_log_dir) / "checkpoints"
    arguments = {key: config.get(key) for key in ("exp_dir", "name", "version", "explicit_log_dir")}
    arguments["use_datetime_version"] = config.get("use_datetime_version", True)
    log_dir, *_ = get_log_dir(trainer, **arguments, resume_if_exists=True)
    return Path(log_dir) / "checkpoints"


def _by_age(paths: Iterable[Path]) -> list[Path]:
    """The paths, oldest first, without those that another rank has just renamed."""
    ages = {}
    for path in paths:
        try:
            ages[path] = path.stat().st_mtime_ns
        except FileNotFoundError:
            continue
    return sorted(ages, key=lambda path: (ages[path], path.name))


def _rename(path: Path, suffix: str) -> str:
    """Append a suffix to a checkpoint's name, unless another rank has done so; returns the new name."""
    number, target = 0, path.with_name(path.name + suffix)
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}{suffix}{number}")
    try:
        path.rename(target)
    except FileNotFoundError:
        return path.name + suffix
    return target.name
