"""Which preparation a folder belongs to: what identifies one, and what is refused to any other."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_emmett.corpora.corpus import Corpus, Part, Selection
from nemo_emmett.corpora.writing import Workshop, read_json
from nemo_emmett.errors import DataError

SUMMARY_FILE = "corpus.json"

STARTED_FILE = "corpus.started.json"
"""Stands in an unfinished corpus: what it is going to hold."""

WORKSHOP = ".unfinished"


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


def claim(out: Path, workshop: Workshop, plan: Mapping[str, Any], parts: Sequence[Part]) -> None:
    """Make ``out`` this plan's folder.

    Raises:
        DataError: if it holds something else, or what was begun for this plan when the source had other parts.
    """
    if out.exists() and not out.is_dir():
        raise DataError(f"'{out}' is a file; give the corpus a folder.")
    if (started := read_json(out / STARTED_FILE)) is not None:
        refuse_difference(out, started, plan)
        _refuse_other_parts(out, started.get("parts", []), parts)
    elif out.exists() and any(path.name != WORKSHOP for path in out.iterdir()):
        raise DataError(f"'{out}' is not empty and holds no corpus; give the corpus a folder of its own.")
    else:
        begun = [{"name": part.name, "languages": part.languages} for part in parts]
        workshop.write_json(out / STARTED_FILE, {**plan, "parts": begun})


def refuse_difference(out: Path, there: Any, asked: Mapping[str, Any]) -> None:
    """Raise DataError, naming what differs, if ``out`` holds the corpus of another plan, or anything else."""
    if not isinstance(there, Mapping) or "options" not in there:
        raise DataError(f"'{out}' holds another program's {SUMMARY_FILE}; give the corpus a folder of its own.")
    before, now = ({"corpus": plan["name"], "release": plan["release"], **plan["options"]} for plan in (there, asked))
    differences = [f"{key} ({before.get(key)} there, {now[key]} asked)" for key in now if before.get(key) != now[key]]
    if differences:
        raise DataError(
            f"'{out}' holds a corpus that differs in {', '.join(differences)}; give another folder or delete this one."
        )


def refuse_inside(out: Path, source: Path) -> None:
    """Raise DataError if ``out`` lies in ``source``: some readers take all that is below it."""
    if out.resolve().is_relative_to(source.resolve()):
        raise DataError(f"'{out}' lies in the source, '{source}'; give the corpus a folder outside of it.")


def _refuse_other_parts(out: Path, there: Sequence[Mapping[str, Any]], parts: Sequence[Part]) -> None:
    """What is done would not fit what is still to do, if the source was added to in between."""
    before = {part["name"]: tuple(part["languages"]) for part in there}
    now = {part.name: tuple(part.languages) for part in parts}
    if before != now:
        name = next(name for name in (*before, *now) if before.get(name) != now.get(name))
        was, is_now = (", ".join(found.get(name, ("nothing",))) for found in (before, now))
        raise DataError(
            f"The source has changed since '{out}' was begun: '{name}' was {was} and is {is_now}; delete the folder "
            "and start anew."
        )
