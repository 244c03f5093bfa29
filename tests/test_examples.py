"""The recipes and scripts that ship: complete, and of one mind with the demo."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from nemo_emmett.training import check_recipe

EXAMPLES = Path(__file__).parents[1] / "examples" / "speechlm"

pytestmark = pytest.mark.usefixtures("scripts_importable")


def composed(name: str, *overrides: str):
    with initialize_config_dir(str(EXAMPLES / "conf"), version_base=None):
        return compose(name, overrides=list(overrides))


@pytest.fixture(scope="module")
def demo(scripts_importable):
    return importlib.import_module("demo")


@pytest.mark.parametrize(
    ("script", "arguments", "line"),
    [
        ("train.py", [], "  pretrained_llm: exp/phrasebook/t5/t5"),
        ("train.py", ["--config-name=salm_t5", "emmett_freezing=lora"], "    lora_alpha: 256"),
        ("evaluate.py", ["--config-name=evaluate_fleurs_flores"], "corpus: data/public"),
    ],
)
def test_a_script_runs_its_own_recipes_and_those_of_the_package_from_any_folder(script, arguments, line, tmp_path):
    command = [sys.executable, EXAMPLES / script, *arguments, "--cfg", "job"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert line in done.stdout.splitlines()


def test_a_misspelt_recipe_of_a_script_gets_its_name(tmp_path):
    command = [sys.executable, EXAMPLES / "train.py", "--config-name=salm_t5_phrasebok"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stderr == "Error: there is no recipe 'salm_t5_phrasebok'; did you mean 'salm_t5_phrasebook'?\n"


@pytest.mark.parametrize("name", ["salm_t5_phrasebook", "pretrain_t5_phrasebook"])
def test_the_training_recipes_have_no_strange_key_and_no_missing_value(name):
    recipe = composed(name)
    assert not OmegaConf.missing_keys(recipe)
    check_recipe(recipe)
    OmegaConf.to_container(recipe, resolve=True)


def test_every_override_of_the_demo_is_a_key_of_its_recipe(demo):
    stages = demo.demo_stages(Path("d"), Path("e")) + demo.speech_alone_stages(Path("d"), Path("e"))
    recipes = {
        "pretrain_encoder.py": "pretrain_encoder_phrasebook",
        "pretrain_t5.py": "pretrain_t5_phrasebook",
        "train.py": "salm_t5_phrasebook",
        "evaluate.py": "evaluate_phrasebook",
    }
    seen = set()
    for stage in stages[1:]:
        script, overrides = Path(stage.command[1]).name, stage.command[2:]
        composed(recipes[script], *overrides)  # Hydra refuses what is not there
        seen.add(script)
    assert seen == set(recipes)


def test_each_stage_finds_what_an_earlier_one_leaves(demo):
    exp = Path("e")
    results = [str(stage.result) for stage in demo.demo_stages(Path("d"), exp)]
    joint = next(stage for stage in demo.demo_stages(Path("d"), exp) if "together" in stage.title)
    recipe = composed("salm_t5_phrasebook", *joint.command[2:])
    assert recipe.model.pretrained_asr in results
    assert f"{recipe.model.pretrained_llm}/config.json" in results
    assert f"{recipe.export_dir}/config.json" in results


def test_speech_alone_differs_from_the_joint_training_in_its_data_only(demo):
    exp = Path("e")
    joint = next(stage for stage in demo.demo_stages(Path("d"), exp) if "together" in stage.title)
    alone = demo.speech_alone_stages(Path("d"), exp)[0]
    with_text, without = (
        OmegaConf.to_container(composed("salm_t5_phrasebook", *s.command[2:]), resolve=True) for s in (joint, alone)
    )
    assert without["data"]["train_ds"].keys() == with_text["data"]["train_ds"].keys() - {"text"}
    for key in ("model", "trainer", "seed"):
        assert with_text[key] == without[key]
