"""``nemo-emmett train``: what examples/speechlm/train.py does, from an installed package alone."""

from __future__ import annotations

import os
import re
import sys
from importlib.metadata import entry_points
from itertools import takewhile
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from omegaconf import OmegaConf

from nemo_emmett.cli import main
from nemo_emmett.models import load

from .fork_server import call_in_new_process, print_to


def test_it_trains_on_two_devices_and_exports(recipe, tmp_path: Path) -> None:
    for key in ("enable_progress_bar", "enable_model_summary"):
        del recipe["trainer"][key]
    OmegaConf.save(OmegaConf.create(recipe), tmp_path / "recipes.yaml")
    overrides = ["trainer.devices=2", "+trainer.strategy=ddp", "trainer.max_steps=2"]
    code, printed = call_in_new_process(run_command, tmp_path, "train", "recipes.yaml", *overrides)
    assert code == 0, printed
    check_printed(printed.splitlines())
    check_log_files(tmp_path / "exp")
    assert load(recipe["export_dir"]).translate(["one red house"], "en", "de")
    (last,) = (tmp_path / "exp" / "checkpoints").glob("*-last.ckpt")
    assert torch.load(last, weights_only=False)["global_step"] == 2


def check_printed(lines: list[str]) -> None:
    """Rank zero alone prints, and what a user wants to know: two tables, and the progress between them."""
    (first_step,) = [number for number, line in enumerate(lines) if line.startswith("step 1/2 (50%)  loss audio ")]
    assert first_step <= 25
    assert lines.count("Training") == lines.count("Trained") == 1
    assert not [line for line in lines if "warning" in line.lower()]
    assert max(map(len, lines)) <= 80
    start, end = (table_of(lines, title) for title in ("Training", "Trained"))
    assert start["parameters"] == "54,720, of which 54,720 are trained (100.0%)"
    assert start["devices"] == "2 x CPU, DDP, precision 32-true"
    assert start["audio"].split() == ["of", "each", "record", "2", "12", "12", "9.0", "s", "100.0%"]
    assert start["text"].split()[:5] == ["en-de,", "de-en", "1", "6", "12"]  # six lines, in two directions
    assert (start["audio batch"], start["text batch"], start["steps"]) == ("4 examples", "3 examples", "2")
    assert (start["log"], start["watch"]) == ("exp/train.log", "tensorboard --logdir exp")
    assert (end["steps"], end["epochs"], end["skipped"]) == ("2 of 2", "1", "no record")
    assert end["audio"].startswith("16 examples, ")  # two batches of four on each of two ranks
    assert end["text"].startswith("12 examples, ")
    assert end["best"].startswith("val_bleu 0.0000:")
    assert lines[-3:-1] == ["Next:", '  nemo-emmett translate --model export --to de "..."']


def table_of(lines: list[str], title: str) -> dict[str, str]:
    """The first line of each row of a summary."""
    lines = list(takewhile(lambda line: not line.startswith("step "), lines[lines.index(title) + 1 :]))
    rows = (re.split(r"  +", line.strip(), maxsplit=1) for line in lines if not line.startswith(" "))
    return {row[0]: row[1] for row in rows if len(row) == 2}


def check_log_files(folder: Path) -> None:
    """What the libraries log is in the files, of each rank."""
    of_zero, of_one = (folder / name for name in ("train.log", "train.rank1.log"))
    for text in ("ExpManager schema", "Trainable params", "requested tokenization during data sampling"):
        assert text in of_zero.read_text()
    # The second process was started by the first, with the same arguments, in a new interpreter.
    assert "MEMBER: 2/2" in of_one.read_text()
    assert "OneLogger" in of_one.read_text()


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
