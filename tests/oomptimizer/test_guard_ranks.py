"""Two ranks, one of which runs out of memory."""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import signal
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from nemo_emmett.models import SALMT5
from nemo_emmett.oomptimizer.adapters.base import Adapter
from nemo_emmett.oomptimizer.adapters.speech_text import SpeechTextAdapter
from nemo_emmett.oomptimizer.buckets import Bucket, Group, Shape
from nemo_emmett.oomptimizer.guard import Guard
from nemo_emmett.oomptimizer.meter import TensorMeter

from ..fork_server import call_in_new_process, fork_server, print_to
from .injected import Bomb, Charges, Guarded, weights
from .models import encoder, preprocessor
from .rows import text_group

SECONDS_TO_END = 60
STEPS = 8
TEXT = text_group((16.0, 16.0))
AUDIO = Group("audio", TEXT.config, (Bucket("audio", 0, 2.0, Shape("audio", 2.0, 0, 24)),))
SIZES = {TEXT.buckets[0]: 4, AUDIO.buckets[0]: 3}


@dataclass(frozen=True)
class Run:
    """A training of SALM-T5 on two ranks.

    Args:
        folder: receives weights, profile, checkpoints and what the ranks print.
        t5: folder of the language model.
        kinds: of the batches of each rank, in turn: ``audio``, ``text``, ``both``.
        phases: what fails, by batch.
        failing: the rank that fails.
        find_unused: DDP looks for parameters that a step does not use.
        accumulate: batches to an optimizer step.
        resume: from the last checkpoint, with the saved batch sizes.
        gradient_conflict: of the model's section.
    """

    folder: Path
    t5: Path
    kinds: tuple[tuple[str, ...], tuple[str, ...]]
    phases: dict[int, str] | None = None
    failing: int = 1
    find_unused: bool = True
    accumulate: int = 1
    resume: bool = False
    gradient_conflict: str | None = None

    def weights(self, rank: int = 0) -> torch.Tensor:
        return torch.load(self.folder / f"weights{rank}.pt")

    def log(self, rank: int) -> str:
        return (self.folder / f"rank{rank}.log").read_text()


def build(t5: Path, gradient_conflict: str | None = None) -> SALMT5:
    torch.manual_seed(0)
    connector = "nemo.collections.speechlm2.modules.perception.IdentityConnector"
    perception = {
        "target": "nemo.collections.speechlm2.modules.perception.AudioPerceptionModule",
        "output_dim": 32,
        "preprocessor": preprocessor(),
        "encoder": encoder(16, 1),
        "modality_adapter": {"_target_": connector, "d_model": 16},
    }
    model = SALMT5(
        {
            "pretrained_llm": str(t5),
            "pretrained_weights": False,
            "perception": perception,
            "gradient_conflict": gradient_conflict,
        }
    )
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.003)
    return model


def batch_of(adapter: Adapter, kind: str, seed: int) -> dict:
    torch.manual_seed(seed)
    cpu = torch.device("cpu")
    speech = adapter.synthetic_batch(Shape("audio", 0.3 + 0.1 * (seed % 3), 0, 4), 3, cpu)
    text = adapter.synthetic_batch(Shape("text", 0.0, 5 + seed % 4, 6), 4, cpu)
    return {"audio": speech, "text": text}.get(kind) or adapter.join([speech, text])


class Counted(Callback):
    """Writes down what a rank has done."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, idx: int) -> None:
        with self.path.open("a") as file:
            file.write(f"{trainer.global_step}\n")


def fit(run: Run, rank: int, port: int) -> None:
    """Train in this process, which is one rank of the run."""
    os.setpgrp()
    run.folder.mkdir(parents=True, exist_ok=True)
    print_to(run.folder / f"rank{rank}.log")
    faulthandler.dump_traceback_later(SECONDS_TO_END - 5, file=sys.stderr)
    # What Lightning reads to find that its ranks are started by somebody else.
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "LOCAL_RANK": str(rank)}
    model = build(run.t5, run.gradient_conflict)
    adapter = SpeechTextAdapter(model)
    kinds = run.kinds[rank]
    batches = [batch_of(adapter, kinds[step % len(kinds)], 2 * step + rank) for step in range(STEPS)]
    profile = run.folder / "profile.json"
    sizes = SIZES
    if run.resume:
        sizes = dict(zip(SIZES, json.loads(profile.read_text()), strict=True))

    def save(sizes: dict, events: list) -> None:
        profile.write_text(json.dumps(list(sizes.values())))

    guard = Guard(adapter, [TEXT, AUDIO], sizes, TensorMeter(torch.device("cpu")), 2**40, save, agree_every=4)
    phases = run.phases if run.phases and rank == run.failing else {}
    checkpoints = ModelCheckpoint(dirpath=run.folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    trainer = Trainer(
        accelerator="cpu",
        strategy="ddp_find_unused_parameters_true" if run.find_unused else "ddp",
        devices=2,
        max_steps=STEPS // run.accumulate,
        accumulate_grad_batches=run.accumulate,
        callbacks=[
            Guarded(guard),
            Charges(Bomb(model.llm.encoder), phases),
            Counted(run.folder / f"steps{rank}"),
            checkpoints,
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=run.folder,
    )
    last = max(run.folder.glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1])) if run.resume else None
    trainer.fit(model, DataLoader(batches, batch_size=None), ckpt_path=last)
    torch.save(weights(model), run.folder / f"weights{rank}.pt")
    (run.folder / f"sizes{rank}.json").write_text(json.dumps(list(guard.sizes.values())))
    dist.barrier()


def exit_codes(run: Run) -> list[int]:
    """Carry out a run; the exit code of each rank.

    Raises:
        TimeoutError: if it has not ended in time, with the end of every rank's log.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = fork_server()
    processes = [context.Process(target=fit, args=(run, rank, port)) for rank in range(2)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + SECONDS_TO_END
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0))
    hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if hanging:
        raise TimeoutError(f"ranks {hanging} hang\n" + "\n".join(run.log(rank)[-4000:] for rank in range(2)))
    return [process.exitcode for process in processes]


