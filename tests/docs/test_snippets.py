"""Every block of code of README.md and docs/ works, or a comment before it says why it is not run.

- ``python`` runs, all blocks of a page one after the other; a block of output right below one is what it prints.
- ``bash``, ``console`` and what begins with a command: tests/docs/test_commands.py runs it; here programs, commands,
  options, recipes and their keys exist (tests/docs/shell.py), also of blocks that are not run.
- ``yaml`` is checked as a part of a recipe, and trained where that is possible, by tests/test_documented_recipes.py.
- ``json`` is read; ``text``, ``bibtex``, ``css`` and blocks without a language that begin with no command are no code.

The comment is ``<!-- not run: the reason -->``, or ``<!-- run in part: the reason -->`` where some commands of a block
can be run.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import perception_config, write_tone
from tests.docs.pages import GENERATED, PAGES, ROOT, Block, blocks_of
from tests.docs.shell import commands_in, fault_of, is_shell_block, mistakes_in
from tests.test_documented_recipes import PAGES as PAGES_WITH_TESTED_YAML

BLOCKS = [block for page in PAGES if page.parent != GENERATED for block in blocks_of(page)]
NO_CODE = frozenset({"bibtex", "css", "text"})


def of_language(*languages: str) -> list[Block]:
    """The blocks of a language that are to be run."""
    return [block for block in BLOCKS if block.language in languages and block.reason is None]


def named(block: Block) -> str:
    return block.name


@pytest.mark.parametrize("block", BLOCKS, ids=named)
def test_what_a_block_is_can_be_seen(block: Block) -> None:
    known = {"python", "bash", "console", "yaml", "json", "toml", ""} | NO_CODE
    assert block.language in known, "name a language that tests/docs/test_snippets.py knows, or text"
    assert block.reason is None or len(block.reason.split()) > 1
    assert is_shell_block(block) or not block.in_part, "only commands are run in part"


def test_yaml_is_on_pages_whose_yaml_is_tested() -> None:
    assert {block.page for block in of_language("yaml")} <= set(PAGES_WITH_TESTED_YAML)


# Commands; tests/docs/test_commands.py runs them.


@pytest.mark.parametrize("block", [block for block in BLOCKS if is_shell_block(block)], ids=named)
def test_commands_exist_with_their_options(block: Block) -> None:
    assert mistakes_in(commands_in(block)) == []


@pytest.mark.parametrize(
    "command",
    [
        "nemo-emmett trian salm_t5",
        "nemo-emmett translate a.wav --to de --model m --bems 4",
        "nemo-emmett evaluate MODEL",
        "nemo-emmett prepare fleur IN OUT",
        "nemo-emmett train salm_t5 trainer.max_step=5",
        "nemo-emmett train salm_t6",
        "make demmo",
        "pip install 'nemo_emmett[hygene]'",
        "python examples/speechlm/trian.py",
        "python examples/speechlm/demo.py --speech-aloud",
        "python examples/speechlm/train.py trainer.max_step=5",
        "sbatch --nodes=8 slurm_train.sh --config-name=salm_t6",
        "torchrun --nproc-per-node=8 gone.py",
        "torchrun --nproc-per-node=8 --no-python nemo-emmett trian salm_t5",
        "srun nemo-emmett trian salm_t5",
        "frobnicate",
    ],
)
def test_a_command_that_does_not_work_is_found(command: str) -> None:
    assert fault_of(command) is not None


@pytest.mark.parametrize(
    "command",
    [
        "nemo-emmett train salm_t5 trainer.devices=8 ++data.train_ds.text.max_bad_records=3",
        ".venv/bin/nemo-emmett translate --model m --to fr data/*.wav > out.txt",
        "NEMO_EMMETT_CALLBACKS=random_state python your_training.py",
        "srun --nodes=2 python examples/speechlm/evaluate.py model=exp/model",
        "pip install -c constraints.txt '.[synthesis]'",
        "nemo-emmett prepare fleurs IN OUT --languages en,de",
    ],
)
def test_one_that_works_is_not(command: str) -> None:
    assert fault_of(command) is None


# Data.


@pytest.mark.parametrize("block", of_language("json"), ids=named)
def test_json_can_be_read(block: Block) -> None:
    try:
        json.loads(block.text)
    except json.JSONDecodeError:
        assert [json.loads(line) for line in block.text.splitlines()]


@pytest.mark.parametrize("block", of_language("toml"), ids=named)
def test_toml_can_be_read(block: Block) -> None:
    if sys.version_info >= (3, 11):
        import tomllib

        assert tomllib.loads(block.text)


# Python.

PYTHON = sorted({block.page for block in of_language("python")})


def given(page: Path) -> dict[str, Any]:
    """Names that the blocks of a page use and do not make."""
    numbers = random.Random(0)
    lengths = [numbers.randint(1, 50) for _ in range(200)]
    return {
        "data.md": {"input_lengths": lengths, "output_lengths": [n + numbers.randint(0, 5) for n in lengths]},
        "oomptimizer.md": {"MyModel": type("MyModel", (), {})},
    }.get(page.name, {})


@pytest.fixture(scope="module")
def exported(tiny_t5: Path, tiny_asr: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny SALM-T5."""
    from nemo_emmett.models import SALMT5

    folder = tmp_path_factory.mktemp("exported") / "model"
    parts = {"pretrained_llm": str(tiny_t5), "pretrained_asr": str(tiny_asr), "perception": perception_config()}
    SALMT5({**parts, "max_new_tokens": 8}).save_pretrained(folder)
    return folder


