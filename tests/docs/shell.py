"""Checks the commands of a shell block without running them: each program, command, option, recipe and key exists."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import click

from nemo_emmett.cli import main
from nemo_emmett.errors import EmmettError
from nemo_emmett.runner import compose_incomplete
from tests.docs.pages import ROOT, Block

EXAMPLES = ROOT / "examples" / "speechlm"
FOLDERS = (ROOT, EXAMPLES)
"""Where a command may have been started."""

OTHERS = frozenset(
    ". [ cat cd curl docker echo export git ls mkdir nvidia-smi sacrebleu scontrol source tar tensorboard vllm".split()  # noqa: SIM905
)
"""Programs of others, whose arguments are not checked."""

LAUNCHERS = frozenset({"env", "nohup", "srun", "time", "torchrun"})
"""Programs that start the program among their arguments."""

KEYWORDS = frozenset("do done else fi for if then while".split())  # noqa: SIM905


def mistakes_in(text: str) -> list[str]:
    """What is wrong with the commands of a block."""
    return [f"{command}: {fault}" for command in commands_of(text) if (fault := fault_of(command))]


def commands_of(text: str) -> list[str]:
    """The simple commands of a block, each on a line, without comments."""
    text = text.replace("\\\n", " ")
    found = []
    for line in text.splitlines():
        lexer = shlex.shlex(line, posix=False, punctuation_chars="|&;")
        lexer.whitespace_split, lexer.commenters = True, "#"
        command: list[str] = []
        for token in [*lexer, ";"]:
            if set(token) <= set("|&;"):
                found += [" ".join(command)] if command else []
                command = []
            elif not (token in KEYWORDS and not command):
                command.append(token)
    return [command for command in found if not re.fullmatch(r"\w+ in .*", command)]  # `for _ in 1 2 3`


def fault_of(command: str) -> str | None:
    """What is wrong with a simple command, or None."""
    words = shlex.split(re.sub(r"\s[<>]+\s*\S+", "", command))
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words = words[1:]
    if not words:
        return None
    program, arguments = words[0].rpartition("/")[2], words[1:]
    if program in OTHERS:
        return None
    if program in LAUNCHERS:
        own = next(i for i, word in enumerate(arguments) if not word.startswith("-"))
        is_script = program == "torchrun" and "--no-python" not in arguments[:own]
        return fault_of(shlex.join([*(["python"] if is_script else []), *arguments[own:]]))
    checks = {"nemo-emmett": _of_ours, "make": _of_make, "pip": _of_pip}
    if program in checks:
        return checks[program](arguments)
    if program in ("python", "python3") and arguments[:2] == ["-m", "pip"]:
        return _of_pip(arguments[2:])
    if program in ("python", "python3", "bash", "sbatch"):
        return _of_script(arguments)
    return f"'{program}' is no program that is known here; name it in tests/docs/shell.py, or mark the block"


def _of_ours(arguments: Sequence[str]) -> str | None:
    if not arguments or arguments[0].startswith("-"):
        return None
    context, command = click.Context(main, info_name="nemo-emmett"), main
    try:
        while isinstance(command, click.Group) and arguments:
            name, member, arguments = command.resolve_command(context, list(arguments))
            command, context = member, click.Context(member, info_name=name, parent=context)
        if isinstance(command, click.Group) or "--help" in arguments:
            return None
        context = command.make_context(context.info_name, list(arguments), parent=context.parent)
    except (click.ClickException, EmmettError) as error:
        return str(error) or error.format_message()
    recipe = context.params.get("recipe") or context.params.get("config")
    return _of_recipe(str(recipe), context.params["overrides"]) if "overrides" in context.params else None


def _of_recipe(recipe: str, overrides: Sequence[str]) -> str | None:
    """Recipes of the package are composed, so that a key that they do not have is found; a user's own is not here."""
    path = next((folder / recipe for folder in FOLDERS if (folder / recipe).is_file()), None)
    if path is None and recipe.endswith((".yaml", ".yml")):
        return None
    try:
        compose_incomplete(str(path or recipe), overrides)
    except EmmettError as error:
        return str(error)
    return None


def _of_make(arguments: Sequence[str]) -> str | None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    unknown = [word for word in arguments if "=" not in word and word not in targets]
    return f"no target {unknown}" if unknown else None


def _of_pip(arguments: Sequence[str]) -> str | None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = project.partition("[project.optional-dependencies]")[2].partition("[project.scripts]")[0]
    known = set(re.findall(r"^(\w+) = \[", extras, re.MULTILINE))
    asked = {name for word in arguments for group in re.findall(r"\[([\w,]+)\]", word) for name in group.split(",")}
    return f"no extra {sorted(asked - known)}" if asked - known else None


def _of_script(arguments: Sequence[str]) -> str | None:
    script = next((word for word in arguments if word.endswith((".py", ".sh"))), None)
    if script is None or script.startswith("your_"):
        return None
    path = next((folder / script for folder in FOLDERS if (folder / script).is_file()), None)
    if path is None:
        return f"there is no script '{script}'"
    source, rest = path.read_text(encoding="utf-8"), list(arguments[list(arguments).index(script) + 1 :])
    if any(word.startswith("--config-path=") for word in rest):
        return None  # a recipe in a folder of the user's
    if "recipe_runner" not in source and path.name not in ("slurm_train.sh", "slurm_emmett.sh"):
        unknown = [word for word in rest if word.startswith("--") and word.partition("=")[0] not in source]
        return f"{script} has no option {unknown}" if unknown else None
    default = re.search(r'recipe_runner\(.*config_name="(\w+)"', source)
    name = next((word.partition("=")[2] for word in rest if word.startswith("--config-name=")), None)
    name = name or (rest[0] if path.name == "slurm_emmett.sh" else default and default[1])
    recipe = next((folder / f"{name}.yaml" for folder in (EXAMPLES / "conf", ROOT / "conf") if name), None)
    recipe = recipe if recipe is not None and recipe.is_file() else name
    overrides = [word for word in rest if "=" in word and not word.startswith("--")]
    return _of_recipe(str(recipe), overrides) if name else None


def is_shell(text: str) -> bool:
    """Whether a block without a language begins with a command, or with a prompt and a command."""
    first = Path((re.sub(r"^(\$ )?(\w+=\S+ )*", "", text).split() or [""])[0]).name
    return first in {"make", "nemo-emmett", "pip", "python", "sbatch", "srun", "torchrun"}


def is_shell_block(block: Block) -> bool:
    """Whether a block has commands."""
    return block.language in ("bash", "console") or (
        block.language == "" and block.output_of is None and is_shell(block.text)
    )


def commands_in(block: Block) -> str:
    """What is typed: of a console's lines those behind the prompt."""
    if block.language != "console" and not re.search(r"^\$ ", block.text, re.MULTILINE):
        return block.text
    return "\n".join(match[1] for match in re.finditer(r"^\$ (.*(?:\\\n.*)*)", block.text, re.MULTILINE))