def complete(run: Run) -> Run:
    codes = exit_codes(run)
    assert codes == [0, 0], "\n".join(run.log(rank)[-3000:] for rank in range(2))
    return run


@pytest.fixture(scope="module")
def t5(tiny_t5, tmp_path_factory) -> Path:
    """A T5 without dropout."""
    call_in_new_process(os.getpid)  # waits for the server, which is not to be in the times that are measured
    folder = tmp_path_factory.mktemp("quiet") / "t5"
    shutil.copytree(tiny_t5, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dropout_rate": 0.0}))
    return folder


MIXED = (("audio", "text", "both"), ("text", "both", "audio"))
BOTH = (("both",), ("both",))


@pytest.mark.parametrize(
    ("kinds", "find_unused", "accumulate", "phases", "conflict"),
    [
        (MIXED, True, 1, {0: "forward", 1: "forward", 4: "forward", 5: "forward"}, None),
        (BOTH, False, 1, {0: "forward", 3: "forward"}, None),
        (MIXED, True, 2, {0: "backward", 1: "forward", 2: "forward", 4: "backward"}, None),
        (MIXED, False, 1, {0: "forward", 1: "backward", 4: "backward"}, "harmonise"),
    ],
)
def test_out_of_memory_in_a_forward_pass_is_survived_by_both(
    t5, tmp_path, kinds, find_unused, accumulate, phases, conflict
) -> None:
    """Also in a backward pass, in the batches of an accumulation that are not the last, and where the gradients of
    speech and text are added up over the ranks after it."""
    run = Run(
        tmp_path / "plain",
        t5,
        kinds,
        find_unused=find_unused,
        accumulate=accumulate,
        gradient_conflict=conflict,
    )
    expected = complete(run).weights()
    done = complete(replace(run, folder=tmp_path / "run", phases=phases))
    assert (expected - weights(build(t5))).abs().max() > 1e-3
    torch.testing.assert_close(done.weights(0), done.weights(1), rtol=0, atol=0)
    torch.testing.assert_close(done.weights(), expected, rtol=1e-4, atol=1e-6)
    sizes = [json.loads((done.folder / f"sizes{rank}.json").read_text()) for rank in (0, 1)]
    assert sizes[0] == sizes[1] == json.loads((done.folder / "profile.json").read_text()) != list(SIZES.values())


@pytest.mark.parametrize("failing", [0, 1])
def test_out_of_memory_in_a_backward_pass_ends_both_to_be_started_again(t5, tmp_path, failing) -> None:
    run = Run(tmp_path / "run", t5, MIXED, phases={5: "backward"}, failing=failing)
    started = time.monotonic()
    assert exit_codes(run) == [75, 75]
    assert time.monotonic() - started < SECONDS_TO_END
    assert "and the ranks were adding up their gradients; the profile is saved" in run.log(failing)
    assert f"OOMptimizer: rank {failing}: a step of" in run.log(1 - failing)
    assert json.loads((run.folder / "profile.json").read_text()) != list(SIZES.values())
    again = complete(replace(run, phases=None, resume=True))
    assert "Restoring states from the checkpoint" in again.log(0)
    steps = [int(line) for line in (run.folder / "steps0").read_text().split()]
    assert steps == [1, 2, 3, 4, 5, 5, 6, 7, 8]


def test_out_of_memory_in_the_optimizers_step_ends_both_to_be_started_again(t5, tmp_path) -> None:
    run = Run(tmp_path / "run", t5, MIXED, phases={5: "optimizer"})
    assert exit_codes(run) == [75, 75]
    for rank in (0, 1):
        assert "after step 5 outside of its forward and backward pass, in _after_update (" in run.log(rank)
    assert not (run.folder / "profile.json").exists()  # no batch size is at fault
    (run.folder / "profile.json").write_text(json.dumps(list(SIZES.values())))
    complete(replace(run, phases=None, resume=True))
    steps = [int(line) for line in (run.folder / "steps0").read_text().split()]
    assert list(dict.fromkeys(steps)) == [1, 2, 3, 4, 5, 6, 7, 8]  # the other rank may end the step, and save it
