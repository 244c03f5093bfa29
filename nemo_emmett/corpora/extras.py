"""Libraries of optional extras, imported when they are needed."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from nemo_emmett.errors import EmmettError, Help


def require(module: str, extra: str = "synthesis", user: str = "This corpus") -> ModuleType:
    """Import a module.

    Args:
        module: its name.
        extra: the extra of this package that installs it.
        user: what needs it, for the message.

    Raises:
        EmmettError: if its library is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise _missing(module.partition(".")[0], extra, user) from error


def installed_version(library: str) -> str:
    """The version of a library of spoken corpora.

    Raises:
        EmmettError: if it is not installed.
    """
    try:
        return version(library)
    except PackageNotFoundError as error:
        raise _missing(library, "synthesis", "This corpus") from error


def _missing(library: str, extra: str, user: str) -> EmmettError:
    return EmmettError(
        f"{user} needs '{library}', which is not installed; run: pip install 'nemo_emmett[{extra}]'",
        page=Help.MISSING_PACKAGE,
    )
