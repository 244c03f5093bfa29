"""Where a corpus's files are made, and a note of what is done: a killed preparation goes on where it was."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_emmett.errors import DataError
from nemo_emmett.files import atomic_file, write_text


@dataclass(frozen=True)
class Workshop:
    """The folder in an unfinished corpus where files are made and finished units of work are noted."""

    folder: Path

    def whole(self, path: Path) -> AbstractContextManager[Path]:
        """A file to write to that becomes ``path`` when the block ends without an error."""
        return atomic_file(path, self.folder)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes from working here; however this one ends, they may then.

        Raises:
            DataError: if another process is at work here.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(f"Another process is writing to '{self.folder.parent}'; let it finish.") from None
            except OSError:  # some network file systems have no locks
                pass
            yield

    def write_text(self, path: Path, content: str) -> None:
        """Write a small text file."""
        write_text(path, content, self.folder)

    def write_json(self, path: Path, content: Mapping[str, Any]) -> None:
        """Write a small JSON file."""
        self.write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def record(self, unit: str) -> dict[str, Any] | None:
        """What was noted about a unit of work when it was finished; None if it was not."""
        return read_json(self.folder / "done" / f"{unit}.json")

    def note(self, unit: str, record: Mapping[str, Any]) -> None:
        """Note that a unit of work is finished; ``record`` is what others need to know about it."""
        self.write_json(self.folder / "done" / f"{unit}.json", record)

    def clear(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON file's content; None where there is no such file.

    Raises:
        DataError: if it is damaged.
    """
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"'{path}' is damaged ({error}); delete its folder and prepare it again.") from error
