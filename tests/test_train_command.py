"""``nemo-emmett train``: what examples/speechlm/train.py does, from an installed package alone."""

from __future__ import annotations

import os
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from omegaconf import OmegaConf

from nemo_emmett.cli import main
from nemo_emmett.models import load

from .fork_server import call_in_new_process, print_to


def test_it_trains_on_two_devices_and_exports(recipe, tmp_path: Path) -> None:
    OmegaConf.save(OmegaConf.create(recipe), tmp_path / "recipes.yaml")
    overrides = ["trainer.devices=2", "+trainer.strategy=ddp", "trainer.max_steps=2"]
    code, printed = call_in_new_process(run_command, tmp_path, "train", "recipes.yaml", *overrides)
    assert code == 0, printed
    assert "MEMBER: 2/2" in printed  # the second process was started by the first, with the same arguments
    assert load(recipe["export_dir"]).translate(["one red house"], "en", "de")
    (last,) = (tmp_path / "exp" / "checkpoints").glob("*-last.ckpt")
    assert torch.load(last, weights_only=False)["global_step"] == 2


def run_command(folder: Path, *arguments: str) -> tuple[int | None, str]:
    """Run the installed command in this process; Lightning starts the others by its path, in new interpreters."""
    log = folder / "log"
    print_to(log)
    os.chdir(folder)
    sys.argv = [str(Path(sys.executable).with_name("nemo-emmett")), *arguments]
    (entry_point,) = entry_points(group="console_scripts", name="nemo-emmett")
    try:
        code = entry_point.load()()
    except SystemExit as ended:
        code = ended.code
    return code, log.read_text()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["gone.yaml"], "The recipe 'gone.yaml' cannot be read: there is no such file."),
        (["salm_t6"], "there is no recipe 'salm_t6'; did you mean 'salm_t5'?"),
        (["salm_t5", "trainer.max_step=3"], "did you mean 'max_steps'?"),
        (["incomplete.yaml"], "model.pretrained_llm: the recipe leaves this to you"),
        (["incomplete", "model.pretrained_llm=x"], "there is no recipe 'incomplete'"),
        (["./incomplete", "model.pretrained_llm=x"], "the recipe has no section 'trainer'"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path: Path, monkeypatch, arguments: list[str], sentence: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("incomplete.yaml").write_text("model: {pretrained_llm: '???'}\n")
    done = CliRunner().invoke(main, ["train", *arguments])
    assert done.exit_code == 2
    (line,) = [line for line in done.output.splitlines() if line.startswith("Error: ")]
    assert sentence in line


def test_a_recipe_whose_oomptimizer_only_plans_does_not_train(recipe, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe["trainer"]["callbacks"] = [
        {"_target_": "nemo_emmett.callbacks.OOMptimizer", "mode": "plan", "memory_budget": "64MiB", "profile": "p.yaml"}
    ]
    recipe["data"]["train_ds"]["text"]["max_tokens"] = 20
    recipe["data"]["train_ds"]["audio"]["max_duration"] = 2.0
    OmegaConf.save(OmegaConf.create(recipe), "recipe.yaml")
    done = CliRunner().invoke(main, ["train", "recipe.yaml"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert Path("p.yaml").is_file()
    assert not Path(recipe["export_dir"]).exists()
    assert not list((tmp_path / "exp").rglob("*.ckpt"))
