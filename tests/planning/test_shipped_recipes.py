"""`nemo-emmett plan` with the shipped recipes, whose pretrained parts are configs without weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from omegaconf import DictConfig
from rich.console import Console

from nemo_emmett.planning import plan
from nemo_emmett.runner import compose_recipe
from nemo_emmett.training import build_training

from ..conftest import ENCODER_DIM
from ..models.backbones import backbone

BACKBONES = {"salm_t5": "t5", "salm_gpt": "llama", "bestow_gpt": "llama"}
WIDTH_KEYS = {"salm_t5": "input_dim", "salm_gpt": "input_dim", "bestow_gpt": "d_model"}
BUDGET = 24 * 2**20


def recipe(name: str, llm: Path, asr: Path) -> DictConfig:
    """A shipped recipe on tiny parts, with bins of its own, for one device."""
    overrides = {
        "model.pretrained_llm": llm,
        "model.pretrained_asr": asr,
        f"model.perception.modality_adapter.{WIDTH_KEYS[name]}": ENCODER_DIM,
        "data.train_ds.audio.bucket_duration_bins": "[[1,6],[2,20]]",
        "data.train_ds.text.bucket_duration_bins": "[[10,10],[20,30]]",
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.strategy": "auto",
        "trainer.precision": "bf16-mixed",
        **({"model.cross_attention.num_heads": 4} if name == "bestow_gpt" else {}),
    }
    return compose_recipe(name, [f"{key}={value}" for key, value in overrides.items()])


@pytest.mark.parametrize("name", BACKBONES)
def test_a_plan_reads_no_weights(name: str, tmp_path: Path, tmp_path_factory, tiny_asr: Path, monkeypatch) -> None:
    whole = backbone(BACKBONES[name], tmp_path_factory.getbasetemp() / "backbones")
    config_only = tmp_path / "llm"
    shutil.copytree(whole, config_only, ignore=shutil.ignore_patterns("*.safetensors"))
    for place in ("torch.load", "safetensors.torch.load_file"):
        monkeypatch.setattr(place, _refuse)
    options = {"memory": str(BUDGET), "memory_fraction": 1.0, "console": Console(quiet=True)}
    found = plan(recipe(name, config_only, tiny_asr), build_training, profile=tmp_path / "plan.yaml", **options)
    assert found.groups["audio"].bucket_duration_bins == ((1.0, 6.0), (2.0, 20.0))
    assert found.groups["text"].bucket_duration_bins == ((10.0, 10.0), (20.0, 30.0))
    assert all(short > long > 1 for short, long in (group.bucket_batch_size for group in found.groups.values()))
    # Each step holds speech and text: the heaviest pair fills what the margin leaves of the budget.
    peaks = [measure.confirmed_peak for measure in found.measures["audio"]]
    assert 0.9 * BUDGET < max(peaks) <= 0.97 * BUDGET


def _refuse(*_: object, **__: object) -> None:
    raise AssertionError("weights were read")
