"""Writes the pages of the reference that list keys and commands, from the code that reads them.

    python tools/reference.py

- docs/reference/recipe.md: every key of a recipe with its type and default, from the dataclasses, tables and signatures
  by which recipes are parsed. What a key does comes from there too: the comment after a field or an entry, or the
  docstring's ``Args``.
- docs/reference/commands.md: every command and option, from click.

``tests/docs/test_reference.py`` compares the pages with the code.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import re
import tokenize
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import click
import griffe
from lightning.pytorch import Trainer
from nemo.collections.common.data.lhotse.dataloader import LhotseDataLoadingConfig
from nemo.utils.exp_manager import ExpManagerConfig, exp_manager

from nemo_emmett import callbacks, recipe_checks
from nemo_emmett.cli import main
from nemo_emmett.data.config import dataset_config, schema, sources
from nemo_emmett.evaluation import evaluate
from nemo_emmett.evaluation.comet import CometConfig
from nemo_emmett.evaluation.metrics import DEFAULT_METRICS
from nemo_emmett.evaluation.recipe import EvaluationConfig
from nemo_emmett.models.config import ModelConfig
from nemo_emmett.modules.cross_attention import SpeechCrossAttention
from nemo_emmett.modules.modality_adapters import MLPConnector, QFormer
from nemo_emmett.objectives.objective import Objective
from nemo_emmett.objectives.registry import OBJECTIVES
from nemo_emmett.typed_config import Switch, Text, describe
from tools.key_texts import DATALOADER, DATASETS, EXPERIMENT, RECIPE, SECTIONS, SOURCES

ROOT = Path(__file__).parents[1]
RECIPE_PAGE = ROOT / "docs" / "reference" / "recipe.md"
COMMANDS_PAGE = ROOT / "docs" / "reference" / "commands.md"

GENERATED = "<!-- Written by tools/reference.py; change the code that it reads. -->\n"
NO_DEFAULT = "required"


@dataclass(frozen=True)
class Key:
    """A row of a table.

    Args:
        name: as a recipe has it.
        type: what is accepted, in words.
        default: as a recipe would write it.
        text: what the key does.
    """

    name: str
    type: str
    default: str
    text: str


# What the code says of its keys.


@cache
def comments(source: str) -> dict[str, str]:
    r"""The comment after each annotated field, and after each key or item of a table, by its name.

    Example:
        >>> comments("class A:\\n    x: int = 0  # how many\\n    y: int\\nT = {'z': 1}  # last")
        {'x': 'how many', 'z': 'last'}
    """
    by_line = {
        token.start[0]: token.string.removeprefix("#").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and not token.line.lstrip().startswith("#")
    }
    found: dict[str, str] = {}
    for name, first, last in _named_lines(ast.parse(source)):
        lines = [by_line[number] for number in range(first, last + 1) if number in by_line]
        if lines:
            found.setdefault(name, lines[0])
    return found


def _named_lines(tree: ast.AST) -> Iterator[tuple[str, int, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, node.lineno, node.end_lineno or node.lineno
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant):
                    yield str(key.value), key.lineno, value.end_lineno or value.lineno
        elif isinstance(node, (ast.Tuple, ast.Set, ast.List)):
            for item in node.elts:
                if isinstance(item, ast.Constant):
                    yield str(item.value), item.lineno, item.end_lineno or item.lineno


@cache
def arguments(docstring: str) -> dict[str, str]:
    """The descriptions of a docstring's ``Args``, by name."""
    sections = griffe.Docstring(docstring).parse("google", warnings=False)
    return {
        item.name: " ".join(item.description.split())
        for section in sections
        if section.kind in (griffe.DocstringSectionKind.parameters, griffe.DocstringSectionKind.attributes)
        for item in section.value
    }


def texts_of(cls: type) -> dict[str, str]:
    """What a class says of its fields or parameters."""
    docstring = inspect.cleandoc(cls.__doc__ or "")
    return comments(inspect.cleandoc("\n" + inspect.getsource(cls))) | arguments(docstring)


_FEWER_WORDS = {
    r"(, or)? <class '[\w.]*PathLike'>|(, or)? collections\.abc\.Callable\S* \S*(?=,)": "",
    r"<class '[\w.]*DictConfig'>|a mapping, each value a value": "mapping",
    r"a mapping, each value (an? )?": "mapping of ",
    r"a list( \(\d+ items\))?( that is not empty)?, each item (an? )?": r"list\1 of ",
    r" that is not empty": "",
    r"(?<![\w'])an? (?=\w)": "",
    r", or ": " or ",
}


def in_words(annotation: Any) -> str:
    """What a type accepts: :func:`describe` in fewer words."""
    if annotation is Any:
        return "any value"
    text = describe(annotation)
    for pattern, words in _FEWER_WORDS.items():
        text = re.sub(pattern, words, text)
    return " or ".join(dict.fromkeys(text.split(" or "))) if "'" not in text else text


