"""A training that is killed and run again ends with the weights of one that was never killed, to the last bit."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from omegaconf import OmegaConf
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from nemo_emmett import training
from nemo_emmett.errors import EXIT_TRY_AGAIN

STEPS, STEPS_PER_EPOCH = 12, 3

Moment = tuple[str, int, int]
"""A hook, the step, and the signal that is sent there."""


class Observer(Callback):
    """Writes each validation to a log, and kills the process at the given hook of the given step."""

    hooks = ("train_batch_start", "train_batch_end", "validation_batch_end", "save_checkpoint")

    def __init__(self, log_path: Path, kill_at: Moment | None) -> None:
        self.log_path, self.kill_at = log_path, kill_at

    def at(self, hook: str, trainer: Trainer) -> None:
        if hook in self.hooks and self.kill_at is not None and self.kill_at[:2] == (hook, trainer.global_step):
            os.killpg(os.getpid(), self.kill_at[2])  # data workers too, as a terminal and SLURM do

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self.at("train_batch_start", trainer)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.at("train_batch_end", trainer)

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self.at("validation_batch_end", trainer)

    def on_save_checkpoint(self, trainer, module, checkpoint) -> None:
        self.at("save_checkpoint", trainer)

    def on_validation_end(self, trainer, module) -> None:
        scores = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val_")}
        logged_at = trainer.fit_loop.epoch_loop._batches_that_stepped
        line = {"epoch": trainer.current_epoch, "step": trainer.global_step, "logged_at": logged_at, **scores}
        with open(self.log_path, "a") as log:
            log.write(json.dumps(line, sort_keys=True) + "\n")


class LastObserver(Observer):
    """The same, behind the callback that writes checkpoints; it logs nothing."""

    hooks = ("validation_end", "train_epoch_end")

    def on_validation_end(self, trainer, module) -> None:
        self.at("validation_end", trainer)

    def on_train_epoch_end(self, trainer, module) -> None:
        self.at("train_epoch_end", trainer)


def train_in_child(recipe: dict, log: Path, kill_at: Moment | None, observer: type[Observer]) -> None:
    os.setsid()
    torch.set_num_threads(1)
    built = training.build_training

    def observed(cfg: Any) -> training.Training:
        made = built(cfg)
        made.trainer.callbacks.insert(0, observer(log, kill_at))
        made.trainer.callbacks.append(LastObserver(log, kill_at))
        return made

    training.build_training = observed
    training.train(OmegaConf.create(recipe))


def run(recipe: dict, log: Path, kill_at: Moment | None = None, observer: type[Observer] = Observer) -> int:
    """Train in a forked process, which has imported everything; returns its exit code."""
    process = multiprocessing.get_context("fork").Process(target=train_in_child, args=(recipe, log, kill_at, observer))
    process.start()
    process.join()
    return process.exitcode


def last_checkpoint(folder: Path) -> dict:
    (path,) = (folder / "checkpoints").glob("*last.ckpt")
    checkpoint = torch.load(path, weights_only=False)
    kept = ("epoch", "global_step", "state_dict", "optimizer_states", "lr_schedulers", "loops")
    return {key: checkpoint[key] for key in kept} | {"random": checkpoint["callbacks"]["RandomState"]}


def differences(a: Any, b: Any, place: str = "") -> list[str]:
    if is_traceable_wrapper_subclass(a):
        return [d for name in a.__tensor_flatten__()[0] for d in differences(getattr(a, name), getattr(b, name), place)]
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [place]
    if isinstance(a, dict):
        assert a.keys() == b.keys(), place
        return [d for key in a for d in differences(a[key], b[key], f"{place}.{key}")]
    if isinstance(a, (list, tuple)):
        assert len(a) == len(b), place
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{place}[{i}]")]
    return [] if a == b else [f"{place}: {a!r} and {b!r}"]


@pytest.fixture
def exact_recipe(recipe, corpus, tiny_corpus) -> dict:
    """Four epochs with dropout, a schedule, checkpoints of the best and the last; on the same files in every test."""
    recipe = json.loads(json.dumps(recipe).replace(str(corpus), str(tiny_corpus)))
    recipe["trainer"] |= {"max_steps": STEPS, "limit_train_batches": STEPS_PER_EPOCH}
    recipe["trainer"] |= {"val_check_interval": STEPS_PER_EPOCH, "log_every_n_steps": 1}
    schedule = {"_target_": "nemo.core.optim.lr_scheduler.CosineAnnealing", "warmup_steps": 2, "max_steps": STEPS}
    recipe["model"]["lr_scheduler"] = schedule | {"min_lr": 1e-5}
    recipe["exp_manager"]["create_tensorboard_logger"] = False
    recipe["exp_manager"]["log_step_timing"] = False
    del recipe["export_dir"]
    return recipe


def moments(kills: int, seed: int) -> list[Moment]:
    """Where to kill, in the order in which a training that resumes comes past them."""
    draw = random.Random(seed)
    found = []
    for step in sorted(draw.sample(range(1, STEPS), kills)):
        hook = draw.choice(Observer.hooks + LastObserver.hooks if step % STEPS_PER_EPOCH == 0 else Observer.hooks[:2])
        found.append((hook, step, signal.SIGKILL))
    return found


@pytest.mark.parametrize(
    ("kills", "workers", "checkpoints"),
    [
        (5, 0, {}),
        (5, 2, {}),
        (2, 0, {"every_n_train_steps": 2, "every_n_epochs": None}),
        (2, 0, {"save_on_train_epoch_end": True, "monitor": "loss", "mode": "min"}),
    ],
    ids=["validation", "validation-two-workers", "every-two-steps", "epoch-end"],
)
def test_killed_at_random_and_run_again_it_ends_as_if_never_killed(
    exact_recipe, tmp_path, uninterrupted, kills, workers, checkpoints
):
    exact_recipe["data"]["train_ds"]["num_workers"] = workers
    exact_recipe["exp_manager"]["checkpoint_callback_params"] |= checkpoints
    compare(exact_recipe, tmp_path, uninterrupted, moments(kills, seed=workers + len(checkpoints)))


@pytest.mark.parametrize(
    "target",
    [
        pytest.param(target, marks=pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed"))
        for package, target in (
            ("torchao", "torchao.optim.AdamW8bit"),
            ("torchao", "torchao.optim.AdamW4bit"),
            ("bitsandbytes", "bitsandbytes.optim.AdamW8bit"),
        )
    ],
)
def test_an_optimizer_of_few_bits_goes_on_where_it_was(exact_recipe, tmp_path, uninterrupted, target):
    exact_recipe["model"]["optimizer"] = {"_target_": target, "lr": 1e-3}
    with torch.compiler.set_stance("force_eager"):
        compare(exact_recipe, tmp_path, uninterrupted, [("train_batch_end", 7, signal.SIGKILL)])


def test_float32_copies_of_the_weights_go_on_where_they_were(exact_recipe, tmp_path, uninterrupted):
    exact_recipe["model"]["optimizer"] = {"_target_": "nemo_emmett.optimizers.MasterWeightAdamW", "lr": 1e-3}
    exact_recipe["trainer"]["precision"] = "bf16-true"
    compare(exact_recipe, tmp_path, uninterrupted, [("train_batch_end", 7, signal.SIGKILL)])


@pytest.mark.parametrize("workers", [0, 2])
def test_signals_stop_it_with_a_checkpoint_and_no_step_is_trained_twice(
    exact_recipe, tmp_path, uninterrupted, capfd, workers
):
    exact_recipe["data"]["train_ds"]["num_workers"] = workers
    stops = [
        ("train_batch_start", 1, signal.SIGTERM),
        ("train_batch_end", 4, signal.SIGINT),
        ("validation_batch_end", 6, signal.SIGTERM),
        ("validation_end", 9, signal.SIGINT),
    ]
    compare(exact_recipe, tmp_path, uninterrupted, stops)
    printed = capfd.readouterr().err
    stopped_after = [2, 4, 6, 10]
    for (_, _, number), step in zip(stops, stopped_after, strict=True):
        assert f"{signal.Signals(number).name}: training stopped after step {step}." in printed
    assert "SystemExit" not in printed
    assert "KeyboardInterrupt" not in printed
    steps = [json.loads(line)["step"] for line in (tmp_path / "killed.jsonl").read_text().splitlines()]
    assert steps == [3, 6, 9, 12]


def test_a_second_signal_ends_it_at_once(exact_recipe, tmp_path):
    class Twice(Observer):
        def at(self, hook: str, trainer: Trainer) -> None:
            super().at(hook, trainer)
            super().at(hook, trainer)
            assert (hook, trainer.global_step) != self.kill_at[:2]

    moment = ("train_batch_start", 1, signal.SIGTERM)
    assert run(exact_recipe, tmp_path / "log.jsonl", moment, Twice) == -signal.SIGTERM


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory) -> Callable[[dict], tuple[dict, list[str]]]:
    """The last checkpoint and the validations of a recipe's training that nothing interrupts; once for equal ones."""
    known: dict[str, tuple[dict, list[str]]] = {}

    def trained(recipe: dict) -> tuple[dict, list[str]]:
        numbers, optimizer = recipe["data"]["train_ds"]["num_workers"], recipe["model"]["optimizer"]
        key = json.dumps({"data": numbers, "optimizer": optimizer, "manager": recipe["exp_manager"]})
        if key not in known:
            folder = tmp_path_factory.mktemp("whole")
            changed = {"exp_manager": recipe["exp_manager"] | {"explicit_log_dir": str(folder)}}
            assert run(recipe | changed, folder / "log.jsonl") == 0
            known[key] = last_checkpoint(folder), (folder / "log.jsonl").read_text().splitlines()
        return known[key]

    return trained


def compare(
    recipe: dict, folder: Path, uninterrupted: Callable[[dict], tuple[dict, list[str]]], stops: list[Moment]
) -> None:
    """Train without interruption, and stopped at these moments; the ends must be equal."""
    del recipe["exp_manager"]["explicit_log_dir"]
    checkpoint, whole = uninterrupted(recipe)
    recipe["exp_manager"]["explicit_log_dir"] = str(folder / "killed")
    for moment in stops:
        code = EXIT_TRY_AGAIN if moment[2] != signal.SIGKILL else -signal.SIGKILL
        assert run(recipe, folder / "killed.jsonl", moment) == code, moment
    assert run(recipe, folder / "killed.jsonl") == 0
    assert differences(checkpoint, last_checkpoint(folder / "killed")) == []
    killed = (folder / "killed.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in whole] == list(range(STEPS_PER_EPOCH, STEPS + 1, STEPS_PER_EPOCH))
    # Validations that were lost with the process come again, with the same scores.
    assert list(dict.fromkeys(killed)) == whole
