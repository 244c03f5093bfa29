"""What do examples cost as the number of ranks grows, compared with stock NeMo's dataloader?

One process is one rank of 1, 8, 64 and 512, which are not there: no loader needs to hear from the others. It makes its
own batches in the process itself, with no worker, as fast as it can. Text is in four languages, twelve directions and
seven buckets of two dimensions; speech is a manifest whose lines share 400 recordings. Both loaders have the same
files, config and dataset. Each measurement has an interpreter of its own, the loaders by turns; the table shows medians
of

- the examples of the rank itself in a second of processor time, which other programs on the machine hardly change;
- the examples that a worker of our loader makes in a second of processor time, without the schedule, which is computed
  in the main process;
- the time of the schedule alone, which our loader computes for all ranks, for each of its steps;
- the time to the first batch, with the indexes made before, and to the first batch after resuming at 10 and 90 % of a
  pass, by the clock and by the processor;
- anonymous memory (without what is mapped from files) of small and of large data, the lines of the small repeated.

    python benchmarks/ranks.py [--runs 3] [--seconds 5] [--data FOLDER] [--text FOLDER]

``--text`` names a folder with line-aligned ``train.en``, ``train.de``, ``train.fr`` and ``train.cs``, such as Multi30K;
by default the text is made up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from itertools import islice, permutations
from pathlib import Path
from typing import Any

from measuring import answer, in_fresh_process, keep
from measuring.corpora import LOCATOR, make_aligned, make_speech, make_tokenizer, repeated
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

PACKAGES = ("nemo_emmett", "nemo_toolkit", "lhotse", "torch", "transformers", "tokenizers", "numpy")
WORLD_SIZES = (1, 8, 64, 512)
LOADERS = ("nemo", "nemo_emmett")
KINDS = ("text", "speech")
LINES = {"text": 20_000, "speech": 20_000}
LARGE = 2_000_000
"""Lines of text in one direction, for memory and the time to the first batch."""

SHARDS = 10_000
"""Files of twenty lines each, for the time to the first batch."""

WARM_UP = 10
BUCKETS = {
    "bucket_duration_bins": [[16, 16], [16, 40], [24, 24], [24, 56], [40, 40], [40, 80], [400, 400]],
    "bucket_batch_size": [64, 56, 48, 40, 32, 24, 16],
}
COMMON = {"prompt_format": "emmett_t5", "audio_locator_tag": LOCATOR, "shuffle": True, "seed": 0, "shard_seed": 0}


def config_of(task: dict[str, Any]) -> dict[str, Any]:
    """The dataset's config, the same for both loaders."""
    data = Path(task["data"])
    if task["kind"] == "speech":
        source = {"type": "nemo", "manifest_filepath": make_speech(data, LINES["speech"])}
        buckets = {"bucket_duration_bins": [2.5, 4.0, 5.5, 7.0, 8.5], "bucket_batch_size": [24, 20, 16, 12, 8]}
        return {**COMMON, "input_cfg": [source, source], **buckets}  # data of a single manifest would end
    if task["kind"] == "shards":
        folder = data / f"shards-{SHARDS}"
        paths = {lang: f"{folder}/part__OP_0..{SHARDS - 1}_CL_.{lang}" for lang in ("en", "de")}
        sources = [pair_source(paths, "en", "de")]
    elif task["kind"] == "large":
        paths = repeated(aligned_text(task), data / "repeated", task["lines"], ("en", "de"))
        sources = [pair_source(paths, "en", "de")]
    else:
        paths = aligned_text(task)
        sources = [pair_source(paths, *pair) for pair in permutations(paths, 2)]
    return {**COMMON, "input_cfg": sources, "use_multimodal_sampling": True, **BUCKETS}


def aligned_text(task: dict[str, Any]) -> dict[str, str]:
    """The files of the four languages."""
    if task["text"]:
        return {language: f"{task['text']}/train.{language}" for language in ("en", "de", "fr", "cs")}
    return make_aligned(Path(task["data"]), LINES["text"], ("en", "de", "fr", "cs"))


