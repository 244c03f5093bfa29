"""The rules of docs/architecture.md: which room imports which, no import cycles, and the shape of modules."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import networkx
import pytest

PACKAGE = Path(__file__).parents[1] / "nemo_emmett"

# From the top to the bottom: a room may import itself and those below it, but none on its own floor. A callback is a
# room of its own: OOMptimizer's rests on ``oomptimizer``, and ResumableData is a part of ``data``.
FLOORS = (
    (
        "plugin",
        "cli",
        "runner",
        "training",
        "recipe_checks",
        "checkpoints",
        "exporting",
        "init",
        "training_record",
        "run_folders",
        "run_summary",
        "doctor",
        "callbacks",
    ),
    ("planning", "evaluation", "translation", "serving", "corpora"),
    ("callbacks.oomptimizer",),
    ("models", "data", "oomptimizer"),
    ("callbacks.*", "strategies"),
    ("objectives",),
    ("modules", "prompts", "schedulers", "optimizers"),
    ("errors", "config", "typed_config", "early_checks", "files", "processes", "audio_file", "audio_chunks", "run_log"),
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
        ("models", "objectives", True),
        ("objectives", "modules", True),
        ("objectives", "models", False),
        ("modules", "objectives", False),
        ("evaluation", "corpora", False),
        ("planning", "data", True),
        ("planning", "oomptimizer", True),
        ("planning", "runner", False),
        ("serving", "models", True),
        ("cli", "serving", True),
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


# Import cycles. Imports inside functions and under TYPE_CHECKING count.


def module_imports(name: str, tree: ast.AST, modules: set[str], exported: dict[str, dict[str, str]]) -> Iterator[str]:
    """The modules of ours that a module imports. A name of a lazy package counts as the module that defines it.

    Args:
        name: the module.
        tree: its code.
        modules: the names of all modules.
        exported: for each lazy package, the module of each of its names.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if f"{node.module}.{alias.name}" in modules:
                    yield f"{node.module}.{alias.name}"
                elif alias.name in exported.get(node.module, {}):
                    yield exported[node.module][alias.name]
                elif node.module in modules and node.module not in exported:
                    yield node.module


