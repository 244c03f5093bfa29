"""A corpus of tones and numbers: text, recordings in files, stretches of a long recording, members of a tar."""

from __future__ import annotations

import io
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import soundfile

from nemo_emmett.corpora import Corpus, Part, Recording, Selection, Sentence

RATE = 16_000
SECONDS = 0.4


def samples_of(number: int, seconds: float = SECONDS, rate: int = RATE) -> np.ndarray:
    """A tone of its own for each sentence, in steps of 16 bits, so that FLAC has the same: (samples,)."""
    time = np.arange(round(seconds * rate)) / rate
    return np.rint(3000 * np.sin(2 * np.pi * (200 + 50 * number) * time)) / 32768


def make_source(folder: Path) -> Path:
    """The files of the corpus."""
    folder.mkdir()
    for number in range(3):
        soundfile.write(folder / f"{number}.wav", samples_of(number), RATE, subtype="PCM_16")
    talk = np.concatenate([samples_of(number) for number in range(3, 6)])
    soundfile.write(folder / "talk.wav", talk, RATE, subtype="PCM_16")
    with tarfile.open(folder / "test.tar.gz", "w:gz") as archive:
        for number in (7, 6):
            stream = io.BytesIO()
            soundfile.write(stream, samples_of(number), RATE, format="WAV", subtype="PCM_16")
            member = tarfile.TarInfo(f"./test/{number}.wav")
            member.size = len(stream.getvalue())
            archive.addfile(member, io.BytesIO(stream.getvalue()))
    return folder


def _sentence(number: int, recording: Recording | None = None) -> Sentence:
    return Sentence(f"s/{number}", {"en": f"number {number}", "de": f"Zahl {number}"}, recording)


def _text(count: int) -> list[Sentence]:
    odd = [
        Sentence("empty", {"en": "", "de": "nichts"}),
        Sentence("lines", {"en": "one\nline", "de": " eine\r\nZeile "}),
    ]
    return [*odd, *(_sentence(number) for number in range(count))]


def _speech(source: Path) -> list[Sentence]:
    files = [_sentence(number, Recording(source / f"{number}.wav")) for number in range(3)]
    talk = [
        _sentence(number, Recording(source / "talk.wav", start=SECONDS * (number - 3), duration=SECONDS))
        for number in range(3, 6)
    ]
    return [*files, *talk]


def _archived(source: Path) -> list[Sentence]:
    return [_sentence(number, Recording(source / "test.tar.gz", member=f"test/{number}.wav")) for number in (6, 7)]


def read(source: Path, selection: Selection) -> list[Part]:
    """Two text parts and two of speech."""
    languages = ("en", "de")
    return [
        Part("train", languages, partial(_text, 5)),
        Part("dev", languages, partial(_text, 2)),
        Part("train", languages, partial(_speech, source), spoken="en"),
        Part("test", languages, partial(_archived, source), spoken="en"),
    ]


CORPUS = Corpus(
    name="toy",
    title="Toy",
    release="1",
    licence="CC0-1.0",
    url="https://example.org",
    files="wavs and a tar.",
    read=read,
)
