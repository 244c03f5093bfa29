"""A test set dealt out to the processes of an evaluation, by whole batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from lhotse import CutSet
from lhotse.dataset.sampling.base import CutSampler

from nemo_emmett.data.readers.examples import origin_of


class ShardedBatches:
    """Of the batches that one process would get those of a rank: the ``rank``-th of every ``world_size``.

    Samplers that divide the batches themselves keep the ranks in step, for which they cut the last ones anew or repeat
    examples. That does no harm in training; a test set is to be translated once, in batches that do not depend on the
    number of processes.

    Args:
        sampler: of one process; every rank runs through all of it, without reading any audio.
        rank: this process's place.
        world_size: how many there are.
    """

    def __init__(self, sampler: CutSampler, rank: int, world_size: int) -> None:
        self.sampler = sampler
        self.rank = rank
        self.world_size = world_size
        self.order: str | None = None  # digest of all batches, once they are through: the same on every rank

    def __iter__(self) -> Iterator[CutSet]:
        """Yield this rank's batches."""
        order = hashlib.sha256()
        for number, batch in enumerate(self.sampler):
            order.update(repr([origin_of(example) for example in batch]).encode())
            if number % self.world_size == self.rank:
                yield batch
        self.order = order.hexdigest()
