"""What a corpus is, whatever its publisher's files look like: who made it, its parts, and their sentences.

A reader knows one publisher's files and turns them into parts; ``preparing`` turns parts into manifests, text and
shards, and knows no publisher.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nemo_emmett.typed_config import is_number


def is_seconds(value: object) -> bool:
    """Whether a publisher's value is a finite number."""
    return is_number(value) and math.isfinite(value)


@dataclass(frozen=True)
class Recording:
    """Where a recording lies."""

    path: Path  # an audio file, or the tar archive that it lies in
    member: str | None = None  # its name in the archive
    start: float = 0.0  # seconds
    duration: float | None = None  # seconds; None: to its end


@dataclass(frozen=True)
class Sentence:
    """One sentence in one or more languages, and its recording in one of them."""

    id: str  # within its part; the publisher's where there is one
    texts: Mapping[str, str]  # ISO 639-1 code -> text; of speech the transcript and the translations
    recording: Recording | None = None


@dataclass(frozen=True)
class Skipped:
    """A row of a publisher's file that makes no sentence; it is counted under its cause."""

    cause: str


@dataclass(frozen=True)
class Part:
    """A stretch of a corpus that is written as one: a split in some languages, text or the speech of one language."""

    split: str  # as the publisher calls it
    languages: tuple[str, ...]  # ISO 639-1; every sentence of a text part has all of them
    sentences: Callable[[], Iterable[Sentence | Skipped]]  # reads the files again at each call, in the same order
    spoken: str | None = None  # the language of the recordings; None: text
    name: str = ""  # of its files; derived from the split and the spoken language unless given

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", f"{self.split}.{self.spoken}" if self.spoken else self.split)


@dataclass(frozen=True)
class Selection:
    """What of a corpus is wanted."""

    languages: tuple[str, ...] | None = None  # ISO 639-1; None: all that are there
    splits: tuple[str, ...] | None = None  # the publisher's names; None: all that are there
    beside: Mapping[str, Path] = field(default_factory=dict)  # further sources by name: {"flores": Path(...)}


@dataclass(frozen=True)
class Corpus:
    """A public corpus that can be prepared."""

    name: str  # of the command
    title: str
    release: str  # the one whose layout is read
    licence: str  # SPDX identifier where there is one
    url: str  # where it is to be had
    files: str  # what of it must be there, for the command's help and for error messages
    read: Callable[[Path, Selection], Sequence[Part]]  # raises DataError in one sentence naming what is missing
    beside: Mapping[str, str] = field(default_factory=dict)  # further sources: name -> help; options of the command
