"""Files that appear whole or not at all, whoever reads them and whenever the work is cut off."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | os.PathLike[str], folder: str | os.PathLike[str] | None = None) -> Iterator[Path]:
    """A new file to write to that becomes ``path`` when the block ends without an error, and is removed if it does not.

    Args:
        path: its folder is made if it is not there; a file that is there is replaced.
        folder: where the unfinished file is made, on the same file system; by default beside ``path``. What a killed
            process leaves, it leaves there.

    Example:
        >>> with whole_file("scores.txt") as unfinished:  # doctest: +SKIP
        ...     unfinished.write_text("31.4")
    """
    path = Path(path)
    folder = path.parent if folder is None else Path(folder)
    for needed in {path.parent, folder}:
        needed.mkdir(parents=True, exist_ok=True)
    # The ending stays, for libraries that tell the format by it.
    unfinished = folder / f".{uuid.uuid4().hex}{path.suffix}"
    unfinished.touch(exist_ok=False)  # for all whom the umask admits, other than tempfile's
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str, folder: str | os.PathLike[str] | None = None) -> None:
    """Write a UTF-8 file, whole or not at all; the arguments are those of :func:`whole_file`."""
    with whole_file(path, folder) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
