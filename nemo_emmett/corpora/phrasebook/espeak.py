"""The eSpeak NG library for spoken corpora: its voices, drawn for each recording, and text to samples."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from nemo_emmett.config import nearest
from nemo_emmett.corpora.extras import require
from nemo_emmett.errors import ConfigError

SAMPLING_RATE = 16_000
"""Of the recordings, in Hz."""

_ACCENTS = {"en": ("en-us", "en"), "de": ("de",), "es": ("es", "es-419"), "fr": ("fr",)}
"""eSpeak NG's voice files; its "en" is British and "es" European."""


@dataclass(frozen=True)
class Voice:
    """How a recording is spoken."""

    name: str  # accent+variant, as eSpeak NG writes it: "en-us+f2"
    speed: int  # words a minute
    pitch: int  # 0 to 99


class VoiceRange(Protocol):
    """The fields of a spoken corpus's configuration from which voices are drawn."""

    accents: bool
    variants: Sequence[str]
    speed: Sequence[int]
    pitch: Sequence[int]
    seed: int


def draw_voice(item: object, language: str, rendition: int, config: VoiceRange) -> Voice:
    """Draw the voice of one recording by a hash of the seed and the recording's identity.

    Args:
        item: what is spoken; its ``str`` identifies it.
        language: of the recording.
        rendition: number of the recording among those of the item in that language.
        config: the range of voices.
    """

    def within(interval: Sequence[int], number: int) -> int:
        low, high = interval
        return low + number % (high - low + 1)

    digest = hashlib.sha256(f"{config.seed}/{item}/{language}/{rendition}".encode()).digest()
    accent, variant, speed, pitch = (int.from_bytes(digest[i : i + 8], "big") for i in range(0, 32, 8))
    accents = _ACCENTS[language] if config.accents else _ACCENTS[language][:1]
    return Voice(
        name=f"{accents[accent % len(accents)]}+{config.variants[variant % len(config.variants)]}",
        speed=within(config.speed, speed),
        pitch=within(config.pitch, pitch),
    )


def check_variants(kind: str, variants: Iterable[str]) -> None:
    """Refuse voice variants that eSpeak NG does not have: it would use its default voice without an error.

    Args:
        kind: kind of corpus, for the message: "phrasebook".
        variants: their names.

    Raises:
        ConfigError: naming the variant and the nearest known one.
    """
    folder = Path(require("espeakng_loader").get_data_path()) / "voices" / "!v"
    known = sorted(path.name for path in folder.iterdir())
    for variant in variants:
        if variant not in known:
            suggestion = nearest(variant, known)
            hint = f"did you mean '{suggestion}'?" if suggestion else "f1 to f5 and m1 to m8 are among those it has"
            raise ConfigError(f"{kind}.variants: eSpeak NG has no voice variant '{variant}'; {hint}")


# From eSpeak NG's speak_lib.h.
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_INITIALIZE_DONT_EXIT = 0x8000
_CHARS_UTF8 = 1
_POSITION_CHARACTER = 1
_RATE, _PITCH = 1, 3
_NOISE_SEED = 1
_SynthCallback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


def espeak_version() -> str:
    """Version of the eSpeak NG library, such as "1.52.0"."""
    library = ctypes.CDLL(require("espeakng_loader").get_library_path())
    library.espeak_Info.restype = ctypes.c_char_p
    return library.espeak_Info(None).decode()


class Engine:
    """The loaded library. ``speak`` may be called once in a process: the library keeps state between utterances."""

    def __init__(self) -> None:
        self._numpy, self._soxr = require("numpy"), require("soxr")
        loader = require("espeakng_loader")
        self._library = ctypes.CDLL(loader.get_library_path())
        self._native_rate = self._library.espeak_Initialize(
            _AUDIO_OUTPUT_SYNCHRONOUS, 0, loader.get_data_path().encode(), _INITIALIZE_DONT_EXIT
        )
        if self._native_rate <= 0:
            raise RuntimeError(f"eSpeak NG finds no data in {loader.get_data_path()}")
        # The scan of the voices' files is half the time of a first utterance; done here, once for all forked processes.
        self._library.espeak_ListVoices(None)
        self._chunks: list[bytes] = []
        # Kept on self: ctypes keeps no reference to a callback that C still calls.
        self._callback = _SynthCallback(self._receive)
        self._library.espeak_SetSynthCallback(self._callback)

    def speak(self, text: str, voice: Voice) -> bytes:
        """Samples of 16 bits at the library's own rate."""
        data = text.encode() + b"\0"
        # Breath and other noise use random numbers: the library's own, seeded by the clock, and C's.
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(_NOISE_SEED))
        ctypes.CDLL(None).srand(_NOISE_SEED)
        _expect_ok("SetVoiceByName", self._library.espeak_SetVoiceByName(voice.name.encode()), voice)
        _expect_ok("SetParameter", self._library.espeak_SetParameter(_RATE, voice.speed, 0), voice)
        _expect_ok("SetParameter", self._library.espeak_SetParameter(_PITCH, voice.pitch, 0), voice)
        length = ctypes.c_size_t(len(data))
        status = self._library.espeak_Synth(data, length, 0, _POSITION_CHARACTER, 0, _CHARS_UTF8, None, None)
        _expect_ok("Synth", status, voice)
        if not self._chunks:
            raise RuntimeError(f"eSpeak NG said nothing for {text!r}")
        return b"".join(self._chunks)

    def resample(self, samples: bytes) -> bytes:
        """Samples of 16 bits at ``SAMPLING_RATE``."""
        np = self._numpy
        native = np.frombuffer(samples, dtype=np.int16).astype(np.float32)
        resampled = self._soxr.resample(native, self._native_rate, SAMPLING_RATE)
        return np.clip(np.rint(resampled), -32768, 32767).astype("<i2").tobytes()

    def _receive(self, samples: ctypes.POINTER(ctypes.c_short), count: int, _events: int | None) -> int:
        if count > 0:
            self._chunks.append(ctypes.string_at(samples, count * ctypes.sizeof(ctypes.c_short)))
        return 0


def _expect_ok(function: str, status: int, voice: Voice) -> None:
    if status != 0:
        raise RuntimeError(f"espeak_{function} failed with status {status} for {voice}")
