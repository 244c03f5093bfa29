"""Ends a training on all ranks with one exit code, without a collective.

A rank that runs out of memory in the middle of a collective cannot reach the others by another one: they wait in it,
until its timeout. So every rank has a thread that polls a key of the store by which the ranks initialised their process
group; a rank that has to exit sets that key.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import NoReturn

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from nemo_emmett.modules.loss import world_size

_EXIT_KEY, _COUNT_KEY = "nemo_emmett/exit", "nemo_emmett/exiting_ranks"
_POLL_SECONDS = 1.0
_WAIT_SECONDS = 20.0  # for ranks that do not answer; they may have ended already


class CoordinatedExit:
    """Lets the ranks of a training exit together."""

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self._store: dist.Store | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Poll for an exit of the other ranks, if there are any."""
        if world_size() == 1:
            return
        # A connection of its own: the training's may be in use for as long as a collective waits.
        self._store = _get_default_store().clone()
        self._thread = threading.Thread(target=self._poll, name="coordinated-exit", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop polling. Does not return if this rank is about to exit.

        The rank's training may see the others' connections break before it exits, and must not end by that error.
        """
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def exit(self, sentence: str, exit_code: int) -> NoReturn:
        """End this process, and make all other ranks end, with a sentence and an exit code.

        A single process raises ``SystemExit``, so that its callers can clean up. With several ranks nothing is cleaned
        up: loggers, strategies and process groups use collectives when they are closed.
        """
        _print(sentence)
        if self._store is None:
            raise SystemExit(exit_code)
        self._stopped.set()
        self._store.set(_EXIT_KEY, f"{exit_code} rank {dist.get_rank()}: {sentence}")
        self._exit_with_others(exit_code)

    def _poll(self) -> None:
        while not self._stopped.wait(_POLL_SECONDS):
            try:
                if not self._store.check([_EXIT_KEY]):
                    continue
                exit_code, sentence = self._store.get(_EXIT_KEY).decode().split(" ", 1)
            except RuntimeError:
                return  # the store ended with rank 0
            _print(sentence)
            self._exit_with_others(int(exit_code))

    def _exit_with_others(self, exit_code: int) -> NoReturn:
        """Exit when all ranks are about to; rank 0 first, since a launcher in it kills all once another has failed."""
        try:
            self._store.add(_COUNT_KEY, 1)
            deadline = time.monotonic() + _WAIT_SECONDS
            while self._store.add(_COUNT_KEY, 0) < world_size() and time.monotonic() < deadline:
                time.sleep(0.05)
            if dist.get_rank() != 0:
                time.sleep(_POLL_SECONDS)
        except RuntimeError:
            pass  # the store ended with rank 0
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)


def _print(sentence: str) -> None:
    """On every rank; NeMo's logging prints on the first one only."""
    sys.stderr.write(f"OOMptimizer: {sentence}\n")
