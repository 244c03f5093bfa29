"""A recipe, trained: what ``examples/speechlm/train.py`` runs.

The order is that of NeMo's own speechlm2 scripts (trainer, experiment manager, model, data, fit), with the user's
mistakes looked for first, while they cost nothing.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import lightning
import torch
from hydra.errors import InstantiationException
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import LightningModule, Trainer
from nemo.collections.speechlm2.data import SALMDataset
from nemo.collections.speechlm2.models import SALM
from nemo.utils import logging
from nemo.utils.exp_manager import ExpManagerConfig, exp_manager
from nemo.utils.trainer_utils import resolve_trainer_cfg
from omegaconf import DictConfig, OmegaConf

from nemo_emmett import plugin
from nemo_emmett.checkpoints import with_resume_point
from nemo_emmett.config import check_keys, check_target
from nemo_emmett.data import MultimodalDataModule, SpeechTextDataset
from nemo_emmett.data.check import check_data_config
from nemo_emmett.errors import ConfigError, EmmettError
from nemo_emmett.models.base import SpeechTextModel
from nemo_emmett.models.export import read_checkpoint
from nemo_emmett.modules.stop_on_signal import StopOnSignal

RECIPE_KEYS = ("model", "trainer", "data", "exp_manager", "export_dir", "seed", "num_threads")
"""The keys of a recipe that mean something here; a recipe may hold others for its own interpolations."""

DATASETS = ("train_ds", "validation_ds", "test_ds", "predict_ds")
"""The datasets of a recipe's ``data`` section."""


@dataclass(frozen=True)
class Training:
    """All that a recipe names, ready to fit."""

    trainer: Trainer
    model: LightningModule
    datamodule: MultimodalDataModule

    def fit(self) -> None:
        """Train."""
        self.trainer.fit(self.model, self.datamodule)


def train(cfg: DictConfig) -> LightningModule:
    """Train the model of a recipe on its data; resume from the experiment's last checkpoint if there is one.

    Args:
        cfg: a recipe with the sections ``model``, ``trainer``, ``data`` and ``exp_manager`` (NeMo's meaning of each).
            ``model._target_`` is a class path or the short name of an entry point (``salm_t5``). ``export_dir``, where
            given, receives the trained model as a Hugging Face style folder. ``seed`` seeds all generators.

    Returns:
        The trained model.

    Raises:
        EmmettError: for a mistake in the recipe or the data, before training starts; for too many bad records, later.
    """
    plugin.register()
    check_recipe(cfg)
    check_data_section(cfg.data)
    training = build_training(cfg)
    if not any(isinstance(callback, StopOnSignal) for callback in training.trainer.callbacks):
        training.trainer.callbacks.append(StopOnSignal())
    training.fit()
    if cfg.get("export_dir"):
        _export(training, cfg.export_dir)
    return training.model


def _export(training: Training, folder: str) -> None:
    """Write the trained model from rank 0."""
    model, trainer = training.model, training.trainer
    # Ours writes on rank 0 by itself, for what is sharded is gathered from all ranks; NeMo's SALM writes where called.
    if isinstance(model, SpeechTextModel) or trainer.is_global_zero:
        model.save_pretrained(folder)
    if trainer.is_global_zero:
        logging.info(f"The trained model is in {folder}")


def build_training(cfg: DictConfig, construction: AbstractContextManager[Any] | None = None) -> Training:
    """Build what a recipe names: trainer (with the experiment manager), model, data. No file of the data is opened.

    Args:
        cfg: as for :func:`train`; without ``exp_manager``, nothing is logged and no checkpoint is written or read.
        construction: entered while the model is built, for example to build it of fake tensors.

    Raises:
        EmmettError: for a mistake in the recipe.
    """
    plugin.register()
    check_recipe(cfg)
    model_class = _model_class(cfg.model._target_)
    if cfg.get("num_threads"):
        torch.set_num_threads(cfg.num_threads)
    lightning.seed_everything(cfg.get("seed", 0), workers=True)
    trainer = Trainer(**_trainer_options(cfg.trainer))
    if not cfg.model.get("trust_remote_code", False) and type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = CheckpointsAsData()
    if cfg.get("exp_manager") is not None:
        exp_manager(trainer, with_resume_point(cfg.exp_manager, trainer))
    with trainer.init_module(), construction or nullcontext():
        model = model_class(OmegaConf.to_container(cfg.model, resolve=True))
    return Training(trainer, model, _datamodule(cfg.data, model))


