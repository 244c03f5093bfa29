"""Writes the files that a version leaves behind, for ``test_older_versions.py`` of later ones.

Run it in a checkout of the version whose files are wanted::

    FILES=/somewhere/0.2.0.dev0 python -m pytest tests/older_versions/make_files.py

The folder then holds a recipe with its data and pretrained parts, a checkpoint in the middle of an epoch, the folder
that the whole training exports, exported folders of the other models, and ``expected.json`` with what they translate.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from nemo_emmett import training
from nemo_emmett.models import SALMGPT, BestowGPT

from ..models.backbones import model_config

STEPS = 4
TEXTS = ["one red house", "six big dogs"]


def translations(model: Any, folder: Path) -> dict[str, list[str]]:
    """What a model makes of two sentences and of two recordings."""
    audios = [str(folder / "corpus" / "audio" / f"en-{number}.wav") for number in (0, 5)]
    model.eval()
    return {
        "text": model.translate(TEXTS, source_lang="en", target_lang="de"),
        "audio": model.translate(audios, source_lang="en", target_lang="de"),
    }


def test_make(recipe: dict, tiny_corpus: Path, tiny_t5: Path, tiny_asr: Path, tmp_path: Path, monkeypatch) -> None:
    folder = Path(os.environ["FILES"])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copytree(tiny_corpus, folder / "corpus")
    shutil.copytree(tiny_t5, folder / "t5")
    shutil.copy(tiny_asr, folder / "encoder.nemo")
    text = json.dumps(recipe)
    for old, new in (
        (tmp_path / "corpus", folder / "corpus"),
        (tiny_t5, folder / "t5"),
        (tiny_asr, folder / "encoder.nemo"),
    ):
        text = text.replace(str(old), str(new))
    recipe = json.loads(text)
    recipe["data"]["train_ds"] |= {"weights": "auto"}
    for group in ("audio", "text"):
        recipe["data"]["train_ds"][group]["token_equivalent_duration"] = 0.08
    recipe["trainer"] |= {"max_steps": STEPS, "limit_train_batches": 4, "val_check_interval": 4}
    recipe["exp_manager"] |= {"create_tensorboard_logger": False, "log_step_timing": False}
    recipe["exp_manager"]["checkpoint_callback_params"] |= {
        "every_n_train_steps": 3,
        "every_n_epochs": None,
        "save_top_k": -1,
        "monitor": "loss",
        "mode": "min",
    }
    recipe["exp_manager"]["explicit_log_dir"] = str(tmp_path / "whole")
    recipe["export_dir"], recipe["export"] = str(folder / "export"), "last"
    model = training.train(OmegaConf.create(recipe))
    expected: dict[str, Any] = {"folder": str(folder), "salm_t5": translations(model, folder)}
    (checkpoint,) = (tmp_path / "whole" / "checkpoints").glob("*epoch=0.ckpt")
    assert torch.load(checkpoint, weights_only=False)["global_step"] == 3
    (folder / "run" / "checkpoints").mkdir(parents=True)
    shutil.copy(checkpoint, folder / "run" / "checkpoints" / f"{checkpoint.stem}-last.ckpt")
    for name, cls in (("salm_gpt", SALMGPT), ("bestow_gpt", BestowGPT)):
        torch.manual_seed(1)
        made = cls(model_config("llama", tmp_path / "llms", folder / "encoder.nemo"))
        made.save_pretrained(folder / name)
        expected[name] = translations(made, folder)
    (folder / "recipe.json").write_text(json.dumps(recipe, indent=1).replace(str(folder), "{folder}"))
    (folder / "expected.json").write_text(json.dumps(expected, indent=1, ensure_ascii=False))
