"""Time and memory of loss and gradients of a linear head without all its logits, against linear and cross-entropy.

Time on this CPU, forward and backward pass, 2,048 tokens, d = 1,024, V = 32,000; both take turns, so that whatever else
the machine does falls on both. Peak memory with 8,192 tokens and V = 256,000, on tensors without values.

    python benchmarks/loss.py [--repeats 7]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from measuring import keep
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from nemo_emmett.modules.linear_cross_entropy import linear_cross_entropy
from nemo_emmett.oomptimizer.meter import TensorMeter

PACKAGES = ("nemo_emmett", "torch")
IMPLEMENTATIONS = ("naive", "chunked")
WIDTH = 1_024
TIMED = {"tokens": 2_048, "vocabulary": 32_000}
METERED = {"tokens": 8_192, "vocabulary": 256_000}
CASES = ("float32", "float32, frozen weight", "bf16 autocast")


def precision_of(case: str) -> AbstractContextManager:
    """What a case's steps run in."""
    return torch.autocast("cpu", torch.bfloat16) if "bf16" in case else nullcontext()


def make_step(case: str, implementation: str, tokens: int, vocabulary: int) -> tuple[list[Tensor], Callable[[], None]]:
    """A head's tensors, and a function that runs forward and backward pass on them."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, WIDTH, requires_grad=True)
    weight = (torch.randn(vocabulary, WIDTH) / WIDTH**0.5).requires_grad_("frozen" not in case)
    targets = torch.randint(vocabulary, (tokens,))

    def step() -> None:
        hidden.grad = weight.grad = None
        with precision_of(case):
            loss = linear_cross_entropy(hidden, weight, targets, implementation=implementation)
        loss.backward()

    return [hidden, weight, targets], step


def seconds_of(case: str, repeats: int) -> dict[str, list[float]]:
    """Of each implementation, the seconds of its steps, after one that is not counted."""
    steps = {name: make_step(case, name, **TIMED)[1] for name in IMPLEMENTATIONS}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in track(range(repeats + 1), description=f"{case}, seconds"):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    return {name: values[1:] for name, values in seconds.items()}


def peak_of(case: str, implementation: str) -> int:
    """Bytes alive at the worst moment of a step, weight and hidden states included."""
    with FakeTensorMode():
        tensors, step = make_step(case, implementation, **METERED)
        meter = TensorMeter(torch.device("cpu"))
        meter.track(tensors)
        with meter.measuring():
            step()
        return meter.peak


def measure(case: str, repeats: int) -> dict[str, Any]:
    """Seconds, peaks, and what part of the naive one's they are."""
    seconds = seconds_of(case, repeats)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    peaks = {name: peak_of(case, name) for name in IMPLEMENTATIONS}
    return {
        "seconds": {name: round(median, 3) for name, median in medians.items()},
        "ratio_of_seconds": round(medians["chunked"] / medians["naive"], 3),
        "seconds_of_steps": {name: [round(value, 3) for value in values] for name, values in seconds.items()},
        "peak_gib": {name: round(peak / 2**30, 2) for name, peak in peaks.items()},
        "ratio_of_peaks": round(peaks["chunked"] / peaks["naive"], 3),
    }


def show(results: dict[str, dict[str, Any]]) -> None:
    """A table on the terminal."""
    table = Table("case", "seconds, naive", "chunked", "ratio", "peak GiB, naive", "chunked", "ratio")
    for case, result in results.items():
        seconds, peaks = result["seconds"], result["peak_gib"]
        numbers = (*seconds.values(), result["ratio_of_seconds"], *peaks.values(), result["ratio_of_peaks"])
        table.add_row(case, *map(str, numbers))
    Console().print(table)


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="steps of each that are counted")
    repeats = parser.parse_args().repeats
    results = {case: measure(case, repeats) for case in CASES}
    show(results)
    setting = {"width": WIDTH, "timed": TIMED, "metered": METERED, "threads": torch.get_num_threads()}
    keep("loss", {**setting, "cases": results}, PACKAGES)


if __name__ == "__main__":
    main()
