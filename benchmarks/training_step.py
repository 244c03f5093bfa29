"""What does a training step of SALMGPT take, in time and memory, compared with NeMo's SALM?

Both have the same weights and get the same batch in NeMo's form. A step is what Lightning makes of it: forward pass,
gradients of the step before dropped, backward pass, AdamW, all in float32. Steps take turns, so that whatever else the
machine does falls on both; the ratio is the median over these turns. Dropout and dither are off, and the losses of all
steps are compared. Peaks are bytes of tensors, weights, gradients and optimizer state included, of one step each.

Then where the time goes, from PyTorch's profiler; and the peaks of models of the usual size, on tensors without values.

    python benchmarks/training_step.py [--repeats 5]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import product
from operator import truediv
from pathlib import Path
from typing import Any

import torch
from measuring import keep
from measuring.batches import PROMPT_TOKENS, Speech, as_nemo, speech_batch
from measuring.models import model_section, without_chance, write_llama
from measuring.steps import Steps
from nemo.collections.speechlm2.models import SALM
from nemo.utils import logging
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from nemo_emmett.models import SALMGPT
from nemo_emmett.oomptimizer.adapters import adapter_for
from nemo_emmett.oomptimizer.buckets import Shape
from nemo_emmett.oomptimizer.fake import fake_construction

PACKAGES = ("nemo_emmett", "nemo_toolkit", "torch", "transformers")
ENCODER = {"encoder_layers": 4, "encoder_width": 256, "conv_channels": 64}
MODELS = {"nemo": SALM, "ours": SALMGPT}


@dataclass(frozen=True)
class Setting:
    """A language model, and the batch that it is trained on.

    Args:
        what: in words.
        vocabulary: rows of the embedding table, which is not the output layer's.
        layers: of the Llama, 512 wide.
        speech: the batch.
    """

    what: str
    vocabulary: int
    layers: int
    speech: Speech
    width: int = 512


SPEECH = Speech(examples=8, seconds=(6.0, 12.0), answer_tokens=(20, 40))
LONG_ANSWERS = Speech(examples=16, seconds=(1.5, 3.0), answer_tokens=(30, 50))
SETTINGS = (
    Setting("speech", 32_000, 6, SPEECH),
    Setting("speech, large vocabulary", 128_000, 6, replace(SPEECH, examples=16)),
    Setting("answers as long as contexts", 32_000, 6, LONG_ANSWERS),
    Setting("speech, proportions of TinyLlama", 12_000, 22, SPEECH),
)

LARGE = {
    "TinyLlama 1.1B": {
        "vocab_size": 32_000,
        "width": 2048,
        "layers": 22,
        "intermediate_size": 5632,
        "num_key_value_heads": 4,
    },
    "Llama 3.2 1B": {
        "vocab_size": 128_256,
        "width": 2048,
        "layers": 16,
        "intermediate_size": 8192,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
}
LARGE_ENCODER = {"encoder_layers": 24, "encoder_width": 1024, "conv_channels": 256}  # Canary-1B's
LARGE_BATCH = {"examples": 32, "seconds": 20.0, "answer_tokens": 60}


def build(setting: Setting, folder: Path) -> dict[str, torch.nn.Module]:
    """NeMo's SALM, and ours with its weights."""
    write_llama(folder, setting.width, setting.layers, setting.vocabulary)
    section = model_section(folder, "qwen", setting.width, **ENCODER)
    torch.manual_seed(0)
    models = {name: without_chance(kind(copy.deepcopy(section)).train()) for name, kind in MODELS.items()}
    models["ours"].load_state_dict(models["nemo"].state_dict())
    return models


def measure(setting: Setting, repeats: int) -> dict[str, Any]:
    """Seconds, losses, peaks and profiles of both, and what part of NeMo's ours are."""
    with tempfile.TemporaryDirectory() as folder:
        models = build(setting, Path(folder))
    batch = as_nemo(speech_batch(models["ours"], setting.speech), models["nemo"])
    steps = {name: Steps(model, batch) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, list[float]] = {name: [] for name in steps}
    for _ in track(range(repeats + 1), description=f"{setting.what}, V = {setting.vocabulary:,}"):
        for name, of_model in steps.items():
            began = time.perf_counter()
            loss = of_model.run()
            seconds[name].append(time.perf_counter() - began)
            losses[name].append(loss.item())
    turns = {name: taken[1:] for name, taken in seconds.items()}  # the first makes the optimizer's state
    peaks = {name: of_model.peak() for name, of_model in steps.items()}
    return {
        **asdict(setting),
        "parameters": sum(p.numel() for p in models["ours"].parameters()),
        "seconds": {name: round(statistics.median(taken), 2) for name, taken in turns.items()},
        "ratio_of_seconds": round(statistics.median(map(truediv, turns["ours"], turns["nemo"])), 3),
        "seconds_of_steps": {name: [round(value, 2) for value in taken] for name, taken in turns.items()},
        "largest_difference_of_losses": max(abs(ours / nemo - 1) for nemo, ours in zip(*losses.values(), strict=True)),
        "losses": losses,
        "peak_gib": {name: round(peak / 2**30, 2) for name, peak in peaks.items()},
        "ratio_of_peaks": round(peaks["ours"] / peaks["nemo"], 3),
        "profile_seconds": {name: where_time_goes(of_model.run, setting) for name, of_model in steps.items()},
    }


