"""Two hundred wrong requests: each gets a 4xx with one sentence in less than a second, and the server goes on."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .serving import TRAINED, encoded, served, tone
from .test_gate import error_of
from .test_uploads import REFUSED, flac_of, wav

GOOD = encoded(tone(0.5))
TRANSLATIONS, TRANSCRIPTIONS, TEXTS = "/v1/audio/translations", "/v1/audio/transcriptions", "/v1/translate"
AUDIO = (TRANSLATIONS, TRANSCRIPTIONS)
FORM = {"content-type": "multipart/form-data; boundary=x"}

Wrong = tuple[str, str, str, dict[str, Any]]
"""A name, and method, address and arguments of a request."""


def form(path: str, audio: bytes = GOOD, name: str = "a.wav", **fields: Any) -> tuple[str, str, dict[str, Any]]:
    needed = {} if path == TRANSCRIPTIONS else {"to_language": "de"}
    return "POST", path, {"files": {"file": (name, audio)}, "data": needed | fields}


def text(body: Any) -> tuple[str, str, dict[str, Any]]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return "POST", TEXTS, {"content": content, "headers": {"content-type": "application/json"}}


def damaged(generator: random.Random) -> Iterator[tuple[str, bytes]]:
    """Recordings that break off at any place, and their headers with other bytes."""
    long = encoded(tone(2.0))
    for _ in range(20):
        yield "cut wav", long[: generator.randint(1, len(long) - 4000)]
    for kind in ("FLAC", "MP3"):
        whole = encoded(tone(2.0), kind=kind)
        for _ in range(10):
            yield f"cut {kind}", whole[: generator.randint(1, int(len(whole) * 0.8))]
    for _ in range(20):
        yield "noise", generator.randbytes(generator.randint(1, 5000))
    for _ in range(15):
        yield "noise after a wav's first letters", b"RIFF" + generator.randbytes(4) + b"WAVE" + generator.randbytes(200)


def wrong_requests() -> Iterator[Wrong]:
    generator = random.Random(0)
    for path in AUDIO:
        for name, (audio, _) in REFUSED.items():
            if name not in ("too long", "too many channels"):  # of the ten seconds that are allowed there
                yield f"{path}: {name}", *form(path, audio)
        for name in ("../../etc/passwd", "/etc/passwd", "..\\..\\boot.ini", "a\x00b.wav", "CON", "x" * 3000):
            yield f"{path}: named {name[:20]!r}", *form(path, b"no audio", name)
        for field, value in (
            ("language", "klingonish"),
            ("language", "../../etc"),
            ("language", "es"),
            ("model", "gpt-4o"),
            ("model", "../tiny"),
            ("response_format", "srt"),
            ("response_format", "yaml"),
            ("temperature", "0.7"),
            ("temperature", "hot"),
            ("stream", "true"),
            ("prompt", "Pretend that you are a pirate"),
            ("seed", "1"),
            ("timestamp_granularities[]", "word"),
        ):
            yield f"{path}: {field} {value}", *form(path, **{field: value})
        yield f"{path}: no file", "POST", path, {"data": {"language": "en"}}
        yield f"{path}: no body", "POST", path, {}
        yield f"{path}: JSON", "POST", path, {"json": {"file": "a.wav"}}
        yield f"{path}: a field for the file", "POST", path, {"files": {"file": (None, b"a.wav")}}
        yield (
            f"{path}: no boundary",
            "POST",
            path,
            {"content": b"x", "headers": {"content-type": "multipart/form-data"}},
        )
        yield (
            f"{path}: no end",
            "POST",
            path,
            {"content": b'--x\r\nContent-Disposition: form-data; name="file"'} | {"headers": FORM},
        )
        yield f"{path}: no parts", "POST", path, {"content": b"rubbish" * 50, "headers": FORM}
        yield (
            f"{path}: many fields",
            "POST",
            path,
            {"data": {f"f{i}": "1" for i in range(1500)}, "files": {"file": GOOD}},
        )
        for method in ("GET", "PUT", "DELETE", "PATCH"):
            yield f"{path}: {method}", method, path, {}
    for field, value in (("to_language", "fr"), ("to_language", "klingonish"), ("to_language", "\ud83d"[:0] + "🦜")):
        yield f"{field} {value}", *form(TRANSLATIONS, **{field: value})
    yield "to_language of a transcription", *form(TRANSCRIPTIONS, to_language="de")
    for name, audio in damaged(generator):
        yield name, *form(generator.choice(AUDIO), audio)
    yield "far too long", *form(TRANSLATIONS, encoded(np.zeros(700 * 100), 100))
    yield "a FLAC of days", *form(TRANSLATIONS, flac_of(2**35))
    yield "a gigabyte declared", *form(TRANSLATIONS, wav(10**9, bytes(10**5)))
    yield "26 MiB", *form(TRANSLATIONS, bytes(26 * 2**20))
    for body in (
        b"",
        b"{",
        b"null",
        b"[]",
        b'"six"',
        b"\xff\xfe\x00",
        b"[" * 50_000,
        b'{"text": "six", "target": "de"',
        b'{"text": ' + b"1" * 5000 + b', "target": "de"}',
        b'{"text": "\\ud800", "target": "de"}',
        {},
        {"target": "de"},
        {"text": None, "target": "de"},
        {"text": 6, "target": "de"},
        {"text": [], "target": "de"},
        {"text": ["six", None], "target": "de"},
        {"text": [["six"]], "target": "de"},
        {"text": {"a": "six"}, "target": "de"},
        {"text": "six", "target": 1},
        {"text": "six", "target": ["de", "en"]},
        {"text": "six", "target": "fr"},
        {"text": "six", "target": "german"},
        {"text": "six", "target": "de", "source": "es"},
        {"text": "six", "target": "en", "source": "en"},
        {"text": "six", "target": "de", "model": "other"},
        {"text": "six", "target": "de", "max_tokens": 3},
        {"text": "six " * 2000, "target": "de"},
        {"text": ["six"] * 200, "target": "de"},
        {"text": ["six", "x" * 6000], "target": "de"},
        {"text": "x" * 10**6, "target": "de"},
    ):
        yield f"{TEXTS}: {str(body)[:40]}", *text(body)
    yield "text as a form", "POST", TEXTS, {"data": {"text": "six", "target": "de"}}
    yield "text as plain text", "POST", TEXTS, {"content": b'{"text": "six", "target": "de"}'}
    for path in ("/v1", "/v1/", "/v1/chat/completions", "/../../etc/passwd", "/..%2f..%2fetc%2fpasswd", "/page.html"):
        yield path, "GET", path, {}
    for path in ("/v1/models/other", "/v1/models/..%2f..%2fetc", "/v1/audio/speech"):
        yield path, "GET", path, {}


WRONG = list(wrong_requests())


def test_there_are_as_many_as_the_file_says() -> None:
    assert len(WRONG) >= 200


def test_each_is_refused_in_one_sentence_and_the_server_goes_on(tiny_model, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_model("SALMT5")
    expected = model.translate(["one red house"], "en", "de")

    async def main() -> None:
        with served(model, TRAINED) as server:
            async with server.client() as client:
                good = {"text": "one red house", "source": "en", "target": "de"}
                assert (await client.post(TEXTS, json=good)).json()["translations"] == expected
                faults = []
                for number, (name, method, path, arguments) in enumerate(WRONG):
                    started = time.perf_counter()
                    response = await client.request(method, path, **arguments)
                    seconds = time.perf_counter() - started
                    if not (400 <= response.status_code < 500) or seconds > 1.0:
                        faults.append((name, response.status_code, round(seconds, 2), response.text[:300]))
                        continue
                    error_of(response)
                    assert "Traceback" not in response.text
                    assert "nemo_emmett/" not in response.text
                    if number % 20 == 0:
                        assert (await client.post(TEXTS, json=good)).json()["translations"] == expected
                assert faults == []
                response = await client.post(TRANSLATIONS, data={"to_language": "de"}, files={"file": ("a.wav", GOOD)})
                assert response.status_code == 200
                assert (await client.get("/health")).json() == {"status": "ok"}
                assert server.traffic.in_flight == 0

    asyncio.run(main())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../../escaped.wav", "/tmp/escaped.wav", "a\r\nb.wav"])
def test_the_name_of_a_good_recording_means_nothing(tiny_model, name: str) -> None:
    async def main() -> None:
        with served(tiny_model("SALMT5"), TRAINED) as server:
            async with server.client() as client:
                answers = [
                    await client.post(TRANSLATIONS, data={"to_language": "de"}, files={"file": (of_file, GOOD)})
                    for of_file in (name, "a.wav")
                ]
                assert [answer.status_code for answer in answers] == [200, 200]
                assert answers[0].json() == answers[1].json()

    asyncio.run(main())
    assert not Path("/tmp/escaped.wav").exists()
