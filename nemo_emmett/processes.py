"""The number of usable cores, and worker processes that end with the process that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm


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
            threading.Event().wait(0.5)
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


def workers_for(tasks: int) -> int:
    """How many processes to share so many tasks out to.

    The processes of a training on one machine all do the same at once; and a daemon, such as a loader's worker, must
    not have children.
    """
    if multiprocessing.current_process().daemon or "fork" not in multiprocessing.get_all_start_methods():
        return 1
    return max(1, min(tasks, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def map_in_processes(
    function: Callable[[Any, Callable[[int], Any]], Any], tasks: Sequence[Any], workers: int, bar: tqdm
) -> Iterator[Any]:
    """Yield ``function(task, progress)`` of each task in turn, computed in forked processes.

    Args:
        function: need not be picklable; tasks and results must be. It calls ``progress`` with the work done since the
            last call.
        tasks: in the order of the results.
        workers: number of processes; 1: everything is done in this one.
        bar: shows the progress.
    """
    if workers == 1:
        yield from (function(task, bar.update) for task in tasks)
        return
    done = multiprocessing.get_context("fork").Value("q", 0)
    with forked_pool(workers, _set_function, function, done) as pool:
        for future in [pool.submit(_run_function, task) for task in tasks]:
            while wait([future], timeout=0.2).not_done:
                bar.update(done.value - bar.n)
            bar.update(done.value - bar.n)
            yield future.result()


_function: Callable[[Any], Any] | None = None
"""In a worker of :func:`map_in_processes`: what it does with a task."""


def _set_function(function: Callable[[Any, Callable[[int], Any]], Any], done: Any) -> None:
    def add_to_done(count: int) -> None:
        with done.get_lock():
            done.value += count

    global _function
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores already
    _function = lambda task: function(task, add_to_done)  # noqa: E731


def _run_function(task: Any) -> Any:
    return _function(task)


def _start_worker(parent: int, initializer: Callable[..., None], arguments: tuple) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a forked process inherits the handler of a training
    end_with_parent(parent)
    initializer(*arguments)
