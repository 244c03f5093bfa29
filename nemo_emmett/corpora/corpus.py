"""A corpus, its parts and their sentences, independent of the layout of its publisher's files.

A reader turns one publisher's files into parts; ``preparing`` turns parts into manifests, text and shards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nemo_emmett.prompts.language_codes import normalized


def is_seconds(value: object) -> bool:
    """Whether a publisher's value is a finite number."""
    from nemo_emmett.typed_config import is_number  # lazy: pydantic, for a command that only prints its help

    return is_number(value) and math.isfinite(value)


@dataclass(frozen=True)
class Recording:
    """The place of a recording."""

    path: Path  # an audio file, or a tar archive
    member: str | None = None  # name in the archive
    start: float = 0.0  # seconds
    duration: float | None = None  # seconds; None: to the end


@dataclass(frozen=True)
class Sentence:
    """One sentence in one or more languages, and its recording in one of them."""

    id: str  # unique in its part; the publisher's if it has one
    texts: Mapping[str, str]  # ISO 639-1 code -> text; for speech the transcript and the translations
    recording: Recording | None = None


@dataclass(frozen=True)
class Skipped:
    """A row of a publisher's file that gives no sentence; it is counted by its cause."""

    cause: str


@dataclass(frozen=True)
class Part:
    """A portion of a corpus that is written together: a split in some languages, text or the speech of one language."""

    split: str  # the publisher's name
    languages: tuple[str, ...]  # ISO 639-1; every sentence of a text part has all of them
    sentences: Callable[[], Iterable[Sentence | Skipped]]  # reads the files again at each call, in the same order
    spoken: str | None = None  # the language of the recordings; None: text
    name: str = ""  # of its files; by default from the split and the spoken language

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", f"{self.split}.{self.spoken}" if self.spoken else self.split)


@dataclass(frozen=True)
class Selection:
    """The selected portion of a corpus."""

    languages: tuple[str, ...] | None = None  # any codes; None: all
    splits: tuple[str, ...] | None = None  # the publisher's names; None: all
    extra_sources: Mapping[str, Path] = field(default_factory=dict)  # by name: {"flores": Path(...)}

    def __post_init__(self) -> None:
        if self.languages is not None:
            object.__setattr__(self, "languages", tuple(dict.fromkeys(map(normalized, self.languages))))


@dataclass(frozen=True)
class Corpus:
    """A public corpus that can be prepared."""

    name: str  # of the command
    title: str
    release: str  # whose layout is read
    licence: str  # SPDX identifier if it has one
    url: str  # of its download page
    files: str  # the required files, for the command's help and for messages
    read: Callable[[Path, Selection], Sequence[Part]]  # raises DataError in one sentence naming what is missing
    extra_sources: Mapping[str, str] = field(default_factory=dict)  # name -> help of the command's option
