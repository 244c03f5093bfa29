"""A Lightning callback by which a checkpoint knows the last batch trained on, not the last one fetched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from nemo.core.classes.common import Serialization

from nemo_emmett.data.dataloader import MultimodalDataLoader


class ResumableData(Callback, Serialization):
    """Tells the training's data loader which batches were trained on.

    Lightning writes the state of a data loader into every checkpoint, but it fetches a batch in advance: without this
    callback the batch that waits when a checkpoint is made is skipped after resuming. ``MultimodalDataModule`` brings
    it along; a recipe with NeMo's ``DataModule`` and ``use_emmett: true`` names it.

    Example:
        In a recipe::

            trainer:
              callbacks:
                - _target_: nemo_emmett.callbacks.ResumableData
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on this callback says what was trained on."""
        for loader in _resumable_loaders(trainer):
            loader.progress.count_trained()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One more batch."""
        for loader in _resumable_loaders(trainer):
            loader.progress.trained()


def _resumable_loaders(trainer: Trainer) -> Iterator[MultimodalDataLoader]:
    for loader in CombinedLoader(trainer.train_dataloader).flattened:
        loader = getattr(loader, "_source", loader)  # NeMo's BroadcastingDataLoader
        if isinstance(loader, MultimodalDataLoader) and loader.progress is not None:
            yield loader