def as_yaml(value: Any) -> str:
    """A default as a recipe would write it."""
    if value in (MISSING, inspect.Parameter.empty):
        return NO_DEFAULT
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return ".inf" if value > 0 else "-.inf"
    if isinstance(value, (tuple, list, set, frozenset)):
        return f"[{', '.join(map(as_yaml, value))}]"
    if isinstance(value, dict) and not value:
        return "{}"
    return f'"{value}"' if value == "" else str(value)


def default_of(field: dataclasses.Field) -> str:
    """The default of a dataclass's field."""
    return as_yaml(field.default_factory() if field.default_factory is not MISSING else field.default)


# Tables.


def of_dataclass(
    cls: type, left_out: Iterable[str] = (), prefix: str = "", texts: Mapping[str, str] | None = None
) -> list[Key]:
    """The fields of a dataclass of ours; ``texts`` are in place of its own."""
    hints, texts = get_type_hints(cls, include_extras=True), texts or texts_of(cls)
    return [
        Key(f"{prefix}{f.name}", in_words(hints[f.name]), default_of(f), texts.get(f.name, ""))
        for f in fields(cls)
        if f.name not in left_out
    ]


def of_signature(
    cls: type,
    left_out: Iterable[str] = (),
    types: Mapping[str, Any] | None = None,
    texts: Mapping[str, str] | None = None,
) -> list[Key]:
    """The parameters of a class; ``types`` are narrower than its annotations."""
    hints = get_type_hints(cls.__init__, include_extras=True)
    texts = texts or texts_of(cls)
    kinds = {name: recipe_checks.declared(hint) for name, hint in hints.items()} if types is not None else hints
    return [
        Key(
            name,
            in_words((types or {}).get(name, kinds.get(name, Any))),
            as_yaml(parameter.default),
            _first_sentence(texts.get(name, "")) if types is not None else texts.get(name, ""),
        )
        for name, parameter in inspect.signature(cls).parameters.items()
        if name not in (*left_out, "listener")  # a function, which no recipe can hold
    ]


def of_experiment(cls: type = ExpManagerConfig, prefix: str = "") -> Iterator[Key]:
    """The keys of NeMo's experiment manager, with those of the sections in it."""
    hints, texts = get_type_hints(cls), _of_experiment() if cls is ExpManagerConfig else {}
    for f in fields(cls):
        nested = [kind for kind in (hints[f.name], *get_args(hints[f.name])) if is_dataclass(kind)]
        if nested:
            yield from of_experiment(nested[0], f"{prefix}{f.name}.")
            continue
        kind = recipe_checks.ARGUMENT_TYPES.get(f.name, recipe_checks.declared(hints[f.name]))
        name = f"{prefix}{f.name}"
        text = texts.get(f.name) or EXPERIMENT.get(name) or SECTIONS.get(prefix.rstrip("."), "")
        yield Key(name, in_words(kind), default_of(f), text)


def of_dataset(names: Iterable[str]) -> list[Key]:
    """Keys of a dataset: NeMo's and ours."""
    ours = (dataset_config.GroupConfig, dataset_config.DatasetConfig)
    texts = DATALOADER | comments(inspect.getsource(schema)) | texts_of(dataset_config.DatasetConfig)
    defaults = {f.name: default_of(f) for f in fields(LhotseDataLoadingConfig)}
    defaults |= {f.name: default_of(f) for cls in ours for f in fields(cls) if f.name in schema.OUR_TYPES}
    return [Key(name, in_words(schema.TYPES[name]), defaults.get(name, "null"), texts.get(name, "")) for name in names]


