"""Runs the commands of shell blocks in this process, in a folder with small files of the names that the pages use."""

from __future__ import annotations

import glob
import logging
import os
import runpy
import shlex
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest.mock import patch

from click.testing import CliRunner

from nemo_emmett.cli import main
from tests.docs.pages import Block
from tests.docs.shell import commands_in

TWO_STEPS = "trainer.accelerator=cpu trainer.max_steps=2 ++trainer.limit_train_batches=2"

SMALLER = {
    "nemo-emmett prepare phrasebook": "--train-items 12 --spoken-train-items 6 --dev-items 2 --test-items 3",
    "python examples/speechlm/pretrain_t5.py": f"{TWO_STEPS} t5.languages=[en,de,es,fr,zh] t5.vocab_size=120 "
    "t5.config.num_layers=1 model.max_new_tokens=4",
    "python examples/speechlm/pretrain_encoder.py": f"{TWO_STEPS} tokenizer.vocab_size=60 model.encoder.n_layers=1",
    "nemo-emmett train": f"{TWO_STEPS} trainer.devices=1 trainer.strategy=auto ++trainer.precision=32-true "
    "data.train_ds.num_workers=0 model.max_new_tokens=4",
    "nemo-emmett translate": "--max-new-tokens 4",
    "nemo-emmett evaluate": "--max-new-tokens 4",
    "python examples/speechlm/evaluate.py model=exp/model": "max_new_tokens=4 output=exp/evaluation_of_recipe",
    "python examples/speechlm/evaluate.py": "max_new_tokens=4",
    "nemo-emmett oomptimize": "trainer.accelerator=cpu --memory-budget 64MiB --profile of_the_device.yaml",
}
"""What is added to the commands that begin so: the models are tiny and random, and learn nothing in two steps.

Two that are alternatives on their page write to different files, so that the second neither replaces those of the first
nor is refused because of them.
"""

PLACEHOLDERS = {"MODEL": "exp/model", "CONFIG": "test_sets.yaml"}
"""Words of the pages for files of the reader's."""


class CannotRun(Exception):
    """The command is of a program that is not run here."""


class Shell:
    """Runs commands, each once: pages repeat some, such as ``nemo-emmett doctor``.

    Args:
        folder: in which they are started.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done: set[tuple[Path, str, str]] = set()

    def run(self, block: Block) -> list[str]:
        """Run a block's commands.

        Returns:
            Those that were not run, of a block of which only a part is.

        Raises:
            CannotRun: if a command cannot be run, and no comment before the block says so.
            AssertionError: if a command fails.
        """
        left_out, before = [], Path.cwd()
        os.chdir(self.folder)
        root = logging.getLogger()
        handlers, level = root.handlers[:], root.level
        try:
            for line in commands_in(block).replace("\\\n", " ").splitlines():
                try:
                    self._line(line)
                except CannotRun:
                    if not block.in_part:
                        raise
                    left_out.append(line)
        finally:
            os.chdir(before)
            root.handlers[:], root.level = handlers, level  # Hydra's scripts set their own
        return left_out

    def _line(self, line: str) -> None:
        """Run ``PROGRAM ...`` or ``echo "..." | PROGRAM ...``."""
        words, typed = shlex.split(line, comments=True), ""
        if words[:1] == ["echo"] and words[2:3] == ["|"]:
            words, typed = words[3:], f"{words[1]}\n"
        key = (Path.cwd(), shlex.join(words), typed)
        if not words or key in self.done:
            return
        if words[0] == "cd":
            os.chdir(words[1])
            return
        words += next((more.split() for start, more in SMALLER.items() if " ".join(words).startswith(start)), [])
        words = [PLACEHOLDERS.get(word, word) for word in words]
        words = [file for word in words for file in sorted(glob.glob(word)) or [word]]
        with patch.dict(os.environ):
            code, output = _run(words, typed)
        assert code == 0, f"{line}\n{output}"
        self.done.add(key)


def _run(words: list[str], typed: str) -> tuple[object, str]:
    """The exit code and the output of a command.

    Raises:
        CannotRun: if it is of another program than those that are run here.
    """
    if words[0] == "nemo-emmett":
        result = CliRunner().invoke(main, words[1:], input=typed, catch_exceptions=False)
        return result.exit_code, result.output
    if words[0] == "sacrebleu":  # wants a standard input with a descriptor
        done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr
    if words[0] != "python" or not words[1].endswith(".py"):
        raise CannotRun(f"'{shlex.join(words)}' is not run by tests/docs/running.py: say why before the block")
    code, output = 0, StringIO()
    with patch.object(sys, "argv", words[1:]), redirect_stdout(output), redirect_stderr(output):
        try:
            runpy.run_path(words[1], run_name="__main__")
        except SystemExit as ended:
            code = ended.code or 0
    return code, output.getvalue()
