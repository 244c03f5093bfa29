"""New processes that have torch, Lightning and NeMo imported: forked from one server, which a test process starts once.

A new interpreter takes more than ten seconds of CPU to import them.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PRELOADED = [
    "lightning.pytorch",
    "nemo.collections.asr.models",
    "nemo.collections.speechlm2",
    "nemo_emmett.training",
    "nemo_emmett.evaluation.run",
    "nemo_emmett.data.datamodule",
    "nemo_emmett.models.bestow_gpt",
    "nemo_emmett.models.salm_gpt",
    "nemo_emmett.models.salm_t5",
    "nemo_emmett.callbacks.oomptimizer",
    "tests.frozen",
]


def fork_server() -> BaseContext:
    """The ``multiprocessing`` context whose processes are forked from the server; it is started if it does not run.

    The processes get the environment in which the server was started, with one thread for each.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with _environment():
        forkserver.ensure_running()
    return context


@contextmanager
def _environment() -> Iterator[None]:
    path = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    before = dict(os.environ)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(dict.fromkeys(path))}
    os.environ.pop("TOKENIZERS_PARALLELISM", None)
    os.unsetenv("TOKENIZERS_PARALLELISM")  # NeMo sets it behind os.environ's back
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


DEPENDENCIES = [
    "torch.utils.data",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "lightning.pytorch",
    "hydra",
    "lhotse",
    "transformers",
    "transformers.models.auto.modeling_auto",
    "peft",
    "torchmetrics.text",
    "librosa",
    "scipy.signal",
    "sklearn.metrics",
    "pandas",
    "matplotlib.pyplot",
    "datasets",
    "numba",
    "sacrebleu",
    "sentencepiece",
]
"""What takes long to import of what NeMo imports."""

IMPORT_DEPENDENCIES = f"""
import importlib, sys
from contextlib import suppress

for name in {DEPENDENCIES}:
    with suppress(ImportError):
        importlib.import_module(name)
assert not [name for name in sys.modules if name.partition(".")[0] in ("nemo", "nemo_emmett")]
"""
"""Code for a new interpreter that is to fork: it imports what NeMo imports, but neither NeMo nor this package."""


def call_in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function of a module returns in a new process.

    Raises:
        AssertionError: if it fails there, with the end of what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        returned, log = Path(folder, "returned"), Path(folder, "log")
        process = fork_server().Process(target=_call, args=(returned, log, function, arguments))
        process.start()
        process.join()
        assert process.exitcode == 0, log.read_text()[-5000:]
        return pickle.loads(returned.read_bytes())


def _call(returned: Path, log: Path, function: Callable[..., Any], arguments: tuple) -> None:
    print_to(log)
    returned.write_bytes(pickle.dumps(function(*arguments)))


def print_to(log: Path) -> None:
    """Append all that this process prints to a file."""
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, sys.stdout.fileno())
    os.dup2(file, sys.stderr.fileno())
