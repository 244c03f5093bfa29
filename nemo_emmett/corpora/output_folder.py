"""The folder of a prepared corpus, and where its files are made: a killed preparation is completed, not repeated."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_emmett.errors import DataError
from nemo_emmett.files import atomic_file, write_text

Identity = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""The part of a plan that must be equal for two preparations to give the same files, by the names in messages."""

STAGING_FOLDER = ".unfinished"


@dataclass(frozen=True)
class Staging:
    """The folder in an unfinished corpus where files are made and the results of finished units of work are kept."""

    folder: Path

    def atomic_file(self, path: Path) -> AbstractContextManager[Path]:
        """A file to write to that is renamed to ``path`` when the block ends without an error."""
        return atomic_file(path, self.folder)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out until this block or this process ends.

        Raises:
            DataError: if another process has the lock.
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

    def result_of(self, unit: str) -> dict[str, Any] | None:
        """The result of a unit of work; None if it is not finished."""
        return _read_json(self.folder / "done" / f"{unit}.json")

    def mark_done(self, unit: str, result: Mapping[str, Any]) -> None:
        """Keep the result of a finished unit of work."""
        self.write_json(self.folder / "done" / f"{unit}.json", result)

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True)
class CorpusFolder:
    """A folder that holds one corpus and nothing else.

    Until the corpus is finished, ``{name}.started.json`` contains the plan: all that the files depend on, as plain JSON
    values. Then ``{name}.json`` contains the plan and a summary.
    """

    path: Path
    name: str = "corpus"
    title: str = "corpus"  # in messages

    @property
    def staging(self) -> Staging:
        """Where its files are made."""
        return Staging(self.path / STAGING_FOLDER)

    def finished(self, plan: Mapping[str, Any], identity: Identity) -> dict[str, Any] | None:
        """The summary of the corpus; None if it is not finished.

        Raises:
            DataError: if it is of another plan, or another program's file has the summary's name.
        """
        if (summary := _read_json(self._summary_file)) is not None:
            self._refuse_difference(summary, plan, identity)
            self.staging.remove()  # left over if the process was killed between the last two steps
        return summary

    @contextmanager
    def begun(self, plan: Mapping[str, Any], identity: Identity) -> Iterator[dict[str, Any]]:
        """Lock the folder for this plan; yields the plan with which the preparation was begun.

        Raises:
            DataError: if it holds anything else, another process is writing to it, or the file system has an error.
        """
        try:
            if self.path.exists() and not self.path.is_dir():
                raise DataError(f"'{self.path}' is a file; give the {self.title} a folder.")
            if (started := _read_json(self._started_file)) is not None:
                self._refuse_difference(started, plan, identity)
            elif self.path.exists() and any(path.name != STAGING_FOLDER for path in self.path.iterdir()):
                raise DataError(
                    f"'{self.path}' is not empty and holds no {self.title}; give the {self.title} a folder of its own."
                )
            else:
                self.staging.write_json(self._started_file, plan)
            with self.staging.locked():
                yield started or dict(plan)
        except OSError as error:
            raise DataError(
                f"'{error.filename or self.path}' cannot be used ({error.strerror or error}); put that right and start "
                "again: finished work is kept."
            ) from error

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the summary, by which the corpus is known to be finished."""
        self.staging.write_json(self._started_file, summary)
        os.replace(self._started_file, self._summary_file)
        self.staging.remove()

    @property
    def _summary_file(self) -> Path:
        return self.path / f"{self.name}.json"

    @property
    def _started_file(self) -> Path:
        return self.path / f"{self.name}.started.json"

    def _refuse_difference(self, found: Any, plan: Mapping[str, Any], identity: Identity) -> None:
        try:
            before = identity(found)
        except (KeyError, TypeError, AttributeError):
            raise DataError(
                f"'{self.path}' holds another program's {self.name}.json; give the {self.title} a folder of its own."
            ) from None
        now = identity(plan)
        if keys := [key for key in {**now, **before} if before.get(key) != now.get(key)]:
            differences = ", ".join(f"{key} ({before.get(key)} there, {now.get(key)} asked)" for key in keys)
            raise DataError(
                f"'{self.path}' holds a {self.title} that differs in {differences}; give another folder or delete "
                "this one."
            )


def _read_json(path: Path) -> dict[str, Any] | None:
    """The content of a JSON file; None if it does not exist."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"'{path}' is damaged ({error}); delete its folder and prepare it again.") from error