def make_named_files(text: str, model: Callable[[], Path]) -> None:
    """In the folder in which a block runs, the recordings and exported models that it names."""
    for path in map(Path, re.findall(r"[\"']([\w./-]+)[\"']", text)):
        if path.is_absolute() or path.exists():
            continue
        if path.suffix in (".wav", ".flac"):
            write_tone(path, 0.6)
        elif path.name == "model" and len(path.parts) > 1:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(model())


def run_page(page: Path, folder: Path, model: Callable[[], Path]) -> None:
    """Run the Python of a page in a folder, and compare what it prints with the blocks of output."""
    before, names, printed = Path.cwd(), {"__name__": "page", **given(page)}, {}
    os.chdir(folder)
    try:
        for block in blocks_of(page):
            if block.language == "python" and block.reason is None:
                make_named_files(block.text, model)
                code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
                with redirect_stdout(StringIO()) as output:
                    exec(code, names)
                printed[block.line] = output.getvalue()
            elif block.language in ("", "text") and block.output_of in printed and block.reason is None:
                assert block.text == printed[block.output_of], f"{block.name} is not what the block above prints"
    finally:
        os.chdir(before)


@pytest.mark.parametrize("page", PYTHON, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_runs(page: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    run_page(page, tmp_path, lambda: request.getfixturevalue("exported"))


def test_output_that_is_not_printed_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 2\nprint(x + 1)\n```\n\n```\n3\n```\n\nText.\n\n```\n4\n```\n")
    run_page(page, tmp_path, lambda: tmp_path)
    page.write_text(page.read_text().replace("\n3\n", "\n4\n"))
    with pytest.raises(AssertionError):
        run_page(page, tmp_path, lambda: tmp_path)
    page.write_text("<!-- not run: needs a GPU -->\n```python\nraise SystemExit\n```\n")
    run_page(page, tmp_path, lambda: tmp_path)
    page.write_text(page.read_text() + "```python\nraise KeyError\n```\n")
    with pytest.raises(KeyError):
        run_page(page, tmp_path, lambda: tmp_path)


def test_what_python_names_is_there(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        '```python\nfrom nemo_emmett.models import load\n\nmodel = load("exp/some/model")\n'
        'answers = model.translate(["one red house", "a/b.wav"], "en", "de")\nprint(len(answers))\n```\n```\n2\n```\n'
    )
    run_page(page, tmp_path, lambda: request.getfixturevalue("exported"))
