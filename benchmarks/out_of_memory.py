"""What becomes of out-of-memory errors at random steps and ranks, in forward pass, backward pass and optimizer's step?

A small SALM-T5 is trained on speech and text by a recipe with the OOMptimizer callback, in one process, and in two
under DDP and FSDP2, with batches alone and accumulated. Errors are injected. Either the step is redone and the training
goes on; its last weights are then compared with those of a training without errors (plain gradient descent, no
dropout). Or all ranks exit with code 75, and the training is started again, which NeMo's exp_manager resumes from the
last checkpoint, with the batch sizes that were lowered; how long that exit takes is measured from the error. Any other
end is a failure, and is counted.

    python benchmarks/out_of_memory.py [--errors 28] [--strategies DDP] [--accumulated 4] [--phases forward]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from lightning.pytorch import Callback
from measuring import RESULTS, keep
from measuring.models import WORDS, model_section, write_t5
from nemo.utils import logging
from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import track
from rich.table import Table

from nemo_emmett import training
from nemo_emmett.errors import EXIT_TRY_AGAIN

PACKAGES = ("nemo_emmett", "nemo_toolkit", "torch", "lightning")
PHASES = ("forward", "backward", "optimizer")
STRATEGIES: dict[str, tuple[int, Any]] = {
    "one device": (1, "auto"),
    "DDP": (2, {"_target_": "lightning.pytorch.strategies.DDPStrategy", "find_unused_parameters": True}),
    "FSDP2": (
        2,
        {
            "_target_": "lightning.pytorch.strategies.ModelParallelStrategy",
            "data_parallel_size": 2,
            "tensor_parallel_size": 1,
        },
    ),
}
"""Number of ranks, and ``trainer.strategy``."""

ACCUMULATED = (1, 4)
WIDTH = 64
SIZES = {"audio": 32, "text": 48}
SECONDS_WITHOUT_A_STEP = 120
"""After which a launch hangs; a checkpoint is written after each step."""

STEPS_AFTER_AN_ERROR = 2
"""Optimizer steps between errors, at least; a checkpoint is written after each."""


@dataclass(frozen=True)
class Cell:
    """A strategy, the batches of an optimizer step, and where errors come.

    Args:
        folder: receives checkpoints, profile and logs.
    """

    strategy: str
    accumulated: int
    phase: str
    folder: Path


@dataclass
class Outcome:
    """What became of a cell's errors."""

    redone: int = 0
    exits: int = 0
    failures: list[str] = field(default_factory=list)
    launches: int = 0
    slowest_exit: float = 0.0
    last_weights_differ: float | None = None
    batch_size: list[int] = field(default_factory=list)


