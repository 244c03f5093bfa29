"""The libraries that only spoken corpora need, loaded on demand."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from nemo_emmett.errors import EmmettError


def require(module: str) -> ModuleType:
    """The module of that name, imported.

    Raises:
        EmmettError: if its library is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise _missing(module) from error


def installed_version(library: str) -> str:
    """The version of a library.

    Raises:
        EmmettError: if it is not installed.
    """
    try:
        return version(library)
    except PackageNotFoundError as error:
        raise _missing(library) from error


def _missing(library: str) -> EmmettError:
    return EmmettError(f"This corpus needs '{library}', which is not installed; run: pip install 'nemo_emmett[demo]'")
