"""Recipes from the command line: what runs, and how mistakes are reported."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nemo_emmett.errors import ConfigError
from nemo_emmett.runner import compose_recipe

SCRIPT = """
import sys
from nemo_emmett.errors import DataError
from nemo_emmett.runner import recipe_runner

@recipe_runner("recipe_of_test")
def main(cfg):
    assert "torch" not in sys.modules
    if cfg.fault == "user":
        raise DataError("manifest.json: there is no such file.")
    if cfg.fault == "ours":
        raise RuntimeError("a bug")
    if cfg.fault == "key":
        print(cfg.no_such_key)
    print("RAN", cfg.trainer.max_steps, cfg.model.name, sys.argv[1:])

main()
"""
RECIPE = """
fault: null
trainer: {max_steps: 5, accelerator: cpu}
model: {name: small}
"""


@pytest.fixture
def run(tmp_path: Path):
    """Run the script on a folder of recipes, away from the source tree."""
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    (tmp_path / "script.py").write_text(SCRIPT)
    (recipes / "recipe_of_test.yaml").write_text(RECIPE)
    (recipes / "needy.yaml").write_text("fault: null\ntrainer:\n  max_steps: ???\nmodel:\n  name: ???\n")
    (recipes / "torn.yaml").write_text("fault: [\n")

    def run_script(*arguments: str, path: str | None = "recipes") -> subprocess.CompletedProcess:
        where = ["--config-path", str(tmp_path / path)] if path else []
        command = [sys.executable, "script.py", *where, *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    return run_script


def sentence_of(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    line, *page = done.stderr.splitlines()
    assert not page or page[0].startswith("See docs/how-to/errors.md#")
    assert len(page) <= 1
    return line


def test_runs_with_overrides_and_leaves_no_files(run, tmp_path: Path) -> None:
    done = run("trainer.max_steps=7")
    assert done.returncode == 0, done.stderr
    arguments = ["--config-path", str(tmp_path / "recipes"), "trainer.max_steps=7"]
    assert done.stdout.strip() == f"RAN 7 small {arguments}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipes", "script.py"]


def test_finds_our_config_groups_from_a_foreign_folder(run) -> None:
    done = run("+emmett_callbacks=random_state", "--cfg", "job")
    assert "_target_: nemo_emmett.callbacks.RandomState" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["trainer.max_step=7"],
            "Error: trainer.max_step: there is no such key in the recipe; did you mean 'max_steps'?",
        ),
        (["moddel.name=x"], "Error: moddel: there is no such key in the recipe; did you mean 'model'?"),
        (
            ["trainer.gradient_clip=1"],
            "Error: trainer.gradient_clip: there is no such key in the recipe; "
            "to add it, write +trainer.gradient_clip=...",
        ),
        (["fault=user"], "Error: manifest.json: there is no such file."),
        (
            ["--config-name", "needy"],
            "Error: model.name, trainer.max_steps: the recipe leaves this to you; "
            "give model.name=... on the command line.",
        ),
        (
            ["--config-name", "needy", "model.name=x"],
            "Error: trainer.max_steps: the recipe leaves this to you; give trainer.max_steps=... on the command line.",
        ),
        (
            ["+emmett_callbacks=random_stat"],
            "Error: emmett_callbacks: there is no recipe 'random_stat'; did you mean 'random_state'?",
        ),
    ],
)
def test_a_users_mistake_is_one_sentence_and_exit_code_2(run, arguments: list[str], sentence: str) -> None:
    assert sentence_of(run(*arguments)) == sentence


def test_a_misspelt_recipe_names_the_nearest(run) -> None:
    sentence = sentence_of(run("--config-name", "recipe_of_tests"))
    assert sentence == "Error: there is no recipe 'recipe_of_tests'; did you mean 'recipe_of_test'?"
    assert "there is no recipe 'zzz'; there are " in sentence_of(run("--config-name", "zzz", path=None))


def test_a_missing_folder_and_torn_yaml_are_told(run) -> None:
    assert "no_such_folder" in sentence_of(run(path="no_such_folder"))
    assert "torn.yaml" in sentence_of(run("--config-name", "torn"))
    assert "trainer.max_steps=[1: cannot be read" in sentence_of(run("trainer.max_steps=[1"))


def test_options_may_stand_anywhere(run) -> None:
    done = run("trainer.max_steps=7", "--config-name", "recipe_of_test", "model.name=large")
    assert done.stdout.startswith("RAN 7 large")


def test_a_bug_keeps_its_traceback(run) -> None:
    for fault, message in {"ours": "RuntimeError: a bug", "key": "Key 'no_such_key' is not in struct"}.items():
        done = run(f"fault={fault}")
        assert done.returncode == 1
        assert "Traceback" in done.stderr
        assert message in done.stderr


def test_called_with_a_config_it_just_runs() -> None:
    from nemo_emmett.runner import recipe_runner

    assert recipe_runner("any")(lambda cfg: cfg.x)(OmegaConf.create({"x": 3})) == 3


# compose_recipe: the same for a command


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    (tmp_path / "own.yaml").write_text("defaults:\n  - emmett_callbacks: random_state\n  - _self_\n" + RECIPE)
    (tmp_path / "needy.yaml").write_text("model:\n  name: ???\n")
    (tmp_path / "referring.yaml").write_text(
        "folder: ???\npaths:\n  - ${folder}/a\n  - {b: '${folder}/b', c: \"???\"}\n"
    )
    (tmp_path / "lists.yaml").write_text("a: [{b: '???', c: 2}]\nx: 1\n")
    (tmp_path / "astray.yaml").write_text("a:\n  b: ${no.such.key}/x\n")
    (tmp_path / "torn.yaml").write_text("fault: [\n")
    return tmp_path


def test_a_file_is_composed_with_its_defaults_and_overrides(recipes: Path, monkeypatch) -> None:
    cfg = compose_recipe(str(recipes / "own.yaml"), ["trainer.max_steps=7", "+model.extra=1"])
    assert cfg.trainer.callbacks[0]._target_ == "nemo_emmett.callbacks.RandomState"
    assert (cfg.trainer.max_steps, cfg.model) == (7, {"name": "small", "extra": 1})
    assert "hydra" not in cfg
    monkeypatch.chdir(recipes)
    assert compose_recipe("own.yaml").trainer.max_steps == 5


def test_a_shipped_recipe_goes_by_its_name() -> None:
    assert compose_recipe("salm_t5", ["seed=9"]).seed == 9


@pytest.mark.parametrize(
    ("config", "overrides", "sentence"),
    [
        ("gone.yaml", [], "The recipe 'gone.yaml' cannot be read: there is no such file."),
        ("folder/recipe", [], "The recipe 'folder/recipe' cannot be read: there is no such file."),
        ("salm_gtp", [], "there is no recipe 'salm_gtp'; did you mean 'salm_gpt'?"),
        (
            "salm_t5_phrasebook",
            [],
            "there is no recipe 'salm_t5_phrasebook'; there are bestow_gpt, evaluate_fleurs_flores, salm_gpt, salm_t5; "
            "name any other by the path of its file",
        ),
        ("{}/own.yaml", ["trainer.max_step=7"], "trainer.max_step: there is no such key in the recipe; did you mean"),
        ("{}/own.yaml", ["trainer.max_steps=[1"], "trainer.max_steps=[1: cannot be read as key=value"),
        (
            "{}/own.yaml",
            ["emmett_callbacks=random_stat"],
            "there is no recipe 'random_stat'; did you mean 'random_state'",
        ),
        ("{}/needy.yaml", [], "model.name: the recipe leaves this to you; give model.name=..."),
        ("{}/referring.yaml", [], "folder, paths.1.c: the recipe leaves this to you; give folder=... on the"),
        ("{}/astray.yaml", [], "a.b: Interpolation key 'no.such.key' not found; correct what it refers to."),
        ("{}/torn.yaml", [], "torn.yaml"),
        ("{}/lists.yaml", [], "a.0.b: the recipe leaves this to you; give a.0.b=... on the command line."),
        ("{}/lists.yaml", ["a.0.bb=1"], "a.0.bb: there is no such key in the recipe; did you mean 'b'?"),
        ("{}/lists.yaml", ["a.0.other=1"], "there is no such key in the recipe; to add it, write +a.0.other="),
        ("{}/lists.yaml", ["a.4.b=1"], "a.4: the recipe's list has no such item; give the whole list."),
    ],
)
def test_mistakes_are_told_as_scripts_tell_them(
    recipes: Path, config: str, overrides: list[str], sentence: str
) -> None:
    with pytest.raises(ConfigError) as error:
        compose_recipe(config.format(recipes), overrides)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("typed", "key", "value"),
    [
        ("x=exp/step=7-last.ckpt", "x", "exp/step=7-last.ckpt"),
        ("x=/corpus (v1)/a.ckpt", "x", "/corpus (v1)/a.ckpt"),
        ("x=it's=1", "x", "it's=1"),
        ("+y=a=b", "y", "a=b"),
        ("x=a,b", "x", "a,b"),
        ("a[0].c=5", "a.0.c", 5),
        ("a[0].c=d=e", "a.0.c", "d=e"),
    ],
)
def test_a_remedy_can_be_typed_as_it_is_printed(recipes: Path, typed: str, key: str, value) -> None:
    recipe = str(recipes / "lists.yaml")
    with pytest.raises(ConfigError) as error:
        compose_recipe(recipe, ["a.0.b=1", typed])
    (written,) = re.findall(r"; write (.+?) (?:instead|for a text)", str(error.value))
    (argument,) = shlex.split(written)
    assert OmegaConf.select(compose_recipe(recipe, ["a.0.b=1", argument]), key) == value
