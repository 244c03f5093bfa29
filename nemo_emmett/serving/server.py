"""The process of a server: its socket, which is taken before the model is loaded, and how it stops.

The first SIGTERM or SIGINT lets the requests in flight finish; new ones get 503. At a second one these get it, too.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from nemo_emmett.errors import ConfigError
from nemo_emmett.serving.connections import Connection
from nemo_emmett.serving.gate import Traffic

_CLOSING_SECONDS = 5
"""How long connections are waited for that are open when all requests are answered."""


def bind(host: str, port: int) -> socket.socket:
    """Take a port. It refuses connections until the server starts.

    Args:
        host: address to listen at.
        port: 0: any that is free.

    Raises:
        ConfigError: if the port is taken, or the address is none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    taken = socket.socket(family, socket.SOCK_STREAM)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((host, port))
    except (OSError, OverflowError) as error:
        taken.close()
        raise ConfigError(
            f"--host, --port: the server cannot listen at {host}:{port} ({error.strerror or error}); give another port."
            if isinstance(error, OSError)
            else f"--port: {port} is no port; give one up to 65535."
        ) from error
    return taken


class Server(uvicorn.Server):
    """A uvicorn server that finishes the requests in flight when it is told to stop.

    Args:
        config: of uvicorn.
        traffic: of the application.
        on_start: called when it listens.
    """

    def __init__(self, config: uvicorn.Config, traffic: Traffic, on_start: Callable[[], None] = lambda: None) -> None:
        super().__init__(config)
        self.traffic = traffic
        self.on_start = on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        self.on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take no more requests; at the second signal, end those in flight; at the third, stop at once."""
        if self.traffic.is_ending.is_set():
            self.force_exit = True
            super().handle_exit(sig, frame)
        if self.traffic.is_stopping:
            self.traffic.is_ending.set()
        self.traffic.is_stopping = True

    async def on_tick(self, counter: int) -> bool:
        """Whether to stop now; uvicorn asks every tenth of a second."""
        if self.traffic.is_stopping and not self.traffic.in_flight:
            self.should_exit = True
        return await super().on_tick(counter)


def run(app: FastAPI, traffic: Traffic, listener: socket.socket, on_start: Callable[[], None]) -> None:
    """Serve until a signal.

    Args:
        app: from :func:`nemo_emmett.serving.app.create_app`.
        traffic: the application's.
        listener: from :func:`bind`.
        on_start: called when it listens.
    """
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # its warnings are of what clients send
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        http=Connection,
        ws="none",
        timeout_graceful_shutdown=_CLOSING_SECONDS,
    )
    Server(config, traffic, on_start).run(sockets=[listener])
