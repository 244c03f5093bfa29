"""Reading the audio of a cut, and saying what is wrong with it when that fails.

lhotse makes up for a recording that is up to half a second short by reflecting its end, and takes a file's own header
at its word. Here a recording that ends before its cut does is refused: half a sentence is no translation example.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import soundfile
import torch
from lhotse import AudioSource, Recording
from lhotse.augmentation import AudioTransform
from lhotse.cut import Cut, MixedCut, MonoCut, PaddingCut

from nemo_emmett.data import commands

TRUNCATION_TOLERANCE = 0.1
"""Seconds that a file may be shorter than declared: rounded durations and codec padding stay below this."""

_UNKNOWN_RIFF_SIZE = 0x7FFF0000
"""Programs that write WAV to a pipe do not know its size, and put a value from here upwards in its header."""


class AudioFault(Exception):
    """Why a recording cannot be used: ``missing audio``, ``empty audio``, ``truncated audio``, ``unreadable audio``,
    ``runs a command``."""


def load_waveform(cut: Cut) -> torch.Tensor:
    """Read a cut's audio, mixed down to one channel.

    Returns:
        float32 tensor (T_samples,).

    Raises:
        AudioFault: if there is no audio, or not all of it; its text is the cause.
    """
    check_audio(cut)
    try:
        samples = torch.from_numpy(cut.load_audio()).to(torch.float32)
    except Exception as error:  # each decoder raises its own kind
        raise AudioFault("unreadable audio") from error
    if samples.shape[-1] == 0:
        raise AudioFault("empty audio")
    return samples.mean(dim=0)


def check_audio(cut: Cut) -> None:
    """Refuse a cut whose audio files do not reach as far as it does. Only headers are read.

    Raises:
        AudioFault: its text is the cause.
    """
    if commands.is_refused(cut):
        raise AudioFault(commands.CAUSE)
    for part in _parts_with_audio(cut):
        _check_recording(part.recording, part.start, part.duration)


def _parts_with_audio(cut: Cut) -> Iterator[Cut]:
    if isinstance(cut, MixedCut):
        for track in cut.tracks:
            yield from _parts_with_audio(track.cut)
    elif not isinstance(cut, PaddingCut) and cut.has_recording:
        yield cut


def _check_recording(recording: Recording, start: float, duration: float) -> None:
    for transform in reversed(recording.transforms or []):  # a file played 10 % faster must be 10 % longer
        if not isinstance(transform, AudioTransform):
            transform = AudioTransform.from_dict(transform)
        start, duration = transform.reverse_timestamps(start, duration, recording.sampling_rate)
    for source in recording.sources:
        if source.type == "file":
            check_file(str(source.source), start + duration)
        elif source.type == "memory" and not source.source:
            raise AudioFault("empty audio")


def check_file(path: str, end: float | None = None) -> None:
    """Refuse an audio file that is missing, empty, or ends before ``end`` seconds (None: before its own end).

    A header that libsndfile cannot read is left for the other decoders to judge.

    Raises:
        AudioFault: its text is the cause.
    """
    if commands.is_command(path) and not commands.are_allowed():
        raise AudioFault(commands.CAUSE)
    if not os.path.isfile(path):
        raise AudioFault("missing audio")
    if os.path.getsize(path) == 0:
        raise AudioFault("empty audio")
    try:
        header = soundfile.info(path)
    except soundfile.SoundFileError:
        if _riff_is_cut_off(path):
            raise AudioFault("truncated audio") from None
        return
    if header.frames == 0:
        raise AudioFault("truncated audio" if _riff_is_cut_off(path) else "empty audio")
    missing = 0.0 if end is None else end - header.duration
    reads_to_its_end = missing > -TRUNCATION_TOLERANCE
    if missing > TRUNCATION_TOLERANCE or (reads_to_its_end and _riff_is_cut_off(path)):
        raise AudioFault("truncated audio")


def _riff_is_cut_off(path: str) -> bool:
    """Whether a WAV file is shorter than its own first chunk says."""
    with open(path, "rb") as file:
        start = file.read(8)
    if start[:4] != b"RIFF" or len(start) < 8:
        return False
    declared = int.from_bytes(start[4:8], "little")
    return declared < _UNKNOWN_RIFF_SIZE and declared + 8 > os.path.getsize(path)


def audio_path(cut: Cut) -> str | None:
    """The file that a cut's audio is read from; None if it is in memory, behind a URL, or there are several."""
    paths = {
        str(source.source)
        for part in _parts_with_audio(cut)
        for source in part.recording.sources
        if isinstance(source, AudioSource) and source.type == "file"
    }
    return paths.pop() if len(paths) == 1 else None


def audio_start(cut: Cut) -> float | None:
    """Where in its file a cut's audio begins, in seconds; None unless the file holds it as it is."""
    is_as_recorded = isinstance(cut, MonoCut) and not cut.recording.transforms
    return cut.start if is_as_recorded and audio_path(cut) is not None else None
