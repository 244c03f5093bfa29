"""Connections of the server: how many there may be, and how long one may be open without a request.

uvicorn limits neither, so that unfinished headers would take all file descriptors of the process.
"""

from __future__ import annotations

import asyncio
import resource
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from nemo_emmett.serving.request_errors import RequestError

HEADER_SECONDS = 10.0
"""Until a request's headers must have come, from the connection or the end of the request before."""

_SHARE = 0.5
"""Of the file descriptors that the process may have."""


def most_connections() -> int:
    """As many as leave file descriptors for the rest of the process."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**16 if allowed == resource.RLIM_INFINITY else max(int(allowed * _SHARE), 1)


class Connection(H11Protocol):
    """uvicorn's, closed where no request comes; what is no HTTP is refused in OpenAI's form."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._most = most_connections()
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, or close it if there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self._most:
            transport.abort()
        else:
            self._wait_for_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self._stop_waiting()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """Read what has come."""
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._stop_waiting()

    def on_response_complete(self) -> None:
        """Wait for the next request; one that came meanwhile has begun already."""
        answered = self.cycle
        super().on_response_complete()
        if self.cycle is answered:
            self._wait_for_request()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP."""
        error = RequestError("The request is no HTTP, or its headers are too long.")
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        for event in (
            h11.Response(status_code=400, headers=headers),
            h11.Data(data=error.encoded()),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _wait_for_request(self) -> None:
        self._stop_waiting()
        self._deadline = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
