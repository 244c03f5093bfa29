"""Data workers end with what they work for: at exit, after an error, and where an iteration is given up."""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from nemo_emmett.data.dataloader import MultimodalDataLoader
from nemo_emmett.data.io.skipped_records import SkippedRecords
from nemo_emmett.data.worker_batches import WorkerBatch, WorkerBatchDataset

from ..fork_server import call_in_new_process, fork_server, print_to

WORKERS = 2
SECONDS = 20
"""Without help the process waits for its workers, which ignore a first SIGTERM, for minutes."""


BATCH = {"step": 1, "text": "x" * 200_000}
"""More than a pipe holds: where nobody reads it, a worker has sent a part."""


class Endless(torch.utils.data.IterableDataset):
    """Batches without an end."""

    def __init__(self) -> None:
        self.dataset = WorkerBatchDataset([], SkippedRecords())

    def __iter__(self) -> Iterator[WorkerBatch]:
        while True:
            yield self.dataset.worker_batch(BATCH)


KEPT: list[Iterator] = []
"""As a training keeps its iterator until the interpreter is gone."""


def end_after_a_batch(folder: Path, error: BaseException) -> None:
    print_to(folder / "log")
    multiprocessing.set_start_method("fork", force=True)  # for the data workers, as in any training
    loader = MultimodalDataLoader(Endless(), batch_size=None, num_workers=WORKERS, collate_fn=lambda batch: batch)
    KEPT.append(iter(loader))
    assert next(KEPT[0]) == BATCH
    workers = [process.pid for process in multiprocessing.active_children()]
    (folder / "workers").write_text(" ".join(map(str, workers)))
    raise error


@pytest.mark.parametrize(("error", "code"), [(SystemExit(75), 75), (RuntimeError("a crash"), 1)], ids=["exit", "crash"])
def test_it_ends_at_once_with_its_exit_code(error, code, tmp_path):
    call_in_new_process(os.getpid)  # waits for the server
    process = fork_server().Process(target=end_after_a_batch, args=(tmp_path, error))
    process.start()
    process.join(SECONDS)
    found = process.exitcode
    process.kill()
    log = (tmp_path / "log").read_text()
    assert found == code, log
    assert "DataLoader worker" not in log, "torch's complaint of workers that have died"
    workers = (tmp_path / "workers").read_text().split()
    assert len(workers) == WORKERS
    assert not any(Path("/proc", pid).exists() for pid in workers)


def loader(**options) -> MultimodalDataLoader:
    return MultimodalDataLoader(Endless(), batch_size=None, num_workers=WORKERS, collate_fn=lambda b: b, **options)


def leave(batches: Iterator) -> None:
    """As a loop that is left by ``break``."""
    batches.close()


def fail(batches: Iterator) -> BaseException:
    """The error is kept, and with its traceback all that the loader had."""
    with pytest.raises(KeyError) as failure:
        batches.throw(KeyError("of the loader"))
    return failure.value


def forget_in_a_cycle(batches: Iterator | MultimodalDataLoader) -> None:
    """As an exception does, whose traceback knows the frame that knows the exception."""
    cycle = [batches]
    cycle.append(cycle)
    del batches, cycle
    gc.collect()


@pytest.fixture
def own_workers() -> Callable[[], list]:
    """The processes that have been started since and are alive."""
    before = {process.pid for process in multiprocessing.active_children()}
    return lambda: [process for process in multiprocessing.active_children() if process.pid not in before]


def alive_soon(processes: list) -> list:
    """Those that are still alive when a process that was killed is gone. torch gives its workers 5 s."""
    for process in processes:
        process.join(2)
    return [process for process in processes if process.is_alive()]


@pytest.fixture
def slow_pinning(monkeypatch):
    """torch's thread that pins memory, as with a GPU; what it does for a batch takes a while."""
    for name, value in {"is_available": True, "current_device_index": 0, "set_device_index": None}.items():
        monkeypatch.setattr(torch.accelerator, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: torch.device("cpu"))
    monkeypatch.setattr(WorkerBatch, "pin_memory", lambda self: time.sleep(0.05) or self, raising=False)


def pinning_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if "_pin_memory_loop" in thread.name]


@pytest.mark.parametrize("is_pinned", [False, True])
@pytest.mark.parametrize("give_up", [leave, fail, forget_in_a_cycle])
def test_workers_of_an_iteration_that_is_given_up_end(own_workers, give_up, is_pinned, slow_pinning):
    batches = [iter(loader(pin_memory=is_pinned))]
    next(batches[0])
    workers = own_workers()
    assert len(workers) == WORKERS
    assert len(pinning_threads()) == is_pinned
    kept = give_up(batches.pop())
    assert not alive_soon(workers)
    assert not pinning_threads()
    del kept


def test_workers_that_persist_wait_for_the_next_iteration(own_workers):
    persistent = loader(persistent_workers=True)
    for _ in range(2):
        batches = iter(persistent)
        next(batches)
        workers = {process.pid for process in own_workers()}
        leave(batches)
        assert {process.pid for process in own_workers()} == workers
    fail_of_next = iter(persistent)
    next(fail_of_next)
    ended = own_workers()
    fail(fail_of_next)
    assert not alive_soon(ended)
    assert next(iter(persistent)) == BATCH, "with new workers"
    last, loaders = own_workers(), [persistent]
    del persistent
    forget_in_a_cycle(loaders.pop())
    assert not alive_soon(last)
