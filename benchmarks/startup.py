"""What does an installed nemo_emmett cost programs that do not use it?

Milliseconds of fresh interpreters: ``import nemo_emmett``, Lightning's callback factory with nothing asked, and Hydra's
scan of its plugins with and without ours. The median of several runs in turn, so that a busy machine slows all alike.

    python benchmarks/startup.py [--runs 15]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys

from measuring import keep
from rich.console import Console
from rich.progress import track
from rich.table import Table

PACKAGES = ("nemo_emmett", "hydra-core", "wrapt", "lightning", "nemo_toolkit", "torch")

# Each program prints the milliseconds of its last part; the part above the dash is not counted.
PROGRAMS = {
    "import nemo_emmett": """
---
import nemo_emmett
""",
    "callback factory, nothing asked": """
from importlib.metadata import entry_points
(point,) = entry_points(group="lightning.pytorch.callbacks_factory", name="nemo_emmett")
---
assert point.load()() == []
""",
    "callback factory, nothing asked, in a process that has imported Lightning": """
import lightning.pytorch
from importlib.metadata import entry_points
(point,) = entry_points(group="lightning.pytorch.callbacks_factory", name="nemo_emmett")
---
assert point.load()() == []
""",
    "Hydra's plugin scan without ours": """
import sys
from hydra.core.plugins import Plugins
sys.modules["hydra_plugins"] = None  # as where no plugin is installed
---
Plugins.instance()
""",
    "Hydra's plugin scan with ours": """
from hydra.core.plugins import Plugins
---
Plugins.instance()
assert "hydra_plugins.nemo_emmett_plugin" in sys.modules
""",
    "for scale: import torch": """
---
import torch
""",
}


def milliseconds(program: str) -> float:
    """Run a program in a fresh interpreter and return what it measured."""
    before, measured = program.split("---")
    code = f"import sys, time\n{before}\nstart = time.perf_counter()\n{measured}\n"
    code += "print('MS', 1000 * (time.perf_counter() - start))"
    environment = {key: value for key, value in os.environ.items() if key != "NEMO_EMMETT_CALLBACKS"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout.split("MS ")[-1])


def measure(runs: int) -> dict[str, list[float]]:
    """Milliseconds of each program, run after run; the first round fills the caches and does not count."""
    times: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for run in track(range(runs + 1), description="Starting interpreters"):
        for name, program in PROGRAMS.items():
            taken = milliseconds(program)
            if run:
                times[name].append(taken)
    return times


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    times = measure(parser.parse_args().runs)
    table = Table("", "median ms", "fastest", "slowest", title="What starting costs")
    for name, taken in times.items():
        table.add_row(name, *(f"{value:.0f}" for value in (statistics.median(taken), min(taken), max(taken))))
    Console().print(table)
    milliseconds = {
        name: {"median": round(statistics.median(taken), 1), "runs": [round(value, 1) for value in taken]}
        for name, taken in times.items()
    }
    keep("startup", {"milliseconds": milliseconds}, PACKAGES)


if __name__ == "__main__":
    main()
