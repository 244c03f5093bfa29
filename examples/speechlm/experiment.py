"""EMMeTT's claims in miniature: joint training against text alone and speech alone, and what makes it efficient.

Usage:
    python examples/speechlm/experiment.py [--captions FOLDER] [--data data] [--exp exp/experiment]
    python examples/speechlm/experiment.py --scarce --settings --forgetting --captions FOLDER
    python examples/speechlm/experiment.py --mboshi FOLDER --zero-shot

On the phrasebook, and on real captions if their folder is given (Multi30k: train.en, train.de, train.fr, val.en, ...),
SALM-T5 and SALM-GPT are trained from one pretrained start on text translation, on speech translation, and on both, with
three seeds each; then, on a corpus with much English speech and little French, with other buckets, batch sizes and
blends. It ends with the tables, and writes them with the curves and all numbers into the experiment's folder.

Options choose parts that are run in place of this: where speech is scarce (``--scarce``), how to set up joint training
there (``--settings``), what becomes of text translation (``--forgetting``), real speech (``--mboshi``), directions
without recordings (``--zero-shot``).

Each run is a command; its log begins with the command and ends with the seconds that it took. A run that has finished
is not run again, so an interrupted experiment continues where it stopped. docs/experiment.md has the results and what
they show.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from importlib.util import find_spec
from pathlib import Path

import experiment_forgetting
import experiment_mboshi
import experiment_scarce
import experiment_settings
import experiment_zero_shot
from experiment_runs import CAPTION_FILES, SEEDS, Run, all_runs, captions, phrasebook
from experiment_seeds import Part
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from stages import KEEP_MEMORY, note_seconds, tail

from nemo_emmett.processes import available_cores

ON_CAPTIONS = {"scarce": experiment_scarce, "settings": experiment_settings, "forgetting": experiment_forgetting}
"""Parts that divide the captions, by the options that choose them."""


def main() -> None:
    """Run what has not finished yet, then print and write the results."""
    parser = argparse.ArgumentParser(description="EMMeTT's claims in miniature.")
    parser.add_argument("--captions", type=Path, help="folder with Multi30k's train.en, train.de, ..., val.fr")
    parser.add_argument("--scarce", action="store_true", help="part: from 250 recordings on; needs --captions")
    parser.add_argument("--settings", action="store_true", help="part: set-up of joint training; needs --captions")
    parser.add_argument("--forgetting", action="store_true", help="part: text lost, speech gained; needs --captions")
    parser.add_argument("--mboshi", type=Path, help="part: real speech; folder of the Mboshi manifests")
    parser.add_argument("--zero-shot", action="store_true", help="part: directions without recordings")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder for the corpora")
    parser.add_argument("--exp", type=Path, default=Path("exp/experiment"), help="folder of the experiment")
    parser.add_argument("--jobs", type=int, default=available_cores(), help="runs at a time, one thread each")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="seeds of the trainings")
    options = parser.parse_args()
    check(options, parser)
    console = Console()
    if parts := chosen_parts(options):
        runs = list({run.name: run for part in parts for run in part.runs}.values())  # parts share starts
        run_all(runs, options.exp / "logs", options.jobs, console)
        from experiment_results import report_parts

        report_parts(parts, options.exp, console)
        return

    corpora = [phrasebook(options.data)]
    if options.captions is not None:
        corpora.append(captions(options.data, options.captions))
    runs = all_runs(corpora, options.exp, options.seeds)
    run_all(runs, options.exp / "logs", options.jobs, console)

    # Imported here: it imports NeMo, and the progress bar should not wait ten seconds for that.
    from experiment_results import collect, report

    report(collect(corpora, options.exp, options.seeds), options.exp, console)


def chosen_parts(options: argparse.Namespace) -> list[Part]:
    """The parts that the options name."""
    data, exp, seeds = options.data, options.exp, options.seeds
    parts = []
    for name, module in ON_CAPTIONS.items():
        if getattr(options, name):
            parts.append(module.part(captions(data, options.captions), options.captions, data, exp, seeds))
    if options.mboshi is not None:
        parts.append(experiment_mboshi.part(options.mboshi, data, exp, seeds))
    if options.zero_shot:
        parts.append(experiment_zero_shot.part(phrasebook(data), exp, seeds))
    return parts


def check(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Report mistakes now that would end the experiment an hour later."""
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: must be 1 or more")
    if len(set(options.seeds)) != len(options.seeds):
        parser.error(f"--seeds {' '.join(map(str, options.seeds))}: each must be given once")
    if options.captions is not None:
        for name in CAPTION_FILES:
            if not (options.captions / name).is_file():
                parser.error(
                    f"--captions: there is no {options.captions / name}; give a folder with Multi30k's raw text"
                )
    for name in ON_CAPTIONS:
        if getattr(options, name) and options.captions is None:
            parser.error(f"--{name} needs --captions; give a folder with Multi30k's raw text")
    if options.mboshi is not None:
        for name in experiment_mboshi.FILES:
            if not (options.mboshi / name).is_file():
                parser.error(f"--mboshi: there is no {options.mboshi / name}; give the folder of the Mboshi manifests")
    for module, extra in {"espeakng_loader": "synthesis", "num2words": "synthesis", "matplotlib": "charts"}.items():
        if find_spec(module) is None:
            parser.error(f"'{module}' is not installed; run: pip install 'nemo_emmett[{extra}]'")


