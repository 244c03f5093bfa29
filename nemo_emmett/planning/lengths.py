"""The lengths of a training's examples, by which bins are judged."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nemo_emmett.data import MultimodalDataModule
from nemo_emmett.data.bucketing.length_stats import Lengths, measure
from nemo_emmett.data.config.dataset_config import parse_dataset
from nemo_emmett.data.worker_batches import prepare_dataset
from nemo_emmett.errors import ConfigError


def lengths_of_groups(
    datamodule: MultimodalDataModule, two_dimensional: dict[str, bool], limit: int | None = None
) -> dict[str, Lengths]:
    """Measure the examples of ``train_ds`` as its samplers do, without their audio.

    Args:
        datamodule: of the training.
        two_dimensional: by the name of each group, whether outputs are to be measured, too.
        limit: examples to measure of each group; by default each example once.

    Raises:
        ConfigError: if the config lacks what measuring needs.
        DataError: if there is nothing to measure.
    """
    if not isinstance(datamodule, MultimodalDataModule):
        raise ConfigError(
            "model.train_ds: the lengths of an ASR model's data are not measured here; write the bins that "
            "`nemo-emmett bins` finds, and leave the option out."
        )
    groups = {group.name: group for group in parse_dataset(datamodule.cfg.train_ds, "data.train_ds").groups}
    _, kind = prepare_dataset(datamodule.dataset)
    return {
        name: measure(groups[name], datamodule.tokenizer, kind, two_dimensional=is_two_dimensional, limit=limit)
        for name, is_two_dimensional in two_dimensional.items()
    }


def numbers_of_buckets(bins: Sequence) -> tuple[int, int | None]:
    """How many strips of inputs given bins have, and how many sub-buckets the fullest of them; None in one dimension.

    Example:
        >>> numbers_of_buckets([[4, 2], [4, 8], [9, 9]])
        (2, 2)
    """
    if np.ndim(bins) == 1:
        return len(bins), None
    _, counts = np.unique(np.asarray(bins, dtype=float)[:, 0], return_counts=True)
    return len(counts), int(counts.max())
