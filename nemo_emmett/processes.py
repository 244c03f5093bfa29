"""Worker processes that never outlive the process that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

_SECONDS_BETWEEN_LOOKS = 0.5


def available_cores() -> int:
    """The cores that this process may use, which a container or ``taskset`` may have made fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def end_with_parent(parent: int) -> None:
    """Make this process end within half a second of its parent's end, however that comes, and leave Ctrl-C to it.

    Without this a worker of a killed process waits for its next task forever: it holds both ends of the queue itself.

    Args:
        parent: process id of the parent.
    """

    def watch() -> None:
        while os.getppid() == parent:
            threading.Event().wait(_SECONDS_BETWEEN_LOOKS)
        os._exit(1)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


@contextmanager
def forked_pool(workers: int, initializer: Callable[..., None], *arguments: Any) -> Iterator[ProcessPoolExecutor]:
    """A pool of forked processes, which have imported what this one has (NeMo takes ten seconds).

    An exception in the block, Ctrl-C among them, ends the processes at once instead of waiting for their tasks.

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
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the handler of a training, which this process has inherited
    end_with_parent(parent)
    initializer(*arguments)
