"""A request that is refused, in the form of OpenAI's API."""

from __future__ import annotations

from typing import Any


class RequestError(Exception):
    """A request cannot be answered.

    Args:
        message: one sentence for the client.
        status: of the HTTP response.
        param: the field at fault.
        code: OpenAI's short name of the error, for programs.
    """

    def __init__(self, message: str, status: int = 400, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """The JSON of the response."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Headers of the response: when to come again, and that the client has to say who it is."""
        if self.status in (429, 503):
            return {"Retry-After": "1"}
        return {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
