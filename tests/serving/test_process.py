"""The server as a process of its own: how it starts, what a broken connection gets, and how it stops."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import httpx
import openai
import pytest
from click.testing import CliRunner

from nemo_emmett.cli import main

from ..fork_server import fork_server, print_to
from .serving import encoded, tone

CLIENT = httpx.Client(timeout=30)  # each new one reads the certificates of all authorities


@pytest.fixture(scope="module")
def exported(tiny_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "tiny"
    tiny_model("SALMT5").save_pretrained(str(folder))
    return folder


def run(log: Path, arguments: list[str], environment: dict[str, str]) -> None:
    """The command, in a process that has imported NeMo."""
    print_to(log)
    os.environ |= environment
    main(arguments)


@dataclass
class Running:
    process: BaseProcess
    url: str
    log: Path

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return host, int(port)


@contextmanager
def running(folder: Path, log: Path, *options: str, **environment: str) -> Iterator[Running]:
    arguments = ["serve", str(folder), "--port", "0", *options]
    process = fork_server().Process(target=run, args=(log, arguments, environment))
    process.start()
    try:
        for _ in range(1200):
            if found := re.search(r"Serving \S+ at (http://\S+)", log.read_text() if log.exists() else ""):
                break
            assert process.is_alive(), log.read_text()
            time.sleep(0.05)
        yield Running(process, found[1], log)
    finally:
        process.kill()
        process.join()


@pytest.fixture(scope="module")
def server(exported, tmp_path_factory) -> Iterator[Running]:
    log = tmp_path_factory.mktemp("log") / "log"
    with running(exported, log, "--timeout", "20", NEMO_EMMETT_API_KEY="s3cret") as made:
        yield made


def test_it_listens_at_this_machine_alone_and_needs_the_key(server) -> None:
    assert server.url.startswith("http://127.0.0.1:")
    assert CLIENT.get(f"{server.url}/v1/models").status_code == 401
    assert CLIENT.get(f"{server.url}/health").json() == {"status": "ok"}


def test_openais_client_gets_what_the_model_gives(server, tiny_model, tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(encoded(tone(0.9, rate=48000, channels=2), 48000))
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="s3cret", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    model = tiny_model("SALMT5")
    with path.open("rb") as file:
        english = client.audio.translations.create(file=file, model="tiny")
    with path.open("rb") as file:
        german = client.audio.translations.create(
            file=file, model="tiny", response_format="verbose_json", extra_body={"to_language": "de", "language": "en"}
        )
    with path.open("rb") as file:
        transcript = client.audio.transcriptions.create(file=file, model="tiny", language="en")
    assert english.text == model.translate([path], None, "en")[0]
    assert german.text == model.translate([path], "en", "de")[0]
    assert german.duration == pytest.approx(0.9)
    assert transcript.text == model.translate([path], "en", "en")[0]
    with pytest.raises(openai.NotFoundError, match="'whisper-1' is not served here; name 'tiny'"):
        client.audio.translations.create(file=("a.wav", b"x"), model="whisper-1")
    with pytest.raises(openai.BadRequestError, match="the recording cannot be read"):
        client.audio.translations.create(file=("a.wav", b"not audio" * 10), model="tiny")


def exchange(server: Running, request: bytes) -> bytes:
    """The first bytes of the answer to bytes that are sent as they are."""
    with socket.create_connection(server.address, timeout=5) as connection:
        connection.sendall(request)
        return connection.recv(4096)


HEAD = b"POST /v1/translate HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer s3cret\r\n"


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (HEAD + b"Content-Length: 1000000000\r\n\r\n{", 413),
        (HEAD + b"Content-Length: -5\r\n\r\n", 400),
        (HEAD + b"Content-Length: many\r\n\r\n", 400),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n", 400),
        (b"rubbish\r\n\r\n", 400),
        (b"GET /\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(50) + b"\r\n\r\n", 400),  # TLS
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 1_000_000 + b"\r\n\r\n", 400),
    ],
)
def test_what_is_no_request_is_refused_at_once(server, request_: bytes, status: int) -> None:
    started = time.monotonic()
    assert exchange(server, request_).startswith(b"HTTP/1.1 %d " % status)
    assert time.monotonic() - started < 1.0
    assert CLIENT.get(f"{server.url}/health").json() == {"status": "ok"}


def test_a_connection_that_is_cut_leaves_nothing_behind(server) -> None:
    body = b'{"text": "six", "target": "de"}'
    for sent in (HEAD, HEAD + b"Content-Length: 31\r\n\r\n" + body[:9], HEAD + b"Content-Length: 31\r\n\r\n" + body):
        with socket.create_connection(server.address, timeout=5) as connection:
            connection.sendall(sent)
    for _ in range(100):
        if "nemo_emmett_requests_in_flight 0.0" in CLIENT.get(f"{server.url}/metrics").text:
            return
        time.sleep(0.05)
    raise AssertionError("a request is still in flight")


def post(url: str, word: str) -> httpx.Response:
    return CLIENT.post(f"{url}/v1/translate", json={"text": word, "target": "de"})


def test_sigterm_lets_the_requests_in_flight_finish(exported, tiny_model, tmp_path: Path) -> None:
    words = ["one", "two", "one red house", "six", "four old doors", "five", "new keys", "three green trees"]
    expected = tiny_model("SALMT5").translate(words, None, "de")
    # They wait for others long enough for the signal to find all of them in flight, on a busy machine too.
    with running(exported, tmp_path / "log", "--batch-wait-ms", "6000") as server, ThreadPoolExecutor(9) as pool:
        pending = [pool.submit(post, server.url, word) for word in words]
        wait_for(lambda: f"requests_in_flight {len(words)}.0" in CLIENT.get(f"{server.url}/metrics").text)
        os.kill(server.process.pid, signal.SIGTERM)
        wait_for(lambda: CLIENT.get(f"{server.url}/health").status_code == 503)
        refused = post(server.url, "late")
        assert refused.status_code == 503
        assert refused.json()["error"]["message"].startswith("The server stops")
        answers = [future.result() for future in pending]
        assert [answer.status_code for answer in answers] == [200] * len(words)
        assert [answer.json()["translations"] for answer in answers] == [[text] for text in expected]
        server.process.join(10)
        assert server.process.exitcode == 0
        assert server.log.read_text().endswith("Stopped; all requests were answered.\n")


def test_a_second_signal_ends_the_requests_in_flight(exported, tmp_path: Path) -> None:
    with running(exported, tmp_path / "log", "--batch-wait-ms", "60000") as server, ThreadPoolExecutor(3) as pool:
        pending = [pool.submit(post, server.url, word) for word in ("one", "two", "six")]
        wait_for(lambda: "requests_in_flight 3.0" in CLIENT.get(f"{server.url}/metrics").text)
        os.kill(server.process.pid, signal.SIGINT)
        wait_for(lambda: CLIENT.get(f"{server.url}/health").status_code == 503)
        os.kill(server.process.pid, signal.SIGINT)
        assert [future.result().status_code for future in pending] == [503] * 3
        server.process.join(10)
        assert server.process.exitcode == 1
        log = server.log.read_text()
        assert log.endswith("Stopped; 3 request(s) in flight were ended.\n")
        assert "Traceback" not in log


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(200):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it did not become so")


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(exported) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(main, ["serve", str(exported), "--port", str(port)])
    assert result.exit_code == 2
    assert f"the server cannot listen at 127.0.0.1:{port} (Address already in use); give another port." in result.output
    assert "Loading" not in result.output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["gone"], "'gone' is not an exported model: there is no such folder"),
        (["MODEL", "--host", "256.1.1.1"], "the server cannot listen at 256.1.1.1:"),
        (["MODEL", "--device", "gpu"], "--device: 'gpu' is no device"),
        (["MODEL", "--chunk-seconds", "0"], "Invalid value for '--chunk-seconds'"),
        (["MODEL", "--timeout", "nan"], "Invalid value for '--timeout': 'nan' is no number."),
    ],
)
def test_mistakes_are_told_before_the_model_is_loaded(exported, arguments: list[str], sentence: str) -> None:
    arguments = [str(exported) if one == "MODEL" else one for one in arguments]
    result = CliRunner().invoke(main, ["serve", *arguments])
    assert result.exit_code == 2
    assert sentence in result.output
    assert "Loading" not in result.output


@pytest.mark.parametrize("key", ["ключ", "é", "s3cret\n", "two words"])
def test_a_key_that_no_client_could_send_is_told(exported, monkeypatch, key: str) -> None:
    monkeypatch.setenv("NEMO_EMMETT_API_KEY", key)
    result = CliRunner().invoke(main, ["serve", str(exported)])
    assert result.exit_code == 2
    assert "NEMO_EMMETT_API_KEY: the key has a space, a line's end or a character that is not ASCII" in result.output


def test_a_missing_extra_is_told_with_the_command_that_installs_it(exported, monkeypatch) -> None:
    find = importlib.util.find_spec  # others ask it as well
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *of: None if name == "uvicorn" else find(name, *of))
    result = CliRunner().invoke(main, ["serve", str(exported)])
    assert result.exit_code == 2
    assert "serve needs 'uvicorn', which is not installed; run: pip install 'nemo_emmett[serve]'" in result.output
