"""What does each training objective add to a step of SALM-GPT, in time and memory?

Every objective is measured against the same model without objectives, in turns in one process, on a batch of speech and
text that both read: the ratio of medians of CPU seconds, of one thread. A step is what Lightning makes of it: forward
pass, backward pass, AdamW, in float32; peaks are bytes of tensors, with weights, gradients and optimizer state.

    python benchmarks/objectives.py [--repeats 5]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measuring import keep
from measuring.models import model_section, without_chance, write_llama
from measuring.steps import Steps
from nemo.utils import logging
from rich.console import Console
from rich.progress import track
from rich.table import Table

from nemo_emmett.models import SALMGPT
from nemo_emmett.objectives.registry import OBJECTIVES
from nemo_emmett.oomptimizer.adapters import adapter_for
from nemo_emmett.oomptimizer.buckets import Shape

PACKAGES = ("nemo_emmett", "nemo_toolkit", "torch", "transformers")
WIDTH, LAYERS, VOCABULARY = 256, 6, 32_000
ENCODER = {"encoder_layers": 4, "encoder_width": 128, "conv_channels": 32}
SPEECH = {"seconds": 8.0, "input_tokens": 0, "output_tokens": 30}
TEXT = {"seconds": 0.0, "input_tokens": 40, "output_tokens": 30}
EXAMPLES = {"audio": 4, "text": 4}
LORA = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{name: ({name: {}}, {}) for name in OBJECTIVES},
    "distillation, LoRA": ({"distillation": {}}, {"lora": LORA}),
    "distillation, frozen language model": ({"distillation": {}}, {"freeze": ["llm"]}),
}
"""Case -> objectives, and further keys of the model, which the model without objectives has, too."""


def steps_of(folder: Path, objectives: dict[str, Any], keys: dict[str, Any]) -> Steps:
    """Training steps of a model on a batch with transcripts."""
    section = model_section(folder, "qwen", WIDTH, **ENCODER) | keys
    torch.manual_seed(0)
    model = without_chance(SALMGPT(section | {"objectives": objectives}).train())
    model.configure_optimizers()  # freezes what is frozen
    return Steps(model, {})


def batch_of(model: SALMGPT) -> dict[str, Any]:
    """Speech with transcripts, and text; the longest that OOMptimizer would measure."""
    adapter, device = adapter_for(model), torch.device("cpu")
    shapes = [Shape("audio", **SPEECH), Shape("text", **TEXT)]
    return adapter.join([adapter.synthetic_batch(shape, EXAMPLES[shape.modality], device) for shape in shapes])


def measure(case: str, folder: Path, repeats: int) -> dict[str, Any]:
    """Seconds and peaks of a case and of its model without objectives."""
    objectives, keys = CASES[case]
    steps = {"none": steps_of(folder, {}, keys), "objective": steps_of(folder, objectives, keys)}
    for of_model in steps.values():
        of_model.batch = batch_of(of_model.model)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in track(range(repeats + 1), description=case):
        for name, of_model in steps.items():
            began = time.process_time()
            of_model.run()
            seconds[name].append(time.process_time() - began)
    medians = {name: statistics.median(taken[1:]) for name, taken in seconds.items()}
    peaks = {name: of_model.peak() for name, of_model in steps.items()}
    teachers = sum(p.nbytes for p in steps["objective"].model.teachers.parameters())
    return {
        "seconds": {name: round(median, 3) for name, median in medians.items()},
        "ratio_of_seconds": round(medians["objective"] / medians["none"], 2),
        "seconds_of_steps": {name: [round(value, 3) for value in taken[1:]] for name, taken in seconds.items()},
        "peak_gib": {name: round(peak / 2**30, 3) for name, peak in peaks.items()},
        "ratio_of_peaks": round(peaks["objective"] / peaks["none"], 2),
        "copy_of_teacher_gib": round(teachers / 2**30, 3),
    }


def show(results: dict[str, dict[str, Any]]) -> None:
    """A table on the terminal."""
    table = Table(
        "objective", "s, without", "with", "ratio", "peak GiB, without", "with", "ratio", "teacher's copy, GiB"
    )
    for case, result in results.items():
        numbers = (*result["seconds"].values(), result["ratio_of_seconds"], *result["peak_gib"].values())
        table.add_row(case, *map(str, (*numbers, result["ratio_of_peaks"], result["copy_of_teacher_gib"])))
    Console(width=140).print(table)


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="steps of each that are counted")
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    logging.setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        write_llama(Path(folder), WIDTH, LAYERS, VOCABULARY)
        results = {case: measure(case, Path(folder), repeats) for case in CASES}
    show(results)
    setting = {"width": WIDTH, "layers": LAYERS, "vocabulary": VOCABULARY, **ENCODER, "examples": EXAMPLES}
    batch = {"speech": SPEECH, "text": TEXT, "threads": torch.get_num_threads()}
    keep("objectives", {**setting, **batch, "cases": results}, PACKAGES)


if __name__ == "__main__":
    main()
