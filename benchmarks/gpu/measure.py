"""What a GPU has to say: tests, plan against real peaks, a training close to the memory's end, and the speed of a step.

Run by `benchmarks/gpu/run.sh`. Each part is a process of its own, so that none finds the memory of another; when it has
ended, its result is written to the results file. A part that fails, or for which no time is left, is noted as such, and
the next one begins. All data are synthetic, all models of random weights: nothing is downloaded.

Parts:
- ``tests``: `pytest tests/gpu/test_device.py`.
- ``memory_salm_t5``, ``memory_salm_gpt``: OOMptimizer calibrates 20 buckets and then trains on batches of all of them,
  at random, with guard; the peaks that a plan on fake tensors gives for the same batches come next.
- ``speed``: target tokens per second of SALM-GPT with batch sizes of its own for each bucket, with one size for all,
  with packed rows, with the loss's other implementations, and with compiled blocks.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
PACKAGES = ("nemo_emmett", "nemo_toolkit", "lightning", "torch", "transformers")
PARTS = ("tests", "memory_salm_t5", "memory_salm_gpt", "speed")
LEAST_SECONDS = 20
"""Of a part: with less time left it is not begun."""

ANSWER = "ANSWER "


@dataclass(frozen=True)
class Size:
    """Of a run.

    Args:
        t5, llama: width and layers of the language models.
        llama_options: further arguments of transformers' ``LlamaConfig``.
        vocabulary: of both.
        encoder: FastConformer's keys of `model_section`.
        precision: Lightning's.
        seconds, tokens, outputs: bins of speech, of text, and of the output of both; they make ten buckets each.
        memory: arguments of OOMptimizer.
        steps: of the training.
        turns: of each way whose speed is measured.
        row_tokens: of packed rows.
        examples: of a batch whose speed is measured.
        ways: names of the ways whose speed is measured; None: all.
    """

    t5: tuple[int, int]
    llama: tuple[int, int]
    vocabulary: int
    encoder: Mapping[str, int]
    precision: str
    seconds: Sequence[float]
    tokens: Sequence[int]
    outputs: Sequence[int]
    memory: Mapping[str, Any]
    steps: int
    turns: int
    row_tokens: int
    llama_options: Mapping[str, int] = field(default_factory=dict)
    examples: int = 32
    ways: Sequence[str] | None = None


FULL = Size(
    t5=(1024, 24),
    llama=(2048, 22),
    llama_options={"intermediate_size": 5632, "num_key_value_heads": 4},
    vocabulary=32_000,
    encoder={"encoder_layers": 24, "encoder_width": 1024, "conv_channels": 256},
    precision="bf16-mixed",
    seconds=(4.0, 8.0, 14.0, 20.0, 30.0),
    tokens=(16, 32, 64, 128, 256),
    outputs=(40, 100),
    memory={"memory_fraction": 0.9},
    steps=300,
    turns=12,
    row_tokens=1024,
)
TINY = Size(
    t5=(64, 1),
    llama=(64, 1),
    vocabulary=512,
    encoder={"encoder_layers": 1, "encoder_width": 64, "conv_channels": 16},
    precision="32-true",
    seconds=(1.0, 3.0),
    tokens=(16, 32),
    outputs=(10, 20),
    memory={"memory_budget": "64MiB", "max_batch_size": 16},
    steps=6,
    turns=1,
    row_tokens=128,
    examples=8,
    ways=("buckets", "packed rows", "packed rows, flash_attention_2"),
)


# One part, in its own process.


def run_tests(size: Size, seconds: float) -> dict[str, Any]:
    """Numbers of tests by outcome, and those that failed or were skipped."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "tests/gpu/test_device.py",
            f"--junitxml={report}",
        ]
        environment = {**os.environ, **({"NEMO_EMMETT_GPU_TESTS": "cpu"} if size is TINY else {})}
        subprocess.run(command, cwd=ROOT, env=environment, stdout=sys.stderr, timeout=seconds)
        cases = list(ElementTree.parse(report).iter("testcase"))
    found: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
    for case in cases:
        children = {child.tag: child.get("message", "") for child in case}
        outcome = (
            "failed" if children.keys() & {"failure", "error"} else "skipped" if "skipped" in children else "passed"
        )
        reason = next((message.splitlines()[0] for message in children.values() if message), "")
        found[outcome].append(f"{case.get('name')}{': ' * bool(reason)}{reason}"[:300])
    return {"passed": len(found["passed"]), "failed": found["failed"], "skipped": found["skipped"]}


def build(name: str, size: Size, folder: Path, **changes: Any) -> Any:
    """A model of random weights."""
    from measuring.models import model_section, write_llama, write_t5

    from nemo_emmett.models import SALMGPT, SALMT5

    torch.manual_seed(0)
    if name == "salm_t5":
        write_t5(folder, *size.t5, size.vocabulary)
        section = model_section(folder, "emmett_t5", size.t5[0], **size.encoder)
        return SALMT5({**section, **changes})
    write_llama(folder, *size.llama, size.vocabulary, **size.llama_options)
    section = model_section(folder, "emmett_llama2", size.llama[0], **size.encoder)
    return SALMGPT({**section, **changes})


