"""The batches of a test set, distributed over the processes of an evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from lhotse import CutSet
from lhotse.dataset.sampling.base import CutSampler

from nemo_emmett.data.readers.examples import origin_of


class ShardedBatches:
    """A rank's part of the batches that a single process would get: the ``rank``-th of every ``world_size``.

    Samplers that distribute the batches themselves keep the ranks in step, for which they divide the last batches or
    repeat examples. A test set must be translated once, in batches that do not depend on the number of processes.

    Args:
        sampler: of a single process; every rank iterates over all of it, without reading any audio.
        rank: of this process.
        world_size: number of ranks.
    """

    def __init__(self, sampler: CutSampler, rank: int, world_size: int) -> None:
        self.sampler = sampler
        self.rank = rank
        self.world_size = world_size
        self.order: str | None = None  # digest of all batches, after iteration: the same on every rank

    def __iter__(self) -> Iterator[CutSet]:
        """Yield this rank's batches."""
        order = hashlib.sha256()
        for number, batch in enumerate(self.sampler):
            order.update(repr([origin_of(example) for example in batch]).encode())
            if number % self.world_size == self.rank:
                yield batch
        self.order = order.hexdigest()
