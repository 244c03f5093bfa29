"""What a user asks to translate: texts, and audio files as a padded batch.

Cheap to import, so that a command can look at its arguments before it loads a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_emmett.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac", ".mp4", ".sph", ".webm"})
"""Endings by which a string is taken for the path of a recording."""


def is_audio_path(item: str | Path) -> bool:
    """Whether an input is a recording: a ``Path``, or a string that ends like an audio file's name."""
    return isinstance(item, Path) or Path(item).suffix.lower() in AUDIO_SUFFIXES


def check_inputs(inputs: Sequence[str | Path]) -> None:
    """Look for recordings that are not there.

    Raises:
        DataError: naming the first one.
    """
    for item in inputs:
        if is_audio_path(item) and not Path(item).is_file():
            raise DataError(f"audio file '{item}' does not exist.")


def load_recordings(paths: Sequence[str | Path], sampling_rate: int) -> tuple[Tensor, Tensor]:
    """Read recordings, mixed down to one channel and resampled.

    Args:
        paths: audio files.
        sampling_rate: samples per second of the result.

    Returns:
        (R, N) float32, zero-padded on the right, and (R,) int64 samples per recording.

    Raises:
        DataError: if a file is missing or cannot be read.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    check_inputs([Path(path) for path in paths])
    signals = [_load_recording(Path(path), sampling_rate) for path in paths]
    lens = torch.tensor([len(signal) for signal in signals])
    return pad_sequence(signals, batch_first=True), lens


def _load_recording(path: Path, sampling_rate: int) -> Tensor:
    import torch
    from lhotse import Recording

    try:
        recording = Recording.from_file(path)
        samples = recording.resample(sampling_rate).load_audio()
    except Exception as error:
        raise DataError(f"audio file '{path}' cannot be read ({type(error).__name__}); is it complete?") from error
    return torch.from_numpy(samples).mean(0)