class Injector(Callback):
    """Raises out-of-memory errors on this rank, each in one batch.

    Args:
        phase: where.
        at: numbers of the batches, counted from the start of the process.
        path: gets the time of each error.
    """

    def __init__(self, phase: str, at: set[int], path: Path) -> None:
        self.phase, self.at, self.path = phase, at, path
        self.seen, self.is_armed = -1, False

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Where errors come from."""
        module.llm.encoder.register_forward_hook(self._pass)
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(lambda *_: self._fail("optimizer"))

    def on_train_batch_start(self, *_: Any) -> None:
        """Arm, if this is a batch with an error."""
        self.seen += 1
        self.is_armed = self.is_armed or self.seen in self.at  # the optimizer's step may come batches later

    def _pass(self, module: Any, args: Any, output: Any) -> Any:
        output["last_hidden_state"] = _Fuse.apply(output["last_hidden_state"], self)
        return output

    def _fail(self, phase: str) -> None:
        if self.is_armed and phase == self.phase:
            self.is_armed = False
            with self.path.open("a") as file:
                file.write(f"{time.time()}\n")
            raise torch.OutOfMemoryError("injected: out of memory")


class _Fuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, injector: Injector) -> torch.Tensor:
        injector._fail("forward")
        ctx.injector = injector
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.injector._fail("backward")
        return gradient, None


def write_data(folder: Path) -> dict[str, Any]:
    """Short recordings and sentences, and the section of the training data."""
    rng, words = random.Random(0), WORDS.split()
    (folder / "audio").mkdir()
    lines = []
    for number in range(160):
        seconds = round(rng.uniform(0.1, 0.3), 2)
        path = folder / "audio" / f"{number}.wav"
        soundfile.write(path, 0.05 * np.random.default_rng(number).normal(size=round(seconds * 16_000)), 16_000)
        record = {"audio_filepath": str(path), "duration": seconds, "text": " ".join(rng.choices(words[10:], k=3))}
        lines.append(json.dumps(record | {"source_lang": "en", "target_lang": "de"}))
    (folder / "speech.jsonl").write_text("\n".join(lines))
    for language, of_language in (("en", words[:10]), ("de", words[10:])):
        text = [" ".join(rng.choices(of_language, k=rng.randint(2, 6))) for _ in range(240)]
        (folder / f"text.{language}").write_text("\n".join(text))
    text = {"type": "parallel_text", "paths": {language: str(folder / f"text.{language}") for language in ("en", "de")}}
    group = {"shuffle": True, "use_bucketing": True}
    return {
        "multi_config": True,
        "sampler_fusion": "zip",
        "seed": 0,
        "shard_seed": 0,
        "num_workers": 0,
        "prompt_format": "emmett_t5",
        "audio_locator_tag": "<|audio|>",
        "audio": {
            **group,
            "input_cfg": [{"type": "nemo", "manifest_filepath": str(folder / "speech.jsonl")}],
            "bucket_duration_bins": [1.0],
        },
        "text": {
            **group,
            "use_multimodal_sampling": True,
            "input_cfg": [text],
            "bucket_duration_bins": [[40, 20]],
        },
    }


def recipe_of(cell: Cell, train_ds: Mapping[str, Any], t5: Path, steps: int) -> dict[str, Any]:
    """A recipe as users write it."""
    ranks, strategy = STRATEGIES[cell.strategy]
    model = model_section(t5, "emmett_t5", WIDTH, 1)
    model["perception"]["encoder"] |= {"conv_norm_type": "layer_norm", "dropout": 0.0, "dropout_emb": 0.0}
    model["perception"]["encoder"] |= {"dropout_att": 0.0, "dropout_pre_encoder": 0.0}
    model["perception"]["preprocessor"]["dither"] = 0.0
    model["optimizer"] = {"_target_": "torch.optim.SGD", "lr": 0.003}
    callback = {
        "_target_": "nemo_emmett.callbacks.OOMptimizer",
        "profile": str(cell.folder / "profile.yaml"),
        "memory_budget": "4GiB",
    }
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return {
        "seed": 0,
        "num_threads": 1,
        "model": {"_target_": "salm_t5", **model},
        "data": {"train_ds": dict(train_ds)},
        "trainer": {
            "accelerator": "cpu",
            "devices": ranks,
            "strategy": strategy,
            "max_steps": steps,
            "limit_train_batches": 10_000,
            "limit_val_batches": 0,
            "num_sanity_val_steps": 0,
            "accumulate_grad_batches": cell.accumulated,
            "use_distributed_sampler": False,
            "callbacks": [callback],
            **quiet,
        },
        "exp_manager": {
            "explicit_log_dir": str(cell.folder / "exp"),
            "resume_if_exists": True,
            "resume_ignore_no_checkpoint": True,
            "create_tensorboard_logger": False,
            "checkpoint_callback_params": {
                "monitor": "step",
                "mode": "max",
                "save_top_k": 1,
                "every_n_train_steps": 1,
                "every_n_epochs": None,
            },
        },
    }


def train_on_rank(rank: int, port: int, recipe: dict, injector: Injector | None, log: Path) -> None:
    """Train in this process, which is one rank."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    if recipe["trainer"]["devices"] > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "LOCAL_RANK": str(rank)}
    build = training.build_training

    def observed(cfg: Any, *args: Any, **options: Any) -> training.Training:
        made = build(cfg, *args, **options)
        if injector is not None:
            made.trainer.callbacks.append(injector)
        return made

    training.build_training = observed
    training.train(OmegaConf.create(recipe))


