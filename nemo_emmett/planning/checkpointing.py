"""The share of blocks whose activations are computed again, such that an epoch takes the least time.

Recomputing a block takes its forward pass once more and frees its activations, so that batches are larger and steps
fewer. Each of a few shares is planned with batch sizes of its own; operations of recomputed blocks are among those that
are counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lightning.pytorch import LightningModule
from omegaconf import DictConfig
from rich.table import Table

from nemo_emmett.errors import ConfigError, Help
from nemo_emmett.models.base import SpeechTextModel
from nemo_emmett.oomptimizer import Profile
from nemo_emmett.planning.planner import Planner
from nemo_emmett.planning.report import duration

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Values of ``model.activation_checkpointing`` that are planned."""

NO_GAIN = 0.02
"""A larger share has to save more of the predicted time than this, which is no more exact."""


def check_has_checkpointing(model: LightningModule) -> None:
    """Raises a ConfigError for a model that has no ``activation_checkpointing``."""
    if not isinstance(model, SpeechTextModel):
        raise ConfigError(
            f"--choose-checkpointing: {type(model).__name__} is no model of nemo_emmett, and has no "
            "model.activation_checkpointing; leave the option out."
        )


def with_fastest_share(planner: Planner, find: Callable[[Planner], Profile]) -> tuple[Planner, Profile]:
    """The planner and the profile of the share with the shortest predicted epoch, or of a smaller one that takes as
    long; prints a comparison.

    Args:
        planner: of the recipe.
        find: plans batch sizes, and predicts the time of an epoch.

    Raises:
        ConfigError: if no share fits into the memory.
    """
    found: dict[float, tuple[Planner, Profile]] = {}
    for share in SHARES:
        title = f"{planner.title}, activation_checkpointing: {share:g}"
        of_share = replace(planner, cfg=_with_share(planner.cfg, share), title=title, operations={})
        try:
            found[share] = of_share, find(of_share)
        except ConfigError as error:
            if error.page is not Help.OUT_OF_MEMORY or (share == SHARES[-1] and not found):
                raise
    shortest = min(profile.epoch_seconds for _, profile in found.values())
    best = next(share for share in found if found[share][1].epoch_seconds <= (1 + NO_GAIN) * shortest)
    planner.console.print("", _comparison({share: profile for share, (_, profile) in found.items()}), sep="\n")
    planner.console.print(
        f"\nThe profile is for trainings with `model.activation_checkpointing={best:g}`.", highlight=False
    )
    chosen, profile = found[best]
    return chosen, profile if _has_buckets(profile) else replace(profile, epoch_seconds=None)


def _has_buckets(profile: Profile) -> bool:
    """Whether all groups have; otherwise each example counts as one of the longest, which only compares shares."""
    return all(buckets.limit_key is None for buckets in profile.groups.values())


def _with_share(cfg: DictConfig, share: float) -> DictConfig:
    changed = cfg.copy()
    changed.model.activation_checkpointing = share
    return changed


def _comparison(profiles: dict[float, Profile]) -> Table:
    """Batch sizes and epochs of the shares; one without a profile does not fit."""
    reference = next(iter(profiles.values())).epoch_seconds
    table = Table(title="model.activation_checkpointing", title_justify="left", box=None, pad_edge=False)
    table.add_column("share", no_wrap=True)
    for name in ("batch sizes", "epoch", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for share in SHARES:
        if (profile := profiles.get(share)) is None:
            table.add_row(f"{share:g}", "does not fit")
            continue
        sizes = [size for group in profile.groups.values() for size in group.bucket_batch_size]
        epoch = duration(profile.epoch_seconds) if _has_buckets(profile) else "–"
        ratio = f"x {profile.epoch_seconds / reference:.3f}"
        table.add_row(f"{share:g}", f"{min(sizes)} to {max(sizes)}", epoch, ratio)
    return table
