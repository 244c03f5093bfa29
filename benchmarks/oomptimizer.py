r"""How many training steps does it take to find the batch sizes of 30 buckets, and how near to the budget do they come?

SALM-T5 of random weights, 15 buckets of speech and then 15 of text (five input lengths by three output lengths), with
the same meter, the same budget, the same synthetic batches and in the same training:

- OOMptimizer, as `nemo_emmett.callbacks.OOMptimizer` searches;
- bisection, as NeMo's scripts do: from 32 examples (then from the size of the bucket before, longest bucket first),
  doubled until a step exceeds the memory, halved until one does not, then halving the gap until it is below 5 %. A step
  over the budget counts as running out of memory.

On a GPU the sizes that were found are then trained with: `--train-steps` steps over all buckets, drawn at random, which
must not run out of memory; and each bucket's confirmed peak is compared with that of a plan on fake tensors.

    python benchmarks/oomptimizer.py [--budget 800MiB] [--width 128 --layers 3 --encoder-layers 4]
    python benchmarks/oomptimizer.py --budget 72GiB --width 1024 --layers 24 --encoder-layers 24 \
        --precision bf16-mixed --train-steps 1000
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from measuring import keep
from measuring.models import build_salm_t5
from nemo.utils import logging
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from nemo_emmett.oomptimizer.adapters import Adapter, adapter_for
from nemo_emmett.oomptimizer.buckets import Bucket, Group, read_groups
from nemo_emmett.oomptimizer.cuda_meter import meter_for
from nemo_emmett.oomptimizer.fake import fake_model
from nemo_emmett.oomptimizer.memory import parse_memory
from nemo_emmett.oomptimizer.meter import Reading, TensorMeter
from nemo_emmett.oomptimizer.search import Search
from nemo_emmett.oomptimizer.steps import TrainingSteps

PACKAGES = ("nemo_emmett", "nemo_toolkit", "lightning", "torch", "transformers")
SPEECH = [[seconds, tokens] for seconds, tokens in product((2, 4, 8, 14, 20), (10, 30, 80))]
TEXT = [[tokens, outputs] for tokens, outputs in product((16, 32, 64, 100, 160), (16, 50, 120))]
START, GAP = 32, 0.05  # of NeMo's scripts


@dataclass
class Found:
    """What one way of searching did."""

    sizes: dict[Bucket, int] = field(default_factory=dict)
    peaks: dict[Bucket, int] = field(default_factory=dict)
    steps: int = 0
    over: int = 0  # steps over the budget, or out of memory
    seconds: float = 0.0

    def noted(self, reading: Reading, budget: int) -> Reading:
        """Count a step."""
        self.steps += 1
        self.over += reading.out_of_memory or reading.peak > budget
        self.seconds += reading.seconds
        return reading


def bisect(group: Group, probe: Callable[[Bucket, int], Reading], budget: int) -> Found:
    """NeMo's way: the longest bucket first, each from the size of the one before."""
    found, start = Found(), START
    for bucket in reversed(group.buckets):
        size, fits, fails = start, 0, None
        while fails is None or fits == 0 or (fails - fits) / fits >= GAP:
            reading = found.noted(probe(bucket, size), budget)
            if reading.out_of_memory or reading.peak > budget:
                fails = size
            else:
                fits, found.peaks[bucket] = size, reading.peak
            if fails == 1 or (fails is not None and fails - fits <= 1):
                break
            size = 2 * size if fails is None else (fits + fails) // 2
        found.sizes[bucket] = start = fits
    return found


class Comparison(Callback):
    """Runs both searches where calibration would."""

    def __init__(self, budget: int, train_steps: int) -> None:
        self.budget = budget
        self.train_steps = train_steps
        self.rows: dict[str, dict[str, Found]] = {}
        self.planned: dict[Bucket, int] = {}
        self.trained: dict[str, int] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All of it."""
        adapter = adapter_for(pl_module)
        groups = read_groups(trainer.datamodule.cfg.train_ds)
        for group in groups.values():
            self.rows[group.name] = {
                "OOMptimizer": self._ours(trainer, pl_module, adapter, group),
                "bisection": self._bisection(trainer, pl_module, adapter, group),
            }
        sizes = {b: n for rows in self.rows.values() for b, n in rows["OOMptimizer"].sizes.items()}
        if self.train_steps:
            self.trained = self._train(trainer, pl_module, adapter, sizes)
            self.planned = planned_peaks(trainer, pl_module, sizes)

    def _ours(self, trainer: Trainer, module: LightningModule, adapter: Adapter, group: Group) -> Found:
        found = Found()
        with _Steps(trainer, module, adapter, group.buckets[0]) as steps:

            def probe(bucket: Bucket, size: int) -> Reading:
                return found.noted(steps.probe(bucket, size), self.budget)

            for result in Search(probe, self.budget, steps.base).run(group.buckets):
                found.sizes[result.bucket], found.peaks[result.bucket] = result.batch_size, result.confirmed.peak
        return found

    def _bisection(self, trainer: Trainer, module: LightningModule, adapter: Adapter, group: Group) -> Found:
        with _Steps(trainer, module, adapter, group.buckets[0]) as steps:
            return bisect(group, steps.probe, self.budget)

    def _train(
        self, trainer: Trainer, module: LightningModule, adapter: Adapter, sizes: dict[Bucket, int]
    ) -> dict[str, int]:
        """Steps of random buckets, one after another as in training."""
        drawn = random.Random(0).choices(list(sizes), k=self.train_steps)
        with _Steps(trainer, module, adapter, drawn[0]) as steps:
            readings = [steps.probe(bucket, sizes[bucket]) for bucket in drawn]
        return {"steps": len(readings), "out_of_memory": sum(reading.out_of_memory for reading in readings)}


def planned_peaks(trainer: Trainer, module: LightningModule, sizes: dict[Bucket, int]) -> dict[Bucket, int]:
    """Peaks of steps of these sizes on fake tensors of the CPU, in bytes; in ``on_fit_start``."""
    module.cpu()
    adapter, device = adapter_for(module), torch.device("cpu")
    meter = TensorMeter(device)
    with fake_model(module, trainer.optimizers), adapter.planning(), TrainingSteps(trainer, module, meter) as steps:
        steps.warm_up(adapter.synthetic_batch(next(iter(sizes)).shape, 1, device))
        return {b: steps.run(adapter.synthetic_batch(b.shape, n, device)).peak for b, n in sizes.items()}


class _Steps:
    """The training's steps on batches of one bucket."""

    def __init__(self, trainer: Trainer, module: LightningModule, adapter: Adapter, first: Bucket) -> None:
        self._device = trainer.strategy.root_device
        self._steps = TrainingSteps(trainer, module, meter_for(self._device))
        self._gradients = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
        self._adapter = adapter
        self._first = first
        self.base = 0

    def __enter__(self) -> _Steps:
        self._steps.__enter__()
        floor = self._steps.warm_up(self._adapter.synthetic_batch(self._first.shape, 1, self._device))
        self.base = floor.resident - self._gradients
        return self

    def __exit__(self, *error: Any) -> None:
        self._steps.__exit__(*error)

    def probe(self, bucket: Bucket, size: int) -> Reading:
        """Run one."""
        return self._steps.run(self._adapter.synthetic_batch(bucket.shape, size, self._device))