def where_time_goes(step: Callable[[], Any], setting: Setting) -> dict[str, float]:
    """Seconds that one step spends in each part, recognised by the sizes of the tensors."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        step()
    seconds: Counter[str] = Counter()
    for event in profiled.events():
        if not event.name.startswith("Optimizer.") and (own := event.self_cpu_time_total):
            seconds[_part_of(event, setting)] += own / 1e6
    return {part: round(taken, 2) for part, taken in seconds.most_common()}


def _part_of(event: Any, setting: Setting) -> str:
    parent = event
    while parent is not None:
        if parent.name.startswith("Optimizer.step"):
            return "optimizer"
        parent = parent.cpu_parent
    shapes = [shape for shape in event.input_shapes or [] if isinstance(shape, (list, tuple))]
    sizes = {size for shape in shapes for size in shape if isinstance(size, int)}
    if setting.vocabulary in sizes:
        return "output layer, loss, embeddings"
    if sizes & {setting.width, 4 * setting.width} or "scaled_dot_product" in event.name:
        return "layers of the language model"
    if sizes & {ENCODER["encoder_width"], 2 * ENCODER["encoder_width"]}:
        return "speech encoder"
    return "rest"


def peaks_of_large(name: str, freeze_encoder: bool) -> dict[str, Any]:
    """Peaks of both at a model's usual size, bf16-mixed, on tensors without values."""
    peaks, floors = {}, {}
    sizes = LARGE[name]
    with tempfile.TemporaryDirectory() as folder:
        write_llama(Path(folder), **sizes)
        section = model_section(Path(folder), "qwen", sizes["width"], **LARGE_ENCODER)
        for whose, kind in MODELS.items():
            with fake_construction():
                model = without_chance(kind(copy.deepcopy(section)).train())
                model.perception.encoder.requires_grad_(not freeze_encoder)
                peaks[whose], floors[whose] = _planned_peak(model)
    return {
        "model": name,
        "encoder": "frozen" if freeze_encoder else "trained",
        "floor_gib": round(floors["ours"] / 2**30, 1),
        "peak_gib": {whose: round(peak / 2**30, 1) for whose, peak in peaks.items()},
        "ratio_of_peaks": round(peaks["ours"] / peaks["nemo"], 3),
    }


def _planned_peak(model: Any) -> tuple[int, int]:
    """Peak of a step, and what weights, gradients and the two moments of AdamW alone take."""
    adapter, device = adapter_for(model), torch.device("cpu")
    shape = Shape("audio", LARGE_BATCH["seconds"], PROMPT_TOKENS, LARGE_BATCH["answer_tokens"])
    with adapter.planning(), torch.autocast("cpu", torch.bfloat16):
        steps = Steps(model, adapter.synthetic_batch(shape, 1, device))
        steps.run()  # makes the moments
        steps.batch = adapter.synthetic_batch(shape, LARGE_BATCH["examples"], device)
        floor = sum(p.numel() * p.element_size() * (4 if p.requires_grad else 1) for p in model.parameters())
        return steps.peak(), floor


def show(results: list[dict[str, Any]], large: list[dict[str, Any]]) -> None:
    """Tables on the terminal."""
    table = Table("batch", "V", "layers", "s, NeMo", "ours", "ratio", "peak GiB, NeMo", "ours", "ratio", "loss differs")
    for result in results:
        seconds, peaks = result["seconds"].values(), result["peak_gib"].values()
        numbers = [*seconds, result["ratio_of_seconds"], *peaks, result["ratio_of_peaks"]]
        sizes = [result["what"], f"{result['vocabulary']:,}", result["layers"]]
        table.add_row(*map(str, sizes + numbers), f"{result['largest_difference_of_losses']:.0e}")
    console = Console(width=150)
    console.print(table)
    for result in results:
        console.print(result["what"], result["profile_seconds"])
    console.print(large)


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="steps of each that are counted")
    repeats = parser.parse_args().repeats
    logging.setLevel(logging.ERROR)
    large = [peaks_of_large(name, freeze_encoder) for name, freeze_encoder in product(LARGE, (False, True))]
    results = [measure(setting, repeats) for setting in SETTINGS]
    show(results, large)
    batch_of_large = {**LARGE_BATCH, **LARGE_ENCODER, "precision": "bf16-mixed"}
    setting = {**ENCODER, "prompt_tokens": PROMPT_TOKENS, "threads": torch.get_num_threads()}
    keep("training_step", {**setting, "settings": results, "large": large, "batch_of_large": batch_of_large}, PACKAGES)


if __name__ == "__main__":
    main()