def of_sources() -> list[Key]:
    """Keys of the sources."""
    names = schema.ANY_SOURCE_KEYS.union(*schema.KEYS_OF_TYPE.values(), sources.INHERITED_IN_NEMO)
    hints = get_type_hints(sources.Source, include_extras=True)
    texts = DATALOADER | SOURCES | comments(inspect.getsource(schema)) | texts_of(sources.Source)
    inherited = {*sources.INHERITED, *sources.INHERITED_IN_NEMO}
    rows = []
    for name in sorted(names):
        types = [kind for kind, keys in schema.KEYS_OF_TYPE.items() if name in keys]
        where = "all" if name in schema.ANY_SOURCE_KEYS else ", ".join(types)
        where = "all; inherited" if name in inherited else where
        rows.append(Key(name, in_words(hints.get(name) or schema.TYPES.get(name, Any)), where, texts.get(name, "")))
    return rows


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[a-z)`])\.\s", text)[0].rstrip(".")


# The page of recipes.


def recipe_page() -> str:
    """The reference of all keys."""
    top_types = recipe_checks.TOP_LEVEL_TYPES | {"export": Literal["best", "last"] | None}
    top = of_texts(RECIPE, top_types, required=["model", "trainer", "data"])
    model = [
        Key("_target_", in_words(Text), NO_DEFAULT, "Short name (`salm_t5`, `salm_gpt`, `bestow_gpt`) or class path."),
        *of_dataclass(ModelConfig),
        Key("trust_remote_code", in_words(Switch), "false", "Run code that comes with a model (docs/security.md)."),
    ]
    trainer = of_signature(Trainer, types=recipe_checks.TRAINER_TYPES, texts=_of_function(Trainer.__init__))
    ours = [name for name in schema.OUR_TYPES if name not in schema.LOADER_KEYS]
    nemos = [f.name for f in fields(LhotseDataLoadingConfig)]
    evaluation = [
        dataclasses.replace(key, default=as_yaml(DEFAULT_METRICS)) if key.name == "metrics" else key
        for key in of_dataclass(EvaluationConfig, ["data", "baselines", "comet"], texts=_of_function(evaluate))
    ]
    parts = [
        GENERATED,
        "# Keys of a recipe\n",
        "What every key accepts, and what it means. A key that is misspelt, or has a value that is not accepted, ends "
        "a command with one sentence before anything is built. Keys that begin with `_` are Hydra's.\n",
        "## The recipe\n",
        table(top),
        "## `model`\n",
        "Of all models of nemo_emmett. [Models](../models.md) explains them; [NeMo's recipes](../nemo_recipes.md) "
        "lists the keys of NeMo's other models, which are refused.\n",
        table(model),
        "### `model.cross_attention`\n",
        "The layers of BESTOW-GPT.\n",
        table(of_signature(SpeechCrossAttention, ["hidden_size"])),
        "### `model.objectives`\n",
        "Terms of the loss besides the modalities' cross-entropies; each is a section under its name. "
        "[Models](../models.md#objectives) explains them. All have these keys.\n",
        table(of_dataclass(Objective)),
        *_of_objectives(),
        "### `model.perception`\n",
        "NeMo's `AudioPerceptionModule`: the sections `preprocessor`, `encoder`, `spec_augment` and `modality_adapter` "
        "name a class under `_target_` and its arguments; without them the `.nemo` file of `model.pretrained_asr` "
        "decides. `output_dim` is the width of the language model. nemo_emmett has these modality adapters.\n",
        *_of_classes(MLPConnector, QFormer, module="nemo_emmett.modules.modality_adapters"),
        "## `trainer`\n",
        "Lightning's `Trainer`; `strategy` and the items of `callbacks` may name a class under `_target_`.\n",
        table(trainer),
        "### `trainer.callbacks`\n",
        "Those of nemo_emmett.\n",
        *_of_classes(*(getattr(callbacks, name) for name in callbacks.__all__), module="nemo_emmett.callbacks"),
        "## `exp_manager`\n",
        "NeMo's experiment manager (`ExpManagerConfig`).\n",
        table(of_experiment()),
        "## `data`\n",
        table(of_texts(DATASETS)),
        "A `validation_ds` or `test_ds` may hold several sets under `datasets`, each with a name and keys of its own; "
        "keys next to `datasets` hold for all of them.\n",
        "### A dataset: keys of nemo_emmett\n",
        "[Data](../data.md) explains them.\n",
        table(of_dataset(ours)),
        "### A dataset: NeMo's keys\n",
        "Those of NeMo's dataloader (`LhotseDataLoadingConfig`), with NeMo's defaults.\n",
        table(of_dataset(nemos)),
        "### Sources: `input_cfg`\n",
        "Each source has a `type`, and files by the keys of its type. An inherited key holds for all sources below the "
        "group or dataset that sets it.\n",
        table(of_sources(), third="source types"),
        f"Types: {', '.join(f'`{name}`' for name in sources.known_types())}.\n",
        "### Keys without effect\n",
        "NeMo's recipes carry them from older dataloaders; a warning names them: "
        f"{', '.join(f'`{name}`' for name in sorted(schema.LEGACY_KEYS))}.\n",
        "## A recipe of `evaluate`\n",
        "Next to `test_ds`, which holds the test sets as above under `datasets`. [Evaluation](../evaluation.md) "
        "explains it.\n",
        table(
            [
                Key("test_ds", "a mapping", NO_DEFAULT, "The test sets; in a recipe of a training `data.test_ds`."),
                Key("model", "a path", "null", "Folder of the model, unless the command line names one."),
                Key("baseline", "a path, or a list of paths", "null", "Evaluations or models to compare with."),
                *evaluation,
                *of_dataclass(CometConfig, prefix="comet."),
            ]
        ),
    ]
    return "\n".join(parts)


def of_texts(
    texts: Mapping[str, str], types: Mapping[str, Any] | None = None, required: Iterable[str] = ()
) -> list[Key]:
    """Keys by their texts; sections, unless they have a type."""
    return [
        Key(name, in_words((types or {}).get(name, dict)), NO_DEFAULT if name in required else "null", text)
        for name, text in texts.items()
    ]


def _of_function(function: Callable) -> dict[str, str]:
    return arguments(inspect.cleandoc(function.__doc__ or ""))


def _of_experiment() -> dict[str, str]:
    """The first sentence on each key that the docstring of NeMo's ``exp_manager`` lists."""
    found = re.findall(r"^\s+- (\w+) ?\([^)]*\):(.*?)(?=^\s+- |\Z)", exp_manager.__doc__, re.MULTILINE | re.DOTALL)
    return {name: _first_sentence(" ".join(text.split())) for name, text in found}


def _of_classes(*classes: type, module: str) -> Iterator[str]:
    for cls in classes:
        rows = of_signature(cls)
        summary = _plain((cls.__doc__ or "").strip().partition("\n\n")[0])
        yield f"#### {cls.__name__}\n"
        yield f"`_target_: {module}.{cls.__name__}`. {summary}\n"
        yield table(rows) if rows else "No arguments.\n"


def _of_objectives() -> Iterator[str]:
    shared = [f.name for f in fields(Objective)]
    for name, cls in OBJECTIVES.items():
        texts: dict[str, str] = {}
        for kind in reversed(cls.__mro__):
            texts |= texts_of(kind) if is_dataclass(kind) else {}
        rows = of_dataclass(cls, shared, texts=texts)
        yield f"#### `model.objectives.{name}`\n"
        yield f"{_plain((cls.__doc__ or '').strip().partition(chr(10) * 2)[0])}\n"
        yield table(rows) if rows else "No other keys.\n"


def table(keys: Iterable[Key], third: str = "default") -> str:
    """Rows of Markdown."""
    rows = [f"| key | accepts | {third} | what it does |", "|---|---|---|---|"]
    for key in keys:
        shown = f"`{key.default}`" if third == "default" and key.default != NO_DEFAULT else key.default
        rows.append(f"| `{key.name}` | {_cell(key.type)} | {shown} | {_cell(key.text)} |")
    return _wrapped(rows, "keys" if third == "default" else "keys sources")


def _wrapped(rows: Iterable[str], kind: str = "keys") -> str:
    """A table that a phone shows row by row (docs/assets/site.css)."""
    return "\n".join([f'<div class="{kind}" markdown>\n', *rows, "\n</div>\n"])


def _cell(text: str) -> str:
    text = _escaped(_plain(text))
    return text.removesuffix(".") if text.count(". ") == 0 else text


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _plain(text: str) -> str:
    """A docstring's text as Markdown of one line."""
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", " ".join(text.split()))
    text = re.sub(r"``([^`]+)``", r"`\1`", text)
    return re.sub(r"\bNone\b|\b(True|False)(?=:)", lambda found: as_yaml(ast.literal_eval(found[0])), text)


