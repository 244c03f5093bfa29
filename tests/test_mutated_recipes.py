"""Recipes with a wrong value at every place: one sentence that names the key, or an entry of the table that says why
the value is sound."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from nemo.collections.common.data.lhotse.dataloader import LhotseDataLoadingConfig
from nemo.collections.common.tokenizers import AutoTokenizer
from nemo.utils.exp_manager import CallbackParams, ExpManagerConfig
from omegaconf import OmegaConf

from nemo_emmett import training
from nemo_emmett.callbacks import OOMptimizer
from nemo_emmett.data import SpeechTextDataset, get_multimodal_dataloader
from nemo_emmett.evaluation import evaluate_recipe
from nemo_emmett.evaluation import run as evaluation_run
from nemo_emmett.models import SALMT5
from nemo_emmett.models.config import ModelConfig
from nemo_emmett.recipe_checks import build_trainer
from nemo_emmett.training import check_data_section

from .accepted_mutations import ACCEPTED, entries_of
from .conftest import LANGUAGES, close_log_files, perception_config
from .mutations import Mutation, every_kind, misspelt, mutated, outcome_of, places_of
from .test_training import sentence_of_mistake

SEED = 15
PER_PLACE = 4
"""Kinds of values that are tried at each place, of those in ``VALUES``."""

LEAST = 600
"""Mutations altogether."""

LOCATOR = "<|audio|>"


def check(section: str, cases: list[tuple[dict, Iterable[Mutation]]], use: Callable[[dict], Any]) -> None:
    """Use each mutated recipe: what is not refused with a sentence must be in the table, and all of the table occur."""
    outcomes = [outcome_of(one, recipe, use) for recipe, mutations in cases for one in mutations]
    found = [outcome for outcome in outcomes if outcome is not None]
    entries = [entries_of(section, one.mutation) if one.kind in ("accepted", "other sentence") else [] for one in found]
    wrong = [one for one, known in zip(found, entries, strict=True) if one.kind != "sentence" and not known]
    never = [one for one in ACCEPTED if one.section == section and not any(one in matched for matched in entries)]
    counts = Counter(one.kind for one in found)
    lines = [f"{one.kind}: {section}: {one.mutation}: {one.said}" for one in wrong]
    lines += [f"never accepted, remove it from the table: {one}" for one in never]
    assert not lines, "\n".join([f"{section}: {dict(counts)}", *lines])


class Enough(BaseException):
    """What was to be seen has been seen."""


@pytest.fixture(autouse=True)
def no_processes(monkeypatch) -> None:
    """However many workers a mutation asks for, none is started."""
    iterator = torch.utils.data.DataLoader._get_iterator

    def of_this_process(self: torch.utils.data.DataLoader) -> Any:
        if self.num_workers:
            raise Enough
        return iterator(self)

    monkeypatch.setattr(torch.utils.data.DataLoader, "_get_iterator", of_this_process)


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


OUR_KEYS = ("allow_commands", "index_dir", "sampling", "source_lang", "target_lang", "use_emmett", "weights")


def data_mutations(data: dict) -> list[Mutation]:
    there = [place for place in places_of(data["train_ds"], "train_ds") if ".tags." not in place]
    absent = [f"train_ds.{key}" for key in OUR_KEYS]
    absent += [f"train_ds.audio.{field.name}" for field in fields(LhotseDataLoadingConfig)]
    absent = [place for place in absent if place not in there]
    bins, sizes = "train_ds.audio.bucket_duration_bins", "train_ds.audio.bucket_batch_size"
    speech, text = "train_ds.audio.input_cfg.0.input_cfg.0", "train_ds.text.input_cfg.0"
    own = [
        Mutation(bins, "not sorted", [0.8, 0.6, 1.2]),
        Mutation(bins, "not a number in it", [0.6, float("nan"), 1.2]),
        Mutation(bins, "more than sizes", [0.6, 0.8, 1.0, 1.2]),
        Mutation(sizes, "fewer than bins", [4, 3]),
        Mutation("train_ds.text.bucket_duration_bins", "not sorted", [[40, 40], [12, 8]]),
        Mutation("train_ds.text.bucket_duration_bins", "three numbers in a bin", [[12, 8, 4], [40, 40, 40]]),
        Mutation("train_ds.text.bucket_duration_bins", "pairs and numbers", [[12, 8], 40]),
        Mutation("train_ds.text.bucket_batch_size", "more than bins", [3, 2, 1]),
        Mutation("train_ds.sampler_fusion", "misspelt", "zipp"),
        Mutation("train_ds.sampler_weights", "lacks a group", {"audio": 1.0}),
        Mutation("train_ds.sampler_weights", "has another group", {"audio": 0.5, "text": 0.3, "video": 0.2}),
        Mutation("train_ds.prompt_format", "misspelt", "emmett_t55"),
        Mutation(f"{speech}.type", "another type", "parallel_text"),
        Mutation(f"{speech}.type", "another type", "lhotse_shar"),
        Mutation(f"{speech}.type", "misspelt", "nemmo"),
        Mutation(f"{text}.type", "another type", "nemo"),
        Mutation(f"{text}.type", "another type", "txt"),
        Mutation(f"{text}.cuts_path", "key of another type", "cuts.jsonl.gz"),
        Mutation(f"{speech}.source_paths", "key of another type", "train.en"),
        Mutation(f"{speech}.target_lang", "no language", "dexx"),
        Mutation(f"{speech}.manifest_filepath", "no file", "/no/such/manifest.jsonl"),
    ]
    return [*every_kind([*there, *absent], PER_PLACE, SEED), *misspelt(there, SEED), *own]


def test_data(data, tokenizer):
    use_data(tokenizer)(data)
    check("data", [(data, data_mutations(data))], use_data(tokenizer))


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
    strategy, callback = "trainer.strategy", "trainer.callbacks.0"
    own = [
        Mutation("trainer.accelerator", "misspelt", "gpuu"),
        Mutation("trainer.precision", "misspelt", "bf15"),
        Mutation("trainer.profiler", "misspelt", "simpl"),
        Mutation("trainer.gradient_clip_algorithm", "misspelt", "normm"),
        Mutation(strategy, "misspelt", "ddpp"),
        Mutation(f"{strategy}._target_", "misspelt", "lightning.pytorch.strategies.DDPStrateg"),
        Mutation(f"{strategy}._target_", "another kind of class", "lightning.pytorch.callbacks.Timer"),
        Mutation(f"{strategy}._target_", "not allowed", "os.system"),
        Mutation(f"{strategy}.static_graph", "text", "false"),
        Mutation(f"{strategy}.no_such_argument", "unknown argument", 1),
        Mutation("trainer.callbacks", "empty list", []),
        Mutation("trainer.callbacks", "a name", ["EarlyStopping"]),
        Mutation(f"{callback}._target_", "misspelt", "lightning.pytorch.callbacks.EarlyStoping"),
        Mutation(f"{callback}._target_", "another kind of class", "torch.nn.Linear"),
        Mutation(f"{callback}._target_", "not allowed", "os.system"),
        Mutation(f"{callback}._target_", "no path", "EarlyStopping"),
        Mutation(f"{callback}.mode", "misspelt", "mn"),
        Mutation(f"{callback}.min_delta", "text", "small"),
        Mutation(f"{callback}.no_such_argument", "unknown argument", 1),
        Mutation("trainer.max_time", "mapping of no units", {"blue": 7}),
        Mutation("exp_manager.max_time_per_run", "no duration", "4 hours"),
        Mutation("exp_manager.create_wandb_logger", "without its arguments", True),
        Mutation("exp_manager.summary_writer_kwargs", "unknown argument", {"flush": 3}),
        Mutation("exp_manager.checkpoint_callback_params.mode", "misspelt", "maxx"),
    ]
    return [*every_kind([*there, *absent], PER_PLACE, SEED), *misspelt(there, SEED), *own]


def test_run(run, use_run):
    use_run(run)
    check("run", [(run, run_mutations(run))], use_run)


class LearningModel(TinyModel):
    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(batch).sum()


@pytest.mark.parametrize("place", ["exp_manager.checkpoint_callback_params.monitor", "trainer.callbacks.0.monitor"])
def test_a_score_that_the_first_validation_lacks_is_a_sentence(run, use_run, monkeypatch, place):
    monkeypatch.setattr(training.plugin, "find_model", lambda target: LearningModel)
    outcome = outcome_of(Mutation(place, "no such score", "blue"), run, use_run)
    assert outcome.kind == "sentence", outcome


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
        "objectives": {"distillation": {"weight": 0.5, "warmup_steps": 2, "temperature": 2.0, "end_step": 9}},
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
    absent += ["lora.r", "lora.target_modules", "lora.lora_dropout"]
    own = [
        Mutation("pretrained_llm", "no folder", "/no/such/folder"),
        Mutation("pretrained_asr", "no file", "/no/such/file.nemo"),
        Mutation("tokenizer_path", "no folder", "/no/such/folder"),
        Mutation("prompt_format", "misspelt", "emmett_t55"),
        Mutation("prompt_format", "of another family", "emmett_llama3"),
        Mutation("freeze", "no part", ["decoder"]),
        Mutation("loss_implementation", "misspelt", "chunkd"),
        Mutation("objectives.distillation.teacher", "no folder", "no_such_folder"),
        Mutation("objectives.distillation.teacher", "no LoRA", "without_lora"),
        Mutation("objectives.distillation.start_step", "after the end", 9),
        Mutation("objectives.retension", "misspelt", {}),
        Mutation(
            "perception.modality_adapter._target_", "misspelt", "nemo_emmett.modules.modality_adapters.MLPConector"
        ),
        Mutation("perception.modality_adapter._target_", "not allowed", "os.system"),
        Mutation("perception.encoder", "contradicts the .nemo", {"d_model": 64}),
        Mutation("perception.preprocessor", "contradicts the .nemo", {"features": 80}),
        Mutation("optimizer._target_", "misspelt", "torch.optim.AdamX"),
        Mutation("optimizer._target_", "not allowed", "os.system"),
        Mutation("optimizer.momentum", "argument of another class", 0.9),
        Mutation("lr_scheduler._target_", "misspelt", "nemo.core.optim.lr_scheduler.CosineAnealing"),
        Mutation("lr_scheduler.warmup", "unknown argument", 3),
        Mutation("lr_scheduler.step_size", "argument of another class", 3),
        Mutation("lora", "unknown argument", {"rank": 3}),
        Mutation("lora", "no such modules", {"target_modules": ["blue"]}),
    ]
    return [*every_kind([*there, *absent], PER_PLACE, SEED), *misspelt(there, SEED), *own]


def test_model(model):
    use_model(model)
    check("model", [(model, model_mutations(model))], use_model)


# OOMptimizer


def use_oomptimizer(arguments: dict) -> None:
    callback = {"_target_": "nemo_emmett.callbacks.OOMptimizer", **arguments}
    build_trainer(OmegaConf.create({"accelerator": "cpu", "logger": False, "callbacks": [callback]}))


CALIBRATE = {"mode": "calibrate", "memory_fraction": 0.8, "safety_margin": 0.05, "guard": True}
PLAN = {"mode": "plan", "memory_budget": "1GiB", "then_train": True}


def oomptimizer_mutations(arguments: dict) -> list[Mutation]:
    places = inspect.signature(OOMptimizer).parameters
    own = [
        Mutation("mode", "misspelt", "guess"),
        Mutation("memory_budget", "no unit", "80 gigs"),
        Mutation("profile", "a folder", "/tmp"),
        Mutation("modality_share", "misspelt", "automatic"),
        Mutation("safety_margin", "zero", 0),
        Mutation("profile", "text", "no_such_profile.yaml"),
    ]
    return [*every_kind(places, PER_PLACE, SEED), *misspelt(arguments, SEED), *own]


def test_oomptimizer():
    for arguments in (CALIBRATE, PLAN):
        use_oomptimizer(arguments)
    check("oomptimizer", [(one, oomptimizer_mutations(one)) for one in (CALIBRATE, PLAN)], use_oomptimizer)


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


def evaluation_mutations(evaluation: dict) -> list[Mutation]:
    there = [place.removeprefix("evaluation.") for place in places_of(evaluation, "evaluation")]
    absent = ["comet", "log_dir", "trust_remote_code", "baseline", "test_ds.shuffle", "test_ds.max_duration"]
    own = [
        Mutation("metrics", "misspelt", ["BLUE"]),
        Mutation("metrics", "empty list", []),
        Mutation("output", "null", None),
        Mutation("num_beams", "huge", 10**15),
        Mutation("examples", "zero", 0),
        Mutation("baseline", "no folder", "/no/such/folder"),
        Mutation("log_dir", "no folder", "/no/such/folder"),
        Mutation("test_ds.datasets.test_text.input_cfg.0.type", "misspelt", "paralel_text"),
    ]
    return [*every_kind([*there, *absent], PER_PLACE, SEED), *misspelt(there, SEED), *own]


def test_evaluation(evaluation, use_evaluation):
    use_evaluation(evaluation)
    check("evaluation", [(evaluation, evaluation_mutations(evaluation))], use_evaluation)


# All


def test_there_are_enough(data, run, model, evaluation):
    recipes = [
        (data, data_mutations(data)),
        (run, run_mutations(run)),
        (model, model_mutations(model)),
        (CALIBRATE, oomptimizer_mutations(CALIBRATE)),
        (PLAN, oomptimizer_mutations(PLAN)),
        (evaluation, evaluation_mutations(evaluation)),
    ]
    assert sum(mutated(recipe, one) is not None for recipe, mutations in recipes for one in mutations) >= LEAST


# The command line


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed=-1", "seed: -1 cannot be used; give a whole number from 0"),
        ("+num_threads=many", "num_threads: 'many' cannot be used; give a whole number from 1"),
        ("trainer.max_steps=blue", "trainer.max_steps: 'blue' cannot be used; give a whole number from -1."),
        ("trainer.enable_progress_bar='no'", "trainer.enable_progress_bar: 'no' cannot be used; give true or false"),
        ("trainer.accelerator=gpuu", "trainer.accelerator: 'gpuu' cannot be used: "),
        ("+trainer.strategy=ddpp", "trainer.strategy: 'ddpp' cannot be used: "),
        ("trainer.devices=-3", "trainer.devices: -3 cannot be used; give "),
        (
            "+trainer.callbacks=[{_target_: torch.nn.Linear}]",
            "trainer.callbacks.0._target_: 'torch.nn.Linear' is not",
        ),
        ("exp_manager.resume_if_exists='false'", "exp_manager.resume_if_exists: 'false' cannot be used; give true or "),
        ("+exp_manager.max_time_per_run=4h", "exp_manager.max_time_per_run: "),
    ],
)
def test_a_mutation_on_the_command_line_ends_with_exit_code_2(recipe, tmp_path, monkeypatch, capfd, override, said):
    assert f"Error: {said}" in sentence_of_mistake(recipe, tmp_path, monkeypatch, capfd, override)
