"""What a command prints, and what goes to its log file instead.

NeMo, Lightning, transformers and OneLogger log some 70 lines before the first step of a training. Of their records the
console gets errors, and warnings except those in :data:`TO_LOG_FILE`; of ours it gets information, too. All records go
to the log file. Only rank zero prints, except errors.

This module imports neither torch nor NeMo: a command calls :func:`quiet_console` before it imports them.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from logging.handlers import MemoryHandler
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import wrapt
from tqdm import tqdm

from nemo_emmett.errors import EmmettError

if TYPE_CHECKING:
    from rich.console import Console

VERBOSE_VARIABLE = "NEMO_EMMETT_VERBOSE"
"""Environment variable: with any value, everything is printed as the libraries do it, and no log file is written."""


class Routed(NamedTuple):
    """A warning or message that goes to the log file alone."""

    logger: str
    message: str  # a regular expression that is searched in it
    why: str


TO_LOG_FILE = (
    Routed("nemo_logger", "requested tokenization during data sampling", "advises pretokenize: false, which we refuse"),
    Routed("nemo_logger", "There were no checkpoints found in checkpoint_dir", "so it is at every first start"),
    Routed("nemo_logger", "Exp_manager is logging to .* but it already exists", "so it is whenever a run resumes"),
    Routed("nemo_logger", r"call the ModelPT\.setup_\w+_data\(\)", "an encoder is trained on the recipe's data"),
    Routed("root", "datasets in the group have the same tarred status", "NeMo's chain is never iterated by us"),
    Routed("nemo_logger", "was told to monitor a validation value", "check_validation warns if none will come"),
    Routed("nemo_logger", "smaller than the logging interval", "the interval counts steps over all epochs"),
    Routed("nemo_logger", "Checkpoint directory .* exists and is not empty", "so it is whenever a run resumes"),
    Routed("nemo_logger", "resuming from a checkpoint that ended before the epoch", "ResumableData goes on within it"),
    Routed("nemo_logger", "nn.Module.*already in eval mode", "frozen parts are in evaluation mode on purpose"),
    Routed("nemo_logger", r"does not implement save_to\(\)", "our models are exported as folders, not as .nemo files"),
    Routed("nemo_logger", r"self\.log\('val_.*sync_dist=True", "our models add up the counts of all ranks themselves"),
    Routed("nemo_logger", "PreemptionCallback is replaced", "StopOnSignal does more than NeMo's callback"),
    Routed("nemo_logger", "The trained model is in ", "the summary at the end names the folder"),
    Routed("nemo_logger", "(Future|Deprecation|PendingDeprecation|Syntax)Warning: ", "for the libraries' developers"),
    Routed("py.warnings", "(Future|Deprecation|PendingDeprecation|Syntax)Warning: ", "for the libraries' developers"),
    Routed("nv_one_logger", "", "NVIDIA's telemetry, which is off"),
)

_OWN_LOGGER = __name__.partition(".")[0]
_OWN_FOLDER = str(Path(__file__).parent) + os.sep
_WITH_HANDLERS = (
    *("", "nemo_logger", "lightning", "lightning.pytorch", "lightning.fabric", "pytorch_lightning"),
    "transformers",
)
"""Loggers to which the libraries, or Hydra, add handlers for the console."""

_FILE_FORMAT = "%(asctime)s %(levelname)s %(name)s %(filename)s:%(lineno)d: %(message)s"


def goes_to_console(record: logging.LogRecord) -> bool:
    """Whether a user of rank zero sees a record."""
    if record.levelno >= logging.ERROR:
        return True
    is_ours = record.name.partition(".")[0] == _OWN_LOGGER or record.pathname.startswith(_OWN_FOLDER)
    if record.levelno < (logging.INFO if is_ours else logging.WARNING):
        return False
    message = record.getMessage()
    return not any(
        (record.name == routed.logger or record.name.startswith(f"{routed.logger}."))
        and re.search(routed.message, message, re.DOTALL)
        for routed in TO_LOG_FILE
    )


@contextmanager
def quiet_console(opening: str = "", *, stdout_is_output: bool = False) -> Iterator[None]:
    """Print what a user can act on, and hold back the rest for the file that :func:`write_log_file` names.

    What was held back is printed if an exception other than an :class:`EmmettError` ends the block and there is no
    file. A block within another has no effect of its own. ``NEMO_EMMETT_VERBOSE=1`` leaves everything as it is.

    Args:
        opening: printed at once, by rank zero: importing NeMo takes ten seconds.
        stdout_is_output: the command's result goes to standard output, so the opening and all information go to stderr.

    Example::

        with quiet_console("Importing NeMo ..."):
            from nemo_emmett.training import train

            train(cfg)
    """
    global _routing
    if opening and _routing is None and is_rank_zero():
        print(opening, file=sys.stderr if stdout_is_output else sys.stdout, flush=True)
    if _routing is not None or os.environ.get(VERBOSE_VARIABLE):
        yield
        return
    _routing = routing = _Routing(stdout_is_output)
    try:
        yield
    except BaseException as error:
        routing.ended_by(error)
        raise
    finally:
        _routing = None
        routing.close()


def write_log_file(folder: str | os.PathLike[str], rank: int = 0) -> Path | None:
    """Write all records of this process to a file, those since :func:`quiet_console` included.

    Args:
        folder: of the run.
        rank: of this process; each rank has its own file.

    Returns:
        The file, ``train.log`` or ``train.rank1.log``; None outside :func:`quiet_console`.
    """
    if _routing is None:
        return None
    path = Path(folder, f"train.rank{rank}.log" if rank else "train.log")
    _routing.write_to(path)
    return path


def is_rank_zero() -> bool:
    """Whether this process is rank zero by the variables of torchrun, srun or Lightning."""
    if (rank := os.environ.get("RANK") or os.environ.get("SLURM_PROCID")) is not None:
        return rank == "0"
    return not any(os.environ.get(name, "0") != "0" for name in ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK"))


def plain_console(**options: Any) -> Console:
    """A console on standard output: with colours in a terminal, plain text in a file, a pipe and a notebook.

    rich's own choice in a notebook is HTML with a copy that has the control codes of a terminal.
    """
    from rich.console import Console

    return Console(force_jupyter=False, **options)


class _Console(logging.Handler):
    """Prints records: information on stdout, the rest on stderr, without breaking a progress bar."""

    def __init__(self, level: int, stdout_is_output: bool = False) -> None:
        super().__init__(level)
        self._on_stdout = -1 if stdout_is_output else logging.INFO
        self.addFilter(goes_to_console)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sign = "" if record.levelno <= logging.INFO else f"{record.levelname.capitalize()}: "
            stream = sys.stdout if record.levelno <= self._on_stdout else sys.stderr
            line = f"{sign}{self.format(record).rstrip()}"
            if getattr(tqdm, "_instances", None):  # takes a lock, which a forked worker may find taken forever
                tqdm.write(line, file=stream)
            else:
                print(line, file=stream, flush=True)
        except Exception:
            self.handleError(record)


class _LogFile(logging.FileHandler):
    """A log file; a full disk costs one sentence, not a traceback for each record."""

    _failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(error := sys.exc_info()[1], OSError):
            super().handleError(record)
        elif not self._failed:
            self._failed = True
            print(f"Warning: '{self.baseFilename}' is incomplete: {error.strerror}.", file=sys.stderr)  # noqa: T201

    def close(self) -> None:
        with suppress(OSError):
            super().close()


class _Routing:
    """The handlers of one :func:`quiet_console`: installed when it is made, removed by :meth:`close`."""

    def __init__(self, stdout_is_output: bool = False) -> None:
        self._console = _Console(logging.INFO if is_rank_zero() else logging.ERROR, stdout_is_output)
        self._held_back = MemoryHandler(1, flushLevel=logging.CRITICAL + 1, flushOnClose=False)  # until it has a target
        self._file: logging.Handler | None = None
        self._removed: list[tuple[logging.Logger, logging.Handler]] = []
        self._propagates: list[tuple[logging.Logger, bool]] = []
        self._is_open = True
        root = logging.getLogger()
        self._level = root.level
        root.setLevel(logging.INFO)
        root.addHandler(self._console)
        root.addHandler(self._held_back)
        self._captures = "nemo.utils" not in sys.modules  # NeMo's logger takes Python's warnings from then on
        if self._captures:
            logging.captureWarnings(True)
        # A library adds its handlers when it is imported.
        for module in ("nemo.utils", "lightning", "transformers.utils.logging"):
            wrapt.register_post_import_hook(self._imported, module)
        self._take_over()

    def _imported(self, module: ModuleType) -> None:
        if not self._is_open:
            return
        if module.__name__ == "transformers.utils.logging":
            module.get_logger()  # adds its handler
            if not sys.stderr.isatty():
                module.disable_progress_bar()
        self._take_over()

    def _take_over(self) -> None:
        """Have the records of the libraries' loggers reach the root's handlers alone."""
        for name in _WITH_HANDLERS:
            logger = logging.getLogger(name)
            for handler in [handler for handler in logger.handlers if type(handler) is logging.StreamHandler]:
                logger.removeHandler(handler)
                self._removed.append((logger, handler))
            if name and not logger.propagate:
                self._propagates.append((logger, logger.propagate))
                logger.propagate = True

    def write_to(self, path: Path) -> None:
        if self._file is not None:
            self._file.close()
        self._file = _LogFile(path, encoding="utf-8")
        self._file.setFormatter(logging.Formatter(_FILE_FORMAT))
        self._held_back.setTarget(self._file)
        self._held_back.flush()

    def ended_by(self, error: BaseException) -> None:
        """Note in the file what ends the command; print what was held back of an unexpected end without a file."""
        if isinstance(error, (SystemExit, KeyboardInterrupt)):
            return
        if self._file is None and not isinstance(error, EmmettError):
            for record in self._held_back.buffer:
                print(logging.Formatter(_FILE_FORMAT).format(record), file=sys.stderr)  # noqa: T201
        info = None if isinstance(error, EmmettError) else (type(error), error, error.__traceback__)
        text = f"Ended by {type(error).__name__}: {error}"
        self._held_back.handle(logging.LogRecord(_OWN_LOGGER, logging.ERROR, __file__, 0, text, None, info))

    def close(self) -> None:
        self._is_open = False
        root = logging.getLogger()
        root.setLevel(self._level)
        for handler in (self._console, self._held_back):
            root.removeHandler(handler)
            handler.close()
        if self._file is not None:
            self._file.close()
        if self._captures and "nemo.utils" not in sys.modules:
            logging.captureWarnings(False)
        for logger, propagate in self._propagates:
            logger.propagate = propagate
        for logger, handler in self._removed:
            logger.addHandler(handler)


_routing: _Routing | None = None
