"""Ranks that draw at random what each step holds, speech, text, both or nothing: none waits for another in vain.

``NEMO_EMMETT_WATCHDOG_STEPS=1000`` takes that many steps of each case instead of a few.
"""

from __future__ import annotations

import faulthandler
import os
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.utils.data import DataLoader

from nemo_emmett.models import SALMGPT, SALMT5, BestowGPT

from .backbones import backbone
from .memorising import built
from .two_ranks import NONE, SGD, batch_of, quiet_trainer, run_on_two_ranks

STEPS = int(os.environ.get("NEMO_EMMETT_WATCHDOG_STEPS", "24"))
"""Batches of each case."""

SECONDS_WITHOUT_PROGRESS = 60

VALIDATED_AFTER = 8
"""Batches."""

CASES: dict[str, tuple[type, str, str, int]] = {
    "DDP, SALMT5": (SALMT5, "t5", "ddp", 1),
    "DDP, SALMGPT, accumulated": (SALMGPT, "llama", "ddp", 3),
    "FSDP2, SALMT5, accumulated": (SALMT5, "t5", "fsdp2", 3),
    "FSDP2, SALMGPT": (SALMGPT, "llama", "fsdp2", 1),
    "FSDP2, BestowGPT": (BestowGPT, "llama", "fsdp2", 1),
    "tensor parallel, SALMGPT, accumulated": (SALMGPT, "llama", "tensor parallel", 3),
    "tensor parallel, BestowGPT": (BestowGPT, "qwen2", "tensor parallel", 1),
}
"""Model, backbone, strategy, batches of an optimizer step."""

STRATEGIES = {
    "ddp": lambda: DDPStrategy(find_unused_parameters=True),
    "fsdp2": lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
    "tensor parallel": lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=2),
}

RANKS_OF = {"ddp": 2, "fsdp2": 2, "tensor parallel": 4}


class Watchdog(Callback):
    """Ends the process if a batch takes too long, and counts the batches."""

    def __init__(self) -> None:
        self.trained = self.validated = 0

    def on_train_batch_start(self, *_: Any) -> None:
        self.trained += 1
        watch()

    def on_validation_batch_start(self, *_: Any) -> None:
        self.validated += 1
        watch()


def watch() -> None:
    faulthandler.dump_traceback_later(SECONDS_WITHOUT_PROGRESS, exit=True, file=sys.stderr)


def drawn_batches(model: Any, number: int, seed: str, rank: int) -> list[dict]:
    """Batches of this one of two ranks of data; in no step both have nothing."""
    draw = random.Random(seed)
    found = []
    for _ in range(number):
        has_text, has_speech = (draw.choices((True, False), k=2) for _ in range(2))
        if not any(has_text + has_speech):
            has_text[draw.randrange(2)] = True
        rows = [slice(0, draw.randint(1, 3)) if has[rank] else NONE for has in (has_text, has_speech)]
        found.append(batch_of(model, *rows))
    return found


def train(rank: int, folder: Path, asr: Path, ranks: int) -> None:
    """All cases of so many ranks, in this process, which is one of them."""
    counted, place = {}, rank * 2 // ranks
    for case, (kind, name, strategy, accumulated) in CASES.items():
        if RANKS_OF[strategy] != ranks:
            continue
        watch()
        model = built(kind, name, folder / "backbones", asr, max_new_tokens=2, **SGD)
        del model.log
        watchdog = Watchdog()
        trainer = quiet_trainer(
            devices=ranks,
            strategy=STRATEGIES[strategy](),
            callbacks=[watchdog],
            accumulate_grad_batches=accumulated,
            val_check_interval=VALIDATED_AFTER,
        )
        batches = DataLoader(drawn_batches(model, STEPS, f"{case}, training", place), batch_size=None)
        validation = [{"dev": batch} for batch in drawn_batches(model, 3, f"{case}, validation", place)]
        trainer.fit(model, batches, DataLoader(validation, batch_size=None))
        counted[case] = watchdog.trained, watchdog.validated, trainer.global_step
    faulthandler.cancel_dump_traceback_later()
    torch.save(counted, folder / f"{rank} of {ranks}.pt")


@pytest.fixture(scope="module")
def counted(tmp_path_factory, tiny_asr) -> dict[int, list[dict[str, tuple[int, int, int]]]]:
    """Number of ranks -> of each rank and case, batches trained and validated, and optimizer steps."""
    folder = tmp_path_factory.mktemp("watchdog")
    for _, name, _, _ in CASES.values():
        backbone(name, folder / "backbones")
    numbers = sorted({*RANKS_OF.values()})
    for ranks in numbers:
        run_on_two_ranks(train, folder, folder, tiny_asr, ranks, ranks=ranks, seconds=240 + STEPS * len(CASES))
    return {ranks: [torch.load(folder / f"{rank} of {ranks}.pt") for rank in range(ranks)] for ranks in numbers}


@pytest.mark.parametrize("case", CASES)
def test_no_rank_waits_in_vain(counted, case) -> None:
    accumulated = CASES[case][-1]
    done = STEPS, 3 * (STEPS // VALIDATED_AFTER), -(-STEPS // accumulated)
    ranks = RANKS_OF[CASES[case][2]]
    assert [of_rank[case] for of_rank in counted[ranks]] == [done] * ranks
