"""Workers end with the process that started them, whatever ends it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_emmett.corpora.preparing import _each
from nemo_emmett.processes import forked_pool

WORKERS = 2
SECONDS_TO_END = 60


def work(folder: Path) -> None:
    """Write the process id, then take longer than any test."""
    (folder / str(os.getpid())).touch()
    time.sleep(600)


def in_forked_pool(folder: Path) -> None:
    with forked_pool(WORKERS, os.getpid) as pool:
        for future in [pool.submit(work, folder) for _ in range(WORKERS)]:
            future.result()


def in_preparing(folder: Path) -> None:
    list(_each(work, [(folder,)] * WORKERS, WORKERS))


def wait_until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + SECONDS_TO_END
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize("start", [in_forked_pool, in_preparing])
def test_workers_end_with_the_process_that_started_them(start, number, tmp_path):
    process = multiprocessing.get_context("fork").Process(target=start, args=(tmp_path,))
    process.start()
    assert wait_until(lambda: len(list(tmp_path.iterdir())) == WORKERS)
    os.kill(process.pid, number)
    process.join(SECONDS_TO_END)
    assert process.exitcode is not None
    workers = [int(path.name) for path in tmp_path.iterdir()]
    assert wait_until(lambda: not any(runs(pid) for pid in workers))
