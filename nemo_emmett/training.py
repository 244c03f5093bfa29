"""Trains the model of a recipe: ``nemo-emmett train`` and ``examples/speechlm/train.py``.

The order is that of NeMo's speechlm2 scripts (trainer, experiment manager, model, data, fit). The recipe is checked
before anything is built.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import lightning
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from nemo.collections.speechlm2.data import SALMDataset
from nemo.collections.speechlm2.models import SALM
from nemo.core.classes import ModelPT
from nemo.utils import logging
from omegaconf import DictConfig, OmegaConf

from nemo_emmett import plugin
from nemo_emmett.callbacks.oomptimizer import OOMptimizer
from nemo_emmett.callbacks.run_progress import RunProgress
from nemo_emmett.callbacks.stop_on_signal import StopOnSignal
from nemo_emmett.callbacks.trained_examples import TrainedExamples
from nemo_emmett.callbacks.validation_schedule import ValidateAtEpochEnd, check_validation
from nemo_emmett.config import check_keys
from nemo_emmett.data import MultimodalDataModule, SpeechTextDataset
from nemo_emmett.data.checks import check_data_config
from nemo_emmett.data.config.dataset_config import parse_dataset
from nemo_emmett.data.readers.examples import ExampleKind
from nemo_emmett.early_checks import check_sections, refuse_empty_paths
from nemo_emmett.errors import ConfigError
from nemo_emmett.exporting import (
    BestCheckpoint,
    check_export,
    export_after_failed_write,
    export_trained,
    is_failed_write,
)
from nemo_emmett.models.checkpoint import read_checkpoint
from nemo_emmett.objectives.registry import parse_objectives
from nemo_emmett.objectives.transcription import Transcription
from nemo_emmett.recipe_checks import build_trainer, check_run_keys, mistakes_in_fit, set_up_experiment
from nemo_emmett.run_folders import SaveRecipe, check_space, lock_folders
from nemo_emmett.run_log import write_log_file
from nemo_emmett.run_summary import RunSummary

RECIPE_KEYS = ("model", "trainer", "data", "exp_manager", "export_dir", "export", "seed", "num_threads")
"""Keys of a recipe that are read; a recipe may hold others for its own interpolations."""

DATASETS = ("train_ds", "validation_ds", "test_ds", "predict_ds")
"""The datasets of a recipe's ``data`` section."""


@dataclass(frozen=True)
class Training:
    """Trainer, model and data of a recipe, ready to fit."""

    trainer: Trainer
    model: LightningModule
    datamodule: MultimodalDataModule | UnreadData

    def fit(self) -> None:
        """Train."""
        self.trainer.fit(self.model, self.datamodule)


def train(cfg: DictConfig) -> LightningModule:
    """Train the model of a recipe on its data; resume from the experiment's last checkpoint if there is one.

    Args:
        cfg: a recipe with the sections ``model``, ``trainer``, ``data`` and ``exp_manager`` (NeMo's meaning of each).
            ``model._target_`` is a class path or the short name of an entry point (``salm_t5``). ``export_dir``, where
            given, receives the trained model as a Hugging Face style folder: with ``export: best`` that of the
            checkpoint with the best monitored score, which is the default where there is one, with ``export: last``
            that of the last step. ``seed`` seeds all generators.

    Returns:
        The trained model, with the weights of the last step. Where the recipe's OOMptimizer only plans, nothing is
        trained or exported.

    Raises:
        EmmettError: for a mistake in the recipe or the data, before training starts; for too many bad records, later.
        NonFiniteError: if too many steps, or the weights, are not finite.
        OutputError: if something could not be written; the message says where the model is.
    """
    plugin.register()
    check_recipe(cfg)
    check_export(cfg)
    model_class = plugin.find_model(cfg.model._target_)
    if issubclass(model_class, ModelPT):
        raise ConfigError(
            f"model._target_: '{cfg.model._target_}' is a NeMo model with a training script of its own; train it with "
            "that, and find its batch sizes with `nemo-emmett plan` or `oomptimize`."
        )
    check_data_section(cfg.data, ExampleKind.CONVERSATION if issubclass(model_class, SALM) else ExampleKind.TRANSLATION)
    check_gradient_conflict(cfg)
    check_objectives(cfg)
    recipe, best = SaveRecipe(cfg), BestCheckpoint()
    with ExitStack() as locks:
        lock_folders(cfg, locks, existing_only=True)
        training = build_training(cfg)
        trainer, model = training.trainer, training.model
        lock_folders(cfg, locks)
        check_space(trainer, model, cfg.get("export_dir"))
        has_warned = _check_scores(cfg, training)
        summary = _report_run(cfg, trainer)
        trainer.callbacks[:0] = [recipe, best, TrainedExamples(), ValidateAtEpochEnd(warns=not has_warned)]
        if not any(isinstance(callback, StopOnSignal) for callback in trainer.callbacks):
            trainer.callbacks.append(StopOnSignal())
        with summary.around(trainer, model, best):
            try:
                with mistakes_in_fit(cfg):
                    training.fit()
            except (OSError, RuntimeError) as error:
                if not is_failed_write(error):
                    raise
                export_after_failed_write(trainer, model, cfg, error)
            if any(isinstance(c, OOMptimizer) and c.ends_after_planning for c in trainer.callbacks):
                return model
            summary.exported = export_trained(trainer, model, cfg, best)
    return model


