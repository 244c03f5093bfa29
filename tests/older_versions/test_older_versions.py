"""Files of older versions: checkpoints continue, exported folders translate as they did."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from omegaconf import OmegaConf
from safetensors.torch import load_file

from nemo_emmett import training
from nemo_emmett.models import load

from .make_files import STEPS, translations

VERSIONS = sorted(path.name.removesuffix(".tar.xz") for path in Path(__file__).parent.glob("*.tar.xz"))

WITHOUT_EFFECT = ("conv.depthwise_conv.bias", "self_attn.linear_k.bias")
"""The batch norm after the one and the softmax after the other take away what they add. Their gradients are rounding
errors, of either sign, which Adam makes steps of up to the learning rate of."""


@pytest.fixture(scope="session", params=VERSIONS)
def files(request, tmp_path_factory) -> Path:
    """The folder that ``make_files.py`` wrote with an older version."""
    folder = tmp_path_factory.mktemp("older")
    with tarfile.open(Path(__file__).parent / f"{request.param}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    folder /= request.param
    (checkpoint,) = (folder / "run" / "checkpoints").iterdir()
    content = torch.load(checkpoint, weights_only=False)
    made_in = json.loads((folder / "expected.json").read_text())["folder"]
    torch.save(moved(content, made_in, str(folder)), checkpoint)
    return folder


def moved(value: Any, old: str, new: str) -> Any:
    """The state of the data with the paths of this machine: sources are recognised by their paths."""
    if isinstance(value, str):
        return value.replace(old, new)
    if isinstance(value, dict):
        return {key: moved(item, old, new) for key, item in value.items()}
    return [moved(item, old, new) for item in value] if isinstance(value, list) else value


class Steps(Callback):
    """Counts the steps that are trained."""

    def __init__(self) -> None:
        self.trained: list[int] = []

    def on_train_batch_end(self, trainer, *_) -> None:
        self.trained.append(trainer.global_step)


def test_a_checkpoint_in_the_middle_of_an_epoch_continues_exactly(files, tmp_path, monkeypatch):
    recipe = json.loads((files / "recipe.json").read_text().replace("{folder}", str(files)))
    recipe["exp_manager"]["explicit_log_dir"] = str(files / "run")
    recipe["export_dir"] = str(tmp_path / "export")
    steps, build = Steps(), training.build_training

    def observed(cfg):
        made = build(cfg)
        made.trainer.callbacks.append(steps)
        return made

    monkeypatch.setattr(training, "build_training", observed)
    training.train(OmegaConf.create(recipe))
    assert steps.trained == [STEPS]
    now = load_file(tmp_path / "export" / "model.safetensors")
    then = load_file(files / "export" / "model.safetensors")
    assert now.keys() == then.keys()
    largest = recipe["model"]["optimizer"]["lr"] * STEPS
    for name, weight in then.items():  # equal on one machine; others may round otherwise
        atol = 2 * largest if name.endswith(WITHOUT_EFFECT) else 2e-6
        torch.testing.assert_close(
            now[name], weight, atol=atol, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(("model", "folder"), [("salm_t5", "export"), ("salm_gpt",) * 2, ("bestow_gpt",) * 2])
def test_an_exported_folder_translates_as_it_did(files, model, folder):
    expected = json.loads((files / "expected.json").read_text())
    assert translations(load(files / folder), files) == expected[model]
