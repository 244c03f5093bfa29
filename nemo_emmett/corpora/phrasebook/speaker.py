"""Text to recordings, whose bytes do not depend on earlier recordings.

eSpeak NG keeps state from one utterance to the next, even through a restart of the library, so every utterance needs a
process that has not spoken yet. To start an interpreter for each costs 30 ms and more. Instead, a process loads
the library once, never speaks itself, and forks a child for each utterance, which takes some 10 ms including the
speech.
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

from nemo_emmett.corpora.phrasebook.espeak import SAMPLING_RATE, Engine, Voice
from nemo_emmett.errors import EmmettError
from nemo_emmett.files import atomic_file


@dataclass(frozen=True)
class Utterance:
    """A recording to be made."""

    text: str
    voice: Voice
    path: str


class Speaker:
    """A process that speaks. Use as a context manager.

    Args:
        folder: where recordings are made until they are complete; by default in the folder of each.

    Raises:
        EmmettError: from ``say``, if an utterance cannot be spoken or written.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = None if folder is None else str(folder)

    def __enter__(self) -> Speaker:
        paths = [str(Path(__file__).resolve().parents[3]), *filter(None, [os.environ.get("PYTHONPATH")])]
        # NumPy's OpenBLAS would start threads, and a process with threads must not fork.
        single_threaded = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import serve; serve({self._folder!r})"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **single_threaded},
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def say(self, utterances: Sequence[Utterance]) -> None:
        """Write each utterance to its path: 16 kHz, mono, 16-bit WAV. A file is complete or does not exist."""
        try:
            self._process.stdin.write(json.dumps([asdict(utterance) for utterance in utterances]) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # readline returns an empty answer, too
        answer = self._process.stdout.readline()
        failed = json.loads(answer) if answer else [utterance.path for utterance in utterances]
        if failed:
            raise EmmettError(f"eSpeak NG could not speak '{failed[0]}'; the cause is printed above")


def serve(folder: str | None) -> None:
    """The loop of the process: reads a JSON list of utterances a line, and answers with the list of paths that failed.

    Args:
        folder: as :class:`Speaker`'s.
    """
    # Ctrl-C reaches the whole process group; this process ends when its stdin is closed.
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
        with atomic_file(utterance.path, folder) as unfinished, wave.open(str(unfinished), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(SAMPLING_RATE)
            file.writeframes(samples)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        # Not sys.exit: inherited buffers and exit handlers belong to the parent.
        sys.stderr.flush()
        os._exit(status)
