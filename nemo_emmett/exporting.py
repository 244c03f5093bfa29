"""Exports a trained model, or the model of a checkpoint, as a Hugging Face style folder."""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.constants import CONFIG_NAME
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from nemo.utils import logging
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from nemo_emmett import plugin
from nemo_emmett.config import check_model_file
from nemo_emmett.early_checks import RECIPE_FILE, check_checkpoint
from nemo_emmett.errors import ConfigError, EmmettError, ModelError, NonFiniteError, OutputError
from nemo_emmett.files import atomic_folder, check_writable, new_folder_elsewhere
from nemo_emmett.models.artifacts import write_artifacts
from nemo_emmett.models.base import SpeechTextModel
from nemo_emmett.models.card import CARD_FILE, model_card
from nemo_emmett.models.checkpoint import check_fit, read_rest, read_weights
from nemo_emmett.models.export import public_config
from nemo_emmett.models.exported import TRAINING_KEY
from nemo_emmett.models.exported_files import FILES_KEY, files_of_export, read_json_object, sizes_of_files
from nemo_emmett.models.initial_weights import INITIAL_WEIGHTS_KEYS
from nemo_emmett.models.targets import check_local_path
from nemo_emmett.modules.tensors import refuse_nonfinite
from nemo_emmett.training_record import record_of_checkpoint, record_of_trainer

EXPORTS = ("best", "last")
"""Values of the key ``export``."""


def check_export(cfg: DictConfig) -> None:
    """Refuse an unknown ``export``, and an ``export_dir`` that holds another model.

    Raises:
        ConfigError: naming the key.
    """
    if cfg.get("export") not in (None, *EXPORTS):
        raise ConfigError(f"export: '{cfg.export}' is unknown; use {' or '.join(EXPORTS)}.")
    if cfg.get("export_dir"):
        check_replaceable(Path(cfg.export_dir), "export_dir")


def check_replaceable(folder: Path, key: str) -> None:
    """Refuse a folder with a model that is not an earlier export.

    Raises:
        ConfigError: naming the folder.
    """
    config = folder / CONFIG_NAME
    try:
        present = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else None
    except (OSError, ValueError, yaml.YAMLError):
        present = {}
    if present is not None and not (isinstance(present, dict) and {"_target_", "audio_locator_tag"} & present.keys()):
        raise ConfigError(f"{key}: '{folder}' holds another model, which would be overwritten; give another folder.")


class BestCheckpoint(Callback):
    """Keeps the path of the checkpoint with the best monitored score, of this run and of the runs that it resumes.

    NeMo's checkpoint callback loses the best one on resuming where checkpoints are folders (FSDP2).
    """

    def __init__(self) -> None:
        self._checkpoint: ModelCheckpoint | None = None
        self._before: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the callback that writes checkpoints."""
        self._checkpoint = trainer.checkpoint_callback

    def state_dict(self) -> dict[str, Any]:
        """The best checkpoint so far."""
        return self.find() or {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best checkpoint of the runs before."""
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
        found = [one for one in found if math.isfinite(one["score"])]  # Lightning turns NaN into an infinite score
        sign = 1 if checkpoint.mode == "max" else -1
        return max(found, key=lambda one: sign * one["score"], default=None)


def export_trained(trainer: Trainer, model: LightningModule, cfg: DictConfig, best: BestCheckpoint) -> str | None:
    """Write the trained model to ``export_dir``, from rank 0; every rank must call it.

    Args:
        trainer: whose fit has ended.
        model: with the weights of the last step.
        cfg: the recipe.
        best: a callback of the trainer.

    Returns:
        The step of the exported weights and, of the best checkpoint, its score; None if nothing was written here.

    Raises:
        NonFiniteError: if the weights are not finite.
        OutputError: if ``export_dir`` could not be written to; the message says where the model is.
    """
    if not cfg.get("export_dir"):
        return None
    found = best.find()
    of_best = _best(trainer, cfg.get("export"), found)
    weights = _last(model) if of_best is None else of_best
    if not trainer.is_global_zero:
        return None
    if of_best is None:
        record = record_of_trainer(trainer, cfg)
        exported, description = f"step {record['steps']}", f"the weights after the last step, {record['steps']}"
    else:
        record = record_of_checkpoint(read_rest(found["path"]), cfg)
        record["validation"] = {found["monitor"]: round(found["score"], 4)}
        exported = f"step {record.get('steps', 'unknown')}, {found['monitor']} {found['score']:.4f}"
        description = f"the checkpoint that is best by {found['monitor']}, {found['score']:.4f} ({found['path']})"
    _write_somewhere(cfg.export_dir, model, weights, trainer, record)
    logging.info(f"The trained model is in {cfg.export_dir}: {description}")
    return exported


def export_after_failed_write(trainer: Trainer, model: LightningModule, cfg: DictConfig, error: Exception) -> None:
    """Export the weights of a training that ended because it could not write, unless they are sharded over ranks.

    Raises:
        OutputError: always; the message says where the model is.
    """
    cause = f"step {trainer.global_step}: the training ended because it could not write ({_reason(error)})"
    remedy = "Make room, and start again to continue from the last checkpoint."
    if isinstance(model, FSDPModule) or not trainer.is_global_zero:
        raise OutputError(f"{cause}. {remedy}") from error
    try:
        record = record_of_trainer(trainer, cfg)
        _write_somewhere(cfg.get("export_dir"), model, _last(model), trainer, record)
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


def _best(trainer: Trainer, wanted: str | None, found: dict[str, Any] | None) -> dict[str, Tensor] | None:
    """Weights of the best checkpoint (empty except on rank 0); None to export the last weights."""
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
    return (weights or {}) if trainer.strategy.broadcast(weights is not None) else None


