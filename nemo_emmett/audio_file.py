"""The rules by which audio is read, the same for data, evaluation and corpora.

- A file's header determines its sampling rate, channels and length; the manifest is checked against it.
- A part of a recording is the samples from ``start`` for ``duration`` seconds. If the recording ends before the part by
  at most :data:`TRUNCATION_TOLERANCE`, the part is shortened.
- Samples are finite, and none is larger than :data:`MAX_MAGNITUDE`.
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
"""Seconds that a file may be shorter than declared: rounded durations and codec padding are below this."""

MAX_MAGNITUDE = 100.0
"""Largest sample, where 1 is full scale. Float recordings exceed full scale by a small factor at most; a factor of 100
(40 dB) is above any recording, and below integers that were written as floats (32768 for full scale)."""

_UNKNOWN_RIFF_SIZE = 0x7FFF0000
"""Programs that write WAV to a pipe do not know its size, and write this value or a larger one to the header."""

RUNS_A_COMMAND = "runs a command"
"""Cause of a recording that is not read since a shell would run its name."""

FAULTS_OF_FILES = ("missing audio", "empty audio", "truncated audio", "unreadable audio")
"""Causes of :func:`read_header`, which a file that is written again may not have."""

_SHELL_CHARACTERS = re.compile(r"[^\w@%+=:,./-]")


class AudioFault(Exception):
    """A recording cannot be used; the text is the cause by which it is counted.

    Args:
        cause: ``missing audio``, ``truncated audio``, ...
        path: of the audio file, if known.
    """

    def __init__(self, cause: str, path: str | None = None) -> None:
        super().__init__(cause)
        self.path = path


class Header(NamedTuple):
    """The header of a recording."""

    sampling_rate: int
    num_samples: int
    num_channels: int
    subtype: str = ""  # libsndfile's name of the sample format; empty if another decoder reads the file
    missing: float = 0.0  # seconds that a WAV declares but does not contain
    is_open: bool = False  # a WAV whose writer did not fill in the size of its data, and left 0

    @property
    def duration(self) -> float:
        """Seconds that the file contains."""
        return self.num_samples / self.sampling_rate

    @property
    def is_float(self) -> bool:
        """Whether the file can contain NaN and infinity."""
        return self.subtype in ("FLOAT", "DOUBLE")


def read_header(audio: str | BinaryIO) -> Header:
    """Read the header of a file by its path, or of encoded audio in an open file.

    Raises:
        AudioFault: if it is missing, empty, or not audio.
    """
    if not isinstance(audio, str):
        return _header_of(audio)
    if is_command(audio):
        raise AudioFault(RUNS_A_COMMAND, audio)
    if "\0" in audio or not os.path.isfile(audio):
        raise AudioFault("missing audio", audio)
    try:
        with open(audio, "rb") as file:
            return _header_of(file, audio)
    except AudioFault as fault:
        if str(fault) != "unreadable audio":
            raise AudioFault(str(fault), audio) from None
    except OSError as error:
        raise AudioFault("unreadable audio", audio) from error
    try:  # libsndfile does not support AAC; lhotse uses FFmpeg
        info = backend.info(audio)
        return Header(int(info.samplerate), info.frames, info.channels)
    except Exception as error:  # its backends raise different kinds
        raise AudioFault("unreadable audio", audio) from error


def _header_of(audio: BinaryIO, path: str | None = None) -> Header:
    """The header of an open file. With its path libsndfile opens it itself, which is faster."""
    size = audio.seek(0, io.SEEK_END)
    if size == 0:
        raise AudioFault("empty audio")
    try:
        data = _wav_data(audio, size)
        audio.seek(0)
        info = soundfile.info(io.BytesIO(_closed(audio.read(), data)) if data and data.is_open else path or audio)
    except struct.error as error:  # the file ends before its reported size
        raise AudioFault("truncated audio") from error
    except soundfile.SoundFileError as error:
        raise AudioFault("truncated audio" if _riff_is_cut_off(audio, size) else "unreadable audio") from error
    if info.frames == 0:
        raise AudioFault("truncated audio" if _riff_is_cut_off(audio, size) else "empty audio")
    header = Header(int(info.samplerate), info.frames, info.channels, info.subtype)
    if data is None:
        return header
    return header._replace(missing=data.missing / data.bytes_per_second, is_open=data.is_open)


def is_command(path: object) -> bool:
    """Whether a shell would run something in a path; lhotse passes the names of SPHERE files to a shell."""
    is_sphere = isinstance(path, str) and path.lower().endswith(".sph")
    return is_pipe(path) or (is_sphere and _SHELL_CHARACTERS.search(path) is not None)


def is_pipe(path: object) -> bool:
    """Whether a path is the output of a command, in the notation of lhotse and NeMo."""
    return isinstance(path, str) and path.lstrip().startswith("pipe:")


class _WavData(NamedTuple):
    """The data chunk of a WAV file."""

    size_at: int  # offset of its size field, in bytes
    declared: int  # bytes
    available: int  # bytes from its start to the end of the file
    bytes_per_second: int
    is_open: bool

    @property
    def missing(self) -> int:
        """Bytes that it declares but the file does not contain; 0 if the writer did not know the size."""
        return 0 if self.declared >= _UNKNOWN_RIFF_SIZE else max(self.declared - self.available, 0)


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
            available = size - position - 8
            is_open = length == 0 and available > 0 and not _are_chunks(file, position + 8, size)
            return _WavData(position + 4, length, available, rate, is_open) if rate else None
        position += 8 + length + length % 2
    return None


def _are_chunks(file: BinaryIO, position: int, size: int) -> bool:
    """Whether an empty data chunk is followed by further chunks, not by audio."""
    while position + 8 <= size:
        file.seek(position)
        name, length = struct.unpack("<4sI", file.read(8))
        if not (name.isascii() and name.decode("ascii").isprintable()):
            return False
        position += 8 + length + length % 2
    return position in (size, size + 1)


def _closed(audio: bytes, data: _WavData) -> bytes:
    """A WAV file with the size of its data written to its header."""
    return audio[: data.size_at] + struct.pack("<I", min(data.available, 0xFFFFFFFF)) + audio[data.size_at + 4 :]


def _riff_is_cut_off(file: BinaryIO, size: int) -> bool:
    """Whether a WAV file is shorter than its RIFF chunk declares."""
    file.seek(0)
    start = file.read(8)
    declared = int.from_bytes(start[4:8], "little")
    return start[:4] == b"RIFF" and len(start) == 8 and declared < _UNKNOWN_RIFF_SIZE and declared + 8 > size


def fitted(available: float, start: float, duration: float, missing: float = 0.0) -> float:
    """The duration of a part of a recording, shortened to the recording's end if necessary.

    Args:
        available: seconds of the recording.
        start: of the part, in seconds.
        duration: of the part, in seconds.
        missing: seconds that the recording declares but does not contain.

    Raises:
        AudioFault: if more than the tolerance is missing from the part.
    """
    lacking = start + duration - available
    tolerance = TRUNCATION_TOLERANCE + 1e-6  # differences of decimal fractions are not exact
    if lacking > tolerance or start >= available or (lacking > -tolerance and missing > tolerance):
        raise AudioFault("truncated audio")
    return available - start if lacking > 1e-6 else duration


class CheckedSource(AudioSource):
    """A file, or encoded audio in memory, whose samples are checked when they are read.

    Args:
        source: of the audio; its channels are replaced by those of the header.
        header: of the audio.
    """

    def __init__(self, source: AudioSource, header: Header) -> None:
        encoded = _closed_wav(source.source) if header.is_open else source.source
        kind = "memory" if isinstance(encoded, bytes) else "file"
        super().__init__(type=kind, channels=list(range(header.num_channels)), source=encoded, video=source.video)
        self.header = header._replace(is_open=False)
        self.short = 0.0  # seconds by which the decoded audio was shorter than the header, when it was last read

    def __reduce__(self) -> tuple:
        return CheckedSource, (AudioSource(self.type, self.channels, self.source, self.video), self.header)

    def load_audio(
        self, offset: float = 0.0, duration: float | None = None, force_opus_sampling_rate: int | None = None
    ) -> np.ndarray:
        """See ``AudioSource.load_audio``.

        Raises:
            AudioLoadingError: expected by lhotse's and NeMo's tolerant loaders; its cause is an :class:`AudioFault`.
        """
        try:
            samples = super().load_audio(offset, duration, self.header.sampling_rate)
            wanted = self.header.duration - offset if duration is None else duration
            self.short = max(wanted - samples.shape[-1] / self.header.sampling_rate, 0.0)
            if self.short > TRUNCATION_TOLERANCE:
                raise AudioFault("truncated audio")
            check_samples(samples)
        except Exception as error:  # decoders raise different kinds
            path = self.source if self.type == "file" else None
            cause = "truncated audio" if isinstance(error, DurationMismatchError) else "unreadable audio"
            fault = AudioFault(str(error) if isinstance(error, AudioFault) else cause, path)
            raise AudioLoadingError(str(fault)) from fault
        return samples


def _closed_wav(source: str | bytes) -> bytes:
    """A WAV file, with the size of its data filled in if its writer left it out."""
    audio = source if isinstance(source, bytes) else Path(source).read_bytes()
    data = _wav_data(io.BytesIO(audio), len(audio))
    return _closed(audio, data) if data.is_open else audio


def openable(path: str) -> str | BinaryIO:
    """A source from which libsndfile reads all of a file: its path, or its bytes if the header declares no data.

    Raises:
        AudioFault: if it is missing, empty, or not audio.
    """
    return io.BytesIO(_closed_wav(path)) if read_header(path).is_open else path


def check_samples(samples: np.ndarray) -> None:
    """Raise if samples are not finite, or far too large.

    Raises:
        AudioFault: its text is the cause.
    """
    peak = np.abs(samples).max(initial=0.0)
    if not np.isfinite(peak):
        raise AudioFault("audio holds values that are not numbers")
    if peak > MAX_MAGNITUDE:
        raise AudioFault("audio far above full scale")


def open_recording(path: str | Path, header: Header | None = None) -> Recording:
    """A recording of a file, like ``Recording.from_file``, whose samples are checked.

    Args:
        path: of the file.
        header: of the file; None: it is read.

    Raises:
        AudioFault: its text is the cause.
    """
    path = str(path)
    header = read_header(path) if header is None else header
    source = CheckedSource(AudioSource("file", [], path), header)
    return recording_from(Path(path).stem, source, header)


def recording_from(name: str, source: AudioSource, header: Header) -> Recording:
    """A recording with the length of its header."""
    return Recording(name, [source], header.sampling_rate, header.num_samples, header.duration)


def load_samples(audio: Recording | Cut, cause: str = "unreadable audio", **window: float) -> np.ndarray:
    """The samples of a recording, or of a cut, float32 (C, T).

    Args:
        audio: a recording, or a cut of one.
        cause: of errors other than those of a :class:`CheckedSource`.
        window: of a recording, ``offset`` and ``duration`` in seconds.

    Raises:
        AudioFault: its text is the cause.
    """
    try:
        samples = audio.load_audio(**window)
    except Exception as error:  # decoders raise different kinds
        raise fault_in(error) or AudioFault(cause) from error
    if samples.shape[-1] == 0:
        raise AudioFault("empty audio")
    check_samples(samples)
    if not isinstance(audio, MixedCut):  # cut off what lhotse reflects if a decoder returns too little
        recording = audio if isinstance(audio, Recording) else audio.recording
        lacking = round(max(getattr(source, "short", 0.0) for source in recording.sources) * recording.sampling_rate)
        samples = samples[:, : max(samples.shape[-1] - lacking, 1)]
    return samples.astype(np.float32, copy=False)


def fault_in(error: BaseException | None) -> AudioFault | None:
    """The AudioFault among the causes of an exception; lhotse raises exceptions again with a longer text."""
    while error is not None:
        if isinstance(error, AudioFault):
            return error
        error = error.__cause__ or error.__context__
    return None
