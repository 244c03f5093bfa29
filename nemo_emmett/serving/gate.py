"""Which requests are let in: by key, size, number and time. What stops is refused in OpenAI's form.

ASGI middleware, so that a body is refused while it comes, before a parser reads it.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from contextlib import suppress
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nemo_emmett.serving.limits import Limits
from nemo_emmett.serving.metrics import Metrics
from nemo_emmett.serving.request_errors import RequestError

API = "/v1/"
"""The addresses below it need the key, and their POST requests are limited."""

_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "media-src 'self' blob:; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""Of every response: the page loads nothing from elsewhere, and no other site shows it."""

_DISCARD_SECONDS = 5.0

_CLIENT_HAS_GONE = 499
"""nginx' status of a request whose client closed the connection, for the metrics."""


class Traffic:
    """The requests of a server: how many there are, and whether it takes more."""

    def __init__(self) -> None:
        self.in_flight = 0
        self.is_stopping = False


class Gate:
    """ASGI middleware.

    Args:
        app: what answers the requests that are let in.
        traffic: is counted here, and read by the server that stops.
        limits: of a request.
        metrics: are counted here.
        api_key: that requests to the API must have; None: none.
    """

    def __init__(
        self, app: ASGIApp, *, traffic: Traffic, limits: Limits, metrics: Metrics, api_key: str | None = None
    ) -> None:
        self.app = app
        self.traffic = traffic
        self.limits = limits
        self.metrics = metrics
        self.api_key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or have it answered."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, response, body = time.monotonic(), _Response(send), _Body(receive, self.limits.upload_bytes)
        is_work = scope["path"].startswith(API) and scope["method"] == "POST"
        try:
            self._check(scope, is_work)
            self.traffic.in_flight += is_work
            self.metrics.in_flight.set(self.traffic.in_flight)
            try:
                await self._run(scope, body, response)
            finally:
                self.traffic.in_flight -= is_work
                self.metrics.in_flight.set(self.traffic.in_flight)
        except RequestError as error:
            if error.status in (401, 429, 503):
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(body.discard(), _DISCARD_SECONDS)
            refusal = JSONResponse(error.body(), error.status, error.headers())
            await refusal(scope, receive, response.send)
        finally:
            path = getattr(scope.get("route"), "path", "other")  # a path of the client's would be a time series each
            self.metrics.requests.labels(path, response.status or 500).inc()
            self.metrics.seconds.labels(path).observe(time.monotonic() - started)

    def _check(self, scope: Scope, is_work: bool) -> None:
        headers = Headers(scope=scope)
        if self.api_key is not None and scope["path"].startswith(API):
            scheme, _, key = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self.api_key):
                raise RequestError(
                    "The key is missing or wrong; send it as the header `Authorization: Bearer KEY`.",
                    401,
                    code="invalid_api_key",
                )
        declared = headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > self.limits.upload_bytes:
            raise _too_large(self.limits.upload_bytes)
        if is_work and self.traffic.is_stopping:
            raise RequestError("The server stops; send the request to another, or again later.", 503)
        if is_work and self.traffic.in_flight >= self.limits.requests:
            raise RequestError(
                f"{self.limits.requests} requests are in flight, as many as the server takes; send it again in a "
                "moment.",
                429,
                code="rate_limit_exceeded",
            )

    async def _run(self, scope: Scope, body: _Body, response: _Response) -> None:
        """Have a request answered, unless its client leaves or its time is over."""
        answering = asyncio.ensure_future(self.app(scope, body.receive, response.send))
        leaving = asyncio.ensure_future(body.until_disconnect())
        try:
            await asyncio.wait((answering, leaving), timeout=self.limits.timeout, return_when=asyncio.FIRST_COMPLETED)
            if answering.done() or response.status is not None:  # what is being sent is sent to its end
                await answering
                return
            has_left = leaving.done()
        finally:
            leaving.cancel()
            answering.cancel()  # and with it the inputs that wait in the queue
            await asyncio.wait((answering, leaving))
        if has_left:
            response.status = _CLIENT_HAS_GONE
            return
        what = "was not answered" if body.is_complete else "did not arrive"
        status = 504 if body.is_complete else 408
        raise RequestError(f"The request {what} within {self.limits.timeout:g} s.", status, code="timeout")


class _Response:
    """Sends a response with the headers that all have, and knows its status."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status: int | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
        await self._send(message)


class _Body:
    """Receives a request's body up to a size."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._limit = limit
        self._size = 0
        self._complete = asyncio.Event()

    @property
    def is_complete(self) -> bool:
        return self._complete.is_set()

    async def receive(self) -> Message:
        message = await self._receive()
        self._size += len(message.get("body", b""))
        if self._size > self._limit:
            error = _too_large(self._limit)
            raise HTTPException(error.status, str(error))  # which FastAPI's parsers leave as it is
        if not message.get("more_body", False):
            self._complete.set()
        return message

    async def until_disconnect(self) -> None:
        """Wait for the client to close the connection, from the end of the body on."""
        await self._complete.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def discard(self) -> None:
        """Read what is left of a body: a client that still sends would not read the response."""
        while not self.is_complete and self._size <= self._limit:
            message: dict[str, Any] = dict(await self._receive())
            self._size += len(message.get("body", b""))
            if not message.get("more_body", False):
                self._complete.set()


def _too_large(limit: int) -> RequestError:
    return RequestError(
        f"The body of the request is larger than the {limit / 2**20:g} MiB that are allowed; send less, or a shorter "
        "recording.",
        413,
        code="too_large",
    )
