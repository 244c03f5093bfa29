"""Recipes with a wrong value at every place: one sentence that names the key, or an entry of the table that says why
the value is sound."""

from __future__ import annotations

import inspect
import os
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from nemo.collections.common.tokenizers import AutoTokenizer
from nemo.utils.exp_manager import CallbackParams, ExpManagerConfig
from omegaconf import OmegaConf

from nemo_emmett import training
from nemo_emmett.callbacks import OOMptimizer
from nemo_emmett.data import SpeechTextDataset, get_multimodal_dataloader
from nemo_emmett.data.config.schema import OUR_KEYS
from nemo_emmett.data.config.sources import nemo_keys
from nemo_emmett.evaluation import evaluate_recipe
from nemo_emmett.evaluation import run as evaluation_run
from nemo_emmett.models import SALMT5
from nemo_emmett.models.config import ModelConfig
from nemo_emmett.recipe_checks import build_trainer
from nemo_emmett.training import check_data_section

from .conftest import LANGUAGES, close_log_files, perception_config
from .mutations import Mutation, Outcome, every_kind, misspelt, outcome_of, places_of

SEED = 15
LOCATOR = "<|audio|>"
PER_PLACE = int(os.environ.get("PER_PLACE", 5))


def outcomes(recipe: dict, mutations: Iterable[Mutation], use: Callable[[dict], Any]) -> list[Outcome]:
    found = []
    for mutation in mutations:
        if (outcome := outcome_of(mutation, recipe, use)) is not None:
            found.append(outcome)
            if log := os.environ.get("MUTATION_LOG"):
                with open(log, "a") as file:
                    file.write(f"{outcome.kind} | {outcome.mutation} | {outcome.said}\n")
    return found


def report(found: list[Outcome]) -> str:
    counts = Counter(outcome.kind for outcome in found)
    lines = [f"{one.kind} | {one.mutation} | {one.said}" for one in found]
    return "\n".join([f"{len(found)}: {dict(counts)}", *lines])


class Enough(BaseException):
    """What was to be seen has been seen."""


@pytest.fixture(autouse=True)
def no_processes(monkeypatch) -> None:
    """However many workers a mutation asks for, none is started."""

    def start(*_: Any) -> None:
        raise Enough

    monkeypatch.setattr(torch.utils.data.dataloader._MultiProcessingDataLoaderIter, "__init__", start)


# Data


@pytest.fixture(scope="module")
def tokenizer(tiny_t5) -> AutoTokenizer:
    tokenizer = AutoTokenizer(str(tiny_t5), use_fast=True)
    tokenizer.add_special_tokens({"additional_special_tokens": [LOCATOR]})
    return tokenizer


@pytest.fixture(scope="module")
def data(tiny_corpus) -> dict:
    """Speech in two levels of groups and buckets of one dimension, text in buckets of two."""
    speech = [
        {"type": "nemo", "manifest_filepath": str(tiny_corpus / "speech" / f"train.{lang}.jsonl"), "weight": 1.0}
        for lang in LANGUAGES
    ]
    text = {lang: str(tiny_corpus / "text" / f"train.{lang}") for lang in LANGUAGES}
    return {
        "train_ds": {
            "multi_config": True,
            "sampler_fusion": "randomized_round_robin",
            "sampler_weights": {"audio": 0.5, "text": 0.5},
            "seed": 0,
            "shard_seed": 0,
            "shuffle": True,
            "num_workers": 0,
            "max_bad_records": 0.1,
            "prompt_format": "emmett_t5",
            "audio_locator_tag": LOCATOR,
            "token_equivalent_duration": 0.08,
            "audio": {
                "min_duration": 0.1,
                "max_duration": 20.0,
                "use_bucketing": True,
                "bucket_duration_bins": [0.6, 0.8, 1.2],
                "bucket_batch_size": [4, 3, 2],
                "bucket_buffer_size": 20,
                "concurrent_bucketing": False,  # a thread that never ends could not be stopped
                "input_cfg": [{"type": "group", "weight": 0.6, "input_cfg": speech, "tags": {"domain": "tones"}}],
            },
            "text": {
                "use_multimodal_sampling": True,
                "use_bucketing": True,
                "bucket_duration_bins": [[12, 8], [40, 40]],
                "bucket_batch_size": [3, 2],
                "bucket_buffer_size": 20,
                "concurrent_bucketing": False,
                "input_cfg": [{"type": "parallel_text", "paths": text, "weight": 1.0}],
            },
        }
    }