class RunFailed(Exception):
    """A command failed; runs that depend on it are left out, all others are run."""


def run_all(runs: Sequence[Run], logs: Path, jobs: int, console: Console) -> None:
    """Run everything that has not finished, each run after those it needs, up to ``jobs`` at a time.

    Raises:
        SystemExit: if runs failed, once all that do not depend on them have finished.
    """
    finished = {run.name for run in runs if run.result.exists()}
    waiting = [run for run in runs if run.name not in finished]
    failures: list[str] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress, ThreadPoolExecutor(jobs) as pool:
        bar = progress.add_task("The experiment's runs", total=len(runs), completed=len(finished))
        running: dict[Future[float], Run] = {}
        stop = threading.Event()
        try:
            while True:
                for run in [one for one in waiting if finished.issuperset(one.after)][: jobs - len(running)]:
                    waiting.remove(run)
                    running[pool.submit(start, run, logs, progress, stop)] = run
                if not running:
                    break
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    run = running.pop(future)
                    try:
                        progress.console.print(f"{run.name}: {future.result():.0f} s", highlight=False)
                    except RunFailed as failure:
                        failures.append(str(failure))
                        progress.console.print(failures[-1], style="bold red", highlight=False)
                        continue
                    progress.advance(bar)
                    finished.add(run.name)
        finally:
            stop.set()
    if failures:
        left_out = [f"{len(waiting)} runs that need it were left out."] if waiting else []
        raise SystemExit("\n".join([*failures, *left_out, "Started again, the experiment continues from here."]))


def start(run: Run, logs: Path, progress: Progress, stop: threading.Event) -> float:
    """Run one command to its end and return its seconds; its last progress bar is shown meanwhile."""
    if run.unfinished is not None:
        shutil.rmtree(run.unfinished, ignore_errors=True)
    log = logs / f"{run.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = run.command()
    task = progress.add_task(run.name, total=None)
    begun = time.monotonic()
    with log.open("wb") as output:
        output.write(f"$ {shlex.join(command)}\n".encode())
        output.flush()
        process = subprocess.Popen(command, env=_environment(), stdout=output, stderr=output)
        _watch(process, log, progress, task, stop)
    progress.remove_task(task)
    if process.returncode != 0 or not run.result.exists():
        raise RunFailed(f"'{run.name}' failed (exit code {process.returncode}): {_last_line(log)} See {log}.")
    seconds = time.monotonic() - begun
    note_seconds(log, seconds)
    return seconds


def _watch(process: subprocess.Popen, log: Path, progress: Progress, task: TaskID, stop: threading.Event) -> None:
    while process.poll() is None:
        if stop.wait(1.0):
            process.terminate()
            process.wait()
        if (steps := _steps(tail(log))) is not None:
            progress.update(task, completed=steps[0], total=steps[1])


def _steps(text: str) -> tuple[int, int] | None:
    """Steps done and in all, of the last Lightning bar in a log (``Epoch 0:  42%|... | 42/100 [...``), or of its last
    line of progress (``step 42/1,000 (4%) ...``)."""
    bars = [line for line in text.replace("\r", "\n").splitlines() if "it/s" in line or line.startswith("step ")]
    for bar in reversed(bars):
        for word in bar.replace(",", "").split():
            done, slash, total = word.partition("/")
            if slash and done.isdigit() and total.isdigit():
                return int(done), int(total)
    return None


def _last_line(log: Path) -> str:
    """The last line of a log, as a rule an error's sentence."""
    lines = tail(log).replace("\r", "\n").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _environment() -> dict[str, str]:
    # One thread each: two runs side by side are faster than one on two cores.
    return {**KEEP_MEMORY, "OMP_NUM_THREADS": "1", **os.environ, "TOKENIZERS_PARALLELISM": "false"}


if __name__ == "__main__":
    main()
