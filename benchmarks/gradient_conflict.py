"""What do `gradient_conflict: monitor` and `harmonise` add to a training step?

One model trains on speech and text in every step, by Lightning. Its steps take turns: without the key, a step that is
monitored, a harmonised one; so whatever else the machine does falls on all three. Ratios are of CPU seconds, medians
over these turns. A monitored step is one in `every_n_steps`; the overhead of a training is the excess of one divided by
that.

    python benchmarks/gradient_conflict.py [--repeats 7]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from operator import truediv
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from measuring import keep
from measuring.models import model_section, without_chance, write_llama
from nemo.utils import logging
from torch.utils.data import DataLoader

from nemo_emmett.models import SALMGPT
from nemo_emmett.models.gradient_conflict import ConflictOptions, GradientConflict, parameter_blocks
from nemo_emmett.oomptimizer.adapters import adapter_for
from nemo_emmett.oomptimizer.buckets import Shape

PACKAGES = ("nemo_emmett", "torch", "transformers", "lightning")
ENCODER = {"encoder_layers": 4, "encoder_width": 256, "conv_channels": 64}
WIDTH, LAYERS, VOCABULARY = 512, 6, 8_000
SPEECH, TEXT = (8, Shape("audio", 8.0, 12, 30)), (24, Shape("text", 0.0, 40, 40))
KINDS = ("without", "monitored", "harmonised")


class Turns(Callback):
    """Times steps of each kind in turn."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        self.conflicts = {
            "without": None,
            "monitored": GradientConflict(ConflictOptions("monitor", 1)),
            "harmonised": GradientConflict(ConflictOptions("harmonise", 100)),
        }

    def on_train_batch_start(self, trainer: Trainer, module: SALMGPT, batch: Any, batch_idx: int) -> None:
        """Choose what this step does, and start its clock."""
        self.kind = KINDS[batch_idx % len(KINDS)]
        module.gradient_conflict = self.conflicts[self.kind]
        self.began = time.process_time()

    def on_train_batch_end(self, *args: Any) -> None:
        """Stop the clock."""
        self.seconds[self.kind].append(time.process_time() - self.began)


def measure(repeats: int) -> dict[str, Any]:
    """CPU seconds of each kind of step, and what part of a plain one they are."""
    with tempfile.TemporaryDirectory() as folder:
        write_llama(Path(folder), WIDTH, LAYERS, VOCABULARY)
        section = model_section(Path(folder), "qwen", WIDTH, **ENCODER)
        torch.manual_seed(0)
        optimizer = {"_target_": "torch.optim.AdamW", "lr": 1e-5}
        model = without_chance(SALMGPT(section | {"optimizer": optimizer}).train())
    adapter = adapter_for(model)
    batches = [adapter.synthetic_batch(shape, size, torch.device("cpu")) for size, shape in (SPEECH, TEXT)]
    turns = Turns()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(accelerator="cpu", devices=1, max_epochs=1, callbacks=[turns], **quiet)
    trainer.fit(model, DataLoader([adapter.join(batches)] * (repeats + 1) * len(KINDS), batch_size=None))
    seconds = {kind: taken[1:] for kind, taken in turns.seconds.items()}  # the first makes the optimizer's state
    ratios = {
        kind: statistics.median(map(truediv, seconds[kind], seconds["without"])) for kind in ("monitored", "harmonised")
    }
    shared = [block for name, block in parameter_blocks(model).items() if name not in ("encoder", "adapter")]
    interval = ConflictOptions("monitor").every_n_steps
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": {kind: round(statistics.median(taken), 2) for kind, taken in seconds.items()},
        "ratio": {kind: round(ratio, 3) for kind, ratio in ratios.items()},
        "every_n_steps": interval,
        "overhead_of_monitoring": round((ratios["monitored"] - 1) / interval, 5),
        "copy_of_gradients_mib": round(sum(p.nbytes for block in shared for p in block) / 2**20, 1),
        "seconds_of_steps": {kind: [round(value, 3) for value in taken] for kind, taken in seconds.items()},
    }


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="steps of each kind that are counted")
    repeats = parser.parse_args().repeats
    logging.setLevel(logging.ERROR)
    result = measure(repeats)
    print(result)
    setting = {**ENCODER, "width": WIDTH, "layers": LAYERS, "vocabulary": VOCABULARY}
    keep("gradient_conflict", {**setting, "threads": torch.get_num_threads(), **result}, PACKAGES)


if __name__ == "__main__":
    main()