def use_data(tokenizer: AutoTokenizer) -> Callable[[dict], None]:
    def use(data: dict) -> None:
        check_data_section(OmegaConf.create(data))
        dataset = SpeechTextDataset(tokenizer)
        loader = get_multimodal_dataloader(OmegaConf.create(data["train_ds"]), 0, 1, dataset, tokenizer)
        with suppress(Enough):
            next(iter(loader))

    return use


def data_mutations(data: dict) -> list[Mutation]:
    there = [place for place in places_of(data["train_ds"], "train_ds") if ".tags." not in place]
    absent = [f"train_ds.audio.{key}" for key in sorted(nemo_keys() | OUR_KEYS)]
    absent = [place for place in absent if place not in there]
    return [*every_kind(there, PER_PLACE, SEED), *misspelt(there, SEED), *every_kind(absent, PER_PLACE, SEED)]


def test_data(data, tokenizer):
    use_data(tokenizer)(data)
    found = outcomes(data, data_mutations(data), use_data(tokenizer))
    Path("/tmp/mut/data.txt").write_text(report(found))


# Trainer, experiment manager, keys at the top


class TinyModel(LightningModule):
    """A model of any section; its first step is enough."""

    tokenizer = data_defaults = None

    def __init__(self, section: dict) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        raise Enough

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val_loss", batch.sum(), batch_size=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class TinyData(LightningDataModule):
    def train_dataloader(self) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(torch.ones(8, 1))

    val_dataloader = train_dataloader


@pytest.fixture
def run(tmp_path) -> dict:
    """All of a recipe but the sections of its model and data."""
    return {
        "seed": 0,
        "num_threads": 1,
        "export_dir": str(tmp_path / "export"),
        "export": "last",
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 4,
            "limit_train_batches": 2,
            "val_check_interval": 2,
            "num_sanity_val_steps": 0,
            "gradient_clip_val": 1.0,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            "strategy": {
                "_target_": "lightning.pytorch.strategies.DDPStrategy",
                "find_unused_parameters": True,
                "gradient_as_bucket_view": True,
            },
            "callbacks": [
                {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": "val_loss", "patience": 2},
            ],
        },
        "exp_manager": {
            "explicit_log_dir": str(tmp_path / "exp"),
            "resume_if_exists": True,
            "resume_ignore_no_checkpoint": True,
            "checkpoint_callback_params": {"monitor": "val_loss", "mode": "min", "save_top_k": 1, "save_last": True},
            "early_stopping_callback_params": {"monitor": "val_loss", "patience": 3},
        },
    }


