"""A profile planned by the command is taken by the callback in NeMo's scripts, and the reverse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import LightningDataModule, Trainer
from nemo.collections.speechlm2 import SALM
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from nemo_emmett.callbacks import OOMptimizer
from nemo_emmett.errors import ConfigError
from nemo_emmett.oomptimizer.profile import Profile
from nemo_emmett.planning import plan
from nemo_emmett.planning.needed import needed_for_planning
from nemo_emmett.training import build_training

from ..oomptimizer.models import tiny_ctc, tiny_multitask, tiny_salm

MEMORY = str(4 * 2**20)  # batches of some 50 examples: NeMo places the recordings of each in a loop
SALM_DATA = {
    "use_emmett": True,
    "use_multimodal_sampling": True,
    "token_equivalent_duration": 0.08,
    "use_bucketing": True,
    "bucket_duration_bins": [16, 24],
    "input_cfg": [{"type": "lhotse_as_conversation", "manifest_filepath": "???"}],
}
ASR_DATA = {
    "use_lhotse": True,
    "manifest_filepath": "???",
    "sample_rate": 16000,
    "batch_size": 1,
    "use_bucketing": True,
    "bucket_duration_bins": [[0.8, 12], [2.0, 30]],
}
QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "max_steps": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Data(LightningDataModule):
    """As NeMo's DataModule holds its config; it is never read."""

    def __init__(self, train_ds: dict) -> None:
        super().__init__()
        self.cfg = OmegaConf.create({"train_ds": train_ds})

    def train_dataloader(self) -> None:
        raise AssertionError("no batch is to be asked for")


def planned_by_the_command(cfg: DictConfig, path: Path) -> Profile:
    recipe = needed_for_planning(cfg, reads_data=False)
    options = {"memory": MEMORY, "memory_fraction": 1.0, "console": Console(quiet=True)}
    return plan(recipe, build_training, profile=path, **options)


def fit_of_nemos_script(model: Any, data: Data | None, callback: OOMptimizer, folder: Path) -> None:
    """A fit that ends where batch sizes are known."""
    trainer = Trainer(callbacks=[callback], default_root_dir=folder, limit_train_batches=0, **QUIET)
    trainer.fit(model, datamodule=data)


@pytest.fixture(scope="module")
def salm_section(tmp_path_factory) -> dict:
    return OmegaConf.to_container(tiny_salm(tmp_path_factory.mktemp("salm")).cfg)


def salm_recipe(section: dict, target: str) -> DictConfig:
    return OmegaConf.create(
        {
            "model": {"_target_": target, **section},
            "trainer": QUIET,
            "data": {"train_ds": SALM_DATA, "validation_ds": {"datasets": {"dev": {"manifest_filepath": "???"}}}},
            "exp_manager": {"explicit_log_dir": "???"},
        }
    )


def test_one_fingerprint_however_nemos_salm_is_named(salm_section: dict, tmp_path: Path) -> None:
    targets = {"salm": "short", "nemo.collections.speechlm2.models.SALM": "full"}
    planned = [
        planned_by_the_command(salm_recipe(salm_section, target), tmp_path / f"{name}.yaml")
        for target, name in targets.items()
    ]
    assert planned[0].fingerprint == planned[1].fingerprint

    # In NeMo's script the class is written in the script, and model._target_ is absent.
    data = Data(SALM_DATA)
    callback = OOMptimizer(profile=tmp_path / "short.yaml", guard=False)
    fit_of_nemos_script(SALM(dict(salm_section)).train(), data, callback, tmp_path)
    assert tuple(data.cfg.train_ds.bucket_batch_size) == planned[0].groups[""].bucket_batch_size


def test_a_plan_of_the_callback_is_taken_by_the_command(salm_section: dict, tmp_path: Path) -> None:
    path = tmp_path / "callback.yaml"
    callback = OOMptimizer(mode="plan", memory_budget=int(MEMORY), profile=path)
    fit_of_nemos_script(SALM(dict(salm_section)).train(), Data(SALM_DATA), callback, tmp_path)
    by_callback = Profile.read(path)
    by_command = planned_by_the_command(salm_recipe(salm_section, "salm"), tmp_path / "command.yaml")
    assert by_callback.fingerprint == by_command.fingerprint
    assert by_callback.groups == by_command.groups


@pytest.mark.parametrize(
    ("build", "target"),
    [
        (tiny_ctc, "EncDecCTCModelBPE"),
        (tiny_multitask, "EncDecMultiTaskModel"),
    ],
)
def test_nemos_asr_recipes_are_planned_and_their_training_takes_the_plan(build, target: str, tmp_path: Path) -> None:
    model = build(tmp_path)
    section = OmegaConf.to_container(model.cfg)
    recipe = {
        "name": "asr",
        "model": {
            "_target_": f"nemo.collections.asr.models.{target}",
            **{key: value for key, value in section.items() if key not in ("target", "nemo_version")},
            "train_ds": ASR_DATA,
            "validation_ds": {"manifest_filepath": "???"},
        },
        "trainer": QUIET,
        "exp_manager": {"exp_dir": "???"},
    }
    planned = planned_by_the_command(OmegaConf.create(recipe), tmp_path / "plan.yaml")
    first, second = planned.groups[""].bucket_batch_size
    assert first > second > 1
    data = Data(ASR_DATA)
    fit_of_nemos_script(model, data, OOMptimizer(profile=tmp_path / "plan.yaml", guard=False), tmp_path)
    assert tuple(data.cfg.train_ds.bucket_batch_size) == (first, second)


class TestWhatAPlanNeeds:
    RECIPE = """
data_dir: ???
other: ???
exp_manager: {explicit_log_dir: "???"}
model: {_target_: salm_t5, pretrained_llm: t5, lr_scheduler: {max_steps: "${trainer.max_steps}"}}
trainer: {max_steps: 7, callbacks: [{_target_: x, a: "???"}]}
data:
  train_ds:
    multi_config: true
    audio: {bucket_duration_bins: [4.0, 8.0], manifest_filepath: "???"}
    text: {input_cfg: [{type: parallel_text, paths: {en: "${data_dir}/a", de: b.de}}]}
  validation_ds: {datasets: {a: {manifest_filepath: "???"}}}
"""

    def test_no_paths_of_data(self) -> None:
        found = needed_for_planning(OmegaConf.create(self.RECIPE), reads_data=False)
        assert set(found) == {"model", "trainer", "data"}
        assert found.trainer == {"max_steps": 7}
        assert found.model.lr_scheduler.max_steps == 7
        assert list(found.data) == ["train_ds"]
        assert found.data.train_ds.text.input_cfg[0].paths.de == "b.de"

    @pytest.mark.parametrize(
        ("changes", "reads_data", "missing"),
        [
            ({}, True, "data.train_ds.audio.manifest_filepath"),
            ({"data.train_ds.audio.manifest_filepath": "a.json"}, True, "data_dir"),
            ({"data.train_ds.audio.bucket_duration_bins": "auto"}, False, "data.train_ds.audio.manifest_filepath"),
            ({"model.pretrained_llm": "???"}, False, "model.pretrained_llm"),
            ({"model.pretrained_llm": "${other}"}, False, "other"),
        ],
    )
    def test_what_it_needs_is_asked_for(self, changes: dict, reads_data: bool, missing: str) -> None:
        cfg = OmegaConf.create(self.RECIPE)
        for key, value in changes.items():
            OmegaConf.update(cfg, key, value)
        with pytest.raises(ConfigError) as error:
            needed_for_planning(cfg, reads_data=reads_data)
        assert str(error.value) == f"{missing}: the recipe leaves this to you; give {missing}=... on the command line."