def pair_source(paths: dict[str, str], source: str, target: str) -> dict[str, Any]:
    """A source of parallel text in one direction."""
    languages = {"source_language": source, "target_language": target}
    return {"type": "txt_pair", "source_paths": paths[source], "target_paths": paths[target], **languages}


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Build the loader of one rank and read from it; runs in a process of its own."""
    import torch
    from nemo.collections.common.data.lhotse.dataloader import get_lhotse_dataloader_from_config
    from nemo.collections.common.tokenizers import AutoTokenizer
    from nemo.collections.speechlm2.data import SALMDataset  # noqa: F401  # imported by either loader when it is built
    from omegaconf import OmegaConf

    from nemo_emmett.data import SpeechTextDataset, get_multimodal_dataloader
    from nemo_emmett.prompts.translation import register_prompt_formats

    torch.set_num_threads(1)
    register_prompt_formats()
    tokenizer = AutoTokenizer(make_tokenizer(Path(task["data"])))
    config = OmegaConf.create(config_of(task))
    if task.get("place") is not None:
        config.force_finite = True
    build = get_multimodal_dataloader if task["loader"] == "nemo_emmett" else get_lhotse_dataloader_from_config
    rank = task["world_size"] // 2

    def new_loader() -> Any:
        return build(config, rank, task["world_size"], SpeechTextDataset(tokenizer), tokenizer)

    state = None
    if task.get("place") is not None:
        state = _state_at(new_loader(), task["place"])
    start, start_cpu = time.perf_counter(), time.process_time()
    loader = new_loader()
    if state is not None:
        loader.load_state_dict(state)
    batches = iter(loader)
    _examples_in(next(batches))
    found = {
        "first_batch": time.perf_counter() - start,
        "first_batch_cpu": time.process_time() - start_cpu,
        "anonymous": _anonymous_memory(),
    }
    if task["seconds"]:
        list(islice(batches, WARM_UP))
        examples, start = 0, time.process_time()
        while (taken := time.process_time() - start) < task["seconds"]:
            examples += _examples_in(next(batches))
        found |= {"examples_per_second": examples / taken, "anonymous": _anonymous_memory()}
        if task["loader"] == "nemo_emmett":
            found["of_worker"] = _examples_per_second_of_worker(loader, task["seconds"])
            found["schedule_ms"] = _milliseconds_of_schedule(new_loader(), task["seconds"])
    return found


def _examples_per_second_of_worker(loader: Any, seconds: float) -> float:
    """What a worker does with the addresses of its steps, in this process."""
    examples, taken, steps = 0, 0.0, iter(loader.sampler)
    while taken < seconds:
        addresses = next(steps)
        start = time.process_time()
        made = loader.dataset[addresses]
        taken += time.process_time() - start
        examples += _examples_in(made.batch)
    return examples / taken


def _milliseconds_of_schedule(loader: Any, seconds: float) -> float:
    steps = iter(loader.sampler)
    list(islice(steps, WARM_UP))
    number, start = 0, time.process_time()
    while time.process_time() - start < seconds:
        next(steps)
        number += 1
    return (time.process_time() - start) / number * 1000


def _state_at(loader: Any, place: float) -> dict[str, Any]:
    """The state of a loader after a share of the steps of its pass, whose batches are not made."""
    steps = iter(loader.sampler)
    for _ in islice(steps, round(len(loader) * place)):
        pass
    loader.progress._states = [loader.sampler.snapshot()]
    return json.loads(json.dumps(loader.state_dict()))


def _anonymous_memory() -> float:
    """MiB of this process that are not mapped from files."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) / 1024


def _examples_in(batch: dict) -> int:
    return sum(len(part["examples"]) for part in batch.values())


def tasks(arguments: argparse.Namespace, data: Path) -> list[dict[str, Any]]:
    """All that is measured."""
    common = {"data": str(data), "text": str(arguments.text or ""), "seconds": arguments.seconds}
    made = [
        {"kind": kind, "loader": loader, "world_size": size, **common}
        for kind in KINDS
        for size in WORLD_SIZES
        for loader in LOADERS
    ]
    ours = {"loader": "nemo_emmett", "world_size": 1, **common, "seconds": 0}
    made += [{**ours, "kind": "large", "lines": lines} for lines in (20_000, LARGE)]
    made += [{**ours, "kind": "large", "lines": LARGE, "place": place} for place in (0.1, 0.9)]
    return [*made, {**ours, "kind": "shards"}]


def name_of(task: dict[str, Any]) -> str:
    """What is measured, in words."""
    name = f"{task['kind']}, {task['loader']}, {task['world_size']} ranks"
    if "lines" in task:
        name += f", {task['lines']:,} lines"
    return name + (f", resumed at {task['place']:.0%}" if "place" in task else "")


