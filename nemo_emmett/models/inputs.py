"""Inputs of a translation, texts and audio files, parts of long recordings, and batches of them.

Cheap to import, so that a command can check its arguments before it loads a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_emmett.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from nemo_emmett.audio_file import AudioFault, Header

BATCH_TOKENS = 4096
"""Positions of the language model's input in a batch to translate: about ten recordings of half a minute."""

AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac", ".mp4", ".sph", ".webm"})
"""A string with one of these suffixes is the path of a recording."""

_WINDOW_SECONDS = 60
"""Seconds of a long recording that are in memory while places to cut are looked for."""

_SENTENCES = {
    "missing audio": "does not exist",
    "empty audio": "holds no samples; leave it out",
    "truncated audio": "breaks off before its end; get the whole of it",
    "unreadable audio": "cannot be read; is it complete? If it is, convert it to WAV or FLAC",
    "audio holds values that are not numbers": "holds values that are not numbers; convert it again",
    "audio far above full scale": "holds values far above full scale, which is 1; convert it again",
}
"""Messages for files that cannot be translated, by the cause under which training counts skipped records."""


@dataclass(frozen=True)
class Segment:
    """A part of a recording."""

    path: Path
    start: float = 0.0  # seconds
    duration: float | None = None  # seconds; None: to the end of the file


@dataclass(frozen=True, eq=False)
class Waveform:
    """A recording in memory, of one channel."""

    samples: np.ndarray  # (N,) float32
    sampling_rate: int

    @property
    def seconds(self) -> float:
        """Its duration."""
        return len(self.samples) / self.sampling_rate


class PlainText(str):
    """A text, whatever it ends in."""


Input = str | Path | Segment | Waveform
"""What is translated: a text, or a recording by the path of its file, a part of it, or one in memory."""


def is_recording(item: Input) -> bool:
    """Whether an input is a recording and no text."""
    return isinstance(item, Waveform) or is_audio_path(item)


def is_audio_path(item: str | Path | Segment) -> bool:
    """Whether an input is in an audio file: a ``Path``, a :class:`Segment`, or a string with an audio file's suffix."""
    if isinstance(item, PlainText):
        return False
    return not isinstance(item, str) or Path(item).suffix.lower() in AUDIO_SUFFIXES


def check_inputs(inputs: Sequence[Input]) -> None:
    """Check that inputs are texts, paths, segments or waveforms, and that files exist.

    Raises:
        DataError: naming the first one.
    """
    if isinstance(inputs, (str, Path)):
        raise DataError(f"inputs: '{inputs}' is one input, not a list of them; write ['{inputs}'].")
    for item in inputs:
        if not isinstance(item, (str, Path, Segment, Waveform)):
            raise DataError(f"inputs: {item!r} is neither a text nor the path of an audio file; leave it out.")
        if not isinstance(item, Waveform) and is_audio_path(item) and not _path_of(item).is_file():
            raise DataError(f"audio file '{_path_of(item)}' does not exist.")


def fill_batches(sizes: Mapping[int, float], batch_tokens: float, batch_size: int | None = None) -> Iterator[list[int]]:
    """Put items of similar size together, the smallest first.

    Args:
        sizes: item -> tokens.
        batch_tokens: most tokens of a batch, counted as it is padded: items times the longest of them. An item that is
            longer than that makes a batch of its own.
        batch_size: most items of a batch; None: as many as the tokens allow.

    Yields:
        The items of each batch, at least one.

    Example:
        >>> list(fill_batches({0: 9, 1: 2, 2: 3}, batch_tokens=6))
        [[1, 2], [0]]
    """
    batch: list[int] = []
    for item in sorted(sizes, key=sizes.__getitem__):
        if batch and ((len(batch) + 1) * sizes[item] > batch_tokens or len(batch) == batch_size):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def recording_seconds(item: Input) -> float:
    """How long a recording, or a segment of one, is.

    Raises:
        DataError: if the file is missing, breaks off, or cannot be read.
    """
    from nemo_emmett.audio_file import AudioFault, read_header

    if isinstance(item, Waveform):
        return item.seconds
    try:
        return _window(item, read_header(str(_path_of(item))))[1]
    except AudioFault as fault:
        raise _unusable(item, fault) from fault


