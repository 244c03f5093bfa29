"""What a training leaves behind: its folders, claimed and checked before it starts; its recipe; the exported model."""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.constants import CONFIG_NAME
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from nemo.constants import NEMO_ENV_VARNAME_VERSION
from nemo.utils import logging
from nemo.utils.get_rank import is_global_rank_zero
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from nemo_emmett import plugin
from nemo_emmett.config import check_model_file
from nemo_emmett.errors import ConfigError, EmmettError, ModelError, NonFiniteError, OutputError
from nemo_emmett.files import atomic_folder, check_writable, hold_folder, new_folder_elsewhere, shown, write_text
from nemo_emmett.models.base import SpeechTextModel
from nemo_emmett.models.checkpoint import check_fit, read_weights
from nemo_emmett.models.initial_weights import INITIAL_WEIGHTS_KEYS
from nemo_emmett.modules.tensors import refuse_nonfinite

EXPORTS = ("best", "last")
"""What ``export`` may ask for."""

RECIPE_FILE = "recipe.yaml"
"""The resolved recipe, beside the checkpoints."""

_SALM = "nemo.collections.speechlm2.models.SALM"


# Before training.


def check_export(cfg: DictConfig) -> None:
    """Refuse an ``export`` that means nothing, and an ``export_dir`` that holds another model.

    Raises:
        ConfigError: naming the key.
    """
    if cfg.get("export") not in (None, *EXPORTS):
        raise ConfigError(f"export: '{cfg.export}' is unknown; use {' or '.join(EXPORTS)}.")
    if cfg.get("export_dir"):
        refuse_foreign_folder(Path(cfg.export_dir), "export_dir")


def refuse_foreign_folder(folder: Path, key: str) -> None:
    """Refuse to export over a model that is no earlier export.

    Raises:
        ConfigError: naming the folder.
    """
    config = folder / CONFIG_NAME
    try:
        there = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else None
    except (OSError, ValueError, yaml.YAMLError):
        there = {}
    if there is not None and not (isinstance(there, dict) and {"_target_", "audio_locator_tag"} & there.keys()):
        raise ConfigError(f"{key}: '{folder}' holds another model, which would be overwritten; give another folder.")


def claim_outputs(cfg: DictConfig, claims: ExitStack, existing_only: bool = False) -> None:
    """Take the folders that a training writes to, on rank 0, until ``claims`` is closed.

    Args:
        cfg: the recipe.
        claims: receives the locks.
        existing_only: leave folders alone that are not there yet: NeMo's experiment manager warns of those that are.

    Raises:
        ConfigError: if another process has one of them, or it cannot be written to.
    """
    if not is_global_rank_zero():
        return
    for key, folder in _output_folders(cfg).items():
        check_writable(folder, key)
        if folder.exists() or not existing_only:
            claims.enter_context(hold_folder(folder, key))


def _output_folders(cfg: DictConfig) -> dict[str, Path]:
    """The local folders that a training writes to, by their keys."""
    folders: dict[str, Any] = {}
    manager = cfg.get("exp_manager")
    if manager is not None and not cfg.trainer.get("fast_dev_run"):
        version = manager.get("version") or os.environ.get(NEMO_ENV_VARNAME_VERSION)
        if manager.get("explicit_log_dir"):
            folders["exp_manager.explicit_log_dir"] = manager.explicit_log_dir
        elif version or manager.get("resume_if_exists"):  # otherwise each start has a folder of its own
            folder = Path(manager.get("exp_dir") or "nemo_experiments", manager.get("name") or "default")
            folders["exp_manager.exp_dir"] = folder / version if version else folder
        folders["exp_manager.checkpoint_callback_params.dirpath"] = OmegaConf.select(
            manager, "checkpoint_callback_params.dirpath"
        )
    folders["export_dir"] = cfg.get("export_dir")
    return {key: Path(folder) for key, folder in folders.items() if folder and "://" not in str(folder)}


def check_space(trainer: Trainer, model: LightningModule, export_dir: str | None) -> None:
    """See that the disks have room for what a training is sure to write, and warn if not for what it probably will.

    Raises:
        ConfigError: if the export, or a checkpoint of the weights alone, does not fit.
    """
    if not trainer.is_global_zero:
        return
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    checkpoint = trainer.checkpoint_callback
    saves = checkpoint is not None and bool(checkpoint.save_top_k or checkpoint.save_last)
    folders = {"export_dir": Path(export_dir)} if export_dir else {}
    if saves and checkpoint.dirpath and "://" not in str(checkpoint.dirpath):
        folders["exp_manager"] = Path(checkpoint.dirpath)
    for key, folder in folders.items():
        with_it = [other for other in folders.values() if _disk(other) == _disk(folder)]
        check_writable(folder, key, needed=weights * len(with_it))
    if "exp_manager" not in folders:
        return
    # Adam keeps two numbers for each weight; the new checkpoint is written before the oldest is removed.
    optimizer = OmegaConf.select(OmegaConf.create(getattr(model, "cfg", {})), "optimizer._target_")
    states = 2 * trained if "adam" in str(optimizer).lower() else 0
    there = sum(file.stat().st_size for file in folders["exp_manager"].rglob("*") if file.is_file())
    expected = (max(checkpoint.save_top_k, 1) + bool(checkpoint.save_last) + 1) * (weights + states) - there
    free = shutil.disk_usage(_existing(folders["exp_manager"])).free
    if free < expected:
        logging.warning(
            f"exp_manager: '{folders['exp_manager']}' has {shown(free)} free; with checkpoints of about "
            f"{shown(weights + states)} the training may take {shown(expected)}: make room, or lower "
            "exp_manager.checkpoint_callback_params.save_top_k."
        )


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())