def stub_names(package: str, stub: ast.AST) -> dict[str, str]:
    """The module of each name that the stub of a lazy package lists (``from .base import Base``)."""
    return {
        alias.name: f"{package}.{node.module}"
        for node in ast.walk(stub)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def cycles(trees: dict[str, ast.AST], stubs: dict[str, ast.AST]) -> list[set[str]]:
    """Sets of modules of which each imports each other one, directly or through others."""
    exported = {package: stub_names(package, stub) for package, stub in stubs.items()}
    graph = networkx.DiGraph()
    for name, tree in trees.items():
        graph.add_edges_from((name, imported) for imported in module_imports(name, tree, {*trees}, exported))
    return sorted((found for found in networkx.strongly_connected_components(graph) if len(found) > 1), key=sorted)


def test_no_modules_import_one_another() -> None:
    trees = {module_name(path): ast.parse(path.read_text()) for path in MODULES}
    stubs = {module_name(path.with_suffix("")): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.pyi")}
    del trees["nemo_emmett"]  # the index of all rooms
    assert list(cycles(trees, stubs)) == []


def test_planted_cycles_are_seen() -> None:
    sources = {
        "p.a": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.b import B",
        "p.b": "def f():\n    from q import C",  # by the name of a lazy package
        "q": "import lazy_loader",
        "q.c": "from p import a",
        "q.d": "from p.a import A",
    }
    trees = {name: ast.parse(source) for name, source in sources.items()}
    stubs = {"q": ast.parse("from .c import C")}
    assert cycles(trees, stubs) == [{"p.a", "p.b", "q.c"}]
    trees["p.b"] = ast.parse("from q import D")
    assert cycles(trees, stubs) == []


# The shape of modules and of their functions.

MAX_MODULE_LINES = 500


def test_no_module_is_longer_than_a_room() -> None:
    lengths = {module_name(path): path.read_text().count("\n") for path in MODULES}
    long = {name: length for name, length in lengths.items() if length > MAX_MODULE_LINES}
    assert not long


def unnamed_modules(docstring: str, modules: set[str]) -> set[str]:
    """Modules whose names do not occur between backticks."""
    marked = re.findall(r"`+([^`]+)`+", docstring)
    return modules - {name for text in marked for name in re.split(r"[^\w]+", text)}


@pytest.mark.parametrize("package", [path.parent for path in MODULES if path.name == "__init__.py"], ids=str)
def test_a_rooms_docstring_names_its_modules(package: Path) -> None:
    docstring = ast.get_docstring(ast.parse((package / "__init__.py").read_text()))
    modules = {path.stem for path in package.iterdir() if path.suffix == ".py" and path.stem != "__init__"}
    modules |= {path.parent.name for path in package.glob("*/__init__.py") if path.parent != PACKAGE / "conf"}
    unnamed = unnamed_modules(docstring or "", modules)
    assert unnamed == set()


def test_an_unnamed_module_is_seen() -> None:
    docstring = "Bins.\n\n- ``bins``: solved exactly.\n- :mod:`nemo_emmett.data.padding`: what they leave."
    assert unnamed_modules(docstring, {"bins", "padding", "solved", "charts"}) == {"solved", "charts"}


ENTRY_POINTS = {
    "nemo_emmett.data.dataloader.get_multimodal_dataloader",
    "nemo_emmett.data.datamodule.MultimodalDataModule.__init__",
    "nemo_emmett.data.readers.registry.read_parallel_text",
    "nemo_emmett.data.readers.registry.read_source",
    "nemo_emmett.data.readers.registry.read_speech_tsv",
    "nemo_emmett.data.stock.check_nemo_dataset",
}
"""Functions of ``data/`` that trainings and NeMo call with an unparsed config."""


def functions_of_unparsed_configs(name: str, tree: ast.AST) -> Iterator[str]:
    """Functions with a parameter ``settings`` or ``where``, or with a ``config`` that is a mapping."""
    for node in ast.iter_child_nodes(tree):
        is_definition = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        inner = f"{name}.{node.name}" if is_definition else name
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            parameters = [arg for arg in ast.walk(node.args) if isinstance(arg, ast.arg)]
            if any(is_unparsed(parameter) for parameter in parameters):
                yield inner
        yield from functions_of_unparsed_configs(inner, node)


def is_unparsed(parameter: ast.arg) -> bool:
    annotation = ast.unparse(parameter.annotation) if parameter.annotation else ""
    is_mapping = re.search(r"\b(Mapping|dict|DictConfig|ListConfig)\b", annotation)
    return parameter.arg in ("settings", "where") or (parameter.arg in ("config", "cfg") and is_mapping is not None)


@pytest.mark.parametrize(
    "path",
    [path for path in MODULES if "nemo_emmett/data/" in path.as_posix() and path.parent.name != "config"],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_configs_are_parsed_before_they_reach_the_data_rooms(path: Path) -> None:
    name = module_name(path)
    found = set(functions_of_unparsed_configs(name, ast.parse(path.read_text()))) - ENTRY_POINTS
    assert found == set()


def test_unparsed_configs_are_seen() -> None:
    source = """
class A:
    def method(self, config: Mapping[str, Any] | None) -> None:
        def inner(*, where: str) -> None: ...
def f(config: DatasetConfig, source: dict) -> None:
    return lambda settings: 1
def g(config: DictConfig): ...
"""
    found = list(functions_of_unparsed_configs("m", ast.parse(source)))
    assert found == ["m.A.method", "m.A.method.inner", "m.f", "m.g"]


# The page.

PAGE = PACKAGE.parent / "docs" / "architecture.md"


def missing_files(text: str) -> set[str]:
    """Files and folders of code that a page names and that do not exist: by their paths, or by their names alone."""
    root, names = PACKAGE.parent, {path.name for path in PACKAGE.rglob("*.py*")}
    named = set(re.findall(r"(?<![\w*.])[\w/]+\.pyi?\b|(?<=`)\w[\w/]*/(?=`)", text))
    return {
        name for name in named if not any((folder / name).exists() for folder in (root, PACKAGE)) and name not in names
    }


def test_the_page_names_files_that_exist() -> None:
    assert missing_files(PAGE.read_text()) == set()


def test_a_file_that_is_gone_is_seen() -> None:
    page = "`plugin.py`, shuffle.py (data/io/gone.py, *.py), `data/gone/` and `data/io/`; moved.py"
    assert missing_files(page) == {"data/io/gone.py", "data/gone/", "moved.py"}
