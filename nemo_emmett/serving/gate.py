"""Which requests are let in: by key, size, number and time. What stops is refused in OpenAI's form.

ASGI middleware, so that a body is refused while it comes, before a parser reads it.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from contextlib import suppress
from typing import Any

from python_multipart.multipart import parse_options_header
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

_DISCARD_SECONDS = 0.5

_TAIL = 4096
"""Bytes at the end of a form among which its last line is."""

_CLIENT_HAS_GONE = 499
"""nginx' status of a request whose client closed the connection, for the metrics."""


class Traffic:
    """The requests of a server: how many there are, and whether it takes more."""

    def __init__(self) -> None:
        self.in_flight = 0
        self.is_stopping = False
        self.is_ending = asyncio.Event()  # set: the requests in flight are ended, too
        self.ended = 0  # requests that were


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
        closing = closing_boundary(Headers(scope=scope).get("content-type", ""))
        started, response = time.monotonic(), _Response(send)
        body = _Body(receive, self.limits.upload_bytes, closing)
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
            path = _address(scope)
            self.metrics.requests.labels(path, response.status or 500).inc()
            self.metrics.seconds.labels(path).observe(time.monotonic() - started)

    def _check(self, scope: Scope, is_work: bool) -> None:
        headers = Headers(scope=scope)
        if self.api_key is not None and scope["path"].startswith(API):
            scheme, _, key = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode("latin-1"), self.api_key):
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
        ending = asyncio.ensure_future(self.traffic.is_ending.wait())
        tasks = (answering, leaving, ending)
        try:
            await asyncio.wait(tasks, timeout=self.limits.timeout, return_when=asyncio.FIRST_COMPLETED)
            if answering.done() or response.status is not None:  # what is being sent is sent to its end
                await answering
                return
            has_left, is_ended = leaving.done(), ending.done()
        finally:
            for task in tasks:
                task.cancel()  # and with the answer the inputs that wait in the queue
            await asyncio.wait(tasks)
        if is_ended:
            self.traffic.ended += 1
            raise RequestError("The server was stopped before the request was answered.", 503)
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
    """Receives a request's body up to a size; a form must be whole, whose parser drops a part that breaks off."""

    def __init__(self, receive: Receive, limit: int, closing: bytes | None) -> None:
        self._receive = receive
        self._limit = limit
        self._closing = closing
        self._tail = b""
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
        if self._closing is not None:
            self._tail = (self._tail + message.get("body", b""))[-_TAIL:]
        if not message.get("more_body", False):
            self._complete.set()
            if self._closing is not None and message["type"] == "http.request" and self._closing not in self._tail:
                raise HTTPException(400, "The form breaks off before its end; send all of it.")
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


def closing_boundary(content_type: str) -> bytes | None:
    """What ends a form of this type; None if it is no form.

    Example:
        >>> closing_boundary('multipart/form-data; boundary="a b"')
        b'--a b--'
    """
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    return b"--%s--" % boundary if kind == b"multipart/form-data" and boundary else None


def _address(scope: Scope) -> str:
    """The address of a request as the application names it; a path of the client's would be a time series each."""
    if (route := scope.get("route")) is not None:
        return route.path
    return scope["path"] if any(scope["path"] == getattr(one, "path", None) for one in scope["app"].routes) else "other"


def _too_large(limit: int) -> RequestError:
    return RequestError(
        f"The body of the request is larger than the {limit / 2**20:g} MiB that are allowed; send less, or a shorter "
        "recording.",
        413,
        code="too_large",
    )
