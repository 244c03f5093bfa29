"""The profile of a run: looked up, checked against what the run would measure, applied to ``train_ds``, and written.

A profile is a file that the user names, or one that is named by a hash of what it was measured on. With
``resume_if_exists``, NeMo's ``exp_manager`` moves every loose file of its log folder into ``run_0``, ``run_1``, ... at
each start, the profile among them. Its batch sizes (lowered by guard, or edited by the user) still hold for the run, so
the newest one that fits is moved back.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo.utils import logging
from nemo.utils.app_state import AppState
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_emmett.errors import ConfigError, Help
from nemo_emmett.oomptimizer.buckets import Bucket, Group, bins_of, configs_of_groups, join_place
from nemo_emmett.oomptimizer.fingerprint import check_fingerprint, short_hash
from nemo_emmett.oomptimizer.profile import ONLY_GROUP, ROW_TOKENS, BatchSize, Buckets, Event, Profile, shown
from nemo_emmett.typed_config import parse_value


@dataclass(frozen=True)
class ProfiledRun:
    """The run that a profile is for.

    Args:
        train_ds: the section of its training data; batch sizes are written into it.
        place: of that section in the recipe, for messages.
        mode: of OOMptimizer.
        settings: the arguments of OOMptimizer that decide batch sizes.
        fingerprint: what decides the memory of a step with the bins of a ``train_ds``; its second argument is true for
            a profile that was planned, on whatever machine.
        folder: where a profile is written whose path is not given.
        is_rank_0: whether this process reads and writes the file.
        broadcast: gives all ranks the value of rank 0.
    """

    train_ds: DictConfig
    place: str
    mode: str
    settings: Mapping[str, Any]
    fingerprint: Callable[[DictConfig, bool], dict[str, Any]]
    folder: str | os.PathLike[str] = "."
    is_rank_0: bool = True
    broadcast: Callable[[Any], Any] = lambda value: value


class ProfileStore:
    """Keeps the profile of a run.

    Args:
        path: of the profile; None for a file in the run's folder that is named by what it was measured on.

    Attributes:
        path: of the profile; None until a run is known, if it was not given.
        profile: the one in use; None until it is found or made.

    Raises:
        ConfigError: if there is a file at ``path`` that is no profile.

    Example:
        >>> store = ProfileStore("profile.yaml")
        >>> if store.find(run) is None:
        ...     store.add(measure(run), run)
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path: str | None = None if path is None else str(path)
        self._path_is_given = path is not None
        # Read at once, so that a corrupt profile is refused before a model is built.
        self.profile: Profile | None = _read_if_exists(self.path) if self.path else None

    def find(self, run: ProfiledRun) -> Profile | None:
        """The profile of a run, with its batch sizes written into ``train_ds``; None if there is none.

        All ranks use what rank 0 finds.

        Raises:
            ConfigError: if it cannot be used, or was made for something else.
        """
        if not self._path_is_given:
            # An earlier fit may have been of another model.
            identity = {**run.fingerprint(run.train_ds, run.mode == "plan"), "asked": dict(run.settings)}
            self.path = os.path.join(run.folder, f"oomptimizer-{short_hash(identity)}.yaml")
            self.profile = None
        if run.is_rank_0:
            self.profile = self.profile or _read_if_exists(self.path)
            self.profile = self._restore_archived(run) or self.profile
        self.path, self.profile = run.broadcast((self.path, self.profile))
        if self.profile is not None:
            self._check_and_apply(self.profile, run, run.train_ds)
            self._log(self.profile, run.place)
            if self.profile.settings.get("mode") == run.mode == "calibrate":
                self._warn_of_other_settings(self.profile.settings, run.settings)
        return self.profile

    def add(self, profile: Profile, run: ProfiledRun) -> None:
        """Take a profile that was made for this run: write its file, and its batch sizes into ``train_ds``.

        Raises:
            ConfigError: if the file cannot be written.
        """
        self.profile = profile
        if run.is_rank_0:
            profile.write(self.path)
        self._apply(profile, run.train_ds, run.place)
        self._log(profile, run.place)

    def batch_sizes(self, groups: Mapping[str, Group]) -> dict[Bucket, int]:
        """The batch size of each bucket."""
        return {
            bucket: size
            for name, group in groups.items()
            for bucket, size in zip(group.buckets, self.profile.groups[name].bucket_batch_size, strict=True)
        }

    def slopes(self, groups: Mapping[str, Group]) -> dict[Bucket, float]:
        """Bytes per example, of the buckets for which they were measured."""
        return {
            bucket: measure.memory.slope
            for name, measures in self.profile.measures.items()
            for bucket, measure in zip(groups[name].buckets, measures, strict=True)
            if measure.memory is not None
        }

    def lowered(self, sizes: Mapping[Bucket, int], events: Sequence[Event]) -> Profile:
        """The profile with lower batch sizes, and what lowered them.

        Args:
            sizes: of all buckets, in their order.
            events: all since the profile was found.
        """
        by_group: dict[str, list[int]] = {}
        for bucket, size in sizes.items():
            by_group.setdefault(bucket.group, []).append(size)
        return self.profile.with_batch_sizes(by_group, *events)

    def _restore_archived(self, run: ProfiledRun) -> Profile | None:
        known = self.profile  # read before exp_manager archived it; whether it fits is checked when it is applied

        def check(archived: Profile) -> None:
            if known is None:
                self._check_and_apply(archived, run, copy.deepcopy(run.train_ds))
            elif archived != known:
                raise ConfigError("it is not the one that this run has read.")

        return restore_archived(self.path, check)

    def _check_and_apply(self, profile: Profile, run: ProfiledRun, train_ds: DictConfig) -> None:
        # The fingerprint covers the bins, which the recipe may leave to the profile: so they are applied first.
        self._apply(profile, train_ds, run.place)
        if profile.fingerprint:
            planned = profile.settings.get("mode") == "plan"
            check_fingerprint(profile.fingerprint, run.fingerprint(train_ds, planned), self.path)

    def _apply(self, profile: Profile, train_ds: DictConfig, place: str) -> None:
        configs = configs_of_groups(train_ds, place)
        if configs.keys() != profile.groups.keys():
            raise ConfigError(
                f"{self.path}: the profile is for {_named(profile.groups)}, the recipe's {place} has {_named(configs)}."
            )
        for name, group in configs.items():
            buckets = profile.groups[name]
            self._check_bounds(buckets, group, join_place(place, name))
            with open_dict(group):
                for key, value in buckets.as_config().items():
                    if key.endswith("batch_size") or group.get(key) in (None, math.inf):
                        group[key] = value

    def _check_bounds(self, buckets: Buckets, group: DictConfig, place: str) -> None:
        """Refuse a profile of other bins, or of shorter examples than a group may hold."""
        bins, longest = bins_of(group, place), buckets.bucket_duration_bins[0]
        if bins is not None and bins != buckets.bucket_duration_bins and buckets.limit_key is None:
            raise ConfigError(
                f"{place}.bucket_duration_bins: the recipe has {shown(bins)}, but the profile {self.path} is for "
                f"{shown(buckets.bucket_duration_bins)}; take the profile's bins, or a profile of these.",
                page=Help.OTHER_PROFILE,
            )
        if buckets.limit_key is None:
            return
        if bins is not None:
            raise ConfigError(
                f"{place}.bucket_duration_bins: the recipe has {shown(bins)}, but the profile {self.path} has one "
                "batch_size for all lengths; remove the bins, or take a profile of these.",
                page=Help.OTHER_PROFILE,
            )
        own = group.get(buckets.limit_key)
        if buckets.limit_key == ROW_TOKENS or group.get("packing"):
            row_tokens = buckets.as_config().get(ROW_TOKENS)
            own = OmegaConf.to_container(own) if OmegaConf.is_config(own) else own
            if own != row_tokens or not group.get("packing"):
                raise ConfigError(
                    f"{place}.{ROW_TOKENS}: is {own} in the recipe, and {row_tokens} in the profile {self.path}; "
                    "delete the profile to measure again.",
                    page=Help.OTHER_PROFILE,
                )
            return
        if own is not None and longest < own < math.inf:
            raise ConfigError(
                f"{place}.{buckets.limit_key}: is {own:g}, but the profile {self.path} is for examples up to "
                f"{longest:g}; set it to {longest:g}, or delete the profile to measure again.",
                page=Help.OTHER_PROFILE,
            )

    def _log(self, profile: Profile, place: str) -> None:
        for name, buckets in profile.groups.items():
            sizes, bins = list(buckets.bucket_batch_size), buckets.bucket_duration_bins
            found = f"bucket_batch_size is {sizes} for the bins {shown(bins)}"
            if buckets.limit_key is not None:
                found = f"batch_size is {sizes[0]} for {buckets.limit_key} {shown(bins[0])}"
            logging.info(f"OOMptimizer: {join_place(place, name)}.{found}, from {self.path}.")

    def _warn_of_other_settings(self, stored: Mapping[str, Any], given: Mapping[str, Any]) -> None:
        differing = [
            f"{name} was {stored[name]} and is {value}"
            for name, value in given.items()
            if name in stored and stored[name] != value
        ]
        if differing:
            logging.warning(
                f"OOMptimizer: {self.path}: the profile was measured with other settings ({'; '.join(differing)}); its "
                "batch sizes are used as they are; delete the file to measure again."
            )


