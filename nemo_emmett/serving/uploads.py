"""An uploaded recording, from the bytes of its file to samples in memory, by the rules of ``nemo_emmett.audio_file``.

The header is read first, so that what would be too large once it is decoded is refused before it is decoded. Only
libsndfile's containers are read. No name that a client gives is used.
"""

from __future__ import annotations

import io

from lhotse import AudioSource

from nemo_emmett.audio_file import AudioFault, CheckedSource, fitted, load_samples, read_header, recording_from
from nemo_emmett.errors import DataError
from nemo_emmett.models.inputs import Waveform, unusable

MAX_RATE = 192_000
"""Largest sampling rate; resampling from arbitrary ones takes memory that grows with them."""

_VALUES_PER_SECOND = 96_000
"""Samples in all channels that the longest recording may have per second: two channels of 48 kHz. Silence that is
compressed would otherwise take gigabytes."""

_UNKNOWN_FRAMES = 2**62
"""libsndfile reports its largest number where a header does not say how long the recording is."""

_FORMATS = "WAV, FLAC, Ogg, Opus or MP3"


def decode(audio: bytes, sampling_rate: int, max_seconds: float) -> Waveform:
    """Decode a recording, mix it down to one channel and resample it.

    Args:
        audio: a file in any container that libsndfile reads.
        sampling_rate: samples per second of the result.
        max_seconds: longest recording.

    Raises:
        DataError: if it is empty, breaks off, is no audio or too long, or holds values that are not numbers.
    """
    place = "file: the recording"
    try:
        header = read_header(io.BytesIO(audio))
        if header.num_samples > _UNKNOWN_FRAMES:
            raise DataError(f"{place} does not say how long it is; convert it to a file, not to a stream.")
        if header.duration > max_seconds:
            raise DataError(
                f"{place} lasts {header.duration:.0f} s, more than the {max_seconds:g} s that are allowed; cut it."
            )
        is_large = header.num_samples * header.num_channels > max_seconds * _VALUES_PER_SECOND
        if is_large or header.sampling_rate > MAX_RATE:
            raise DataError(
                f"{place} has {header.num_channels} channels of {header.sampling_rate} samples per second, too many to "
                f"be decoded; convert it to one channel of {sampling_rate}."
            )
        fitted(header.duration, 0.0, header.duration, header.missing)
        source = CheckedSource(AudioSource("memory", [], audio), header)
        recording = recording_from("upload", source, header).resample(sampling_rate)
        return Waveform(load_samples(recording).mean(0), sampling_rate)
    except AudioFault as fault:
        if str(fault) == "unreadable audio":
            raise DataError(f"{place} cannot be read; send a complete file as {_FORMATS}.") from fault
        raise unusable(place, fault) from fault