class Data(LightningDataModule):
    """Nothing but a config."""

    def __init__(self) -> None:
        super().__init__()
        text = {"bucket_duration_bins": TEXT, "use_multimodal_sampling": True, "input_cfg": [{"type": "parallel_text"}]}
        groups = {"speech": {"bucket_duration_bins": SPEECH}, "text": text}
        self.cfg = OmegaConf.create({"train_ds": {"multi_config": True, **groups}})

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        """No batches: the fit ends before the first."""
        return torch.utils.data.DataLoader([])


def show(comparison: Comparison) -> Table:
    """Both searches, group by group."""
    table = Table(title=f"30 buckets, budget {comparison.budget / 2**20:,.0f} MiB")
    columns = ("group", "search", "steps per bucket", "over the budget", "seconds in steps", "peak / budget", "sizes")
    for column in columns:
        table.add_column(column, justify="left" if column in ("group", "search") else "right")
    for name, rows in comparison.rows.items():
        for way, found in rows.items():
            used = [found.peaks[bucket] / comparison.budget for bucket in found.sizes if bucket in found.peaks]
            sizes = sorted(found.sizes.items(), key=lambda item: item[0].index)
            table.add_row(
                name,
                way,
                f"{found.steps / len(found.sizes):.2f}",
                str(found.over),
                f"{found.seconds:.1f}",
                f"{min(used):.2f} to {max(used):.2f}",
                " ".join(str(size) for _, size in sizes),
            )
    return table


def as_json(comparison: Comparison) -> dict[str, Any]:
    """What is kept."""
    groups = {
        name: {
            way: {
                "steps_per_bucket": round(found.steps / len(found.sizes), 3),
                "over_budget": found.over,
                "seconds_in_steps": round(found.seconds, 2),
                "sizes": [size for _, size in sorted(found.sizes.items(), key=lambda item: item[0].index)],
                "peaks": [found.peaks.get(b) for b in sorted(found.sizes, key=lambda bucket: bucket.index)],
            }
            for way, found in rows.items()
        }
        for name, rows in comparison.rows.items()
    }
    result: dict[str, Any] = {"budget": comparison.budget, "groups": groups}
    if comparison.trained is not None:
        measured = {b: p for rows in comparison.rows.values() for b, p in rows["OOMptimizer"].peaks.items()}
        result["trained"] = comparison.trained
        result["plan_error_percent"] = {
            str(bucket): round(100 * (planned / measured[bucket] - 1), 2)
            for bucket, planned in comparison.planned.items()
        }
    return result


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="800MiB")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--encoder-layers", type=int, default=4)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--train-steps", type=int, default=0)
    options = parser.parse_args()
    logging.setLevel(logging.ERROR)
    comparison = Comparison(parse_memory(options.budget, "--budget"), options.train_steps)
    with tempfile.TemporaryDirectory() as folder:
        model = build_salm_t5(Path(folder), options.width, options.layers, options.encoder_layers)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = Trainer(
            accelerator="auto",
            devices=1,
            precision=options.precision,
            max_epochs=1,
            callbacks=[comparison],
            enable_model_summary=False,
            **quiet,
        )
        trainer.fit(model, Data())
    Console(width=150).print(show(comparison))
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    model_size = {"width": options.width, "layers": options.layers, "encoder_layers": options.encoder_layers}
    keep(
        "oomptimizer" if device.type == "cpu" else "oomptimizer_gpu",
        {"device": name, "precision": options.precision, "model": model_size, **as_json(comparison)},
        PACKAGES,
    )


if __name__ == "__main__":
    main()
