"""How a training ends that shall be started again: all ranks leave with one exit code, without a collective.

A rank that ran out of memory in the midst of a collective cannot tell the others by one: they wait in it, and would
until its timeout. So every rank has a thread that looks into the store by which the ranks once found each other; who
has to leave leaves word there.
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

_WORD, _LEAVING = "nemo_emmett/leave_with", "nemo_emmett/leaving"
_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_TO_WAIT = 20.0  # for ranks that do not answer; they may be gone already


class CoordinatedExit:
    """Lets the ranks of a training leave together."""

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self._store: dist.Store | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Watch for word from the other ranks, if there are any."""
        if world_size() == 1:
            return
        # A connection of its own: the training's may be in use for as long as a collective waits.
        self._store = _get_default_store().clone()
        self._thread = threading.Thread(target=self._watch, name="leave-together", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Watch no more. Does not return where this rank is about to leave.

        The rank's training may see the others' connections break before it has left, and must not end by that error.
        """
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def leave(self, sentence: str, exit_code: int) -> NoReturn:
        """End this process, and have all other ranks end, with a sentence and an exit code.

        A single process leaves by ``SystemExit``, so that whoever called may clean up. With several ranks nothing is
        cleaned up: loggers, strategies and process groups have collectives in their ways out.
        """
        _say(sentence)
        if self._store is None:
            raise SystemExit(exit_code)
        self._stopped.set()
        self._store.set(_WORD, f"{exit_code} rank {dist.get_rank()}: {sentence}")
        self._go(exit_code)

    def _watch(self) -> None:
        while not self._stopped.wait(_SECONDS_BETWEEN_LOOKS):
            try:
                if not self._store.check([_WORD]):
                    continue
                exit_code, sentence = self._store.get(_WORD).decode().split(" ", 1)
            except RuntimeError:
                return  # the store is gone: rank 0 has come to its end
            _say(sentence)
            self._go(int(exit_code))

    def _go(self, exit_code: int) -> NoReturn:
        """Leave when all ranks are about to; rank 0 first, for a launcher in it kills all once another has failed."""
        try:
            self._store.add(_LEAVING, 1)
            deadline = time.monotonic() + _SECONDS_TO_WAIT
            while self._store.add(_LEAVING, 0) < world_size() and time.monotonic() < deadline:
                time.sleep(0.05)
            if dist.get_rank() != 0:
                time.sleep(_SECONDS_BETWEEN_LOOKS)
        except RuntimeError:
            pass  # the store went with rank 0
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)


def _say(sentence: str) -> None:
    """On every rank; NeMo's logging speaks on the first one only."""
    sys.stderr.write(f"OOMptimizer: {sentence}\n")
