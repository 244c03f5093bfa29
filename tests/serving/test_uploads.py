"""Uploaded recordings: what is read is what a file of the same bytes gives, and what is refused is refused early."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import numpy as np
import pytest

from nemo_emmett.errors import DataError
from nemo_emmett.models.inputs import load_recordings
from nemo_emmett.serving.uploads import decode

from .serving import RATE, encoded, tone

KINDS = {
    "wav": ("WAV", "PCM_16"),
    "float.wav": ("WAV", "FLOAT"),
    "flac": ("FLAC", "PCM_24"),
    "ogg": ("OGG", "VORBIS"),
    "opus.ogg": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "aiff": ("AIFF", "PCM_16"),
    "au": ("AU", "ULAW"),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("rate", "channels"), [(16000, 1), (48000, 2), (8000, 1), (44100, 2)])
def test_an_upload_is_read_as_its_file(tmp_path: Path, name: str, rate: int, channels: int) -> None:
    if name == "opus.ogg" and rate == 44100:
        rate = 24000  # Opus has rates of its own
    kind, subtype = KINDS[name]
    audio = encoded(tone(0.7, rate=rate, channels=channels), rate, kind, subtype)
    path = tmp_path / f"a.{name}"
    path.write_bytes(audio)
    waveform = decode(audio, RATE, 10.0)
    (expected,), (length,) = load_recordings([path], RATE)
    assert waveform.samples.dtype == np.float32
    np.testing.assert_array_equal(waveform.samples, expected[:length].numpy())
    assert waveform.seconds == pytest.approx(0.7, abs=0.15)


def wav(declared: int, samples: bytes, channels: int = 1, rate: int = RATE, bits: int = 16) -> bytes:
    """A WAV file by hand, with any size of its data declared."""
    block = channels * bits // 8
    form = struct.pack("<HHIIHH", 1, channels, rate, rate * block, block, bits)
    chunks = b"fmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", declared) + samples
    return b"RIFF" + struct.pack("<I", 4 + 8 + len(form) + 8 + declared) + b"WAVE" + chunks


def flac_of(samples: int) -> bytes:
    """A FLAC file of a second, whose header declares so many samples."""
    audio = bytearray(encoded(tone(1.0), kind="FLAC"))
    packed = int.from_bytes(audio[18:26], "big") >> 36 << 36 | samples
    audio[18:26] = packed.to_bytes(8, "big")
    return bytes(audio)


def test_a_hand_made_file_is_a_wav() -> None:
    samples = (tone(0.5)[:, 0] * 32767).astype("<i2").tobytes()
    assert len(decode(wav(len(samples), samples), RATE, 1.0).samples) == RATE // 2


NAN = encoded(np.array([0.1, np.nan] * 8000), subtype="FLOAT")
SECOND = encoded(tone(1.0))

REFUSED = {
    "nothing": (b"", "the recording holds no samples"),
    "no samples": (encoded(np.zeros(0)), "the recording holds no samples"),
    "text": (b"not audio at all" * 100, "cannot be read; send a complete file as WAV"),
    "half of a wav": (SECOND[: len(SECOND) // 2], "breaks off before its end; get the whole of it"),
    "a header alone": (SECOND[:44], "breaks off before its end"),
    "half of a header": (SECOND[:30], "the recording (breaks off|cannot be read)"),
    "half of a flac": (encoded(tone(1.0), kind="FLAC")[:4000], "the recording (breaks off|cannot be read)"),
    "half of an mp3": (encoded(tone(5.0), kind="MP3")[:6000], "the recording breaks off"),
    "a gigabyte declared": (wav(10**9, bytes(1000)), r"breaks off before its end"),
    "days in a flac": (flac_of(2**36 - 1), r"lasts 4294967 s, more than the 10 s that are allowed; cut it"),
    "a flac of unknown length": (flac_of(0), "does not say how long it is"),
    "too long": (encoded(tone(11.0)), "lasts 11 s, more than the 10 s that are allowed"),
    "not numbers": (NAN, "holds values that are not numbers"),
    "far too loud": (encoded(np.full(100, 3e4), subtype="FLOAT"), "far above full scale"),
    "too many channels": (encoded(tone(1.0, channels=70)), "has 70 channels of 16000 samples per second, too many"),
    "too many samples a second": (encoded(tone(0.1, rate=200_001), 200_001), "1 channels of 200001 samples per second"),
    "a rate of 0": (wav(1000, bytes(1000), rate=0), "the recording (cannot be read|cannot be used)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_in_one_sentence_and_at_once(name: str) -> None:
    audio, sentence = REFUSED[name]
    started = time.perf_counter()
    with pytest.raises(DataError, match=r"^file: the recording .*\.$") as refused:
        decode(audio, RATE, 10.0)
    assert time.perf_counter() - started < 1.0
    refused.match(sentence)
