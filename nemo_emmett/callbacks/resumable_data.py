"""Lets a run resume at the batch after the last one trained on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from nemo.core.classes.common import Serialization
from nemo.utils import logging

from nemo_emmett.callbacks.resumable_loop import ResumableEpochLoop, install_resumable_loop
from nemo_emmett.callbacks.validation_schedule import ValidateAtEpochEnd, warn_of_no_validation
from nemo_emmett.data.dataloader import MultimodalDataLoader


class ResumableData(Callback, Serialization):
    """Stores the exact position of training in checkpoints: in the data, in the step and in the epoch.

    Lightning writes the state of a data loader into every checkpoint, but it fetches one batch in advance: without this
    callback the batch that was fetched and not trained on is skipped after resuming. The callback reports the batches
    trained on to the loader, and replaces the trainer's epoch loop by
    :class:`~nemo_emmett.callbacks.resumable_loop.ResumableEpochLoop`, which neither trains on an extra batch nor
    repeats a validation. ``MultimodalDataModule`` adds it; a recipe with NeMo's ``DataModule`` and
    ``use_emmett: true`` names it.

    Example:
        In a recipe::

            trainer:
              callbacks:
                - _target_: nemo_emmett.callbacks.ResumableData
    """

    is_asked_for = True  # False if a datamodule adds it, which has warned already if the data cannot resume

    def __init__(self) -> None:
        self._loaders: list[MultimodalDataLoader] = []
        self._epoch_begins = False
        self._has_warned_of_validation = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Install the resumable epoch loop before a checkpoint is restored."""
        if stage == "fit":
            install_resumable_loop(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checkpoints written from here on do not repeat this validation."""
        loop = trainer.fit_loop.epoch_loop
        if isinstance(loop, ResumableEpochLoop) and not trainer.sanity_checking:
            loop.validation_finished()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on a batch counts when it was trained on. Warn if no loader of the training can resume."""
        self._loaders = list(_resumable_loaders(trainer))
        self._epoch_begins = False  # the first one may be the rest of one that was interrupted
        for loader in self._loaders:
            loader.progress.count_trained()
        if self.is_asked_for and not self._loaders:
            _warn_of_data_that_starts_over(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the next pass of finite data, and hand its state to new loaders
        (``reload_dataloaders_every_n_epochs``).

        Lightning begins to iterate after this hook, over new loaders once before it as well.
        """
        loaders = list(_resumable_loaders(trainer))
        if self._epoch_begins:
            for old, new in zip(self._loaders, loaders, strict=False):
                old.progress.end_epoch()
                if new is not old:
                    new.load_state_dict(old.state_dict())
                    new.progress.count_trained()
        self._loaders, self._epoch_begins = loaders, True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch."""
        for loader in _resumable_loaders(trainer):
            loader.progress.trained()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn once if the epoch ended before its validation, unless a callback validates it then."""
        validates = any(isinstance(callback, ValidateAtEpochEnd) for callback in trainer.callbacks)
        if self.is_asked_for and not validates and not self._has_warned_of_validation:
            self._has_warned_of_validation = warn_of_no_validation(trainer)


def _warn_of_data_that_starts_over(trainer: Trainer) -> None:
    found = [getattr(loader, "_source", loader) for loader in CombinedLoader(trainer.train_dataloader).flattened]
    ours = any(isinstance(loader, MultimodalDataLoader) for loader in found)
    if not ours and any(hasattr(loader, "state_dict") for loader in found):
        return  # Lightning keeps the state of a loader that has one
    where = "data.train_ds" if trainer.datamodule is not None else "model.train_ds"
    needed = ["sampling=emmett"] if ours else ["use_emmett=true", "sampling=emmett"]
    if not ours and trainer.datamodule is None:  # NeMo's ASR models
        needed.insert(0, "use_lhotse=true")
    reader, keys = "samplers draw" if ours else "dataloader reads", " ".join(f"++{where}.{key}" for key in needed)
    if trainer.datamodule is None and isinstance(trainer.limit_train_batches, float):
        keys += (
            " ++trainer.limit_train_batches=1000 (the batches of an epoch, which NeMo's ASR models cannot count then)"
        )
    logging.warning(
        f"ResumableData does not hold the position in the data of {where}, which NeMo's own {reader}: a resumed run "
        "starts the data of the epoch from its beginning, and only the position in step and epoch is held. To resume "
        f"at the next batch, set {keys}."
    )


def _resumable_loaders(trainer: Trainer) -> Iterator[MultimodalDataLoader]:
    for loader in CombinedLoader(trainer.train_dataloader).flattened:
        loader = getattr(loader, "_source", loader)  # NeMo's BroadcastingDataLoader
        if isinstance(loader, MultimodalDataLoader) and loader.progress is not None:
            yield loader
