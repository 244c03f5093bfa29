"""Recordings embedded in the page, as many as leave it quick to open."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import soundfile

from nemo_emmett.audio_file import AudioFault, openable, read_header
from nemo_emmett.errors import DataError
from nemo_emmett.evaluation.results import Translation

MAX_RECORDING_SECONDS = 30.0
"""Longer recordings are not embedded: every browser that opens the page has to load them all."""
PAGE_BYTES = 10_000_000
"""Of all recordings of a page, base64 included: about six minutes of speech at 16 kHz."""
SEGMENT_SECONDS = 0.5
"""A file that is this much longer than the translated recording holds other speech too."""


@dataclass(frozen=True)
class Recording:
    """The data of a player, or the reason why there is none."""

    uri: str | None  # a data: URI
    missing: str = ""  # why there is no player, to follow "Recording left out: "


class Recordings:
    """Embeds recordings in one page until its budget of bytes is used up."""

    def __init__(self, budget: int = PAGE_BYTES) -> None:
        self.budget = self._left = budget
        self.left_out = 0  # recordings that exceeded the budget

    def recording(self, translation: Translation) -> Recording | None:
        """The recording behind a translation; None for text.

        Raises:
            DataError: if its file cannot be read.
        """
        if translation.modality != "audio":
            return None
        if missing := _not_playable(translation):
            return Recording(None, missing)
        uri = _flac_uri(translation)
        if len(uri) > self._left:
            self.left_out += 1
            return Recording(None, f"the page holds {self.budget / 1e6:.0f} MB of recordings already")
        self._left -= len(uri)
        return Recording(uri)


def is_playable(translation: Translation) -> bool:
    """Whether the recording can be embedded: its file exists, and it is short."""
    return not _not_playable(translation)


def _not_playable(translation: Translation) -> str:
    """Why a recording cannot be played; empty if it can."""
    if translation.audio_path is None:
        return "there is no file of it alone"
    if (translation.duration or 0.0) > MAX_RECORDING_SECONDS:
        return f"longer than {MAX_RECORDING_SECONDS:.0f} s"
    if not Path(translation.audio_path).is_file():
        return f"{translation.audio_path} is not there"
    if translation.duration is None or translation.audio_start is not None:
        return ""
    try:
        seconds = read_header(translation.audio_path).duration
    except AudioFault as fault:
        raise _unreadable(translation.audio_path, fault) from fault
    return "somewhere in a longer file" if seconds > translation.duration + SEGMENT_SECONDS else ""


def _flac_uri(translation: Translation) -> str:
    """A recording as a ``data:`` URI in FLAC, which all browsers play and which halves a WAV file without loss."""
    try:
        with soundfile.SoundFile(openable(translation.audio_path)) as file:
            frames = -1  # all
            if translation.audio_start is not None and translation.duration is not None:
                file.seek(round(translation.audio_start * file.samplerate))
                frames = round(translation.duration * file.samplerate)
            samples = file.read(frames, dtype="int16")
    except (OSError, RuntimeError, AudioFault) as error:
        raise _unreadable(translation.audio_path, error) from error
    flac = io.BytesIO()
    soundfile.write(flac, samples, file.samplerate, format="FLAC", subtype="PCM_16")
    return "data:audio/flac;base64," + base64.b64encode(flac.getvalue()).decode("ascii")


def _unreadable(path: str, error: Exception) -> DataError:
    return DataError(f"The recording {path} of the test set cannot be read for the report: {error}.")
