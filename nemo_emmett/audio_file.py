"""Recordings as their bytes have them: the rules by which everything here reads audio.

- The header of a file says its sampling rate, its channels and how much it holds; what a manifest says is checked
  against it.
- A part of a recording is the samples from ``start`` for ``duration`` seconds. Where the recording ends before, it may
  lack up to :data:`TRUNCATION_TOLERANCE`, and the part ends with it.
- Samples are numbers, and none is larger than :data:`MAX_MAGNITUDE`.
"""

from __future__ import annotations

import io
import os
import re
import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import soundfile
from lhotse import AudioSource, Recording
from lhotse.audio import backend
from lhotse.audio.utils import AudioLoadingError, DurationMismatchError
from lhotse.cut import Cut, MixedCut

TRUNCATION_TOLERANCE = 0.1
"""Seconds that a file may be shorter than declared: rounded durations and codec padding stay below this."""

MAX_MAGNITUDE = 100.0
"""Largest sample, where 1 is full scale. Float recordings exceed full scale by a few times at most; a hundred times
(40 dB) lies beyond any recording, and below integers that were written as floats (32768 for full scale)."""

_UNKNOWN_RIFF_SIZE = 0x7FFF0000
"""Programs that write WAV to a pipe do not know its size, and put a value from here upwards in its header."""

_FLOAT_SUBTYPES = ("FLOAT", "DOUBLE")

RUNS_A_COMMAND = "runs a command"
"""Why a recording is not read whose name a shell would run."""

_SHELL_CHARACTERS = re.compile(r"[^\w@%+=:,./-]")


class AudioFault(Exception):
    """Why a recording cannot be used; its text is the cause, as it is counted.

    Args:
        cause: ``missing audio``, ``truncated audio``, ...
        path: of the audio file at fault, where it is known.
    """

    def __init__(self, cause: str, path: str | None = None) -> None:
        super().__init__(cause)
        self.path = path


class Header(NamedTuple):
    """What a recording says of itself before any of it is decoded."""

    sampling_rate: int
    num_samples: int
    num_channels: int
    subtype: str = ""  # as libsndfile calls it; empty where another decoder reads it
    missing: float = 0.0  # seconds that a WAV declares beyond what it holds
    is_open: bool = False  # a WAV whose writer did not come back to fill in the size of its data, and left 0

    @property
    def duration(self) -> float:
        """Seconds that are there."""
        return self.num_samples / self.sampling_rate

    @property
    def is_float(self) -> bool:
        """Whether the file can hold values that are not numbers."""
        return self.subtype in _FLOAT_SUBTYPES


def read_header(audio: str | BinaryIO) -> Header:
    """Read the header of a file, or of encoded audio in an open one.

    Raises:
        AudioFault: if it is missing, empty, or no audio.
    """
    return _header_of_file(audio) if isinstance(audio, str) else _header_of(audio)


def _header_of(audio: BinaryIO, path: str | None = None) -> Header:
    """The header in an open file. Given its path, libsndfile reads it by itself, which is quicker."""
    size = audio.seek(0, io.SEEK_END)
    if size == 0:
        raise AudioFault("empty audio")
    try:
        data = _wav_data(audio, size)
        audio.seek(0)
        info = soundfile.info(io.BytesIO(_closed(audio.read(), data)) if data and data.is_open else path or audio)
    except struct.error as error:  # the file ends before its size says
        raise AudioFault("truncated audio") from error
    except soundfile.SoundFileError as error:
        raise AudioFault("truncated audio" if _riff_is_cut_off(audio, size) else "unreadable audio") from error
    if info.frames == 0:
        raise AudioFault("truncated audio" if _riff_is_cut_off(audio, size) else "empty audio")
    header = Header(int(info.samplerate), info.frames, info.channels, info.subtype)
    if data is None:
        return header
    return header._replace(missing=data.missing / data.bytes_per_second, is_open=data.is_open)


def _header_of_file(path: str) -> Header:
    if is_command(path):
        raise AudioFault(RUNS_A_COMMAND, path)
    if "\0" in path or not os.path.isfile(path):
        raise AudioFault("missing audio", path)
    try:
        with open(path, "rb") as file:
            return _header_of(file, path)
    except AudioFault as fault:
        if str(fault) != "unreadable audio":
            raise AudioFault(str(fault), path) from None
    except OSError as error:
        raise AudioFault("unreadable audio", path) from error
    try:  # libsndfile knows no AAC; lhotse asks FFmpeg
        info = backend.info(path)
        return Header(int(info.samplerate), info.frames, info.channels)
    except Exception as error:  # each of its backends raises its own kind
        raise AudioFault("unreadable audio", path) from error


