"""Which preparation a folder belongs to: what identifies one, and what is refused to any other."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_emmett.corpora.corpus import Corpus, Part, Selection
from nemo_emmett.corpora.writing import Workshop, read_json
from nemo_emmett.errors import DataError

Identity = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""What two plans must have alike to be of the same files, by the names that messages call it."""

_WORKSHOP = ".unfinished"


@dataclass(frozen=True)
class CorpusFolder:
    """A folder that is to hold one corpus and nothing else.

    ``{name}.started.json`` stands in it until the corpus is finished and says what it is going to hold; then
    ``{name}.json`` says what it does. Both begin with the plan: all that the files depend on, as plain JSON values.
    """

    path: Path
    name: str = "corpus"
    title: str = "corpus"  # what messages call what it holds

    @property
    def workshop(self) -> Workshop:
        """Where its files are made."""
        return Workshop(self.path / _WORKSHOP)

    def finished(self, plan: Mapping[str, Any], identity: Identity) -> dict[str, Any] | None:
        """The summary of the corpus, if it is finished; None if it is not.

        Raises:
            DataError: if it is another plan's, or another program's file has the summary's name.
        """
        if (there := read_json(self._summary_file)) is not None:
            self._refuse_difference(there, plan, identity)
            self.workshop.clear()  # if it was killed between the last two steps
        return there

    @contextmanager
    def work(self, plan: Mapping[str, Any], identity: Identity) -> Iterator[dict[str, Any]]:
        """Make the folder this plan's, and keep other processes from it; gives the plan by which it was begun.

        Raises:
            DataError: if it holds anything else, another process is at work in it, or the machine refuses to write.
        """
        try:
            begun = self._begin(plan, identity)
            with self.workshop.alone():
                yield begun
        except OSError as error:
            raise DataError(
                f"'{error.filename or self.path}' cannot be used ({error.strerror or error}); put that right and start "
                "again: what is done stays done."
            ) from error

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Say that the corpus is finished."""
        self.workshop.write_json(self._started_file, summary)
        os.replace(self._started_file, self._summary_file)
        self.workshop.clear()

    @property
    def _summary_file(self) -> Path:
        return self.path / f"{self.name}.json"

    @property
    def _started_file(self) -> Path:
        return self.path / f"{self.name}.started.json"

    def _begin(self, plan: Mapping[str, Any], identity: Identity) -> dict[str, Any]:
        if self.path.exists() and not self.path.is_dir():
            raise DataError(f"'{self.path}' is a file; give the {self.title} a folder.")
        if (started := read_json(self._started_file)) is not None:
            self._refuse_difference(started, plan, identity)
            return started
        if self.path.exists() and any(path.name != _WORKSHOP for path in self.path.iterdir()):
            raise DataError(
                f"'{self.path}' is not empty and holds no {self.title}; give the {self.title} a folder of its own."
            )
        self.workshop.write_json(self._started_file, plan)
        return dict(plan)

    def _refuse_difference(self, there: Any, plan: Mapping[str, Any], identity: Identity) -> None:
        try:
            before = identity(there)
        except (KeyError, TypeError, AttributeError):
            raise DataError(
                f"'{self.path}' holds another program's {self.name}.json; give the {self.title} a folder of its own."
            ) from None
        now = identity(plan)
        keys = [key for key in {**now, **before} if before.get(key) != now.get(key)]
        if keys:
            differences = ", ".join(f"{key} ({before.get(key)} there, {now.get(key)} asked)" for key in keys)
            raise DataError(
                f"'{self.path}' holds a {self.title} that differs in {differences}; give another folder or delete "
                "this one."
            )


def plan_of(corpus: Corpus, source: Path, selection: Selection, options: Mapping[str, Any]) -> dict[str, Any]:
    """What identifies a preparation, as plain JSON values: two with the same plan give the same files.

    Args:
        corpus: which one.
        source: where its files are.
        selection: what of it.
        options: what else the files depend on.
    """
    options = {
        "source": str(source.absolute()),
        "languages": selection.languages,
        "splits": selection.splits,
        "beside": {name: str(Path(path).absolute()) for name, path in selection.beside.items()},
        **options,
    }
    described = {key: getattr(corpus, key) for key in ("name", "title", "release", "licence", "url")}
    return json.loads(json.dumps({**described, "options": options}, default=str))


def identity_of(plan: Mapping[str, Any]) -> dict[str, Any]:
    """What identifies a public corpus, of what :func:`plan_of` made."""
    return {"corpus": plan["name"], "release": plan["release"], **plan["options"]}


def refuse_inside(out: Path, source: Path) -> None:
    """Raise DataError if ``out`` lies in ``source``: some readers take all that is below it."""
    if out.resolve().is_relative_to(source.resolve()):
        raise DataError(f"'{out}' lies in the source, '{source}'; give the corpus a folder outside of it.")


def refuse_other_parts(out: Path, there: Sequence[Mapping[str, Any]], parts: Sequence[Part]) -> None:
    """Raise DataError if the source has other parts than when ``out`` was begun, which what is done would not fit."""
    before = {part["name"]: tuple(part["languages"]) for part in there}
    now = {part.name: tuple(part.languages) for part in parts}
    if before != now:
        name = next(name for name in (*before, *now) if before.get(name) != now.get(name))
        was, is_now = (", ".join(found.get(name, ("nothing",))) for found in (before, now))
        raise DataError(
            f"The source has changed since '{out}' was begun: '{name}' was {was} and is {is_now}; delete the folder "
            "and start anew."
        )