def _disk(folder: Path) -> int:
    return _existing(folder).stat().st_dev


class RecipeBesideCheckpoints(Callback):
    """Writes the resolved recipe into the folder of the checkpoints when training starts.

    A recipe that is there and differs is kept under a numbered name.

    Args:
        cfg: the recipe.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self._text = OmegaConf.to_yaml(cfg, resolve=True)  # now: building adds to it what the model knows

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


class BestCheckpoint(Callback):
    """Knows the checkpoint with the best monitored score, of this run and of those that it resumes.

    NeMo's checkpoint callback forgets the best one on resuming where checkpoints are folders (FSDP2).
    """

    def __init__(self) -> None:
        self._checkpoint: ModelCheckpoint | None = None
        self._before: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look for the callback that makes checkpoints."""
        self._checkpoint = trainer.checkpoint_callback

    def state_dict(self) -> dict[str, Any]:
        """The best checkpoint so far."""
        return self.find() or {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember that of the runs before."""
        self._before = state_dict

    def find(self) -> dict[str, Any] | None:
        """``path``, ``monitor`` and ``score`` of the best checkpoint; None if none has a score."""
        checkpoint = self._checkpoint
        if checkpoint is None or checkpoint.monitor is None:
            return None
        found = [self._before] if self._before.get("monitor") == checkpoint.monitor else []
        if checkpoint.best_model_path and checkpoint.best_model_score is not None:
            score = float(checkpoint.best_model_score)
            found.append({"path": str(checkpoint.best_model_path), "monitor": checkpoint.monitor, "score": score})
        found = [one for one in found if math.isfinite(one["score"])]  # NaN has become the worst number
        sign = 1 if checkpoint.mode == "max" else -1
        return max(found, key=lambda one: sign * one["score"], default=None)


def _differences(before: Any, now: Any, place: str = "") -> Iterator[str]:
    """The places where two recipes differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            yield from _differences(before.get(key), now.get(key), f"{place}.{key}".lstrip("."))
    elif before != now:
        yield place


# After training.


@dataclass(frozen=True)
class _Chosen:
    """The weights that are exported: on rank 0, and with ours of all ranks."""

    weights: dict[str, Tensor]
    description: str


def export_trained(trainer: Trainer, model: LightningModule, cfg: DictConfig, best: BestCheckpoint) -> None:
    """Write the trained model to ``export_dir``, from rank 0; every rank must call it.

    Args:
        trainer: whose fit has ended.
        model: with the weights of the last step.
        cfg: the recipe.
        best: a callback of the trainer.

    Raises:
        NonFiniteError: if its weights are not finite.
        OutputError: if ``export_dir`` could not be written to; the message says where the model is.
    """
    if not cfg.get("export_dir"):
        return
    chosen = _best(trainer, cfg.get("export"), best.find()) or _last(trainer, model)
    if not trainer.is_global_zero:
        return
    _write_somewhere(cfg.export_dir, model, chosen.weights, _experiment(trainer))
    logging.info(f"The trained model is in {cfg.export_dir}: {chosen.description}")


def keep_what_was_trained(trainer: Trainer, model: LightningModule, cfg: DictConfig, error: Exception) -> None:
    """Export the weights of a training that ended because it could not write, unless they are spread over ranks.

    Raises:
        OutputError: always; the message says where the model is.
    """
    cause = f"step {trainer.global_step}: the training ended because it could not write ({_reason(error)})"
    remedy = "Make room, and start again to go on from the last checkpoint."
    if isinstance(model, FSDPModule) or not trainer.is_global_zero:
        raise OutputError(f"{cause}. {remedy}") from error
    try:
        weights = _last(trainer, model).weights
        _write_somewhere(cfg.get("export_dir"), model, weights, _experiment(trainer))
    except EmmettError as outcome:
        raise OutputError(f"{cause}; {outcome} {remedy}") from error
    raise OutputError(f"{cause}; the weights of that step are exported to '{cfg.export_dir}'. {remedy}") from error


def is_failed_write(error: BaseException) -> bool:
    """Whether an error says that a disk is full or cannot be written to."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
        return True
    return isinstance(error, (OSError, RuntimeError)) and any(
        text in str(error) for text in ("No space left on device", "PytorchStreamWriter failed", "Disk quota exceeded")
    )


def _best(trainer: Trainer, wanted: str | None, found: dict[str, Any] | None) -> _Chosen | None:
    """The checkpoint that is best by the score that checkpoints go by; None where the last weights are to be exported.

    Every rank must call it; only rank 0 reads.
    """
    if wanted == "last":
        return None
    if found is None:
        if wanted == "best":
            logging.warning("export: best: no checkpoint has a score, so the last weights are exported.")
        return None
    weights: dict[str, Tensor] | None = {}
    if trainer.is_global_zero:
        try:
            weights = read_weights(found["path"])
        except ModelError as error:
            logging.warning(f"The best checkpoint is not exported, but the last weights: {error}")
            weights = None
    if not trainer.strategy.broadcast(weights is not None):
        return None
    description = f"the checkpoint that is best by {found['monitor']}, {found['score']:.4f} ({found['path']})"
    return _Chosen(weights or {}, description)


def _last(trainer: Trainer, model: LightningModule) -> _Chosen:
    description = f"the weights after the last step, {trainer.global_step}"
    if isinstance(model, SpeechTextModel):
        return _Chosen(model.whole_weights(), description)
    return _Chosen({name: value.detach().cpu() for name, value in model.state_dict().items()}, description)


def _experiment(trainer: Trainer) -> list[Path]:
    """The folder of the experiment, where it is a local one."""
    folder = trainer.default_root_dir
    return [Path(folder)] if folder and "://" not in str(folder) else []


def _write_somewhere(
    folder: str | None, model: LightningModule, weights: dict[str, Tensor], others: list[Path]
) -> None:
    """Write an export to its folder, or, where that fails, to another one.

    Raises:
        NonFiniteError: if the weights are not finite.
        OutputError: if it had to be another one, or none could be written to.
    """
    failed = "no export_dir was given"
    if folder:
        try:
            return write_export(folder, model, weights)
        except NonFiniteError:
            raise
        except Exception as error:  # the libraries underneath have exceptions of their own for a full disk
            failed = f"export_dir: '{folder}' could not be written to ({_reason(error)})"
    for place in new_folder_elsewhere("export", others):
        try:
            write_export(place, model, weights)
        except Exception:
            shutil.rmtree(place, ignore_errors=True)
        else:
            raise OutputError(f"{failed}; the trained model is in '{place}' instead.")
    raise OutputError(f"{failed}, nor any other folder; make room and run `nemo-emmett export` on the last checkpoint.")


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0].rstrip(".")


def write_export(folder: str | Path, model: LightningModule, weights: dict[str, Tensor]) -> None:
    """Write an exported model; the folder is a whole one or none.

    Args:
        folder: is made if need be.
        model: one of ours, or NeMo's SALM.
        weights: of its state.

    Raises:
        NonFiniteError: if a weight is not finite; then nothing is written.
    """
    if isinstance(model, SpeechTextModel):
        model.write_folder(folder, weights)
        return
    refuse_nonfinite(weights, {name for name, _ in model.named_buffers()})
    model.load_state_dict(weights)
    # NeMo does not say in a folder which of its models wrote it; `load` takes what has no `_target_` for its SALM.
    config = {key: value for key, value in OmegaConf.to_container(model.cfg).items() if key != "_target_"}
    with atomic_folder(folder, last=CONFIG_NAME) as unfinished:
        model.save_pretrained(unfinished, config=config)


def export_checkpoint(checkpoint: Path, folder: Path, recipe: DictConfig | None) -> None:
    """Write the model of a checkpoint as a folder: ``nemo-emmett export``.

    Args:
        checkpoint: a ``.ckpt`` file, or the folder of a sharded training's.
        folder: is made if need be.
        recipe: that of the training; None takes the one beside the checkpoint.

    Raises:
        ConfigError: if there is no recipe, or the folder cannot be written to.
        ModelError: if the checkpoint cannot be read, or is not of the recipe's model.
        NonFiniteError: if its weights are not finite.
    """
    if not checkpoint.exists():
        raise ModelError(f"'{checkpoint}': there is no such checkpoint.")
    refuse_foreign_folder(folder, "FOLDER")
    if recipe is None:
        beside = checkpoint.absolute().parent / RECIPE_FILE
        if not beside.is_file():
            raise ConfigError(f"'{beside}' is not there; give the recipe of the training by --config.")
        recipe = OmegaConf.load(beside)
        # The recipe came with the checkpoint, perhaps from somebody else: it may not have code run.
        plain = {key: value for key, value in OmegaConf.to_container(recipe.model).items() if key != "_target_"}
        check_model_file(plain, f"'{beside}'")
    model_class = plugin.find_model(recipe.model.get("_target_") or _SALM)
    weights = read_weights(checkpoint)
    section = OmegaConf.to_container(recipe.model, resolve=True)
    section = {key: value for key, value in section.items() if key not in INITIAL_WEIGHTS_KEYS}
    # What was pretrained is in the checkpoint; but what a speech encoder is like stands in its .nemo file.
    model = model_class(section)
    check_fit(weights, model, checkpoint)
    check_writable(folder, "FOLDER", needed=sum(t.numel() * t.element_size() for t in weights.values()))
    write_export(folder, model, weights)