@pytest.fixture
def use_run(monkeypatch, tmp_path) -> Callable[[dict], None]:
    monkeypatch.setattr(training.plugin, "find_model", lambda target: TinyModel)
    monkeypatch.setattr(training, "_datamodule", lambda data, model: TinyData())
    monkeypatch.setattr(training, "check_data_section", lambda data, examples: None)
    monkeypatch.setattr(training, "export_trained", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    sections = {"model": {"_target_": "salm_t5"}, "data": {"train_ds": {}, "validation_ds": {}}}

    def use(recipe: dict) -> None:
        try:
            with suppress(Enough):
                training.train(OmegaConf.create(recipe | sections))
        finally:
            close_log_files()

    return use


def run_mutations(run: dict) -> list[Mutation]:
    there = [place.removeprefix("run.") for place in places_of(run, "run")]
    absent = [f"trainer.{key}" for key in inspect.signature(Trainer).parameters]
    absent += [f"exp_manager.{field.name}" for field in fields(ExpManagerConfig)]
    absent += [f"exp_manager.checkpoint_callback_params.{field.name}" for field in fields(CallbackParams)]
    absent = [place for place in absent if place not in there]
    return [*every_kind(there, PER_PLACE, SEED), *misspelt(there, SEED), *every_kind(absent, PER_PLACE, SEED)]


def test_run(run, use_run):
    use_run(run)
    found = outcomes(run, run_mutations(run), use_run)
    Path("/tmp/mut/run.txt").write_text(report(found))


# Model


@pytest.fixture(scope="module")
def model(tiny_t5, tiny_asr) -> dict:
    return {
        "pretrained_llm": str(tiny_t5),
        "pretrained_asr": str(tiny_asr),
        "audio_locator_tag": LOCATOR,
        "prompt_format": "emmett_t5",
        "perception": perception_config(),
        "max_new_tokens": 8,
        "label_smoothing": 0.1,
        "freeze": ["encoder"],
        "modality_loss_weights": {"audio": 1.0, "text": 0.5},
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": 1e-3, "betas": [0.9, 0.98], "weight_decay": 0.1},
        "lr_scheduler": {
            "_target_": "nemo.core.optim.lr_scheduler.CosineAnnealing",
            "warmup_steps": 2,
            "max_steps": 10,
            "min_lr": 1e-5,
        },
    }


def use_model(model: dict) -> None:
    SALMT5(model).configure_optimizers()


def model_mutations(model: dict) -> list[Mutation]:
    there = [place.removeprefix("model.") for place in places_of(model, "model")]
    absent = [field.name for field in fields(ModelConfig) if field.name not in model]
    absent += ["optimizer.eps", "optimizer.amsgrad", "lr_scheduler.last_epoch", "perception.output_dim"]
    absent += ["perception.encoder.d_model", "perception.preprocessor.features", "perception.encoder._target_"]
    absent += ["lora.r", "lora.target_modules", "lora.task_type", "lora.lora_dropout"]
    return [*every_kind(there, PER_PLACE, SEED), *misspelt(there, SEED), *every_kind(absent, PER_PLACE, SEED)]


def test_model(model):
    use_model(model)
    found = outcomes(model, model_mutations(model), use_model)
    Path("/tmp/mut/model.txt").write_text(report(found))


# OOMptimizer


def use_oomptimizer(arguments: dict) -> None:
    callback = {"_target_": "nemo_emmett.callbacks.OOMptimizer", **arguments}
    build_trainer(OmegaConf.create({"accelerator": "cpu", "logger": False, "callbacks": [callback]}))


def test_oomptimizer(tmp_path):
    places = list(inspect.signature(OOMptimizer).parameters)
    arguments = {"mode": "calibrate", "memory_fraction": 0.8, "safety_margin": 0.05, "guard": True}
    mutations = [*every_kind(places, PER_PLACE, SEED), *misspelt(arguments, SEED)]
    found = outcomes(arguments, mutations, use_oomptimizer)
    plan = {"mode": "plan", "memory_budget": "1GiB", "then_train": True}
    found += outcomes(plan, [*every_kind(places, PER_PLACE, SEED), *misspelt(plan, SEED)], use_oomptimizer)
    Path("/tmp/mut/oom.txt").write_text(report(found))


# Evaluation


@pytest.fixture
def evaluation(tiny_corpus, tmp_path) -> dict:
    text = {lang: str(tiny_corpus / "text" / f"train.{lang}") for lang in LANGUAGES}
    speech = str(tiny_corpus / "speech" / "train.en.jsonl")
    return {
        "model": str(tmp_path / "model"),
        "name": "tiny",
        "output": str(tmp_path / "evaluation"),
        "num_beams": 1,
        "max_new_tokens": 8,
        "metrics": ["BLEU", "chrF++"],
        "examples": 2,
        "test_ds": {
            "batch_size": 4,
            "num_workers": 0,
            "prompt_format": "emmett_t5",
            "audio_locator_tag": LOCATOR,
            "datasets": {
                "test_text": {"input_cfg": [{"type": "parallel_text", "paths": text}]},
                "test_speech": {"input_cfg": [{"type": "nemo", "manifest_filepath": speech}]},
            },
        },
    }


@pytest.fixture
def use_evaluation(monkeypatch, tokenizer, tmp_path) -> Callable[[dict], None]:
    def translate(model: Any, test_sets: dict, **_: Any) -> None:
        for loader in test_sets.values():
            next(iter(loader))
        raise Enough

    model = SimpleNamespace(tokenizer=tokenizer, data_defaults={}, to=lambda device: model)
    monkeypatch.setattr(evaluation_run, "load", lambda folder, **_: model)
    monkeypatch.setattr(evaluation_run, "translate", translate)
    monkeypatch.chdir(tmp_path)

    def use(recipe: dict) -> None:
        with suppress(Enough):
            evaluate_recipe(OmegaConf.create(recipe))

    return use


def test_evaluation(evaluation, use_evaluation):
    use_evaluation(evaluation)
    there = [place.removeprefix("evaluation.") for place in places_of(evaluation, "evaluation")]
    absent = ["comet", "comet.model", "comet.batch_size", "log_dir", "trust_remote_code", "baseline"]
    mutations = [*every_kind(there, PER_PLACE, SEED), *misspelt(there, SEED), *every_kind(absent, PER_PLACE, SEED)]
    found = outcomes(evaluation, mutations, use_evaluation)
    Path("/tmp/mut/evaluation.txt").write_text(report(found))
