"""What the benchmarks share: results on disk, programs in fresh interpreters, corpora that are made on the spot."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from nemo_emmett.processes import available_cores

RESULTS = Path(__file__).parents[1] / "results"


def keep(name: str, result: Mapping[str, Any], packages: Sequence[str]) -> Path:
    """Write a benchmark's result to ``results/<name>.json``, with what it was measured on."""
    measured_on = {
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
        "machine": {"cores": available_cores(), "architecture": platform.machine(), "system": platform.system()},
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**result, **measured_on}, indent=2) + "\n")
    return path


def in_fresh_process(script: str, task: Mapping[str, Any]) -> dict[str, Any]:
    """Have ``script --task <task>`` run by a fresh interpreter; what :func:`answer` said there."""
    command = [sys.executable, script, "--task", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{task} has failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.rpartition("ANSWER ")[2])


def answer(result: Mapping[str, Any]) -> NoReturn:
    """Hand a result to the process that waits in :func:`in_fresh_process`, and end, whatever threads still run."""
    print("ANSWER", json.dumps(result), flush=True)
    os._exit(0)  # the threads in which lhotse fills its buckets never end


def memory_of_processes() -> dict[str, float]:
    """MiB that this process and its children hold: ``rss`` counts shared pages in each of them, ``pss`` once."""
    held = {"Rss": 0, "Pss": 0}
    for pid in _with_children(os.getpid()):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in held:
                held[name] += int(rest.split()[0])
    return {name.lower(): round(kib / 1024, 1) for name, kib in held.items()}


def _with_children(pid: int) -> list[int]:
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += _with_children(int(child))
    return found
