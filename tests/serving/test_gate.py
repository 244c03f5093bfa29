"""Which requests are let in, and what becomes of those whose client leaves or whose time is over."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from .serving import StubModel, encoded, served, tone

TEXT = {"text": "six", "target": "de"}


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error of a response, in OpenAI's form: one sentence."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].endswith((".", "?"))
    assert "\n" not in error["message"]
    return error


async def until(condition) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not become so")


def test_requests_to_the_api_need_the_key() -> None:
    async def main() -> None:
        with served(StubModel(), api_key="s3cret") as server:
            async with server.client() as client:
                for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}):
                    for method, path in (("GET", "/v1/models"), ("POST", "/v1/translate"), ("GET", "/v1/none")):
                        response = await client.request(method, path, headers=headers)
                        assert response.status_code == 401
                        assert error_of(response)["code"] == "invalid_api_key"
                assert not server.model.batches
                response = await client.post("/v1/translate", json=TEXT, headers={"Authorization": "Bearer s3cret"})
                assert response.json()["translations"] == ["de:SIX"]
                for path in ("/", "/health", "/metrics"):
                    assert (await client.get(path)).status_code == 200

    asyncio.run(main())


def test_more_requests_than_allowed_are_told_to_come_again() -> None:
    async def main() -> None:
        with served(StubModel(), requests=3) as server:
            async with server.client() as client:
                server.model.go.clear()
                pending = [asyncio.ensure_future(client.post("/v1/translate", json=TEXT)) for _ in range(3)]
                await until(lambda: server.traffic.in_flight == 3)
                refused = await client.post("/v1/translate", json=TEXT)
                assert refused.status_code == 429
                assert refused.headers["retry-after"] == "1"
                assert error_of(refused)["message"].startswith("3 requests are in flight, as many as the server takes")
                assert (await client.get("/v1/models")).status_code == 200  # costs nothing
                server.model.go.set()
                assert [response.status_code for response in await asyncio.gather(*pending)] == [200] * 3
                assert (await client.post("/v1/translate", json=TEXT)).status_code == 200
                assert server.traffic.in_flight == 0

    asyncio.run(main())


def test_a_server_that_stops_answers_what_it_has_and_refuses_the_rest() -> None:
    async def main() -> None:
        with served(StubModel()) as server:
            async with server.client() as client:
                server.model.go.clear()
                pending = asyncio.ensure_future(client.post("/v1/translate", json=TEXT))
                await until(lambda: server.model.busy.is_set())
                server.traffic.is_stopping = True
                refused = await client.post("/v1/translate", json=TEXT)
                assert refused.status_code == 503
                assert error_of(refused)["type"] == "server_error"
                assert (await client.get("/health")).json() == {"status": "stopping"}
                server.model.go.set()
                assert (await pending).json()["translations"] == ["de:SIX"]

    asyncio.run(main())


def test_a_request_that_takes_too_long_is_not_computed() -> None:
    async def main() -> None:
        with served(StubModel(), timeout=0.3) as server:
            async with server.client() as client:
                server.model.go.clear()
                held = asyncio.ensure_future(client.post("/v1/translate", json=TEXT))
                await until(lambda: server.model.busy.is_set())
                waiting = asyncio.ensure_future(client.post("/v1/translate", json=TEXT | {"text": "late"}))
                for response in await asyncio.gather(held, waiting):
                    assert response.status_code == 504
                    assert error_of(response)["message"] == "The request was not answered within 0.3 s."
                server.model.go.set()
                assert (await client.post("/v1/translate", json=TEXT)).status_code == 200
        assert "late" not in [item for batch in server.model.batches for item in batch]

    asyncio.run(main())


async def raw(
    server: Any, body: list[bytes | float], headers: dict[str, str], leave: bool = False, path: str = "/v1/translate"
) -> list[dict]:
    """What the application sends to a request whose body comes in pieces; numbers are pauses.

    Args:
        server: of ``served``.
        body: pieces.
        headers: of the request.
        leave: the client closes the connection after the body.
        path: of the request.
    """
    sent: list[dict] = []
    pieces = list(body)

    async def receive() -> dict:
        while pieces and isinstance(pieces[0], float):
            await asyncio.sleep(pieces.pop(0))
        if pieces:
            piece = pieces.pop(0)
            return {"type": "http.request", "body": piece, "more_body": bool(pieces)}
        if not leave:
            await asyncio.sleep(3600)
        return {"type": "http.disconnect"}

    async def send(message: dict) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    await server.app(scope, receive, send)
    return sent


JSON = {"content-type": "application/json"}


def test_what_a_client_that_left_asked_for_is_not_computed() -> None:
    async def main() -> None:
        with served(StubModel()) as server:
            async with server.client() as client:
                server.model.go.clear()
                held = asyncio.ensure_future(client.post("/v1/translate", json=TEXT))
                await until(lambda: server.model.busy.is_set())
                assert await raw(server, [b'{"text": "gone", "target": "de"}'], JSON, leave=True) == []
                server.model.go.set()
                assert (await held).status_code == 200
                assert 'status="499"' in server.metrics.text().decode()
                assert server.traffic.in_flight == 0
        assert "gone" not in [item for batch in server.model.batches for item in batch]

    asyncio.run(main())


def test_bodies_are_limited_by_what_they_declare_and_by_what_comes() -> None:
    async def main() -> None:
        with served(StubModel(), upload_bytes=1000) as server:
            declared = await raw(server, [b"{"], JSON | {"content-length": str(10**9)})
            assert declared[0]["status"] == 413
            assert b"larger than the 0.000953674 MiB that are allowed" in declared[1]["body"]
            streamed = await raw(server, [b'{"text": "'] + [b"x" * 400] * 5, JSON)
            assert streamed[0]["status"] == 413
            understated = await raw(server, [b"x" * 400] * 5, JSON | {"content-length": "10"})
            assert understated[0]["status"] == 413
            async with server.client() as client:
                response = await client.post("/v1/audio/translations", files={"file": encoded(tone(1.0))})
                assert response.status_code == 413
                assert error_of(response)["type"] == "invalid_request_error"

    asyncio.run(main())


def test_a_form_that_breaks_off_is_refused() -> None:
    whole = httpx.Request("POST", "http://x", files={"file": encoded(tone(0.1))}, data={"to_language": "de"})
    body, kind = whole.read(), {"content-type": whole.headers["content-type"]}

    async def main() -> None:
        with served(StubModel()) as server:
            for cut in (body[:-5], body[: body.index(b"to_language") + 3], body[:100], b""):
                sent = await raw(server, [cut], kind, path="/v1/audio/translations")
                assert sent[0]["status"] == 400
                assert b"The form breaks off before its end; send all of it." in sent[1]["body"]
            for pieces in (
                [body],
                [body[:-3], body[-3:]],
                [body, b"\r\n"],
                [body[n : n + 7] for n in range(0, len(body), 7)],
            ):
                sent = await raw(server, pieces, kind, path="/v1/audio/translations")
                assert sent[0]["status"] == 200, sent
            assert not server.model.batches or {*map(len, server.model.batches)} == {1}

    asyncio.run(main())


def test_at_the_second_signal_requests_in_flight_are_told_so() -> None:
    async def main() -> None:
        with served(StubModel()) as server:
            async with server.client() as client:
                server.model.go.clear()
                pending = [asyncio.ensure_future(client.post("/v1/translate", json=TEXT)) for _ in range(3)]
                await until(lambda: server.traffic.in_flight == 3)
                server.traffic.is_ending.set()
                for response in await asyncio.gather(*pending):
                    assert response.status_code == 503
                    assert error_of(response)["message"] == "The server was stopped before the request was answered."
                assert server.traffic.ended == 3

    asyncio.run(main())


def test_refused_requests_are_counted_under_their_address() -> None:
    async def main() -> None:
        with served(StubModel(), api_key="s3cret") as server:
            async with server.client() as client:
                for path in ("/v1/translate", "/v1/nothing"):
                    assert (await client.post(path, json=TEXT)).status_code == 401
            counted = server.metrics.text().decode()
            for path in ("/v1/translate", "other"):
                assert f'nemo_emmett_requests_total{{path="{path}",status="401"}} 1.0' in counted

    asyncio.run(main())


def test_a_body_that_does_not_arrive_holds_no_place() -> None:
    async def main() -> None:
        with served(StubModel(), timeout=0.2) as server:
            sent = await raw(server, [b'{"text": ', 3600.0, b'"six"}'], JSON)
            assert sent[0]["status"] == 408
            assert b"did not arrive within 0.2 s" in sent[1]["body"]
            assert server.traffic.in_flight == 0

    asyncio.run(main())


def test_a_bug_is_a_500_that_says_nothing_of_its_inside() -> None:
    async def main() -> None:
        with served(StubModel()) as server:
            async with server.client() as client:
                response = await client.post("/v1/translate", json=TEXT | {"text": "crash"})
                assert response.status_code == 500
                assert error_of(response)["message"] == "The server failed at this request; its log says why."
                assert (await client.get("/health")).json() == {"status": "ok"}

    asyncio.run(main())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_server_whose_model_has_ended_says_so(monkeypatch) -> None:
    def die(*_, **__):
        raise SystemExit

    async def main() -> None:
        with served(StubModel()) as server:
            monkeypatch.setattr(server.model, "answer_inputs", die)
            async with server.client() as client:
                assert (await client.post("/v1/translate", json=TEXT)).status_code == 500
                response = await client.post("/v1/translate", json=TEXT)
                assert response.status_code == 503
                assert error_of(response)["message"] == "The model has stopped; the server's log says why."
                health = await client.get("/health")
                assert (health.status_code, health.json()) == (503, {"status": "failed"})

    asyncio.run(main())


@pytest.mark.parametrize("path", ["/", "/page.js", "/v1/models", "/nothing", "/health"])
def test_no_page_may_load_from_elsewhere_or_be_shown_elsewhere(path: str) -> None:
    async def main() -> None:
        with served(StubModel()) as server:
            async with server.client() as client:
                headers = (await client.get(path)).headers
                policy = headers["content-security-policy"]
                assert "default-src 'none'" in policy
                assert "frame-ancestors 'none'" in policy
                assert "http:" not in policy
                assert "https:" not in policy
                assert headers["x-content-type-options"] == "nosniff"
                assert "access-control-allow-origin" not in headers

    asyncio.run(main())
