"""Counts of what a training has trained on, for the exported model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from nemo_emmett.modules.data_ranks import reads_first
from nemo_emmett.prompts.language_codes import normalized

Direction = tuple[str, str | None, str | None]
"""Modality, source language and target language of an example; None where the data does not name it."""


class TrainedExamples(Callback):
    """Counts the examples of a training by modality and direction, over all ranks and over resumed runs.

    A checkpoint holds the counts of all ranks up to its step.
    """

    def __init__(self) -> None:
        self.before: Counter[Direction] = Counter()  # of all ranks, in the runs that this one resumes
        self.counts: Counter[Direction] = Counter()  # of this rank, in this run
        self.of_all_ranks: Counter[Direction] | None = None  # once the training has ended

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the examples of a batch of ours; NeMo's batches do not describe theirs."""
        counts = isinstance(batch, Mapping) and reads_first(pl_module)
        for part in batch.values() if counts else ():
            for example in part.get("examples") or () if isinstance(part, Mapping) else ():
                self.counts[example["modality"], example["source_lang"], example["target_lang"]] += 1

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add up the counts of all ranks."""
        self.of_all_ranks = self._add_up()

    def state_dict(self) -> dict[str, Any]:
        """The counts of all ranks so far; every rank must call it, as Lightning does to save a checkpoint."""
        return {
            "counts": [[*direction, count] for direction, count in self._add_up().items()],
            "processes": _world_size(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the counts of the runs before."""
        if "processes" in state_dict:
            self.before = counts_of(state_dict)
        else:  # of a version that saved rank 0's alone: all ranks had about the same
            self.counts = counts_of(state_dict)

    def _add_up(self) -> Counter[Direction]:
        of_ranks = [self.counts] * _world_size()
        if len(of_ranks) > 1:
            dist.all_gather_object(of_ranks, self.counts)
        return sum(of_ranks, self.before)


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def counts_of(state_dict: Mapping[str, Any]) -> Counter[Direction]:
    """The counts in the state of a callback."""
    counts: Counter[Direction] = Counter()
    for modality, source, target, count in state_dict.get("counts", ()):
        counts[modality, normalized(source), normalized(target)] += count
    return counts
