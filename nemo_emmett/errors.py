"""The exceptions for users: each is one sentence with the key or file, the value and the remedy."""

from __future__ import annotations

from enum import Enum
from typing import Any, ClassVar

__all__ = [
    "EmmettError",
    "ConfigError",
    "DataError",
    "TooManyBadRecords",
    "ModelError",
    "NonFiniteError",
    "OutputError",
]

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


PAGE = "docs/how-to/errors.md"
"""The page that explains the frequent errors."""


class Help(str, Enum):
    """The headings of :data:`PAGE`, by their anchors."""

    BAD_RECORDS = "too-many-bad-records"
    BATCH_SIZE = "batch-sizes-and-bins"
    CLASS_NOT_ALLOWED = "a-class-that-is-not-imported"
    CODE_IN_MODEL = "code-that-came-with-a-model"
    DISK_FULL = "no-room-on-the-disk"
    FILE_CHANGED = "a-file-that-has-changed"
    FOLDER_IN_USE = "a-folder-that-is-in-use"
    LANGUAGE = "no-language"
    MISSING_FILE = "a-file-that-is-not-there"
    MISSING_PACKAGE = "a-package-that-is-not-installed"
    MISSING_VALUE = "a-value-that-is-left-to-you"
    NEMO_KEY = "a-key-of-another-model-of-nemo"
    NO_MODEL = "a-model-that-is-not-found"
    NO_SPEECH = "a-batch-without-speech"
    NOTHING_LEFT = "no-example-is-left"
    NOT_FINITE = "losses-that-are-not-finite"
    OTHER_PROFILE = "a-profile-of-another-run"
    OUT_OF_MEMORY = "out-of-memory"
    TOKENIZER = "a-tokenizer-larger-than-the-embedding-table"
    UNKNOWN_KEY = "a-key-that-does-not-exist"
    VALUE = "a-value-that-cannot-be-used"


def with_help(sentence: str, page: Help | None) -> str:
    """A sentence, and on a line of its own where it is explained.

    Example:
        >>> print(with_help("model.lorra: there is no such key.", Help.UNKNOWN_KEY))
        model.lorra: there is no such key.
        See docs/how-to/errors.md#a-key-that-does-not-exist
    """
    return sentence if page is None else f"{sentence}\nSee {PAGE}#{page.value}"


class EmmettError(Exception):
    """A user's mistake. Our commands print the message without a traceback, and exit with the code of the class.

    Args:
        message: one sentence.
        page: where it is explained; by default what the class has.
    """

    exit_code: ClassVar[int] = EXIT_USER_ERROR
    page: Help | None = None

    def __init__(self, *message: Any, page: Help | None = None) -> None:
        super().__init__(*message)
        if page is not None:
            self.page = page


class ConfigError(EmmettError, ValueError):
    """A key of a recipe is missing, misspelt, or has an invalid value."""


class DataError(EmmettError):
    """A file of the data is missing, or its content cannot be trained on."""


class TooManyBadRecords(DataError):
    """More records were skipped than ``max_bad_records`` allows; the message names the first ten."""

    page = Help.BAD_RECORDS


class ModelError(EmmettError):
    """A model cannot be built, loaded or used as requested."""


class NonFiniteError(EmmettError):
    """Losses, gradients or weights are not finite, so a training cannot continue, be saved or be exported."""

    exit_code = EXIT_NOT_FINITE
    page = Help.NOT_FINITE


class OutputError(EmmettError):
    """A result could not be written to the given place; the message says where it is instead."""

    exit_code = EXIT_NOT_WRITTEN
