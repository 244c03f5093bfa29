"""Recipes are checked before they are used: a key close to a known one is a typo, and typos must not train."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from nemo_emmett.errors import ConfigError

MAX_TYPO_DISTANCE = 2
"""A key within this many edits of a known one is taken for a misspelling of it."""


def edit_distance(a: str, b: str, limit: int | None = None) -> int:
    """Levenshtein distance between two strings; any value above ``limit`` may be returned as ``limit + 1``."""
    if limit is not None and abs(len(a) - len(b)) > limit:
        return limit + 1
    previous = list(range(len(b) + 1))
    for i, char_a in enumerate(a, start=1):
        current = [i]
        for j, char_b in enumerate(b, start=1):
            current.append(min(previous[j] + 1, current[-1] + 1, previous[j - 1] + (char_a != char_b)))
        previous = current
    return previous[-1]


def nearest(name: str, known: Iterable[str], limit: int = MAX_TYPO_DISTANCE) -> str | None:
    """The known name with the fewest edits from ``name``, or None if all are more than ``limit`` edits away.

    Ties go to the name that sorts first. Names of up to three letters allow one edit only, so that ``de`` is not taken
    for ``fr``.
    """
    limit = limit if len(name) > 3 else min(limit, 1)
    distances = sorted((edit_distance(name, k, limit), k) for k in known)
    if distances and distances[0][0] <= limit:
        return distances[0][1]
    return None


def check_keys(
    config: Mapping,
    known: Collection[str],
    where: str,
    tolerated: Collection[str] = (),
) -> list[str]:
    """Refuse the keys of ``config`` that look like misspellings of known ones.

    Args:
        config: a mapping with string keys (a dict or a ``DictConfig``).
        known: the keys that have a meaning here.
        where: the config's place in the recipe, for the message (``data.train_ds``).
        tolerated: keys that are allowed although unknown (NeMo's legacy keys), whatever they resemble.

    Returns:
        The unknown keys that resemble nothing; the caller warns about them, as NeMo does.

    Raises:
        ConfigError: if a key is within ``MAX_TYPO_DISTANCE`` edits of a known one.

    Example:
        >>> check_keys({"batch_size": 4, "labels": None}, {"batch_size"}, "data.train_ds")
        ['labels']
    """
    strangers = []
    for key in config:
        key = str(key)
        if key in known or key in tolerated or key.startswith("_"):
            continue
        if (suggestion := nearest(key, known)) is not None:
            raise ConfigError(f"{where}.{key}: there is no such key; did you mean '{suggestion}'?")
        strangers.append(key)
    return strangers


def escape_interpolations(text: str) -> str:
    r"""A text as it must stand in a recipe: ``${`` in it, such as in a path, is no interpolation.

    Example:
        >>> print(escape_interpolations("/data/${name}"))
        /data/\${name}
    """
    return re.sub(r"(\\*)\$\{", lambda found: 2 * found[1] + "\\${", text)
