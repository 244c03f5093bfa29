"""Training runs in processes of their own, one per rank, that write down what they train on and may be killed."""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from nemo.collections.common.tokenizers import AutoTokenizer

from nemo_emmett.data import MultimodalDataModule, SpeechTextDataset

from ..fork_server import fork_server, print_to
from .corpora import ids_of

SECONDS_UNTIL_DEADLOCK = 40
"""A run takes one or two; the rest is for machines that are busy."""


@dataclass(frozen=True)
class Run:
    """One training run.

    Args:
        folder: receives the ranks' records and logs, and the checkpoints.
        train_ds: the data's config.
        tokenizer: folder of the tokenizer.
        steps: train so many (-1: without end) ...
        epochs: ... or so many passes (None: without end).
        batches_per_epoch: end a pass after so many batches (None: when the data ends).
        world_size: ranks, joined by gloo.
        checkpoint_every: save a checkpoint each time after so many steps; None: never.
        kill_in_step: die by SIGKILL in this step (from 0), on all ranks.
        checkpoint: resume from this one.
        environment: variables of the environment.
    """

    folder: Path
    train_ds: Mapping[str, Any]
    tokenizer: Path
    steps: int = -1
    epochs: int | None = None
    batches_per_epoch: int | None = None
    world_size: int = 1
    checkpoint_every: int | None = None
    kill_in_step: int | None = None
    checkpoint: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    def with_changes(self, folder: str, **changes) -> Run:
        """Another run, whose folder is next to this one's."""
        return replace(self, folder=self.folder.parent / folder, **changes)

    def records(self, rank: int = 0) -> list[dict]:
        """What a rank has trained on, step by step."""
        path = self.folder / f"rank{rank}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def log(self, rank: int = 0) -> str:
        """All that a rank has printed."""
        return (self.folder / f"rank{rank}.log").read_text()

    def checkpoints(self) -> dict[int, Path]:
        """The checkpoints by the number of steps trained before them."""
        return {int(path.stem.removeprefix("step=")): path for path in sorted(self.folder.glob("*.ckpt"))}


class Recorder(LightningModule):
    """Trains one number, and writes down each step's examples before it is trained."""

    def __init__(self, run: Run, rank: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.run, self.rank = run, rank

    def training_step(self, batch: dict) -> torch.Tensor:
        step = {
            "step": self.global_step,
            "epoch": self.current_epoch,
            "modalities": sorted(batch),
            "ids": ids_of(batch),
            "contexts": {name: part["context_lens"].tolist() for name, part in batch.items()},
            "samples": batch["audio"]["audio_lens"].tolist() if "audio" in batch else [],
        }
        with open(self.run.folder / f"rank{self.rank}.jsonl", "a") as file:
            file.write(json.dumps(step) + "\n")
        if self.global_step == self.run.kill_in_step:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.weight * 1.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def join_ranks(run: Run, rank: int, port: int) -> None:
    """Make this process one rank of the run."""
    os.setpgrp()  # the data workers die with it
    run.folder.mkdir(parents=True, exist_ok=True)
    print_to(run.folder / f"rank{rank}.log")
    multiprocessing.set_start_method("fork", force=True)  # for the data workers, as in any training
    faulthandler.dump_traceback_later(SECONDS_UNTIL_DEADLOCK - 5, file=sys.stderr)
    # What Lightning reads to find that its ranks are started by somebody else.
    os.environ |= run.environment
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "LOCAL_RANK": str(rank)}
    torch.manual_seed(rank + 1)  # what the data is must not depend on it


def fit(run: Run, rank: int, port: int) -> None:
    """Train in this process, which is one rank of the run."""
    join_ranks(run, rank, port)
    callbacks = []
    if run.checkpoint_every is not None:
        every = {"every_n_train_steps": run.checkpoint_every, "save_top_k": -1}
        callbacks.append(ModelCheckpoint(dirpath=run.folder, filename="{step}", **every))
    trainer = Trainer(
        accelerator="cpu",
        strategy="ddp" if run.world_size > 1 else "auto",
        devices=run.world_size,
        max_steps=run.steps,
        max_epochs=run.epochs if run.epochs is not None else -1,
        limit_train_batches=run.batches_per_epoch,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=run.folder,
    )
    tokenizer = AutoTokenizer(str(run.tokenizer))
    data = MultimodalDataModule({"train_ds": dict(run.train_ds)}, tokenizer, SpeechTextDataset(tokenizer))
    trainer.fit(Recorder(run, rank), data, ckpt_path=run.checkpoint)


def run_ranks(run: Run, target: Callable[[Run, int, int], None] = fit) -> list[int]:
    """Carry out a run.

    Args:
        run: what to do.
        target: does it in each rank's process.

    Returns:
        The exit code of each rank; -9 of one that was killed.

    Raises:
        TimeoutError: if it has not ended in time, with the end of every rank's log.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = fork_server()
    processes = [context.Process(target=target, args=(run, rank, port)) for rank in range(run.world_size)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + SECONDS_UNTIL_DEADLOCK
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0))
    hangs = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        with suppress(ProcessLookupError):  # nothing is left of it
            os.killpg(process.pid, signal.SIGKILL)
    if hangs:
        logs = "\n".join(f"rank {rank}:\n{run.log(rank)[-2000:]}" for rank in range(run.world_size))
        raise TimeoutError(f"ranks {hangs} have not ended in {SECONDS_UNTIL_DEADLOCK} s\n{logs}")
    return [process.exitcode for process in processes]


def complete(run: Run, target: Callable[[Run, int, int], None] = fit) -> Run:
    """Carry out a run that must succeed on all ranks."""
    codes = run_ranks(run, target)
    if any(codes):
        logs = "\n".join(f"rank {rank}:\n{run.log(rank)[-3000:]}" for rank in range(run.world_size))
        raise AssertionError(f"exit codes {codes}\n{logs}")
    return run
