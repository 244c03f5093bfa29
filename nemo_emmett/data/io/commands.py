"""Commands in data: lhotse runs recordings of the type ``command`` and opens ``pipe:`` paths in a shell.

A downloaded manifest could run anything. So commands need ``allow_commands: true`` in the dataset's section of the
recipe; otherwise such records are skipped and counted, and such paths of sources raise an error.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import lhotse.audio.backend
import lhotse.audio.source
from lhotse import AudioSource, Recording
from lhotse.array import Array, TemporalArray
from lhotse.cut import Cut, MixedCut
from lhotse.features import Features
from lhotse.image import Image
from lhotse.serialization import CompositeIOBackend, PipeIOBackend, get_current_io_backend, set_current_io_backend

from nemo_emmett.audio_file import is_command, is_pipe
from nemo_emmett.config import item_of
from nemo_emmett.errors import ConfigError, DataError

_UNPICKLED = ("memory_raw", "pillow_memory", "kaldiio")
"""lhotse's storage types whose arrays are unpickled, or whose path may be a command."""

_allowed: ContextVar[bool] = ContextVar("nemo_emmett_commands_allowed", default=False)
_refusing: ContextVar[bool] = ContextVar("nemo_emmett_refuses_commands", default=False)


@contextmanager
def commands_allowed(allowed: bool) -> Iterator[None]:
    """Sets whether data that is read inside this context may run commands."""
    token = _allowed.set(allowed)
    try:
        yield
    finally:
        _allowed.reset(token)


def are_allowed() -> bool:
    """Whether the data that is being read may run commands."""
    return _allowed.get()


def is_refused(cut: Cut) -> bool:
    """Whether loading a cut would run a command that the recipe does not allow."""
    if _allowed.get():
        return False
    try:
        return any(map(_runs_a_command, _stored(cut)))
    except RecursionError:  # deeply nested custom fields
        return True


def _stored(thing: Any) -> Iterator[Any]:
    """All parts of a cut that are loaded: recordings, impulse responses, features, arrays in custom fields."""
    if thing is None or isinstance(thing, (str, int, float)):
        return
    if isinstance(thing, MixedCut):
        for track in thing.tracks:
            yield from _stored(track.cut)
        yield from _stored([thing.transforms, getattr(thing, "snr_reference", None)])
    elif isinstance(thing, Cut):
        for part in (thing.supervisions, *(getattr(thing, key, None) for key in ("recording", "features", "custom"))):
            yield from _stored(part)
    elif isinstance(thing, Recording):
        yield from thing.sources
        yield from _stored(thing.transforms)
    elif isinstance(thing, Mapping):  # custom fields, or a transform as a dict with a recording
        if {"type", "channels", "source"} <= thing.keys():
            yield AudioSource(thing["type"], thing["channels"], thing["source"])
        yield from _stored(list(thing.values()))
    elif isinstance(thing, Sequence) and not isinstance(thing, bytes):
        for value in thing:
            yield from _stored(value)
    elif isinstance(thing, (Array, TemporalArray, Features, Image)):
        yield thing
    elif hasattr(thing, "custom") or hasattr(thing, "rir"):  # a supervision, or lhotse's reverberation
        yield from _stored([getattr(thing, key, None) for key in ("custom", "rir")])


def _runs_a_command(stored: AudioSource | Array | TemporalArray | Features | Image) -> bool:
    if not isinstance(stored, AudioSource):
        array = stored.array if isinstance(stored, TemporalArray) else stored
        # In-memory arrays are None, since lhotse saves a cut without their data.
        return array is not None and (array.storage_type in _UNPICKLED or is_pipe(array.storage_path))
    return stored.type == "command" or (stored.type != "memory" and is_command(stored.source))


def refuse_pipes(value: Any, place: str) -> None:
    """Raise ConfigError if files of a source are the output of commands.

    Args:
        value: of a source or of one of its keys.
        place: of the value in the recipe.
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key != "tags":
                refuse_pipes(item, f"{place}.{key}")
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            refuse_pipes(item, item_of(place, number))
    elif is_pipe(value):
        raise ConfigError(
            f"{place}: '{value}' would run a command; if you want that, set allow_commands: true in the dataset's "
            "section of the recipe."
        )


class WithoutCommands:
    """Iterates over NeMo's readers, with lhotse's commands disabled while they read.

    Args:
        examples: cuts, texts, conversations.
    """

    def __init__(self, examples: Iterable) -> None:
        self.examples = examples

    def __iter__(self) -> Iterator:
        with without_commands():
            iterator = iter(self.examples)
        while True:
            with without_commands():
                try:
                    example = next(iterator)
                except StopIteration:
                    return
            yield example


@contextmanager
def without_commands() -> Iterator[None]:
    """Disables lhotse's pipes and commands inside this context.

    The wrapped functions of lhotse stay installed, and do what they did before outside of the context.
    """
    for module in (lhotse.audio.source, lhotse.audio.backend):
        module.run = _run
    if not isinstance(backend := get_current_io_backend(), _WithoutPipes):
        set_current_io_backend(_WithoutPipes([_RefusedPipe(), backend]))
    token = _refusing.set(True)
    try:
        yield
    finally:
        _refusing.reset(token)


class _WithoutPipes(CompositeIOBackend):
    """lhotse's I/O backend, with :class:`_RefusedPipe` in front."""


class _RefusedPipe(PipeIOBackend):
    def handles_special_case(self, identifier: Any) -> bool:
        return _refusing.get() and super().handles_special_case(identifier)

    def open(self, identifier: Any, mode: str) -> None:
        raise _refused(identifier)


def _run(command: Any, *args: Any, **kwargs: Any) -> Any:
    """What lhotse calls instead of ``subprocess.run``."""
    if _refusing.get():
        raise _refused(command)
    return subprocess.run(command, *args, **kwargs)


def _refused(command: Any) -> DataError:
    return DataError(
        f"'{command}' in the data would run a command; if you want that, set allow_commands: true in the dataset's "
        "section of the recipe."
    )
