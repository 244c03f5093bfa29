"""Connections without a request are closed, and there are no more of them than the process has room for."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest
import uvicorn

from nemo_emmett.serving import connections
from nemo_emmett.serving.connections import Connection

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
HEADER_SECONDS = 0.4


async def application(scope, receive, send) -> None:
    """Answers after as many seconds as the query says."""
    await asyncio.sleep(float(scope["query_string"] or 0))
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
def address(monkeypatch) -> Iterator[tuple[str, int]]:
    """Of a server that takes eight connections, and waits a moment for headers."""
    monkeypatch.setattr(connections, "HEADER_SECONDS", HEADER_SECONDS)
    monkeypatch.setattr(connections, "most_connections", lambda: 8)
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(application, http=Connection, ws="none", lifespan="off", log_level="critical")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield listener.getsockname()
    server.should_exit = True
    thread.join()


def seconds_until_closed(connection: socket.socket) -> float:
    """Until the server closes a connection, after what it may still send."""
    started = time.monotonic()
    connection.settimeout(10)
    try:
        while connection.recv(4096):
            pass
    except ConnectionResetError:
        pass
    return time.monotonic() - started


def answer_of(connection: socket.socket, number: int = 1) -> bytes:
    """So many answers, or what came before the connection was closed."""
    received = b""
    while received.count(b"\r\nok") < number and (more := connection.recv(4096)):
        received += more
    return received


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nX: "])
def test_a_connection_without_a_request_is_closed(address, sent: bytes) -> None:
    with socket.create_connection(address) as connection:
        connection.sendall(sent)
        assert HEADER_SECONDS / 2 < seconds_until_closed(connection) < 5


def test_headers_that_drip_do_not_keep_it_open(address) -> None:
    with socket.create_connection(address) as connection:
        started = time.monotonic()
        with suppress(OSError):  # reset, or a broken pipe
            while time.monotonic() - started < 10:
                connection.sendall(b"X")
                time.sleep(0.05)
    assert time.monotonic() - started < 5


def test_after_an_answer_the_next_request_has_as_long(address) -> None:
    with socket.create_connection(address) as connection:
        for _ in range(2):
            connection.sendall(GET)
            assert answer_of(connection).endswith(b"ok")
            time.sleep(HEADER_SECONDS / 2)
        connection.sendall(GET[:10])
        assert seconds_until_closed(connection) < 5


def test_a_request_may_take_longer_and_others_may_follow_it_in_one_piece(address) -> None:
    with socket.create_connection(address) as connection:
        slow = GET.replace(b"/ ", b"/?%.1f " % (3 * HEADER_SECONDS))
        connection.sendall(slow + slow)
        assert answer_of(connection, 2).count(b"ok") == 2


def test_more_connections_than_allowed_are_closed_and_the_others_served(address) -> None:
    held = [socket.create_connection(address) for _ in range(8)]
    try:
        with socket.create_connection(address) as late:
            assert seconds_until_closed(late) < HEADER_SECONDS
        held[0].sendall(GET)
        assert answer_of(held[0]).endswith(b"ok")
    finally:
        for connection in held:
            connection.close()
    time.sleep(0.1)
    with socket.create_connection(address) as connection:
        connection.sendall(GET)
        assert answer_of(connection).endswith(b"ok")


def test_what_is_no_http_is_refused_in_openais_form(address) -> None:
    with socket.create_connection(address) as connection:
        connection.sendall(b"rubbish\r\n\r\n")
        head, _, body = answer_of(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"]["message"] == "The request is no HTTP, or its headers are too long."


def test_there_is_room_for_the_rest_of_the_process(monkeypatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (1024, 4096))
    assert connections.most_connections() == 512