def _last(model: LightningModule) -> dict[str, Tensor]:
    """Weights after the last step. A sharded model of ours needs all ranks to call it."""
    if isinstance(model, SpeechTextModel):
        return model.whole_weights()
    return {name: value.detach().cpu() for name, value in model.state_dict().items()}


def _write_somewhere(
    folder: str | None,
    model: LightningModule,
    weights: dict[str, Tensor],
    trainer: Trainer,
    record: Mapping[str, Any],
) -> None:
    """Write an export to its folder or, if that fails, to another one, and raise OutputError with its place."""
    experiment = trainer.default_root_dir
    others = [Path(experiment)] if experiment and "://" not in str(experiment) else []
    failed = "no export_dir was given"
    if folder:
        try:
            return write_export(folder, model, weights, record)
        except NonFiniteError:
            raise
        except Exception as error:  # safetensors and others have exceptions of their own for a full disk
            failed = f"export_dir: '{folder}' could not be written to ({_reason(error)})"
    for place in new_folder_elsewhere("export", others):
        try:
            write_export(place, model, weights, record)
        except Exception:
            shutil.rmtree(place, ignore_errors=True)
        else:
            raise OutputError(f"{failed}; the trained model is in '{place}' instead.")
    raise OutputError(f"{failed}, nor any other folder; make room and run `nemo-emmett export` on the last checkpoint.")


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0].rstrip(".")


def write_export(
    folder: str | Path, model: LightningModule, weights: dict[str, Tensor], record: Mapping[str, Any] | None = None
) -> None:
    """Write an exported model; ``config.json`` appears last, so that a folder with it is complete.

    Args:
        folder: is made if it does not exist.
        model: one of ours, or NeMo's SALM.
        weights: of its state.
        record: of its training, for its config and card.

    Raises:
        NonFiniteError: if a weight is not finite; then nothing is written.
    """
    of_training = {TRAINING_KEY: dict(record)} if record else {}
    if isinstance(model, SpeechTextModel):
        model.write_folder(folder, weights, config=of_training)
        return
    refuse_nonfinite(weights, {name for name, _ in model.named_buffers()})
    model.load_state_dict(weights)
    # NeMo writes no `_target_`; `load` takes a folder without one for NeMo's SALM.
    config = {key: value for key, value in OmegaConf.to_container(model.cfg).items() if key != "_target_"}
    config = public_config(config | of_training)
    with atomic_folder(folder, last=CONFIG_NAME, stale=files_of_export(Path(folder))) as unfinished:
        (unfinished / CARD_FILE).write_text(model_card(config), encoding="utf-8")
        model.save_pretrained(unfinished, config=config)
        # As NeMo's to_hf.py does it: then nothing of the folder refers to the files that the training began with.
        write_artifacts(unfinished, model, config)
        written = unfinished / CONFIG_NAME
        content = read_json_object(written) | {FILES_KEY: sizes_of_files(unfinished)}
        written.write_text(json.dumps(content, sort_keys=True, indent=2), encoding="utf-8")


def export_checkpoint(checkpoint: Path, folder: Path, recipe: DictConfig | None) -> None:
    """Write the model of a checkpoint as a folder: ``nemo-emmett export``.

    Args:
        checkpoint: a ``.ckpt`` file, or the folder of a sharded training's.
        folder: is made if it does not exist.
        recipe: that of the training; None reads ``recipe.yaml`` next to the checkpoint.

    Raises:
        ConfigError: if there is no recipe, or the folder cannot be written to.
        ModelError: if the checkpoint cannot be read, or is not of the recipe's model.
        NonFiniteError: if its weights are not finite.
    """
    check_checkpoint(checkpoint, has_recipe=recipe is not None)
    check_replaceable(folder, "FOLDER")
    if recipe is None:
        path = checkpoint.absolute().parent / RECIPE_FILE
        recipe = OmegaConf.load(path)
        # The recipe came with the checkpoint, perhaps from another person: it must not run code.
        plain = {key: value for key, value in OmegaConf.to_container(recipe.model).items() if key != "_target_"}
        check_model_file(plain, f"'{path}'")
    model_class = plugin.find_model(recipe.model.get("_target_") or "nemo.collections.speechlm2.models.SALM")
    weights = read_weights(checkpoint)
    section = OmegaConf.to_container(recipe.model, resolve=True)
    section = {key: value for key, value in section.items() if key not in INITIAL_WEIGHTS_KEYS}
    _check_pretrained_parts(section)
    # Pretrained weights are in the checkpoint, but a speech encoder's config is in its .nemo file alone.
    model = model_class(section)
    check_fit(weights, model, checkpoint)
    check_writable(folder, "FOLDER", needed=sum(t.numel() * t.element_size() for t in weights.values()))
    write_export(folder, model, weights, record_of_checkpoint(read_rest(checkpoint), recipe))


def _check_pretrained_parts(section: Mapping[str, Any]) -> None:
    """Refuse pretrained parts that are not where the recipe names them.

    Raises:
        ModelError: with what can be done.
    """
    for key in ("pretrained_llm", "tokenizer_path", "pretrained_asr"):
        try:
            check_local_path(str(section.get(key) or ""), f"model.{key}")
        except ModelError as error:
            raise ModelError(
                f"model.{key}: '{section[key]}' does not exist, as seen from this folder; a checkpoint holds weights "
                "alone, and the recipe names the tokenizer and the configs of the language model and speech encoder: "
                f"run the command in the folder of the training, or correct the path in a copy of {RECIPE_FILE} and "
                "give that by --config.",
                page=error.page,
            ) from error
