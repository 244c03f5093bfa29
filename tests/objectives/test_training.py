"""A recipe with objectives, from files to the exported model."""

from __future__ import annotations

import torch
from omegaconf import OmegaConf

from nemo_emmett.models import load
from nemo_emmett.training import train


def test_a_recipe_with_objectives_trains_logs_them_and_exports(recipe, tmp_path, capsys):
    """Its data has the transcripts since the model asks for them; the exported model does not know of it."""
    recipe["model"]["objectives"] = {
        "distillation": {"weight": 0.5, "warmup_steps": 2},
        "retention": {"weight": 0.5},
        "transcription": {"weight": 0.3},
    }
    recipe["trainer"]["log_every_n_steps"] = 1
    model = train(OmegaConf.create(recipe))
    assert "distillation (weight 0.5), retention (weight 0.5), transcription (weight 0.3)" in " ".join(
        capsys.readouterr().out.split()
    )
    metrics = model.trainer.logged_metrics
    for name in ("distillation", "retention"):
        assert metrics[f"loss_{name}"] > 0
    assert metrics["weight_distillation"] == 0.5
    exported = load(recipe["export_dir"])
    assert len(exported.translate(["one red house"], "en", "de")) == 1
    assert "objectives" not in exported.cfg
    (last,) = (tmp_path / "exp" / "checkpoints").glob("*-last.ckpt")
    weights = torch.load(last, weights_only=False)["state_dict"]
    assert not [name for name in weights if "teacher" in name]
