"""Translations as lines of text, or as JSON objects with id, input, languages and translation; written as they come."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from nemo_emmett.errors import ConfigError
from nemo_emmett.files import atomic_file, check_writable
from nemo_emmett.translation.run import Result


def check_output(path: Path | None, overwrite: bool) -> None:
    """Refuse a file that exists, unless it is to be overwritten, and one that cannot be written.

    Raises:
        ConfigError: naming the file.
    """
    if path is None:
        return
    if path.exists() and not overwrite:
        raise ConfigError(f"--output: '{path}' exists already; name another file, or add --overwrite.")
    check_writable(path.absolute().parent, "--output")


def format_of(path: Path | None, chosen: str | None) -> str:
    """The format that was chosen, or that of the file's name: JSON for ``.jsonl`` and ``.json``."""
    if chosen is not None:
        return chosen
    return "jsonl" if path is not None and path.suffix in (".jsonl", ".json") else "lines"


@contextmanager
def opened(path: Path | None) -> Iterator[TextIO]:
    """Standard output, or a file that appears under its name when the block ends without an error."""
    if path is None:
        yield sys.stdout
        return
    with atomic_file(path, durable=True) as temporary, open(temporary, "w", encoding="utf-8") as file:
        yield file
        file.flush()


def as_line(result: Result, format_: str) -> str:
    """The line of one result; an empty one where a line of text has no translation, so that lines stay aligned."""
    if format_ == "lines":
        return " ".join((result.translation or "").splitlines())
    record = {
        "id": result.request.id,
        "input": result.request.shown,
        "translation": result.translation,
        "source_lang": result.request.source_lang,
        "target_lang": result.request.target_lang,
    }
    if result.chunks:
        record["chunks"] = [
            {"start": round(chunk.start, 3), "end": round(chunk.end, 3), "translation": chunk.translation}
            for chunk in result.chunks
        ]
    return json.dumps(record | ({"error": result.fault} if result.fault else {}), ensure_ascii=False)
