"""No module imports upwards: the rooms of docs/architecture.md."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "nemo_emmett"

# From the top to the bottom: a room may import itself and those below it, but none on its own floor. A callback is a
# room of its own: OOMptimizer's rests on ``oomptimizer``, and ResumableData is a part of ``data``.
FLOORS = (
    ("plugin", "cli", "runner", "training", "recipe_checks", "checkpoints", "ending", "doctor", "callbacks"),
    ("planning", "evaluation", "corpora"),
    ("callbacks.oomptimizer",),
    ("models", "data", "oomptimizer"),
    ("callbacks.*",),
    ("modules", "prompts"),
    ("errors", "config", "typed_config", "files", "processes", "audio_file"),
)
# What others see and start is one floor of equals, and so is what all of them rest on.
SHARED_FLOORS = (0, len(FLOORS) - 1)


def floor_of(room: str) -> int:
    for level, rooms in enumerate(FLOORS):
        if room in rooms:
            return level
    raise AssertionError(f"nemo_emmett.{room} has no room in docs/architecture.md")


def room_of(module: str) -> str | None:
    """``nemo_emmett.data.dataset`` is in the room ``data``; None for the package itself and foreign modules."""
    package, *parts = module.split(".")
    if package != "nemo_emmett" or not parts:
        return None
    if parts[0] != "callbacks" or len(parts) == 1:
        return parts[0]
    return {"oomptimizer": "callbacks.oomptimizer", "resumable_data": "data"}.get(parts[1], "callbacks.*")


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Every module of ours that is imported anywhere in the file, inside functions and type-checking blocks too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module == "nemo_emmett":
            yield from (f"nemo_emmett.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module


def may_import(importer: str, imported: str) -> bool:
    above, below = floor_of(importer), floor_of(imported)
    return above < below or importer == imported or (above == below and above in SHARED_FLOORS)


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE / "conf")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_nothing_from_above(path: Path) -> None:
    if path == PACKAGE / "__init__.py":
        return  # the index of all rooms
    room = room_of(module_name(path))
    assert room is not None
    tree = ast.parse(path.read_text())
    relative = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    assert not relative, "imports are absolute, so that the room can be read off them"
    upwards = [
        module
        for module in imported_modules(tree)
        if (imported := room_of(module)) is not None and imported != "__version__" and not may_import(room, imported)
    ]
    assert not upwards


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("plugin", "data", True),
        ("data", "plugin", False),
        ("models", "data", False),
        ("data", "oomptimizer", False),
        ("models", "modules", True),
        ("modules", "models", False),
        ("evaluation", "corpora", False),
        ("planning", "data", True),
        ("planning", "oomptimizer", True),
        ("planning", "runner", False),
        ("oomptimizer", "planning", False),
        ("cli", "runner", True),
        ("config", "errors", True),
        ("models", "callbacks.*", True),
        ("models", "callbacks.oomptimizer", False),
        ("models", "callbacks", False),
    ],
)
def test_the_rule_itself(importer: str, imported: str, allowed: bool) -> None:
    assert may_import(importer, imported) is allowed


def test_a_planted_import_from_above_is_seen() -> None:
    tree = ast.parse("def f():\n    from nemo_emmett import plugin\n    import nemo_emmett.models.base\n")
    assert sorted(imported_modules(tree)) == ["nemo_emmett.models.base", "nemo_emmett.plugin"]
