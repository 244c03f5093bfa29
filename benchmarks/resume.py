"""Is a run that was killed late in an epoch resumed as quickly as one that was killed early?

An epoch of 200,000 lines is read up to 10 % and up to 90 %, and the loader's state kept. Then fresh interpreters, by
turns, build the loader, give it a state, and take a batch: the time of these three together, all imports and indexes
made before, and whether it is the batch that came next before. For text, for a speech manifest, and for gzipped text,
which has to be read again from its shard's beginning (one shard here, the worst case).

    python benchmarks/resume.py [--runs 7] [--data FOLDER]
"""

from __future__ import annotations

import argparse
import gzip
import json
import pickle
import shutil
import statistics
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

from measuring import answer, in_fresh_process, keep
from measuring.corpora import LOCATOR, make_speech, make_text, make_tokenizer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

PACKAGES = ("nemo_emmett", "nemo_toolkit", "lhotse", "torch", "transformers")
LINES = 200_000
KINDS = ("text", "speech", "gzipped text")
WORKERS = (0, 2)
PLACES = (0.1, 0.9)


def config_of(kind: str, data: Path, workers: int) -> dict[str, Any]:
    """One pass over a source, shuffled, in buckets."""
    common = {"prompt_format": "emmett_t5", "audio_locator_tag": LOCATOR, "shuffle": True, "seed": 0, "shard_seed": 0}
    common |= {"num_workers": workers, "force_finite": True, "token_equivalent_duration": 0.08}
    common |= {"use_multimodal_sampling": True, "bucket_duration_bins": [70, 130, 400], "bucket_batch_size": [32] * 3}
    if kind == "speech":
        return {**common, "input_cfg": [{"type": "nemo", "manifest_filepath": make_speech(data, LINES)}]}
    paths = make_text(data, LINES)
    if kind == "gzipped text":
        paths = {language: _gzipped(path) for language, path in paths.items()}
    languages = {"source_lang": "en", "target_lang": "de"}
    text = {"type": "parallel_text", "source_paths": paths["en"], "target_paths": paths["de"], **languages}
    return {**common, "input_cfg": [text]}


def _gzipped(path: str) -> str:
    packed = Path(f"{path}.gz")
    if not packed.exists():
        with open(path, "rb") as plain, gzip.open(packed, "wb", compresslevel=1) as file:
            shutil.copyfileobj(plain, file)
    return str(packed)


def build_loader(kind: str, data: Path, workers: int, reads_audio: bool) -> Any:
    """The loader; without audio where only the order of the examples matters."""
    from nemo.collections.common.tokenizers import AutoTokenizer

    from nemo_emmett.data import SpeechTextDataset, get_multimodal_dataloader
    from nemo_emmett.data.dataset import describe

    class Described(SpeechTextDataset):
        """Examples as they are described in a batch, without their audio."""

        def __getitem__(self, examples: Any) -> dict:
            return {"text": {"examples": [describe(example) for example in examples]}}

    tokenizer = AutoTokenizer(make_tokenizer(data))
    dataset = SpeechTextDataset(tokenizer) if reads_audio else Described(tokenizer)
    start = time.perf_counter()
    loader = get_multimodal_dataloader(config_of(kind, data, workers), 0, 1, dataset, tokenizer)
    return loader, start


def ids_of(batch: dict) -> list[str]:
    """The examples of a batch."""
    return [example["id"] for part in batch.values() for example in part["examples"]]


def read_up_to(kind: str, data: Path, workers: int) -> dict[str, Any]:
    """Read an epoch, keeping the state at each of the places, and the ids of the batch that came next."""
    loader, _ = build_loader(kind, data, workers, reads_audio=False)
    seen, places = 0, list(PLACES)
    batches = iter(loader)
    while places:
        seen += len(ids_of(next(batches)))
        if seen >= places[0] * LINES:
            state = loader.state_dict()
            batch = ids_of(next(batches))
            seen += len(batch)
            _kept(kind, data, workers, places.pop(0)).write_bytes(pickle.dumps((state, batch)))
    return {"examples": seen}


def resume(kind: str, data: Path, workers: int, place: float) -> dict[str, float]:
    """Seconds from the config to the first resumed batch."""
    import torch
    from nemo.collections.speechlm2.data import SALMDataset  # noqa: F401  # imported when a loader is built

    import nemo_emmett.data.dataloader  # noqa: F401

    torch.set_num_threads(1)
    state, expected = pickle.loads(_kept(kind, data, workers, place).read_bytes())
    loader, start = build_loader(kind, data, workers, reads_audio=True)
    loader.load_state_dict(state)
    batch = next(iter(loader))
    seconds = time.perf_counter() - start
    if ids_of(batch) != expected:
        raise AssertionError(f"{kind}: the first batch after resuming at {place:.0%} is not the next one")
    return {"seconds": seconds}


def _kept(kind: str, data: Path, workers: int, place: float) -> Path:
    return data / f"{kind.replace(' ', '-')}-{workers}-{place}.state"


def measure(data: Path, runs: int) -> list[dict[str, Any]]:
    """The time to the first resumed batch, for each kind of source and number of workers, at both places by turns."""
    cells = list(product(KINDS, WORKERS))
    seconds: dict[tuple, list[float]] = {(*cell, place): [] for cell in cells for place in PLACES}
    with Progress() as progress:
        bar = progress.add_task("Resuming", total=len(cells) * (1 + runs * len(PLACES)))
        for kind, workers in cells:
            task = {"kind": kind, "workers": workers, "data": str(data)}
            in_fresh_process(__file__, {**task, "place": None})
            progress.advance(bar)
            for _, place in product(range(runs), PLACES):
                found = in_fresh_process(__file__, {**task, "place": place})["seconds"]
                seconds[kind, workers, place].append(found)
                progress.advance(bar)
    rows = []
    for kind, workers in cells:
        early, late = (seconds[kind, workers, place] for place in PLACES)
        medians = statistics.median(early), statistics.median(late)
        rows.append(
            {
                "kind": kind,
                "workers": workers,
                "seconds_at_10_percent": round(medians[0], 3),
                "seconds_at_90_percent": round(medians[1], 3),
                "ratio": round(medians[1] / medians[0], 3),
                "runs": {"10 %": [round(s, 3) for s in early], "90 %": [round(s, 3) for s in late]},
            }
        )
    return rows


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--data", type=Path, help="folder for the corpora; a temporary one if not given")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        task = json.loads(arguments.task)
        of_loader = task["kind"], Path(task["data"]), task["workers"]
        answer(read_up_to(*of_loader) if task["place"] is None else resume(*of_loader, task["place"]))
    with tempfile.TemporaryDirectory(prefix="nemo_emmett_benchmark_") as temporary:
        data = arguments.data or Path(temporary)
        data.mkdir(parents=True, exist_ok=True)
        make_tokenizer(data)
        rows = measure(data, arguments.runs)
    table = Table("source", "workers", "at 10 %", "at 90 %", "ratio", title="Seconds to the first resumed batch")
    for row in rows:
        times = (f"{row[f'seconds_at_{place}_percent']:.2f}" for place in (10, 90))
        table.add_row(row["kind"], str(row["workers"]), *times, f"{row['ratio']:.2f}")
    Console().print(table)
    keep("resume", {"lines": LINES, "resumed": rows}, PACKAGES)


if __name__ == "__main__":
    main()