def _report_run(cfg: DictConfig, trainer: Trainer) -> RunSummary:
    """Add the callbacks that print the summaries, and lines of progress where there is no terminal for the bar."""
    has_folder = cfg.get("exp_manager") is not None and not trainer.fast_dev_run
    log_file = write_log_file(trainer.default_root_dir, trainer.global_rank) if has_folder else None
    bar = trainer.progress_bar_callback
    prints_lines = bar is not None and not sys.stdout.isatty()
    if prints_lines:
        bar.disable()
    progress = RunProgress(steps=prints_lines)
    summary = RunSummary(cfg, progress, log_file)
    trainer.callbacks += [progress, summary]
    return summary


def _check_scores(cfg: DictConfig, training: Training) -> bool:
    """Warn of a validation that will never run, and refuse to monitor a score that will never be computed.

    Returns:
        Whether it has warned.
    """
    manager = cfg.get("exp_manager") or {}
    makes_checkpoints = manager and manager.get("create_checkpoint_callback", True)
    monitor = (manager.get("checkpoint_callback_params") or {}).get("monitor") if makes_checkpoints else None
    has_warned = check_validation(training.trainer, monitor, has_validation=cfg.data.get("validation_ds") is not None)
    options = getattr(training.model, "options", None)
    if str(monitor).startswith("val_bleu") and options is not None:
        sharded = isinstance(training.trainer.strategy, ModelParallelStrategy)
        if sharded or not options.validation_bleu:
            why = "a sharded model does not translate in validation" if sharded else "model.validation_bleu is false"
            raise ConfigError(
                f"exp_manager.checkpoint_callback_params.monitor: '{monitor}' is never computed, since {why}; "
                "monitor val_loss with mode: min."
            )
    return has_warned


def build_training(cfg: DictConfig, construction: AbstractContextManager[Any] | None = None) -> Training:
    """Build the trainer (with the experiment manager), model and data of a recipe. No file of the data is opened.

    Args:
        cfg: as for :func:`train`; without ``exp_manager``, nothing is logged and no checkpoint is written or read.
        construction: entered while the model is built, for example to build it of fake tensors.

    Raises:
        EmmettError: for a mistake in the recipe.
    """
    plugin.register()
    check_recipe(cfg)
    model_class = plugin.find_model(cfg.model._target_)
    if cfg.get("num_threads"):
        torch.set_num_threads(cfg.num_threads)
    lightning.seed_everything(cfg.get("seed", 0), workers=True)
    trainer = build_trainer(cfg.trainer)
    if not cfg.model.get("trust_remote_code", False) and type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = CheckpointsAsData()
    if cfg.get("exp_manager") is not None:
        set_up_experiment(trainer, cfg.exp_manager)
    section = OmegaConf.to_container(cfg.model, resolve=True)
    with trainer.init_module(), construction or nullcontext():
        if issubclass(model_class, ModelPT):
            model = model_class(cfg=OmegaConf.create({k: v for k, v in section.items() if k != "_target_"}))
        else:
            model = model_class(section)
    return Training(trainer, model, _datamodule(cfg.data, model))


class UnreadData(LightningDataModule):
    """A config of data that is never loaded: that of NeMo's ASR models, for planning.

    Args:
        cfg: the recipe's ``data`` section.
    """

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__()
        self.cfg = cfg

    def train_dataloader(self) -> None:
        """Required by Lightning; raises."""
        raise RuntimeError("this data is not read")


class CheckpointsAsData(TorchCheckpointIO):
    """Reads checkpoints without running code: tensors and plain values, which is all that our checkpoints hold."""

    def load_checkpoint(self, path: Any, map_location: Any = "cpu") -> dict[str, Any]:
        """Read a ``.ckpt`` file.

        Raises:
            ModelError: if it holds other objects, since unpickling them runs code.
        """
        with get_filesystem(path).open(str(path), "rb") as file:
            return read_checkpoint(file, map_location=map_location)


def _datamodule(data: DictConfig, model: LightningModule) -> MultimodalDataModule | UnreadData:
    """The datamodule for the model; NeMo's SALM has its own dataset, and its recipes give all keys."""
    if isinstance(model, ModelPT):
        return UnreadData(data)
    if isinstance(model, SALM):
        return MultimodalDataModule(data, model.tokenizer, SALMDataset(model.tokenizer))
    return MultimodalDataModule(data, model.tokenizer, SpeechTextDataset(model.tokenizer), model.data_defaults)


