"""Counts of what a training has trained on, for the exported model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

Direction = tuple[str, str | None, str | None]
"""Modality, source language and target language of an example; None where the data does not name it."""


class TrainedExamples(Callback):
    """Counts the examples of a training by modality and direction, over all ranks and over resumed runs.

    A checkpoint holds the counts of rank 0, which a resumed run continues on every rank: all ranks have about the same.
    """

    def __init__(self) -> None:
        self.counts: Counter[Direction] = Counter()  # of this rank
        self.of_all_ranks: Counter[Direction] | None = None  # once the training has ended

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the examples of a batch of ours; NeMo's batches do not describe theirs."""
        for part in batch.values() if isinstance(batch, Mapping) else ():
            for example in part.get("examples") or () if isinstance(part, Mapping) else ():
                self.counts[example["modality"], example["source_lang"], example["target_lang"]] += 1

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add up the counts of all ranks; checkpoints that are written after this still hold those of rank 0."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            of_ranks: list[Counter[Direction]] = [Counter()] * dist.get_world_size()
            dist.all_gather_object(of_ranks, self.counts)
            self.of_all_ranks = sum(of_ranks, Counter())

    def state_dict(self) -> dict[str, Any]:
        """The counts so far."""
        return {"counts": [[*direction, count] for direction, count in self.counts.items()]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the counts of the runs before."""
        self.counts = counts_of(state_dict)


def counts_of(state_dict: Mapping[str, Any]) -> Counter[Direction]:
    """The counts in the state of a callback."""
    return Counter({tuple(direction): count for *direction, count in state_dict.get("counts", ())})
