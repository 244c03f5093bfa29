"""Commands one after another, each run once: what the demo and the experiment are made of."""

from __future__ import annotations

import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent

# glibc gives large blocks back to the kernel and takes them anew at every step, which costs a fifth of the CPU time.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(4 << 30), "MALLOC_TRIM_THRESHOLD_": str(8 << 30)}


def tail(log: Path, size: int = 4096) -> str:
    """The end of a file that is being written."""
    with log.open("rb") as lines:
        lines.seek(max(0, log.stat().st_size - size))
        return lines.read().decode(errors="replace")


def installed(command: str) -> str:
    """The path of a command that stands beside the interpreter, from here where that is shorter."""
    path = Path(sys.executable).with_name(command)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def script(name: str, *overrides: str) -> list[str]:
    """One of the scripts beside this one."""
    return [sys.executable, str(EXAMPLES / name), *overrides]