def train_ds(size: Size) -> dict[str, Any]:
    """Buckets of speech and of text."""
    text = [[tokens, outputs] for tokens, outputs in product(size.tokens, size.outputs)]
    speech = [[seconds, outputs] for seconds, outputs in product(size.seconds, size.outputs)]
    return {
        "multi_config": True,
        "audio": {"bucket_duration_bins": speech},
        "text": {
            "bucket_duration_bins": text,
            "use_multimodal_sampling": True,
            "input_cfg": [{"type": "parallel_text"}],
        },
    }


def measure_memory(name: str, size: Size, seconds: float) -> dict[str, Any]:
    """Calibrate, train on all buckets with what was found, plan the same batches."""
    from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
    from omegaconf import OmegaConf
    from oomptimizer import planned_peaks

    from nemo_emmett.callbacks import OOMptimizer
    from nemo_emmett.oomptimizer.adapters import adapter_for
    from nemo_emmett.oomptimizer.search import Result
    from nemo_emmett.planning.fake_training import fake_training

    began = time.monotonic()
    results: list[Result] = []
    losses: list[float] = []

    class Data(LightningDataModule):
        """Synthetic batches of the buckets, at random."""

        def __init__(self) -> None:
            super().__init__()
            self.cfg = OmegaConf.create({"train_ds": train_ds(size)})

        def train_dataloader(self) -> Iterator[dict[str, Any]]:
            adapter, draw = adapter_for(self.trainer.lightning_module), random.Random(0)
            device = torch.device("cpu")
            for result in draw.choices(results, k=size.steps):
                yield adapter.synthetic_batch(result.bucket.shape, result.batch_size, device)

    class Losses(Callback):
        """Keeps them, and stops when time is up."""

        def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, *_: Any) -> None:
            losses.append(float(outputs["loss"]))
            trainer.should_stop = trainer.should_stop or time.monotonic() - began > 0.75 * seconds

    class Planned(Callback):
        """Plans the sizes that were found."""

        def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
            sizes = {result.bucket: result.batch_size for result in results}
            self.peaks = planned_peaks(trainer, module, sizes)

    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    with tempfile.TemporaryDirectory() as folder:
        oomptimizer = OOMptimizer(**size.memory, profile=Path(folder) / "profile.yaml", listener=results.append)
        trainer = Trainer(
            accelerator="cpu" if size is TINY else "gpu",
            devices=1,
            precision=size.precision,
            max_epochs=1,
            num_sanity_val_steps=0,
            callbacks=[oomptimizer, Losses()],
            **quiet,
        )
        model = build(name, size, Path(folder) / "llm")
        parameters = sum(parameter.numel() for parameter in model.parameters())
        built = time.monotonic() - began
        if size is not TINY:
            torch.cuda.reset_peak_memory_stats()
        began_fit = time.monotonic()
        calibrated: list[float] = []
        model.on_train_start = _then(model.on_train_start, lambda: calibrated.append(time.monotonic() - began_fit))
        trainer.fit(model, datamodule=Data())
        trained = time.monotonic() - began_fit - calibrated[0]
        reserved = 0 if size is TINY else torch.cuda.max_memory_reserved()
        events = list(oomptimizer.profile.events)
        del model, trainer
        began_plan = time.monotonic()
        with fake_training():
            planned = Planned()
            trainer = Trainer(
                accelerator="cpu",
                devices=1,
                precision=size.precision,
                limit_train_batches=0,
                callbacks=[planned],
                **quiet,
            )
            trainer.fit(build(name, size, Path(folder) / "llm"), datamodule=Data())
    buckets = {
        str(result.bucket): {
            "batch_size": result.batch_size,
            "peak": result.confirmed.peak,
            "reserved": result.confirmed.reserved,
            "planned": planned.peaks[result.bucket],
            "plan_error_percent": round(100 * (planned.peaks[result.bucket] / result.confirmed.peak - 1), 2),
        }
        for result in results
    }
    return {
        "parameters": parameters,
        "seconds_to_build": round(built, 1),
        "seconds_to_calibrate": round(calibrated[0], 1),
        "seconds_to_plan": round(time.monotonic() - began_plan, 1),
        "steps_of_calibration": sum(result.probes for result in results),
        "steps": len(losses),
        "seconds_of_steps": round(trained, 1),
        "finite_losses": sum(map(_is_finite, losses)),
        "events_of_guard": len(events),
        "peak_reserved": reserved,
        "buckets": buckets,
    }


def _then(first: Callable[[], Any], second: Callable[[], Any]) -> Callable[[], None]:
    def both() -> None:
        first()
        second()

    return both


def _is_finite(value: float) -> bool:
    return abs(value) < float("inf")