def is_command(path: object) -> bool:
    """Whether a shell reads more than a file's name in a path; lhotse hands the names of SPHERE files to one."""
    is_sphere = isinstance(path, str) and path.lower().endswith(".sph")
    return is_pipe(path) or (is_sphere and _SHELL_CHARACTERS.search(path) is not None)


def is_pipe(path: object) -> bool:
    """Whether a path is the output of a command, as lhotse and NeMo write it."""
    return isinstance(path, str) and path.lstrip().startswith("pipe:")


class _WavData(NamedTuple):
    """The data chunk of a WAV file."""

    size_at: int  # where its size stands, in bytes
    declared: int  # bytes
    held: int  # bytes from its start to the end of the file
    bytes_per_second: int
    is_open: bool

    @property
    def missing(self) -> int:
        """Bytes that it declares beyond what the file holds; none where the writer did not know."""
        return 0 if self.declared >= _UNKNOWN_RIFF_SIZE else max(self.declared - self.held, 0)


def _wav_data(file: BinaryIO, size: int) -> _WavData | None:
    """Find the data chunk of a WAV file; None if it is no WAV file, or has none."""
    file.seek(0)
    start = file.read(12)
    if start[:4] != b"RIFF" or start[8:] != b"WAVE":
        return None
    position, rate = 12, 0
    while position + 8 <= size:
        file.seek(position)
        name, length = struct.unpack("<4sI", file.read(8))
        if name == b"fmt ":
            rate = int.from_bytes(file.read(12)[8:12], "little")
        if name == b"data":
            held = size - position - 8
            is_open = length == 0 and held > 0 and not _are_chunks(file, position + 8, size)
            return _WavData(position + 4, length, held, rate, is_open) if rate else None
        position += 8 + length + length % 2
    return None


def _are_chunks(file: BinaryIO, position: int, size: int) -> bool:
    """Whether what follows an empty data chunk is further chunks, and no audio."""
    while position + 8 <= size:
        file.seek(position)
        name, length = struct.unpack("<4sI", file.read(8))
        if not (name.isascii() and name.decode("ascii").isprintable()):
            return False
        position += 8 + length + length % 2
    return position in (size, size + 1)


def _closed(audio: bytes, data: _WavData) -> bytes:
    """A WAV file with the size of its data filled in."""
    return audio[: data.size_at] + struct.pack("<I", min(data.held, 0xFFFFFFFF)) + audio[data.size_at + 4 :]


def _riff_is_cut_off(file: BinaryIO, size: int) -> bool:
    """Whether a WAV file is shorter than its own first chunk says."""
    file.seek(0)
    start = file.read(8)
    declared = int.from_bytes(start[4:8], "little")
    return start[:4] == b"RIFF" and len(start) == 8 and declared < _UNKNOWN_RIFF_SIZE and declared + 8 > size


def fitted(available: float, start: float, duration: float, missing: float = 0.0) -> float:
    """The duration of a part of a recording: what was asked for, or up to the recording's end.

    Args:
        available: seconds that the recording holds.
        start: of the part, in seconds.
        duration: of the part, in seconds.
        missing: seconds that the recording declares beyond what it holds.

    Raises:
        AudioFault: if the part lacks more than the tolerance.
    """
    lacking = start + duration - available
    tolerance = TRUNCATION_TOLERANCE + 1e-6  # a difference of decimal fractions is not exact
    if lacking > tolerance or start >= available or (lacking > -tolerance and missing > tolerance):
        raise AudioFault("truncated audio")
    return available - start if lacking > 1e-6 else duration


