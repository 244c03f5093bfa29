"""A request that is refused, in the form of OpenAI's API."""

from __future__ import annotations

import json
from typing import Any

MOST_SHOWN = 100
"""Characters of a client's value in a message."""


def shown(value: Any) -> str:
    """A client's value for a message: short, and of characters that can be sent."""
    text = str(value)
    text = text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."
    return text.encode("utf-8", "replace").decode()


class RequestError(Exception):
    """A request cannot be answered.

    Args:
        message: one sentence for the client.
        status: of the HTTP response.
        param: the field at fault.
        code: OpenAI's short name of the error, for programs.
    """

    def __init__(self, message: str, status: int = 400, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message.encode("utf-8", "replace").decode())
        self.status = status
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """The JSON of the response."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def encoded(self) -> bytes:
        """The JSON as bytes."""
        return json.dumps(self.body()).encode()

    def headers(self) -> dict[str, str]:
        """Headers of the response: when to come again, and that the client has to say who it is."""
        if self.status in (429, 503):
            return {"Retry-After": "1"}
        return {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