# The page of commands.


def commands_page() -> str:
    """The reference of ``nemo-emmett``."""
    context = click.Context(main, info_name="nemo-emmett")
    parts = [
        GENERATED,
        "# Commands\n",
        "Every command prints the same with `--help`. A mistake ends it with one sentence and exit code 2; "
        "[Training](../training.md#exit-codes) has the other codes.\n",
        *_of_command(main, context, level=2),
    ]
    return "\n".join(parts)


def _of_command(command: click.Command, context: click.Context, level: int) -> Iterator[str]:
    if context.parent is not None:
        usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
        yield f"{'#' * level} {context.command_path.removeprefix('nemo-emmett ')}\n"
        yield f"```text\n{usage}\n```\n"
        yield f"{inspect.cleandoc(command.help or '')}\n"
        if rows := list(_options(command, context)):
            yield _wrapped(["| option | what it does |", "|---|---|", *rows])
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            member = command.get_command(context, name)
            inner = click.Context(member, info_name=name, parent=context)
            yield from _of_command(member, inner, level if context.parent is None else level + 1)


def _options(command: click.Command, context: click.Context) -> Iterator[str]:
    for parameter in command.params:
        if (record := parameter.get_help_record(context)) is not None and record[0].startswith("-"):
            option, text = record[0], re.sub(r"\[([^\]]*)\]", r"(\1)", record[1])  # no link
            yield f"| `{_escaped(option)}` | {_cell(text)} |"


PAGES: dict[Path, Callable[[], str]] = {RECIPE_PAGE: recipe_page, COMMANDS_PAGE: commands_page}
"""Each page with the function that makes it."""

if __name__ == "__main__":
    for path, make in PAGES.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(make(), encoding="utf-8")
        print(f"{path.relative_to(ROOT)}")  # noqa: T201