def profile_of_recipe(
    groups: Mapping[str, Group], place: str, fingerprint: dict[str, Any], settings: dict[str, Any]
) -> Profile:
    """The batch sizes that a recipe gives, as a profile; it is written once guard lowers one of them.

    Raises:
        ConfigError: if a group's are missing, or are not one positive whole number for each bin.
    """
    buckets = {}
    for name, group in groups.items():
        of_group = join_place(place, name)
        if group.limit_key is not None:
            sizes = [parse_value(BatchSize, group.config.get("batch_size"), f"{of_group}.batch_size")]
        elif (given := group.config.get("bucket_batch_size")) is None:
            sizes = []
        else:
            given = OmegaConf.to_container(given, resolve=True) if OmegaConf.is_config(given) else given
            sizes = parse_value(list[BatchSize], given, f"{of_group}.bucket_batch_size")
        if len(sizes) != len(group.buckets):
            raise ConfigError(
                f"{of_group}.bucket_batch_size: one is needed for each of the {len(group.buckets)} bins, since mode "
                "'guard' measures nothing; write them, or use mode 'calibrate'."
            )
        buckets[name] = Buckets(group.bins, tuple(sizes), group.limit_key)
    return Profile(buckets, settings=settings, fingerprint=fingerprint)


def restore_archived(path: str | os.PathLike[str], check: Callable[[Profile], None]) -> Profile | None:
    """Move the newest archived profile that fits back to its path.

    Args:
        path: where the profile was; nothing is done if a file is there, or if exp_manager's log folder is another.
        check: raises a ConfigError for a profile that does not fit this run.

    Returns:
        The profile; None if none was archived, or none fits.

    Raises:
        ConfigError: if the file cannot be moved.
    """
    path, log_dir = Path(path), AppState().log_dir
    if path.exists() or log_dir is None or Path(log_dir).resolve() != path.parent.resolve():
        return None
    # `run_*` as exp_manager names its folders; a moved file keeps its time.
    archived = [file for folder in path.parent.glob("run_*/") if (file := folder / path.name).is_file()]
    for candidate in sorted(archived, key=_time_of, reverse=True):
        try:
            profile = Profile.read(candidate)
            check(profile)
        except ConfigError as error:
            logging.warning(f"OOMptimizer: an archived profile, {candidate}, is not used: {error}")
            continue
        try:
            os.replace(candidate, path)
        except OSError as error:
            raise ConfigError(
                f"{candidate}: the archived profile cannot be moved back to {path}: {error.strerror}; move it yourself."
            ) from error
        logging.info(
            f"OOMptimizer: the profile of an earlier start was moved back from {candidate} to {path}; delete it to "
            "measure again."
        )
        return profile
    return None


def _read_if_exists(path: str) -> Profile | None:
    """The profile in a file; None if there is none, or if exp_manager of another rank archives it meanwhile."""
    try:
        return Profile.read(path)
    except ConfigError:
        if Path(path).exists():
            raise
        return None


def _time_of(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def _named(groups: Mapping[str, Any]) -> str:
    if list(groups) == [ONLY_GROUP]:
        return "one dataset without groups"
    return "the groups " + ", ".join(f"'{name}'" for name in groups)