class CheckedSource(AudioSource):
    """A file, or encoded audio in memory, whose samples are checked when they are read.

    Args:
        source: where the audio is; its channels are taken to be those of the header.
        header: of the audio.
    """

    def __init__(self, source: AudioSource, header: Header) -> None:
        encoded = _closed_wav(source.source) if header.is_open else source.source
        kind = "memory" if isinstance(encoded, bytes) else "file"
        super().__init__(type=kind, channels=list(range(header.num_channels)), source=encoded, video=source.video)
        self.header = header._replace(is_open=False)
        self.short = 0.0  # seconds that the decoder gave less than the header promises, when it was last read

    def __reduce__(self) -> tuple:
        return CheckedSource, (AudioSource(self.type, self.channels, self.source, self.video), self.header)

    def load_audio(
        self, offset: float = 0.0, duration: float | None = None, force_opus_sampling_rate: int | None = None
    ) -> np.ndarray:
        """See ``AudioSource.load_audio``.

        Raises:
            AudioLoadingError: which lhotse's and NeMo's tolerant loaders expect, from an :class:`AudioFault`.
        """
        try:
            samples = super().load_audio(offset, duration, self.header.sampling_rate)
            wanted = self.header.duration - offset if duration is None else duration
            self.short = max(wanted - samples.shape[-1] / self.header.sampling_rate, 0.0)
            if self.short > TRUNCATION_TOLERANCE:
                raise AudioFault("truncated audio")
            check_samples(samples)
        except Exception as error:  # each decoder raises its own kind
            path = self.source if self.type == "file" else None
            cause = "truncated audio" if isinstance(error, DurationMismatchError) else "unreadable audio"
            fault = AudioFault(str(error) if isinstance(error, AudioFault) else cause, path)
            raise AudioLoadingError(str(fault)) from fault
        return samples


def _closed_wav(source: str | bytes) -> bytes:
    """A WAV file whose writer left out the size of its data, with that size."""
    audio = source if isinstance(source, bytes) else Path(source).read_bytes()
    data = _wav_data(io.BytesIO(audio), len(audio))
    return _closed(audio, data) if data.is_open else audio


def openable(path: str) -> str | BinaryIO:
    """What libsndfile reads all of a file from: the file, or its bytes where its header says that it holds nothing.

    Raises:
        AudioFault: if it is missing, empty, or no audio.
    """
    return io.BytesIO(_closed_wav(path)) if read_header(path).is_open else path


def check_samples(samples: np.ndarray) -> None:
    """Refuse samples that are not numbers, or far too large.

    Raises:
        AudioFault: its text is the cause.
    """
    peak = np.abs(samples).max(initial=0.0)
    if not np.isfinite(peak):
        raise AudioFault("audio holds values that are not numbers")
    if peak > MAX_MAGNITUDE:
        raise AudioFault("audio far above full scale")


def open_recording(path: str | Path, header: Header | None = None) -> Recording:
    """A file as a recording, as ``Recording.from_file`` describes it.

    Args:
        path: of the file.
        header: of the file; it is read unless it is given.

    Raises:
        AudioFault: its text is the cause.
    """
    path = str(path)
    header = read_header(path) if header is None else header
    source = CheckedSource(AudioSource("file", [], path), header)
    return recording_from(Path(path).stem, source, header)


def recording_from(name: str, source: AudioSource, header: Header) -> Recording:
    """A recording as long as its header says."""
    return Recording(name, [source], header.sampling_rate, header.num_samples, header.duration)


def load_samples(audio: Recording | Cut, cause: str = "unreadable audio", **window: float) -> np.ndarray:
    """The samples of a recording, or of a cut, float32 (C, T).

    Args:
        audio: a recording, or a cut on such.
        cause: of what is raised by anything but the reading of a :class:`CheckedSource`.
        window: of a recording, ``offset`` and ``duration`` in seconds.

    Raises:
        AudioFault: its text is the cause.
    """
    try:
        samples = audio.load_audio(**window)
    except Exception as error:  # each decoder raises its own kind
        raise fault_in(error) or AudioFault(cause) from error
    if samples.shape[-1] == 0:
        raise AudioFault("empty audio")
    check_samples(samples)
    if not isinstance(audio, MixedCut):  # lhotse fills up what a decoder gave too little, with its reflection
        recording = audio if isinstance(audio, Recording) else audio.recording
        lacking = round(max(getattr(source, "short", 0.0) for source in recording.sources) * recording.sampling_rate)
        samples = samples[:, : max(samples.shape[-1] - lacking, 1)]
    return samples.astype(np.float32, copy=False)


def fault_in(error: BaseException | None) -> AudioFault | None:
    """The fault behind an exception, which lhotse raises again with a longer text."""
    while error is not None:
        if isinstance(error, AudioFault):
            return error
        error = error.__cause__ or error.__context__
    return None