def verdicts(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """The ratios that are compared with the targets, by their names."""
    ratios = {}
    for kind in KINDS:
        ours = {size: found[f"{kind}, nemo_emmett, {size} ranks"] for size in WORLD_SIZES}
        nemos = {size: found[f"{kind}, nemo, {size} ranks"] for size in WORLD_SIZES}
        rate = "examples_per_second"
        ratios[f"{kind}: examples per second of a worker at 512 ranks over 1"] = (
            ours[512]["of_worker"] / ours[1]["of_worker"]
        )
        ratios[f"{kind}: examples per second, with the schedule in the same process, at 512 ranks over 1"] = (
            ours[512][rate] / ours[1][rate]
        )
        for size in (1, 512):
            ratios[f"{kind}: examples per second over NeMo's, {size} ranks"] = ours[size][rate] / nemos[size][rate]
    small, large = (found[f"large, nemo_emmett, 1 ranks, {lines:,} lines"] for lines in (20_000, LARGE))
    ratios[f"anonymous memory at {LARGE:,} lines over 20,000"] = large["anonymous"] / small["anonymous"]
    early, late = (found[f"large, nemo_emmett, 1 ranks, {LARGE:,} lines, resumed at {p}"] for p in ("10%", "90%"))
    ratios["first batch after resuming at 90 % over 10 %"] = late["first_batch_cpu"] / early["first_batch_cpu"]
    return {name: round(ratio, 3) for name, ratio in ratios.items()}


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="how long examples are counted")
    parser.add_argument("--data", type=Path, help="folder for the corpora; a temporary one if not given")
    parser.add_argument("--text", type=Path, help="folder with train.en, train.de, train.fr and train.cs")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        answer(measure(json.loads(arguments.task)))
    with tempfile.TemporaryDirectory(prefix="nemo_emmett_benchmark_") as temporary:
        data = arguments.data or Path(temporary)
        data.mkdir(parents=True, exist_ok=True)
        all_tasks = tasks(arguments, data)
        make_shards(data, all_tasks[0])
        measured: dict[str, list[dict[str, float]]] = {name_of(task): [] for task in all_tasks}
        with Progress() as progress:
            alone = [task for task in all_tasks if task["loader"] == "nemo_emmett" and task["world_size"] == 1]
            bar = progress.add_task("Measuring", total=len(alone) + arguments.runs * len(all_tasks))
            for task in alone:  # makes the indexes
                in_fresh_process(__file__, {**task, "seconds": 0})
                progress.advance(bar)
            for _ in range(arguments.runs):
                for task in all_tasks:
                    measured[name_of(task)].append(in_fresh_process(__file__, task))
                    progress.advance(bar)
    medians = {
        name: {key: round(statistics.median(run[key] for run in runs), 4) for key in runs[0]}
        for name, runs in measured.items()
    }
    ratios = verdicts(medians)
    show(medians, ratios)
    keep("ranks", {"ratios": ratios, "measurements": medians, "runs": measured}, PACKAGES)


def make_shards(data: Path, task: dict[str, Any]) -> None:
    """Many files of twenty lines of the two languages."""
    folder = data / f"shards-{SHARDS}"
    if folder.exists():
        return
    paths = aligned_text(task)
    folder.mkdir()
    for language in ("en", "de"):
        lines = Path(paths[language]).read_text().splitlines(keepends=True)[:20]
        for number in range(SHARDS):
            (folder / f"part_{number}.{language}").write_text("".join(lines))


def show(found: dict[str, dict[str, float]], ratios: dict[str, float]) -> None:
    """Print what was found."""
    table = Table(
        "",
        "own examples/s",
        "of a worker",
        "schedule, ms a step",
        "first batch, s",
        "of the processor",
        "anonymous MiB",
    )
    for name, row in found.items():
        cells = [f"{row[key]:.{digits}f}" if key in row else "" for key, digits in COLUMNS.items()]
        table.add_row(name, *cells)
    console = Console()
    console.print(table)
    for name, ratio in ratios.items():
        console.print(f"{ratio:6.2f}  {name}")


COLUMNS = {
    "examples_per_second": 0,
    "of_worker": 0,
    "schedule_ms": 2,
    "first_batch": 2,
    "first_batch_cpu": 2,
    "anonymous": 0,
}
"""What the table shows of a measurement, and with how many digits."""


if __name__ == "__main__":
    main()
