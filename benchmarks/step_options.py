"""What do options of the recipe take off a training step, in time and memory?

Each of the three models is trained on the same batches of speech as it is, with PyTorch's fused AdamW, with activations
computed again in the backward pass, with a frozen speech encoder, and with that encoder's outputs on disk
(`cache_encoder`), before and after they are there. Ways take turns, in one thread and in float32: CPU seconds of a step
by the median of the turns, and the peak of the largest batch, weights, gradients and optimizer state included. Losses
of the first turn are compared, those with outputs on disk with those of the frozen encoder. With `--compile`,
SALM-GPT's blocks are compiled too: graphs, and seconds until the first turn, whose batches all differ in shape, is
over.

    python benchmarks/step_options.py [--repeats 5] [--compile]
"""

from __future__ import annotations

import argparse
import copy
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measuring import keep
from measuring.batches import Speech, speech_batch
from measuring.models import model_section, without_chance, write_llama, write_t5
from measuring.steps import Steps
from nemo.utils import logging
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch._dynamo.utils import counters

from nemo_emmett.models import SALMGPT, SALMT5, BestowGPT

PACKAGES = ("nemo_emmett", "nemo_toolkit", "torch", "transformers")
WIDTH, LAYERS, VOCABULARY = 256, 4, 8_192
ENCODER = {"encoder_layers": 4, "encoder_width": 192, "conv_channels": 48}
BATCHES = [
    Speech(examples, seconds, tokens)
    for examples, seconds, tokens in [
        (8, (2.0, 4.0), (6, 14)),
        (6, (4.0, 7.0), (12, 22)),
        (4, (7.0, 11.0), (20, 36)),
        (3, (11.0, 15.0), (34, 48)),
    ]
]
MODELS = {"salm_t5": SALMT5, "salm_gpt": SALMGPT, "bestow_gpt": BestowGPT}

PLAIN, FROZEN, WRITTEN, READ, COMPILED = "as it is", "frozen encoder", "outputs written", "outputs read", "compiled"
FREEZE = {"freeze": ["encoder"]}
WAYS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "fused AdamW": {},
    "activation checkpointing": {"activation_checkpointing": True},
    FROZEN: FREEZE,
    WRITTEN: FREEZE,
    READ: FREEZE,
}
"""What differs in the model's section."""


def build(name: str, changes: dict[str, Any], folder: Path) -> Any:
    """A model of random weights, the same in each way."""
    torch.manual_seed(0)
    llm = folder / name
    if not llm.exists():
        write = write_t5 if name == "salm_t5" else write_llama
        write(llm, WIDTH, LAYERS, VOCABULARY)
    section = model_section(llm, "emmett_t5" if name == "salm_t5" else "emmett_llama2", WIDTH, **ENCODER)
    return without_chance(MODELS[name](copy.deepcopy({**section, **changes})))


def measure(name: str, ways: dict[str, dict[str, Any]], folder: Path, repeats: int) -> dict[str, dict[str, float]]:
    """CPU seconds of a step, peak and loss in each way, in turns after one that is not counted."""
    cache = folder / "cache"
    caching = {WRITTEN: cache / "written", READ: cache / "read"}
    steps = {}
    for way, changes in ways.items():
        of_cache = {"cache_encoder": str(caching[way])} if way in caching else {}
        model = build(name, changes | of_cache, folder)
        steps[way] = Steps(model, {}, fused=way == "fused AdamW")
    torch.manual_seed(1)
    batches = [{"audio": speech_batch(steps[PLAIN].model, speech)} for speech in BATCHES]
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    losses: dict[str, list[float]] = {way: [] for way in ways}
    first: dict[str, float] = {}
    for repeat in track(range(repeats + 1), description=name):
        for way, of_way in steps.items():
            if way == WRITTEN:
                shutil.rmtree(caching[WRITTEN], ignore_errors=True)
            began, began_clock = time.process_time(), time.perf_counter()
            for of_way.batch in batches:
                loss = of_way.run().item()
                if repeat == 0:
                    losses[way].append(loss)
            if repeat:
                seconds[way].append((time.process_time() - began) / len(batches))
            else:
                first[way] = time.perf_counter() - began_clock
    found = {}
    for way, of_way in steps.items():
        of_way.batch = batches[-1]
        found[way] = {
            "cpu_seconds": statistics.median(seconds[way]),
            "ratio": statistics.median(a / b for a, b in zip(seconds[way], seconds[PLAIN], strict=True)),
            "seconds_of_first_turn": first[way],
            "peak": of_way.peak(),
        }
        if way != FROZEN:  # which is trained to something else
            expected = losses[FROZEN if way in caching else PLAIN]
            found[way]["loss_differs"] = max(abs(a / b - 1) for a, b in zip(losses[way], expected, strict=True))
    return found


def table(results: dict[str, dict[str, dict[str, float]]]) -> Table:
    """What was measured."""
    shown = Table("model", "", "CPU s a step", "ratio", "peak, MiB", "first turn, s", "loss differs")
    for name, ways in results.items():
        for way, one in ways.items():
            numbers = [f"{one['cpu_seconds']:.3f}", f"{one['ratio']:.2f}", f"{one['peak'] / 2**20:.0f}"]
            differs = f"{one['loss_differs']:.0e}" if "loss_differs" in one else ""
            shown.add_row(name, way, *numbers, f"{one['seconds_of_first_turn']:.1f}", differs)
    return shown


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="turns that are counted")
    parser.add_argument("--compile", action="store_true", help="compile SALM-GPT's blocks too; needs a C++ compiler")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.setLevel(logging.ERROR)
    results, graphs = {}, None
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            is_compiled = options.compile and name == "salm_gpt"
            ways = WAYS | ({COMPILED: {"compile": True}} if is_compiled else {})
            results[name] = measure(name, ways, Path(folder), options.repeats)
            if is_compiled:
                graphs = counters["stats"]["unique_graphs"]
    Console(width=120).print(table(results))
    settings = {"width": WIDTH, "layers": LAYERS, "vocabulary": VOCABULARY, **ENCODER}
    path = keep("step_options", {"settings": settings, "steps": results, "graphs": graphs}, PACKAGES)
    Console().print(f"Graphs: {graphs}. Written to {path}.")


if __name__ == "__main__":
    main()
