"""Inputs of a translation, texts and audio files, and batches of them.

Cheap to import, so that a command can check its arguments before it loads a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_emmett.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_emmett.audio_file import AudioFault, Header

AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac", ".mp4", ".sph", ".webm"})
"""A string with one of these suffixes is the path of a recording."""

_SENTENCES = {
    "missing audio": "does not exist",
    "empty audio": "holds no samples; leave it out",
    "truncated audio": "breaks off before its end; get the whole of it",
    "unreadable audio": "cannot be read; is it complete?",
    "audio holds values that are not numbers": "holds values that are not numbers; convert it again",
    "audio far above full scale": "holds values far above full scale, which is 1; convert it again",
}
"""Messages for files that cannot be translated, by the cause under which training counts skipped records."""


def is_audio_path(item: str | Path) -> bool:
    """Whether an input is a recording: a ``Path``, or a string with an audio file's suffix."""
    return isinstance(item, Path) or Path(item).suffix.lower() in AUDIO_SUFFIXES


def check_inputs(inputs: Sequence[str | Path]) -> None:
    """Check that inputs are texts or paths, and that recordings exist.

    Raises:
        DataError: naming the first one.
    """
    if isinstance(inputs, (str, Path)):
        raise DataError(f"inputs: '{inputs}' is one input, not a list of them; write ['{inputs}'].")
    for item in inputs:
        if not isinstance(item, (str, Path)):
            raise DataError(f"inputs: {item!r} is neither a text nor the path of an audio file; leave it out.")
        if is_audio_path(item) and not Path(item).is_file():
            raise DataError(f"audio file '{item}' does not exist.")


def fill_batches(sizes: Mapping[int, float], batch_tokens: float) -> Iterator[list[int]]:
    """Put items of similar size together, the smallest first.

    Args:
        sizes: item -> tokens.
        batch_tokens: most tokens of a batch, counted as it is padded: items times the longest of them. An item that is
            longer than that makes a batch of its own.

    Yields:
        The items of each batch, at least one.

    Example:
        >>> list(fill_batches({0: 9, 1: 2, 2: 3}, batch_tokens=6))
        [[1, 2], [0]]
    """
    batch: list[int] = []
    for item in sorted(sizes, key=sizes.__getitem__):
        if batch and (len(batch) + 1) * sizes[item] > batch_tokens:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def recording_seconds(path: str | Path) -> float:
    """How long a recording is.

    Raises:
        DataError: if the file is missing, breaks off, or cannot be read.
    """
    from nemo_emmett.audio_file import AudioFault, read_header

    try:
        return _whole(read_header(str(path))).duration
    except AudioFault as fault:
        raise _unusable(path, fault) from fault


def load_recordings(paths: Sequence[str | Path], sampling_rate: int) -> tuple[Tensor, Tensor]:
    """Read recordings, mixed down to one channel and resampled.

    Args:
        paths: audio files.
        sampling_rate: samples per second of the result.

    Returns:
        (R, N) float32, zero-padded on the right, and (R,) int64 samples per recording.

    Raises:
        DataError: if a file is missing, breaks off, cannot be read, or holds values that are not numbers.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    signals = [_load_recording(path, sampling_rate) for path in paths]
    lens = torch.tensor([len(signal) for signal in signals])
    return pad_sequence(signals, batch_first=True), lens


def _load_recording(path: str | Path, sampling_rate: int) -> Tensor:
    import torch

    from nemo_emmett.audio_file import AudioFault, load_samples, open_recording, read_header

    try:
        recording = open_recording(path, _whole(read_header(str(path))))
        return torch.from_numpy(load_samples(recording.resample(sampling_rate))).mean(0)
    except AudioFault as fault:
        raise _unusable(path, fault) from fault


def _whole(header: Header) -> Header:
    """A header, unless its recording breaks off."""
    from nemo_emmett.audio_file import fitted

    fitted(header.duration, 0.0, header.duration, header.missing)
    return header


def _unusable(path: str | Path, fault: AudioFault) -> DataError:
    return DataError(f"audio file '{path}' {_SENTENCES.get(str(fault), f'cannot be used ({fault})')}.")
