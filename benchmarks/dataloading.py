"""How fast do batches come, compared with stock NeMo's dataloader, and how much memory do they take?

Both loaders read the same files with the same config, tokenizer and dataset class: parallel text, and speech whose
lines share 400 recordings. Shuffled, with known bins, 0 and 2 workers. Each measurement has an interpreter of its own,
the loaders by turns, and the table shows medians of

- the time from the config to the first batch, after imports and with our indexes made before (their cost is
  reported separately);
- examples per second after the first batches, nothing else to do;
- the resident memory of all processes after that, their sum (RSS), and with pages that processes share, with these or
  with others on the machine, divided among them (PSS).

    python benchmarks/dataloading.py [--runs 3] [--seconds 6] [--data FOLDER]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

from measuring import answer, in_fresh_process, keep, memory_of_processes
from measuring.corpora import LOCATOR, make_speech, make_text, make_tokenizer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

PACKAGES = ("nemo_emmett", "nemo_toolkit", "lhotse", "torch", "transformers", "tokenizers")
SIZES = (20_000, 200_000)
WORKERS = (0, 2)
LOADERS = ("nemo", "nemo_emmett")
KINDS = ("text", "speech")
WARM_UP = 10
"""Batches that are not counted: workers have fetched some before anyone asks for them."""


def config_of(kind: str, data: Path, lines: int, workers: int) -> dict[str, Any]:
    """The dataset's config, the same for both loaders."""
    common = {
        "prompt_format": "emmett_t5",
        "audio_locator_tag": LOCATOR,
        "shuffle": True,
        "seed": 0,
        "shard_seed": 0,
        "num_workers": workers,
    }
    if kind == "text":
        paths = make_text(data, lines)
        languages = {"source_language": "en", "target_language": "de"}
        source = {"type": "txt_pair", "source_paths": paths["en"], "target_paths": paths["de"], **languages}
        buckets = {"bucket_duration_bins": [40, 70, 100, 130, 400], "bucket_batch_size": [64, 48, 32, 24, 16]}
        return {**common, "input_cfg": [source], "use_multimodal_sampling": True, **buckets}
    source = {"type": "nemo", "manifest_filepath": make_speech(data, lines)}
    buckets = {"bucket_duration_bins": [2.5, 4.0, 5.5, 7.0, 8.5], "bucket_batch_size": [24, 20, 16, 12, 8]}
    return {**common, "input_cfg": [source], **buckets}


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Build one loader and read from it; runs in a process of its own."""
    import torch
    from nemo.collections.common.data.lhotse.dataloader import get_lhotse_dataloader_from_config
    from nemo.collections.common.tokenizers import AutoTokenizer
    from nemo.collections.speechlm2.data import SALMDataset  # noqa: F401  # imported by either loader when it is built
    from omegaconf import OmegaConf

    from nemo_emmett.data import SpeechTextDataset, get_multimodal_dataloader
    from nemo_emmett.prompts.translation import register_prompt_formats

    torch.set_num_threads(1)
    register_prompt_formats()
    data = Path(task["data"])
    tokenizer = AutoTokenizer(make_tokenizer(data))
    config = OmegaConf.create(config_of(task["kind"], data, task["lines"], task["workers"]))
    build = get_multimodal_dataloader if task["loader"] == "nemo_emmett" else get_lhotse_dataloader_from_config

    start = time.perf_counter()
    loader = build(config, 0, 1, SpeechTextDataset(tokenizer), tokenizer)
    batches = iter(loader)
    _examples_in(next(batches))
    first_batch = time.perf_counter() - start

    for _ in range(WARM_UP):
        next(batches)
    examples, start = 0, time.perf_counter()
    while (taken := time.perf_counter() - start) < task["seconds"]:
        examples += _examples_in(next(batches))
    return {"first_batch": first_batch, "examples_per_second": examples / taken, **memory_of_processes()}


def _examples_in(batch: dict) -> int:
    return sum(len(part["examples"]) for part in batch.values())


def compare(data: Path, runs: int, seconds: float) -> list[dict[str, Any]]:
    """All measurements, the loaders by turns; the medians of each kind, number of workers and lines, and loader."""
    cells = list(product(KINDS, WORKERS, SIZES, LOADERS))
    measured: dict[tuple, list[dict]] = {cell: [] for cell in cells}
    with Progress() as progress:
        bar = progress.add_task("Measuring", total=runs * len(cells))
        for _ in range(runs):
            for kind, workers, lines, loader in cells:
                task = {"kind": kind, "workers": workers, "lines": lines, "loader": loader}
                found = in_fresh_process(__file__, {**task, "data": str(data), "seconds": seconds})
                measured[kind, workers, lines, loader].append(found)
                progress.advance(bar)
    return [
        {
            **dict(zip(("kind", "workers", "lines", "loader"), cell, strict=True)),
            **{key: round(statistics.median(run[key] for run in found), 3) for key in found[0]},
            "runs": [{key: round(value, 3) for key, value in run.items()} for run in found],
        }
        for cell, found in measured.items()
    ]


def index(data: Path) -> dict[str, float]:
    """Seconds that building a loader takes the first time, when its indexes are made, beyond what it takes later."""
    seconds = {}
    for kind, lines in product(KINDS, SIZES):
        task = {"kind": kind, "workers": 0, "lines": lines, "loader": "nemo_emmett", "data": str(data), "seconds": 0}
        first, later = (in_fresh_process(__file__, task)["first_batch"] for _ in range(2))
        seconds[f"{kind}, {lines} lines"] = round(max(first - later, 0.0), 3)
    return seconds


def verdicts(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The ratios that are compared with the targets, by their names."""
    found = {(row["kind"], row["workers"], row["lines"], row["loader"]): row for row in rows}
    ratios = {}
    for kind, workers in product(KINDS, WORKERS):
        ours, nemos = (found[kind, workers, SIZES[-1], loader] for loader in ("nemo_emmett", "nemo"))
        small = found[kind, workers, SIZES[0], "nemo_emmett"]
        where = f"{kind}, {workers} workers"
        ratios[f"{where}: examples per second over NeMo's"] = ours["examples_per_second"] / nemos["examples_per_second"]
        ratios[f"{where}: time to first batch over NeMo's"] = ours["first_batch"] / nemos["first_batch"]
        ratios[f"{where}: resident memory at {SIZES[1]} lines over {SIZES[0]}"] = ours["rss"] / small["rss"]
    return {name: round(ratio, 3) for name, ratio in ratios.items()}