def split_recording(item: Input, chunk_seconds: float) -> list[Input]:
    """The parts of a recording that is too long to be translated at once, cut at its quietest places.

    It is read in windows of a minute: it is never in memory as a whole.

    Args:
        item: an audio file, a segment of one, or a waveform.
        chunk_seconds: longest part.

    Returns:
        Segments of the file, or waveforms, each of which starts where the one before ends; the item itself if it is
        short enough.

    Raises:
        DataError: if the file is missing, breaks off, cannot be read, or, of a long one, holds values that are not
            numbers.
    """
    from nemo_emmett.audio_chunks import cut_into_chunks, cut_windows
    from nemo_emmett.audio_file import AudioFault, load_samples, open_recording, read_header

    if isinstance(item, Waveform):
        chunks = cut_into_chunks(item.samples, item.sampling_rate, chunk_seconds)
        return [replace(item, samples=item.samples[begin:end]) for begin, end in chunks] or [item]
    path = _path_of(item)
    try:
        header = read_header(str(path))
        start, seconds = _window(item, header)
        if seconds <= chunk_seconds + 1e-6:  # differences of decimal fractions are not exact
            return [item]
        recording, rate = open_recording(path, header), header.sampling_rate
        first, last = round(start * rate), round((start + seconds) * rate)
        bounds = [*range(first, last, _WINDOW_SECONDS * rate), last]
        windows = (
            load_samples(recording, offset=begin / rate, duration=(end - begin) / rate).mean(0)
            for begin, end in pairwise(bounds)
        )
        chunks = cut_windows(windows, rate, chunk_seconds)
    except AudioFault as fault:
        raise _unusable(item, fault) from fault
    return [Segment(path, (first + begin) / rate, (end - begin) / rate) for begin, end in chunks]


def load_recordings(items: Sequence[Input], sampling_rate: int) -> tuple[Tensor, Tensor]:
    """Read recordings, mixed down to one channel and resampled.

    Args:
        items: audio files, segments of them, and waveforms.
        sampling_rate: samples per second of the result.

    Returns:
        (R, N) float32, zero-padded on the right, and (R,) int64 samples per recording.

    Raises:
        DataError: if a file is missing, breaks off, cannot be read, or holds values that are not numbers, or if a
            waveform has another sampling rate.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    signals = [_load_recording(item, sampling_rate) for item in items]
    lens = torch.tensor([len(signal) for signal in signals])
    return pad_sequence(signals, batch_first=True), lens


def _load_recording(item: Input, sampling_rate: int) -> Tensor:
    import torch

    from nemo_emmett.audio_file import AudioFault, load_samples, open_recording, read_header

    if isinstance(item, Waveform):
        if item.sampling_rate != sampling_rate:
            raise DataError(
                f"inputs: a waveform has {item.sampling_rate} samples per second, but the model reads {sampling_rate}; "
                "resample it."
            )
        return torch.from_numpy(item.samples)
    path = _path_of(item)
    try:
        header = read_header(str(path))
        start, seconds = _window(item, header)
        window = {"offset": start, "duration": seconds} if isinstance(item, Segment) else {}
        recording = open_recording(path, header).resample(sampling_rate)
        return torch.from_numpy(load_samples(recording, **window)).mean(0)
    except AudioFault as fault:
        raise _unusable(item, fault) from fault


def _path_of(item: str | Path | Segment) -> Path:
    return item.path if isinstance(item, Segment) else Path(item)


def _window(item: str | Path | Segment, header: Header) -> tuple[float, float]:
    """Start and duration of a recording or segment, unless it breaks off."""
    from nemo_emmett.audio_file import fitted

    start = item.start if isinstance(item, Segment) else 0.0
    duration = item.duration if isinstance(item, Segment) else None
    return start, fitted(
        header.duration, start, header.duration - start if duration is None else duration, header.missing
    )


def _unusable(item: str | Path | Segment, fault: AudioFault) -> DataError:
    place = f"audio file '{_path_of(item)}'"
    if isinstance(item, Segment) and item.duration is not None and str(fault) == "truncated audio":
        return DataError(f"{place} ends before {item.start + item.duration:g} s, where the segment ends; correct it.")
    return unusable(place, fault)


def unusable(place: str, fault: AudioFault) -> DataError:
    """The error of a recording that cannot be used.

    Args:
        place: the recording, for the message.
        fault: why not.
    """
    return DataError(f"{place} {_SENTENCES.get(str(fault), f'cannot be used ({fault})')}.")
