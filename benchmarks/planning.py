"""How long does it take to plan the batch sizes of a model that is too large for the machine, and how much memory?

SALM-T5 with a FastConformer of 32 layers, 1024 wide, and a T5 of 24 + 24 layers, 2048 wide, bf16-mixed, AdamW,
for 15 buckets of speech and 15 of text on an 80 GiB device; from nothing to the profile, in one process. With
`--devices` the model is sharded over so many by FSDP2.

    python benchmarks/planning.py [--devices 64]
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from measuring import RESULTS, keep
from measuring.models import build_salm_t5
from nemo.utils import logging
from omegaconf import OmegaConf
from rich.console import Console

from nemo_emmett.callbacks import OOMptimizer
from nemo_emmett.oomptimizer.search import Result
from nemo_emmett.planning.fake_training import fake_training
from nemo_emmett.planning.sharded import fake_ranks

PACKAGES = ("nemo_emmett", "nemo_toolkit", "lightning", "torch", "transformers")
SPEECH = [[seconds, tokens] for seconds, tokens in product((4, 8, 14, 20, 30), (20, 50, 100))]
TEXT = [[tokens, outputs] for tokens, outputs in product((16, 32, 64, 128, 256), (16, 64, 200))]


class Data(LightningDataModule):
    """Nothing but a config: the fit ends before the first batch."""

    def __init__(self) -> None:
        super().__init__()
        text = {"bucket_duration_bins": TEXT, "use_multimodal_sampling": True, "input_cfg": [{"type": "parallel_text"}]}
        groups = {"speech": {"bucket_duration_bins": SPEECH}, "text": text}
        self.cfg = OmegaConf.create({"train_ds": {"multi_config": True, **groups}})

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        """No batches."""
        return torch.utils.data.DataLoader([])


def plan(folder: Path, devices: int) -> dict[str, Any]:
    """One plan, timed."""
    results: list[Result] = []
    began = time.perf_counter()
    with fake_ranks(devices), fake_training():
        model = build_salm_t5(folder, 2048, 24, 32, encoder_width=1024, vocab_size=32_128)
        built = time.perf_counter() - began
        callback = OOMptimizer(
            mode="plan", memory_budget="80GiB", profile=folder / "plan.yaml", listener=results.append
        )
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        trainer = Trainer(
            accelerator="cpu",
            devices=devices,
            strategy="auto" if devices == 1 else ModelParallelStrategy(devices, 1),
            precision="bf16-mixed",
            limit_train_batches=0,
            callbacks=[callback],
            use_distributed_sampler=False,
            **quiet,
        )
        trainer.fit(model, Data())
        parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "parameters": parameters,
        "buckets": len(results),
        "steps": sum(result.probes for result in results) + 2,  # those that allocate the optimizer's state
        "seconds_to_build": round(built, 1),
        "seconds": round(time.perf_counter() - began, 1),
        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "batch_sizes": {str(result.bucket): result.batch_size for result in results},
    }


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=1, help="over which FSDP2 shards the model")
    devices = parser.parse_args().devices
    logging.setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        result = plan(Path(folder), devices)
    console = Console()
    for key, value in result.items():
        console.print(f"{key}: {value}", highlight=False)
    path = RESULTS / "planning.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    if devices == 1:
        keep("planning", {**result, "sharded": kept.get("sharded", {})}, PACKAGES)
    else:
        sharded = {**kept.get("sharded", {}), str(devices): result}
        keep("planning", {**{key: kept.get(key) for key in result}, "sharded": sharded}, PACKAGES)


if __name__ == "__main__":
    main()