def show(rows: list[dict[str, Any]], ratios: dict[str, float]) -> None:
    """Print what was found."""
    table = Table("", "lines", "workers", "loader", "first batch s", "examples/s", "PSS MiB", "RSS MiB")
    for row in rows:
        cells = (
            f"{row['first_batch']:.2f}",
            f"{row['examples_per_second']:.0f}",
            f"{row['pss']:.0f}",
            f"{row['rss']:.0f}",
        )
        table.add_row(row["kind"], str(row["lines"]), str(row["workers"]), row["loader"], *cells)
    console = Console()
    console.print(table)
    for name, ratio in ratios.items():
        console.print(f"{ratio:6.2f}  {name}")


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6.0, help="how long examples are counted")
    parser.add_argument("--data", type=Path, help="folder for the corpora; a temporary one if not given")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        answer(measure(json.loads(arguments.task)))
    with tempfile.TemporaryDirectory(prefix="nemo_emmett_benchmark_") as temporary:
        data = arguments.data or Path(temporary)
        data.mkdir(parents=True, exist_ok=True)
        make_tokenizer(data)
        for lines in SIZES:
            make_text(data, lines)
            make_speech(data, lines)
        index_seconds = index(data)
        rows = compare(data, arguments.runs, arguments.seconds)
    ratios = verdicts(rows)
    show(rows, ratios)
    keep("dataloading", {"ratios": ratios, "seconds_for_indexes": index_seconds, "measurements": rows}, PACKAGES)


if __name__ == "__main__":
    main()
