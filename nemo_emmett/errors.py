"""The exceptions for users: each is one sentence with the key or file, the value and the remedy."""

from __future__ import annotations

from typing import ClassVar

EXIT_USER_ERROR = 2
"""Exit code of our commands when the user's input was at fault (the shell's convention for misuse)."""

EXIT_NOT_FINITE = 70
"""Exit code of a training whose losses, gradients or weights are not finite (``EX_SOFTWARE`` of ``sysexits.h``)."""

EXIT_NOT_WRITTEN = 73
"""Exit code of a command that could not write its result to the given place; the result is kept elsewhere
(``EX_CANTCREAT`` of ``sysexits.h``)."""

EXIT_TRY_AGAIN = 75
"""Exit code of a training that ran out of memory, or that SIGTERM or SIGINT stopped, and that continues from its last
checkpoint when it is started again (``EX_TEMPFAIL`` of ``sysexits.h``)."""

EXIT_INTERRUPTED = 130
"""Exit code of a command that Ctrl-C ended (128 + SIGINT, the shell's convention)."""


class EmmettError(Exception):
    """A user's mistake. Our commands print the message without a traceback, and exit with the code of the class."""

    exit_code: ClassVar[int] = EXIT_USER_ERROR


class ConfigError(EmmettError, ValueError):
    """A key of a recipe is missing, misspelt, or has an invalid value."""


class DataError(EmmettError):
    """A file of the data is missing, or its content cannot be trained on."""


class TooManyBadRecords(DataError):
    """More records were skipped than ``max_bad_records`` allows; the message names the first ten."""


class ModelError(EmmettError):
    """A model cannot be built, loaded or used as requested."""


class NonFiniteError(EmmettError):
    """Losses, gradients or weights are not finite, so a training cannot continue, be saved or be exported."""

    exit_code = EXIT_NOT_FINITE


class OutputError(EmmettError):
    """A result could not be written to the given place; the message says where it is instead."""

    exit_code = EXIT_NOT_WRITTEN
