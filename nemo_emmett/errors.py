"""The exceptions a user sees: each carries one sentence that names the key or file, the value and the remedy."""

from __future__ import annotations

EXIT_USER_ERROR = 2
"""Exit code of our commands when the user's input was at fault (the shell's convention for misuse)."""

EXIT_TRY_AGAIN = 75
"""Exit code of a training that continues from its last checkpoint when it is started again: it ran out of memory, or
SIGTERM or SIGINT stopped it (``EX_TEMPFAIL`` of ``sysexits.h``)."""

EXIT_INTERRUPTED = 130
"""Exit code of a command that Ctrl-C ended (128 + SIGINT, the shell's convention)."""


class EmmettError(Exception):
    """A mistake in what the user gave: our commands print its sentence, without a traceback, and exit with 2."""


class ConfigError(EmmettError, ValueError):
    """A key of a recipe is missing, misspelt, or has a value that cannot work."""


class DataError(EmmettError):
    """A file of the data is missing, or what it holds cannot be trained on."""


class TooManyBadRecords(DataError):
    """More records were skipped than ``max_bad_records`` allows; the message names the first ten."""


class ModelError(EmmettError):
    """A model cannot be built, loaded or used as asked."""
