"""The eSpeak NG library, as far as spoken corpora need it: text and a voice to samples."""

from __future__ import annotations

import ctypes

from nemo_emmett.corpora.phrasebook.extras import require
from nemo_emmett.corpora.phrasebook.voices import Voice

SAMPLING_RATE = 16_000
"""Of the recordings, in Hz."""

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
    """The library, loaded. Each call of ``speak`` must come in a process that has not spoken yet."""

    def __init__(self) -> None:
        self._numpy, self._soxr = require("numpy"), require("soxr")
        loader = require("espeakng_loader")
        self._library = ctypes.CDLL(loader.get_library_path())
        self._native_rate = self._library.espeak_Initialize(
            _AUDIO_OUTPUT_SYNCHRONOUS, 0, loader.get_data_path().encode(), _INITIALIZE_DONT_EXIT
        )
        if self._native_rate <= 0:
            raise RuntimeError(f"eSpeak NG finds no data in {loader.get_data_path()}")
        # Its scan of the voices' files is half the time of a first utterance: once, here, for all that are forked.
        self._library.espeak_ListVoices(None)
        self._chunks: list[bytes] = []
        # Kept on self: ctypes does not hold on to a callback that C still calls.
        self._callback = _SynthCallback(self._receive)
        self._library.espeak_SetSynthCallback(self._callback)

    def speak(self, text: str, voice: Voice) -> bytes:
        """Samples of 16 bits at the library's own rate."""
        data = text.encode() + b"\0"
        # Breath and other noise come of random numbers, the library's own, seeded by the clock, and C's.
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
