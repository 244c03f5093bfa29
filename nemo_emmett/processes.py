"""The number of usable cores, and worker processes that end with the process that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

_SECONDS_BETWEEN_CHECKS = 0.5


def available_cores() -> int:
    """Number of cores that this process may run on, which ``taskset`` or a container's cpuset may limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def end_with_parent(parent: int) -> None:
    """End this process within half a second of its parent's end, whatever the cause, and ignore Ctrl-C.

    A worker of a killed process would wait for its next task forever, since it holds both ends of the queue itself.

    Args:
        parent: process id of the parent.
    """

    def watch() -> None:
        while os.getppid() == parent:
            threading.Event().wait(_SECONDS_BETWEEN_CHECKS)
        os._exit(1)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


@contextmanager
def forked_pool(workers: int, initializer: Callable[..., None], *arguments: Any) -> Iterator[ProcessPoolExecutor]:
    """A pool of forked processes. They need not import what this one has imported (NeMo takes ten seconds).

    An exception in the block, also Ctrl-C, kills the processes instead of waiting for their tasks.

    Args:
        workers: number of processes.
        initializer: called in each process with ``arguments``.
    """
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, context, _start_worker, (os.getpid(), initializer, arguments)) as pool:
        try:
            yield pool
        except BaseException:
            for process in list((pool._processes or {}).values()):
                process.kill()
            raise


def _start_worker(parent: int, initializer: Callable[..., None], arguments: tuple) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a forked process inherits the handler of a training
    end_with_parent(parent)
    initializer(*arguments)
