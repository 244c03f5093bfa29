"""The reference has every key that a recipe may hold, every command and option, and is up to date."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from typing import Any

import click
import pytest
from omegaconf import OmegaConf

from nemo_emmett import config
from nemo_emmett.cli import main
from nemo_emmett.data.config.dataset_config import parse_dataset
from nemo_emmett.data.config.sources import known_types
from nemo_emmett.errors import EmmettError
from nemo_emmett.evaluation import evaluate_recipe
from nemo_emmett.models.config import ModelConfig
from nemo_emmett.models.targets import parse_arguments
from nemo_emmett.modules.cross_attention import SpeechCrossAttention
from nemo_emmett.objectives.registry import OBJECTIVES
from nemo_emmett.training import check_data_section, check_recipe
from tools.reference import COMMANDS_PAGE, PAGES, RECIPE_PAGE, comments, in_words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_page_is_up_to_date(page) -> None:
    assert page.read_text(encoding="utf-8") == PAGES[page](), "run: python tools/reference.py"


def tables() -> dict[str, set[str]]:
    """The keys in the tables of the page, by the heading above them."""
    found, heading = defaultdict(set), ""
    for line in RECIPE_PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ").replace("`", "")
        elif match := re.match(r"\| `([^`]+)` \|", line):
            found[heading].add(match[1])
    return found


def test_every_key_says_what_it_does() -> None:
    silent = [line for line in RECIPE_PAGE.read_text(encoding="utf-8").splitlines() if re.search(r"\| *\|$", line)]
    assert [line for line in silent if not line.startswith("| key |")] == []


# What the parser accepts is noted while it parses, so that no table is compared with itself.


@pytest.fixture(scope="module")
def accepted() -> dict[str, set[str]]:
    """By the place of a section, the keys that the parser knew there."""
    known: dict[str, set[str]] = defaultdict(set)
    original = config.check_keys

    def note(section: Mapping, keys: Collection[str], where: str, tolerated: Collection[str] = ()) -> list[str]:
        known[where] |= set(keys)
        return original(section, keys, where, tolerated)

    with pytest.MonkeyPatch.context() as patch:
        for module in list(sys.modules.values()):
            if getattr(module, "check_keys", None) is original:
                patch.setattr(module, "check_keys", note)
        for use in uses():
            with suppress(EmmettError):
                use()
    return known


OF_ALL: dict[str, dict] = {name: {} for name in OBJECTIVES}


def uses() -> Iterator[Callable[[], Any]]:
    """Everything that parses a section, with next to nothing in it."""
    recipe = {
        "model": {"_target_": "salm_t5"},
        "trainer": {"enable_checkpointing": False},
        "data": {},
        "exp_manager": {},
    }
    yield lambda: check_recipe(OmegaConf.create(recipe))
    nested = ("checkpoint_callback_params", "early_stopping_callback_params", "step_timing_kwargs", "ema")
    for name in nested:
        yield lambda name=name: check_recipe(OmegaConf.create({**recipe, "exp_manager": {name: {}}}))
    yield lambda: ModelConfig.from_section({"pretrained_llm": "x", "perception": {}, "objectives": OF_ALL}, "SALMT5")
    yield lambda: parse_arguments(SpeechCrossAttention, {}, "model.cross_attention", ["hidden_size"])
    yield lambda: check_data_section(OmegaConf.create({"other": 1}))
    yield lambda: parse_dataset({"manifest_filepath": "a.json"}, "train_ds")
    for kind in known_types():
        source = {"type": kind, "input_cfg": [{"type": "nemo", "manifest_filepath": "a"}]}
        yield lambda source=source: parse_dataset({"input_cfg": [source]}, "train_ds")
    yield lambda: evaluate_recipe(OmegaConf.create({"test_ds": {}}), "nowhere")


def test_every_key_that_is_accepted_is_there(accepted: dict[str, set[str]]) -> None:
    page = tables()
    dataset = page["A dataset: keys of nemo_emmett"] | page["A dataset: NeMo's keys"]
    evaluation = {key.partition(".")[0] for key in page["A recipe of evaluate"]}
    assert accepted["recipe"] <= page["The recipe"] | evaluation
    assert accepted["model"] <= page["model"]
    for name in OBJECTIVES:
        found = page["model.objectives"] | page[f"model.objectives.{name}"]
        assert accepted[f"model.objectives.{name}"] == found
    assert accepted["model.cross_attention"] == page["model.cross_attention"]
    assert accepted["trainer"] == page["trainer"]
    assert accepted["data"] == page["data"]
    assert accepted["train_ds"] == dataset
    assert accepted["train_ds.input_cfg.0"] <= page["Sources: input_cfg"] | dataset
    top = {key.partition(".")[0] for key in page["exp_manager"]}
    assert accepted["exp_manager"] == top
    for name in ("checkpoint_callback_params", "early_stopping_callback_params", "step_timing_kwargs", "ema"):
        inside = {key.partition(".")[2] for key in page["exp_manager"] if key.startswith(f"{name}.")}
        assert accepted[f"exp_manager.{name}"] == inside
    assert all(accepted[place] for place in ("recipe", "model", "trainer", "data", "train_ds", "exp_manager"))


def commands(command: click.Command, context: click.Context) -> Iterator[tuple[str, click.Command]]:
    yield context.command_path.removeprefix("nemo-emmett").strip(), command
    for name in command.list_commands(context) if isinstance(command, click.Group) else ():
        member = command.get_command(context, name)
        yield from commands(member, click.Context(member, info_name=name, parent=context))


def test_every_command_and_option_is_there() -> None:
    sections = re.split(r"^#+ ", COMMANDS_PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    by_name = {section.partition("\n")[0]: section for section in sections}
    found = [*commands(main, click.Context(main, info_name="nemo-emmett"))]
    assert {"train", "evaluate", "prepare fleurs"} <= {name for name, _ in found}
    for name, command in found[1:]:
        for parameter in command.params:
            named = (
                parameter.opts[-1]
                if isinstance(parameter, click.Option)
                else parameter.make_metavar(click.Context(command))
            )
            assert named in by_name[name], f"{name}: {named}"
        assert command.help.split()[0] in by_name[name]


# The generator.


def test_a_comment_belongs_to_the_field_on_its_line() -> None:
    source = (
        "class A:\n    # about all\n    x: int = 0  # how many\n    y: str = 'a # b'\n"
        "T = {\n    'z': int,  # last\n}\nU = (\n    'u',  # first\n)\n"
    )
    assert comments(source) == {"x": "how many", "z": "last", "u": "first"}


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (bool | None, "true or false or null"),
        (list[int] | None, "list of whole number or null"),
        (dict[str, Any], "mapping"),
        (Any, "any value"),
    ],
)
def test_types_in_words(annotation: Any, words: str) -> None:
    assert in_words(annotation) == words