def launch(recipe: dict, injectors: list[Injector | None], folder: Path) -> tuple[list[int | None], float]:
    """Start a training; the exit code of each rank, None where one hangs, and when the last of them ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=train_on_rank, args=(rank, port, recipe, injector, folder / f"rank{rank}.log"))
        for rank, injector in enumerate(injectors)
    ]
    for process in processes:
        process.start()
    checkpoints, progress = folder / "exp" / "checkpoints", (0.0, time.monotonic())
    while any(process.is_alive() for process in processes):
        changed = checkpoints.stat().st_mtime if checkpoints.exists() else 0.0
        if changed != progress[0]:
            progress = changed, time.monotonic()
        if time.monotonic() - progress[1] > SECONDS_WITHOUT_A_STEP:
            break
        wait([process.sentinel for process in processes if process.is_alive()], timeout=1)
    ended = time.time()
    codes = [process.exitcode for process in processes]
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    return codes, ended


def last_weights(folder: Path) -> torch.Tensor:
    """All weights of the last checkpoint in one row."""
    (path,) = (folder / "exp" / "checkpoints").glob("*last.ckpt")
    state = torch.load(path, weights_only=False)["state_dict"]
    return torch.cat([state[name].float().flatten() for name in sorted(state) if state[name].is_floating_point()])


def write_profile(folder: Path) -> None:
    """The batch sizes that a cell begins with, as a user writes them."""
    groups = {
        "audio": {"bucket_duration_bins": [1.0], "bucket_batch_size": [SIZES["audio"]]},
        "text": {"bucket_duration_bins": [[40, 20]], "bucket_batch_size": [SIZES["text"]]},
    }
    OmegaConf.save(OmegaConf.create({"train_ds": groups}), folder / "profile.yaml")


def size_now(folder: Path) -> int:
    """The batch size of speech in the profile."""
    return OmegaConf.load(folder / "profile.yaml").train_ds.audio.bucket_batch_size[0]


def run(cell: Cell, errors: int, steps: int, train_ds: Mapping[str, Any], t5: Path) -> Outcome:
    """Train so many steps, in which so many errors come."""
    cell.folder.mkdir(parents=True)
    write_profile(cell.folder)
    ranks, _ = STRATEGIES[cell.strategy]
    recipe = recipe_of(cell, train_ds, t5, steps)
    draw, outcome = random.Random(str(cell)), Outcome(batch_size=[SIZES["audio"]])
    while True:
        left = errors - outcome.redone - outcome.exits
        batches, at = 0, [set() for _ in range(ranks)]
        for _ in range(left):
            batches += draw.randint(STEPS_AFTER_AN_ERROR, STEPS_AFTER_AN_ERROR + 2) * cell.accumulated
            at[draw.randrange(ranks)].add(batches + draw.randrange(cell.accumulated))
        log = cell.folder / "errors"
        log.write_text("")
        codes, ended = launch(recipe, [Injector(cell.phase, a, log) for a in at], cell.folder)
        outcome.launches += 1
        fired = [float(line) for line in log.read_text().split()]
        if codes == [EXIT_TRY_AGAIN] * ranks and fired:
            outcome.redone += len(fired) - 1
            outcome.exits += 1
            outcome.slowest_exit = max(outcome.slowest_exit, ended - fired[-1])
            continue
        outcome.redone += len(fired)
        if codes != [0] * ranks:
            outcome.failures.append(f"exit codes {codes} after {len(fired)} errors of launch {outcome.launches}")
        break
    outcome.batch_size.append(size_now(cell.folder))
    return outcome


def cell_of(row: Mapping[str, Any]) -> tuple[int, int, int]:
    """Its place in the table."""
    return list(STRATEGIES).index(row["strategy"]), row["accumulated"], PHASES.index(row["phase"])


def known_cells() -> list[dict[str, Any]]:
    """Of a run before, which those that are measured now replace."""
    path = RESULTS / "out_of_memory.json"
    return json.loads(path.read_text())["cells"] if path.exists() else []


def main() -> None:
    """Measure and print; what is known is kept after each cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--errors", type=int, default=28, help="of each cell")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--accumulated", nargs="+", type=int, choices=ACCUMULATED, default=list(ACCUMULATED))
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.setLevel(logging.ERROR)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would not be there after a fork
    rows, console = known_cells(), Console(width=130)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_ds = write_data(folder)
        write_t5(folder / "t5", WIDTH, 1, 512, dropout_rate=0.0)
        cells = list(product(options.strategies, options.accumulated, options.phases))
        steps, data = (options.errors + 1) * (STEPS_AFTER_AN_ERROR + 2), (train_ds, folder / "t5")
        expected: dict[Any, torch.Tensor] = {}
        for strategy, accumulated, phase in track(cells, "Training", console=console):
            cell = Cell(strategy, accumulated, phase, folder / f"{strategy}, {accumulated}, {phase}")
            outcome = run(cell, options.errors, steps, *data)
            if not outcome.exits and not outcome.failures:
                if (key := (strategy, accumulated)) not in expected:
                    without = Cell(*key, "none", folder / f"{strategy}, {accumulated}")
                    run(without, 0, steps, *data)
                    expected[key] = last_weights(without.folder)
                outcome.last_weights_differ = float((last_weights(cell.folder) - expected[key]).abs().max())
            if outcome.failures:
                print((cell.folder / "rank0.log").read_text()[-3000:], file=sys.stderr)
            row = {"strategy": strategy, "accumulated": accumulated, "phase": phase, **vars(outcome)}
            rows = sorted([*(other for other in rows if cell_of(other) != cell_of(row)), row], key=cell_of)
            console.print(row, highlight=False)
            errors = sum(row["redone"] + row["exits"] for row in rows)
            path = keep("out_of_memory", {"errors": errors, "cells": rows}, PACKAGES)
    table = Table(
        "strategy", "batches a step", "error in", "errors", "redone", "exit 75", "slowest exit, s", "failures"
    )
    for row in rows:
        found = row["redone"] + row["exits"]
        shown = (row["strategy"], row["accumulated"], row["phase"], found, row["redone"], row["exits"])
        table.add_row(*map(str, shown), f"{row['slowest_exit']:.1f}", str(len(row["failures"])))
    console.print(table)
    console.print(f"{errors} errors. Written to {path}.")


if __name__ == "__main__":
    main()
