"""A process that ends with data workers at work keeps its exit code, and does not wait for them."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
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


class Endless(torch.utils.data.IterableDataset):
    """Batches without an end."""

    def __init__(self) -> None:
        self.dataset = WorkerBatchDataset([], SkippedRecords())

    def __iter__(self) -> Iterator[WorkerBatch]:
        while True:
            yield self.dataset.worker_batch({"step": 1})


KEPT: list[Iterator] = []
"""As a training keeps its iterator until the interpreter is gone."""


def end_after_a_batch(folder: Path, error: BaseException) -> None:
    print_to(folder / "log")
    multiprocessing.set_start_method("fork", force=True)  # for the data workers, as in any training
    loader = MultimodalDataLoader(Endless(), batch_size=None, num_workers=WORKERS, collate_fn=lambda batch: batch)
    KEPT.append(iter(loader))
    assert next(KEPT[0]) == {"step": 1}
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