def check_recipe(cfg: DictConfig) -> None:
    """Refuse a recipe that lacks a section or misspells a key of one.

    Raises:
        ConfigError: naming the key, and the nearest known one.
    """
    check_sections(cfg)
    check_run_keys(cfg)
    refuse_empty_paths(cfg)
    if not cfg.model.get("_target_"):
        raise ConfigError(
            "model._target_ is missing: add +model._target_=salm_t5 (salm_gpt, bestow_gpt, NeMo's salm), or the path "
            "of a class, such as nemo.collections.asr.models.EncDecCTCModelBPE for a plan."
        )
    strategy = cfg.trainer.get("strategy")
    if isinstance(strategy, DictConfig) and str(strategy.get("_target_")).endswith(".AutomodelParallelStrategy"):
        raise ConfigError(
            "trainer.strategy._target_: AutomodelParallelStrategy is for the language models of NeMo Automodel, which "
            "no model here has; name lightning.pytorch.strategies.ModelParallelStrategy (FSDP2) or DDPStrategy, and "
            f"remove its other keys ({', '.join(str(key) for key in strategy if key != '_target_')})."
        )


def check_data_section(data: DictConfig, examples: ExampleKind = ExampleKind.TRANSLATION) -> None:
    """Check every dataset of a recipe's ``data`` section before a model is built.

    Args:
        data: the section.
        examples: what the model's dataset collates.

    Raises:
        ConfigError: for a misspelt key, or a value that cannot work.
        DataError: for a file that is missing or does not match its partner.
    """
    for unknown in check_keys(data, DATASETS, "data"):
        logging.warning(f"data.{unknown} is not a dataset of a training; it is ignored.")
    for name in DATASETS:
        if data.get(name) is not None:
            check_data_config(data[name], place=f"data.{name}", examples=examples)


def check_gradient_conflict(cfg: DictConfig) -> None:
    """Check that there are steps in which ``model.gradient_conflict`` has two gradients to compare.

    Args:
        cfg: a recipe whose data is checked.

    Raises:
        ConfigError: if the training data has one modality, or every step has.
    """
    if cfg.model.get("gradient_conflict") is None or cfg.data.get("train_ds") is None:
        return
    dataset = parse_dataset(cfg.data.train_ds, "data.train_ds")
    if any(source.is_conversation for source in dataset.sources):
        return  # of either modality
    if len({source.is_text for source in dataset.sources}) < 2:
        alone = "text" if dataset.sources[0].is_text else "speech"
        raise ConfigError(
            f"model.gradient_conflict: data.train_ds holds {alone} alone, so there is one gradient; add sources of the "
            "other modality, or leave it out."
        )
    is_alternating = dataset.is_multi_config and dataset.sampler_fusion in ("round_robin", "randomized_round_robin")
    if is_alternating and (cfg.trainer.get("accumulate_grad_batches") or 1) == 1:
        raise ConfigError(
            f"model.gradient_conflict: under data.train_ds.sampler_fusion: {dataset.sampler_fusion} each step holds "
            "one modality; write zip, or accumulate several batches to a step (trainer.accumulate_grad_batches)."
        )


def check_objectives(cfg: DictConfig) -> None:
    """Check that the training data has the modality that each of ``model.objectives`` reads; warn of ``transcription``
    where no source says that it is transcribed.

    Args:
        cfg: a recipe whose data is checked.

    Raises:
        ConfigError: for an objective that would never be computed.
    """
    section = cfg.model.get("objectives")
    if not isinstance(section, DictConfig) or cfg.data.get("train_ds") is None:
        return
    sources = parse_dataset(cfg.data.train_ds, "data.train_ds").sources
    has_both = any(source.is_conversation for source in sources)
    there = {"text" if source.is_text else "audio" for source in sources}
    for objective in parse_objectives(OmegaConf.to_container(section, resolve=True)):
        if objective.modality not in there and not has_both:
            reads, other = ("text", "speech") if objective.modality == "text" else ("speech", "text")
            raise ConfigError(
                f"{objective.place}: reads {reads}, and data.train_ds holds {other} alone; add sources of {reads}, or "
                "leave the objective out."
            )
        may_transcribe = any(
            source.is_transcription or _may_be(source.target_lang, source.source_lang) for source in sources
        )
        if objective.name == Transcription.name and not may_transcribe:
            logging.warning(
                f"{objective.place}: no source of data.train_ds has the key transcription, so it has examples only "
                "where records ask for their transcripts; set transcription: 0.2, a share, for the dataset or a source."
            )


def _may_be(targets: str | list[str] | None, spoken: str | None) -> bool:
    """Whether speech may be answered in its own language."""
    return spoken in targets if isinstance(targets, list) else targets is not None and targets == spoken
