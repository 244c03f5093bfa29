"""A recipe names classes, not code: what is not on the allow-list is not imported, and Hydra calls nothing for it."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from click.testing import CliRunner
from omegaconf import OmegaConf

from nemo_emmett import training
from nemo_emmett.cli import main
from nemo_emmett.evaluation.recipe import read_yaml
from nemo_emmett.models import SALMT5
from nemo_emmett.runner import compose_recipe, recipe_runner
from tests.safety.conftest import Payload

RECIPE = {
    "model": {"_target_": "salm_t5", "pretrained_llm": "nowhere"},
    "trainer": {"accelerator": "cpu", "logger": False, "enable_checkpointing": False},
    "data": {"train_ds": {"batch_size": 1, "input_cfg": [{"type": "nemo", "manifest_filepath": "nowhere.json"}]}},
}


def recipe(payload: Payload, **changes) -> Path:
    cfg = OmegaConf.create(RECIPE)
    for key, value in changes.items():
        OmegaConf.update(cfg, key.replace("__", "."), value, force_add=True)
    path = payload.folder / "recipe.yaml"
    path.write_text(OmegaConf.to_yaml(cfg))
    return path


def targets(payload: Payload) -> dict[str, dict]:
    evil, function = {"_target_": payload.target}, {"_target_": "os.system", "command": payload.command}
    return {
        "model": {"model___target_": payload.target},
        "model of NeMo's tests": {"model___target_": f"tests.collections.{payload.target}"},
        "model that is a function": {"model___target_": "os.system"},
        "callback": {"trainer__callbacks": [evil]},
        "callback that is a function": {"trainer__callbacks": [function]},
        "strategy": {"trainer__strategy": evil},
    }


NOBODY = SimpleNamespace(target="", command="", module="")


@pytest.mark.parametrize("name", targets(NOBODY))
def test_a_class_that_is_not_allowed_is_not_imported(payload: Payload, name: str) -> None:
    path = recipe(payload, **targets(payload)[name])
    said = payload.refused(lambda: training.build_training(compose_recipe(str(path))))
    assert "allow" in said or "unsafe target" in said


@pytest.mark.parametrize("key", ["optimizer", "lr_scheduler"])
def test_neither_is_an_optimizer(payload: Payload, tiny_t5: Path, key: str) -> None:
    section = {"pretrained_llm": str(tiny_t5), "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1}}
    section[key] = {"_target_": payload.target}
    said = payload.refused(lambda: SALMT5(section).configure_optimizers())
    assert "allow-list" in said


READERS: dict[str, Callable[[Path], object]] = {
    "train": lambda path: compose_recipe(str(path)),
    "evaluate": read_yaml,
    "blend": lambda path: _invoke("blend", path),
    "bins": lambda path: _invoke("bins", path),
    "plan": lambda path: _invoke("plan", path, "--memory", "8GiB"),
    "oomptimize": lambda path: _invoke("oomptimize", path),
}


def _invoke(*arguments) -> None:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)
    raise SystemExit(done.output)


@pytest.mark.parametrize("reader", READERS)
def test_tags_of_yaml_make_nothing(payload: Payload, reader: str) -> None:
    path = payload.folder / "recipe.yaml"
    path.write_text(f"{yaml.safe_dump(RECIPE)}x: {payload.yaml}\n")
    assert payload.refused(lambda: READERS[reader](path))


@pytest.mark.parametrize("reader", ["train", "plan", "oomptimize"])
def test_a_search_path_imports_no_package(payload: Payload, reader: str) -> None:
    package = payload.folder / f"package_{payload.module}"
    package.mkdir()
    (package / "__init__.py").write_text(payload.code)
    path = recipe(payload, hydra__searchpath=[f"pkg://{package.name}"])
    assert "would import a package" in payload.refused(lambda: READERS[reader](path))


def of_hydra(payload: Payload) -> dict[str, dict]:
    call, handler = ({key: "os.system", "command": payload.command} for key in ("_target_", "()"))
    logs = {"version": 1, "root": {"handlers": ["x"]}}
    return {
        "callback": {"callbacks": {"x": call}},
        "handler": {"job_logging": {**logs, "handlers": {"x": handler}}},
        "handler of Hydra's own log": {"hydra_logging": {**logs, "handlers": {"x": handler}}},
        "class of a handler": {"job_logging": {**logs, "handlers": {"x": {"class": payload.target}}}},
        "object of a handler": {
            "job_logging": {
                **logs,
                "handlers": {"x": {"class": "logging.StreamHandler", "stream": f"ext://{payload.target}"}},
            }
        },
        "search path": {"searchpath": [f"pkg://package_{payload.module}"]},
    }


@pytest.mark.parametrize("name", of_hydra(NOBODY))
@pytest.mark.parametrize("option", ["--config-path", "--config-dir"])
def test_hydra_calls_nothing_for_a_recipe(payload: Payload, name: str, option: str) -> None:
    (payload.folder / f"package_{payload.module}").mkdir()
    (payload.folder / f"package_{payload.module}" / "__init__.py").write_text(payload.code)
    recipe(payload, hydra=of_hydra(payload)[name])
    code = _run_script(["train.py", option, str(payload.folder), "--config-name", "recipe"])
    assert not payload.ran
    assert code == 2


def test_hydras_own_logging_is_none_of_this(payload: Payload) -> None:
    recipe(payload)
    assert _run_script(["train.py", "--config-path", str(payload.folder), "--config-name", "recipe"]) == 0


def _run_script(arguments: list[str]) -> int | None:
    """The exit code of a script, in a process of its own, whose logging Hydra sets up."""

    def run() -> None:
        sys.argv = arguments
        recipe_runner("recipe")(_task)()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(60)
    return process.exitcode


def _task(cfg) -> None:
    assert cfg.model