def measure_speed(size: Size, seconds: float) -> dict[str, Any]:
    """Target tokens per second of SALM-GPT's steps on speech, by the way in which batches and steps are made."""
    import packing
    from measuring.models import without_chance
    from measuring.steps import Steps
    from torch._dynamo.utils import counters

    began = time.monotonic()
    device = torch.device("cpu" if size is TINY else "cuda")
    found: dict[str, Any] = {}
    ways: dict[str, tuple[dict[str, Any], str]] = {
        "padded at random": ({}, packing.PADDED),
        "buckets": ({}, packing.BUCKETED),
        "packed rows": ({}, f"rows of {size.row_tokens}"),
        "packed rows, flash_attention_2": ({"attn_implementation": "flash_attention_2"}, f"rows of {size.row_tokens}"),
        "buckets, loss: naive": ({"loss_implementation": "naive"}, packing.BUCKETED),
        "buckets, loss: liger": ({"loss_implementation": "liger"}, packing.BUCKETED),
        "buckets, activation checkpointing": ({"activation_checkpointing": True}, packing.BUCKETED),
        "buckets, frozen encoder": ({"freeze": ["encoder"]}, packing.BUCKETED),
        "buckets, compiled": ({"compile": True}, packing.BUCKETED),
    }
    packing.ROWS["audio"], packing.EXAMPLES_PER_BATCH = (size.row_tokens,), size.examples
    for way in size.ways or ways:
        changes, batches_of = ways[way]
        if time.monotonic() - began > 0.8 * seconds:
            found[way] = {"left_out": "no time was left"}
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                model = without_chance(build("salm_gpt", size, Path(folder) / "llm", **changes)).to(device)
                batches = packing.batches_of("salm_gpt", model, "audio", max(packing.BUCKETS, size.turns))[batches_of]
                steps = Steps(model, {}, fused=True)
                first = time.monotonic()
                with torch.autocast(device.type, torch.bfloat16, enabled=size is not TINY):
                    found[way] = _speed(steps, [_to(batch, device) for batch in batches], device)
                found[way]["seconds_with_warm_up"] = round(time.monotonic() - first, 1)
                if changes.get("compile"):
                    found[way]["graphs"] = counters["stats"]["unique_graphs"]
            except Exception as error:  # of a kernel that is not installed, or does not run here
                found[way] = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
            model = steps = batches = None
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return {"model": "salm_gpt", "examples": size.examples, "ways": found}


def _speed(steps: Any, batches: Sequence[dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """Tokens per second over all batches, by the median of three passes after one that is not counted."""
    passes = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(4 if device.type == "cuda" else 2):
        began = time.monotonic()
        for steps.batch in batches:
            steps.run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        passes.append(time.monotonic() - began)
    tokens = sum(int(part["answer_lens"].sum()) for batch in batches for part in batch.values())
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return {"tokens_per_second": round(tokens / statistics.median(passes[1:])), "peak": peak}


def _to(batch: Mapping[str, Mapping[str, Any]], device: torch.device) -> dict[str, dict[str, Any]]:
    return {
        modality: {key: value.to(device) if torch.is_tensor(value) else value for key, value in part.items()}
        for modality, part in batch.items()
    }


# All parts.


def run_part(name: str, is_tiny: bool, seconds: float) -> dict[str, Any]:
    """A part in a fresh interpreter; of one that fails, its last line."""
    command = [sys.executable, str(Path(__file__)), "--part", name, "--seconds", str(seconds)]
    began = time.monotonic()
    try:
        done = subprocess.run(
            command + ["--tiny"] * is_tiny, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=seconds
        )
        _, found, answer = done.stdout.rpartition(ANSWER)
        result = json.loads(answer) if found else {"failed": f"exit code {done.returncode}; its output says why"}
    except subprocess.TimeoutExpired:
        result = {"failed": f"was not done after {seconds:.0f} s"}
    return {**result, "seconds": round(time.monotonic() - began, 1)}


def machine() -> dict[str, Any]:
    """What it was measured on."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "memory": properties.total_memory, "cuda": torch.version.cuda}
    return found


def main() -> None:
    """Run a part, or all of them one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="results file")
    parser.add_argument("--seconds", type=float, default=460, help="for all parts together")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="in this order")
    parser.add_argument("--tiny", action="store_true", help="tiny models on the CPU: a rehearsal")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = TINY if options.tiny else FULL
    if options.part is not None:
        kind, _, of = options.part.partition("_")
        parts = {"tests": run_tests, "speed": measure_speed}
        result = measure_memory(of, size, options.seconds) if of else parts[kind](size, options.seconds)
        print(ANSWER, json.dumps(result), sep="", flush=True)
        return
    if not options.tiny and not torch.cuda.is_available():
        parser.error("there is no GPU; --tiny rehearses on the CPU")
    began, report = time.monotonic(), {"machine": machine(), "tiny": options.tiny, "parts": {}}
    for name in options.parts:
        left = options.seconds - (time.monotonic() - began)
        result = run_part(name, options.tiny, left) if left > LEAST_SECONDS else {"left_out": "no time was left"}
        report["parts"][name] = result
        options.output.write_text(json.dumps(report, indent=2) + "\n")
        print(f"{name}: {json.dumps({key: value for key, value in result.items() if key != 'buckets'})}", flush=True)


if __name__ == "__main__":
    main()
