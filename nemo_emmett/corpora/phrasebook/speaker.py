"""Text to recordings, the same bytes whatever was said before.

eSpeak NG keeps state from one utterance to the next, even through a restart of the library, so every utterance needs a
process that has not spoken yet. To start an interpreter for each costs 30 ms and more. Instead, a speaker process
loads the library once, never speaks itself, and forks a child for each utterance, which takes some 10 ms, speaking
included.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
import wave
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nemo_emmett.corpora.phrasebook.espeak import SAMPLING_RATE, Engine
from nemo_emmett.corpora.phrasebook.voices import Voice
from nemo_emmett.errors import EmmettError
from nemo_emmett.files import atomic_file


@dataclass(frozen=True)
class Utterance:
    """A recording to be made."""

    text: str
    voice: Voice
    path: str


class Speaker:
    """A speaker process. Use as a context manager.

    Args:
        folder: where recordings are made until they are whole; by default beside the path of each.

    Raises:
        EmmettError: from ``say``, if an utterance cannot be spoken or written.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = None if folder is None else str(folder)

    def __enter__(self) -> Speaker:
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import serve; serve({self._folder!r})"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=_speaker_environment(),
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def say(self, utterances: Sequence[Utterance]) -> None:
        """Write each utterance to its path: 16 kHz, mono, 16-bit WAV. A file is there whole or not at all."""
        try:
            self._process.stdin.write(json.dumps([asdict(utterance) for utterance in utterances]) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # The answer will be missing as well.
        answer = self._process.stdout.readline()
        failed = json.loads(answer) if answer else [utterance.path for utterance in utterances]
        if failed:
            raise EmmettError(f"eSpeak NG could not speak '{failed[0]}'; the cause is printed above")


def _speaker_environment() -> dict[str, str]:
    package_root = str(Path(__file__).resolve().parents[3])
    paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
    # NumPy's OpenBLAS would start a pool of threads, and a process with threads must not fork.
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def serve(folder: str | None) -> None:
    """Be a speaker: read a JSON list of utterances a line, answer each with the list of paths that failed.

    Args:
        folder: as :class:`Speaker`'s.
    """
    # Ctrl-C reaches the whole process group; a speaker ends when its stdin does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    engine = Engine()
    for line in sys.stdin:
        failed = [request["path"] for request in json.loads(line) if not _speak_in_child(engine, request, folder)]
        sys.stdout.write(json.dumps(failed) + "\n")
        sys.stdout.flush()


def _speak_in_child(engine: Engine, request: dict, folder: str | None) -> bool:
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    status = 1
    try:
        utterance = Utterance(request["text"], Voice(**request["voice"]), request["path"])
        samples = engine.resample(engine.speak(utterance.text, utterance.voice))
        with atomic_file(utterance.path, folder) as unfinished:
            _write_wav(unfinished, samples)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        # Not sys.exit: what the child inherited (buffers, exit handlers) is the speaker's to run down.
        sys.stderr.flush()
        os._exit(status)


def _write_wav(path: Path, samples: bytes) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLING_RATE)
        file.writeframes(samples)
