"""Commands that the demo and the experiment run, and the environment they run in."""

from __future__ import annotations

import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent

RECIPES = EXAMPLES / "conf"
"""Recipes of the demo and the experiment."""

# glibc gives large blocks back to the kernel and takes them again at every step, which costs a fifth of the CPU time.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(4 << 30), "MALLOC_TRIM_THRESHOLD_": str(8 << 30)}


def tail(log: Path, size: int = 4096) -> str:
    """The last bytes of a file that is being written, as text."""
    with log.open("rb") as lines:
        lines.seek(max(0, log.stat().st_size - size))
        return lines.read().decode(errors="replace")


def note_seconds(log: Path, seconds: float) -> None:
    """Write how long a command took into the last line of its log."""
    with log.open("a") as lines:
        lines.write(f"\n# {seconds:.0f} s\n")


def noted_seconds(log: Path) -> float:
    """What :func:`note_seconds` wrote."""
    mark, seconds, _ = tail(log).split("\n")[-2].split(" ")
    assert mark == "#", log
    return float(seconds)


def installed(command: str) -> str:
    """The path of a command next to the interpreter, relative to the working directory if it is below it."""
    path = Path(sys.executable).with_name(command)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def script(name: str, *overrides: str) -> list[str]:
    """The command line of one of the scripts in this folder."""
    return [sys.executable, str(EXAMPLES / name), *overrides]