def _model_class(target: str) -> type[LightningModule]:
    """What ``model._target_`` names; a class path is judged by its name before anything is imported.

    Raises:
        ConfigError: if it is not allowed, cannot be imported, or is no model.
    """
    installed = {point.value.replace(":", ".") for point in plugin.entry_points("models").values()}
    if "." in target and target not in installed:
        check_target(target, "model._target_")
    found = plugin.find("models", target)
    if not (isinstance(found, type) and issubclass(found, LightningModule)):
        raise ConfigError(f"model._target_: '{target}' is not a model; name a class such as nemo_emmett.models.SALMT5.")
    return found


class CheckpointsAsData(TorchCheckpointIO):
    """Reads checkpoints without running anything: tensors and plain values alone, which is all that ours hold."""

    def load_checkpoint(self, path: Any, map_location: Any = "cpu") -> dict[str, Any]:
        """Read a ``.ckpt`` file.

        Raises:
            ModelError: if it holds other objects; Python would run what the file says to make them.
        """
        with get_filesystem(path).open(str(path), "rb") as file:
            return read_checkpoint(file, map_location=map_location)


def _datamodule(data: DictConfig, model: LightningModule) -> MultimodalDataModule:
    """The data in the form that the model takes; NeMo's SALM has its own dataset, and recipes that say all keys."""
    if isinstance(model, SALM):
        return MultimodalDataModule(data, model.tokenizer, SALMDataset(model.tokenizer))
    return MultimodalDataModule(data, model.tokenizer, SpeechTextDataset(model.tokenizer), model.data_defaults)


def _trainer_options(trainer: DictConfig) -> dict[str, Any]:
    """The arguments of the trainer, its callbacks made.

    Raises:
        EmmettError: what a callback was given, and cannot use, in its own words; Hydra hides them in its own.
    """
    try:
        return resolve_trainer_cfg(trainer)
    except InstantiationException as error:
        if isinstance(error.__cause__, EmmettError):
            raise error.__cause__ from error
        if isinstance(error.__cause__, TypeError):
            raise ConfigError(f"trainer: {error.__cause__}; correct or remove what it was given.") from error
        raise


def check_recipe(cfg: DictConfig) -> None:
    """Refuse a recipe that lacks a section or misspells a key of one.

    Raises:
        ConfigError: naming the key, and the nearest known one.
    """
    for section in ("model", "trainer", "data"):
        if section not in cfg:
            raise ConfigError(f"the recipe has no section '{section}'; the recipes in conf/ show what belongs there.")
    if not cfg.model.get("_target_"):
        raise ConfigError("model._target_ is missing: name a class (nemo_emmett.models.SALMT5) or salm_t5 for short.")
    check_keys(cfg, RECIPE_KEYS, "recipe")
    for section, known in (
        ("trainer", inspect.signature(Trainer).parameters),
        ("exp_manager", [f.name for f in fields(ExpManagerConfig)]),
    ):
        for stranger in check_keys(cfg.get(section) or {}, known, section):
            raise ConfigError(f"{section}.{stranger}: there is no such key; remove it.")


def check_data_section(data: DictConfig) -> None:
    """Look for mistakes in every dataset of a recipe's ``data`` section before a model is built.

    Raises:
        ConfigError: for a misspelt key, or a value that cannot work.
        DataError: for a file that is missing or does not match its partner.
    """
    for stranger in check_keys(data, DATASETS, "data"):
        logging.warning(f"data.{stranger} is not a dataset that a training has; it is ignored.")
    for name in DATASETS:
        if data.get(name) is not None:
            check_data_config(data[name], where=f"data.{name}")
