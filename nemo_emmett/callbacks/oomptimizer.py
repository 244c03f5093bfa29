"""The callback that gives every bucket its batch size, and keeps training within the memory."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from nemo.core.classes.common import Serialization
from nemo.utils import logging
from omegaconf import DictConfig, open_dict

from nemo_emmett.errors import ConfigError, ModelError
from nemo_emmett.modules.loss import world_size
from nemo_emmett.oomptimizer.adapters import Adapter, adapter_for
from nemo_emmett.oomptimizer.archive import read_if_there, restore_archived
from nemo_emmett.oomptimizer.arguments import check_positive, check_share, check_switch
from nemo_emmett.oomptimizer.buckets import (
    TOKENS_PER_SECOND,
    Bucket,
    Group,
    bins_of,
    configs_of_groups,
    is_zip,
    read_groups,
)
from nemo_emmett.oomptimizer.calibration import AUTO_SHARE, Calibration, Listener, SearchOptions
from nemo_emmett.oomptimizer.cuda_meter import CudaMeter, meter_for
from nemo_emmett.oomptimizer.fingerprint import check_fingerprint, fingerprint_of, short_hash
from nemo_emmett.oomptimizer.guard import Guard
from nemo_emmett.oomptimizer.in_recipe import (
    check_batch_sizes_are_read,
    check_fits,
    described,
    profile_of_recipe,
    train_ds_of,
)
from nemo_emmett.oomptimizer.memory import (
    CPU_BUDGET,
    MEMORY_FRACTION,
    budget_of,
    check_fraction,
    is_cpu_default,
    parse_memory,
)
from nemo_emmett.oomptimizer.memory import shown as shown_bytes
from nemo_emmett.oomptimizer.meter import Meter, TensorMeter, Unmetered
from nemo_emmett.oomptimizer.profile import ONLY_GROUP, Buckets, Event, Profile
from nemo_emmett.oomptimizer.search import MAX_BATCH_SIZE, PRECISION

PROFILE_VARIABLE = "NEMO_EMMETT_PROFILE"
"""Environment variable: the profile, where the callback does not name one."""

_LIMITS_OF_FIT = ("limit_train_batches", "limit_val_batches", "num_sanity_val_steps")
"""Attributes of a trainer that are 0 for the rest of a fit that ends after planning."""

_LIMITS_AFTER_FIT = ("limit_test_batches", "limit_predict_batches")
"""Those that stay 0: NeMo's ASR scripts test after the fit, with a model that was not trained."""

MODES = ("calibrate", "plan", "guard")
"""What the callback may do."""


class OOMptimizer(Callback, Serialization):
    """Finds the batch size of every bucket before training, and guards the memory during it.

    It replaces NeMo's OOMptimizer scripts (EMMeTT, arXiv 2409.13523, section 4.3) by a few steps of the training
    itself on synthetic batches, which leave no trace: a run that is calibrated equals one that is given the same
    profile by hand. Buckets are read from ``train_ds`` of the datamodule's ``cfg``, or else of the model's, and
    ``bucket_batch_size`` is written there before the data loader is built.

    A profile that exists is used, not measured again; one that was measured on something else is refused, one that was
    measured with other arguments is warned of. Recipes without ``bucket_duration_bins`` get those of the profile; in
    recipes that have them, they must be the profile's.

    Args:
        mode: ``calibrate``: measure on the device. ``plan``: work it out on fake tensors, for a device that need not
            be there. ``guard``: measure nothing; take the profile's batch sizes, or the recipe's.
        memory_fraction: share of the device's memory that a step may take. On the CPU the default means half of the
            memory that is available, at most 8 GiB.
        memory_budget: what a step may take instead, in bytes or as ``72GiB``; for ``plan`` also a device (``H100``).
        profile: path of the profile, written if it does not exist; by default the environment variable
            ``NEMO_EMMETT_PROFILE``, or else a file in the trainer's ``default_root_dir`` that is named by what it was
            measured on and by these arguments.
        safety_margin: share of the budget that calibration leaves free, for what real batches and the allocator do
            otherwise than synthetic ones; guard steps in when it is used up.
        modality_share: of speech, of the memory that is there for batches, where each step holds speech and text
            (``sampler_fusion: zip``); ``auto`` takes the share with the most tokens per second.
        guard: watch the training's steps and redo those that run out of memory; by default, unless the mode is
            ``plan``.
        tokens_per_second: of output, for one-dimensional bins in seconds, which do not bound it.
        precision: a batch size is good enough when none fits that is larger by more than this share.
        max_batch_size: no bucket gets more examples.
        listener: is told of each bucket's result as soon as it is there.
        then_train: with mode ``plan``, train after planning; by default the fit ends there, without a batch of data.

    Raises:
        ConfigError: if an argument, or the profile, cannot be used.

    Example:
        In a recipe::

            trainer:
              callbacks:
                - _target_: nemo_emmett.callbacks.OOMptimizer
                  memory_fraction: 0.9
    """

    def __init__(
        self,
        mode: str = "calibrate",
        memory_fraction: float = MEMORY_FRACTION,
        memory_budget: int | str | None = None,
        profile: str | os.PathLike | None = None,
        safety_margin: float = 0.03,
        modality_share: float | str = 0.5,
        guard: bool | None = None,
        tokens_per_second: float = TOKENS_PER_SECOND,
        precision: float = PRECISION,
        max_batch_size: int = MAX_BATCH_SIZE,
        listener: Listener | None = None,
        then_train: bool | None = None,
    ) -> None:
        if mode not in MODES:
            raise ConfigError(f"OOMptimizer.mode: '{mode}' is unknown; it can be {', '.join(MODES)}.")
        if mode == "plan" and memory_budget is None:
            raise ConfigError("OOMptimizer.memory_budget: is missing; a plan is for some memory: give 80GiB, or H100.")
        check_fraction(memory_fraction)
        if memory_budget is not None:
            parse_memory(memory_budget, "OOMptimizer.memory_budget")
        check_share("safety_margin", safety_margin, least=0.0)
        check_share("precision", precision, least=0.0)
        if modality_share != AUTO_SHARE or mode == "plan":  # a plan takes no time that could be compared
            check_share("modality_share", modality_share, least=0.01)
        check_positive("tokens_per_second", tokens_per_second, (int, float))
        check_positive("max_batch_size", max_batch_size, int)
        check_switch("guard", guard)
        check_switch("then_train", then_train)
        if then_train is not None and mode != "plan":
            raise ConfigError(f"OOMptimizer.then_train: means nothing in mode '{mode}'; remove it.")
        self.mode = mode
        self.memory_fraction = memory_fraction
        self.memory_budget = memory_budget
        self.safety_margin = safety_margin
        self.modality_share = modality_share
        self.guards = mode != "plan" if guard is None else guard
        self.ends_after_planning = mode == "plan" and not then_train
        self.guard_is_asked_for = guard is True or mode == "guard"
        self.tokens_per_second = tokens_per_second
        self.precision = precision
        self.max_batch_size = max_batch_size
        self.listener = listener
        path = profile or os.environ.get(PROFILE_VARIABLE)
        self.path: str | None = None if path is None else str(path)
        self._path_is_given = path is not None
        # Read at once, so that a corrupt profile is told before a model is built.
        self.profile: Profile | None = read_if_there(self.path) if self.path else None
        self._guard: Guard | None = None
        self._limits_of_trainer: dict[str, Any] = {}

    # Lightning's hooks

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write batch sizes into ``train_ds``: the profile's, or those that are found now."""
        _check_is_alone(trainer)
        train_ds, where = train_ds_of(trainer, pl_module)
        check_batch_sizes_are_read(pl_module)
        if trainer.train_dataloader is not None:
            raise ConfigError(
                "OOMptimizer: the batch sizes come too late, the training data loader has already been built; give the "
                "lr_scheduler its max_steps and the trainer its max_steps, so that nothing has to count the batches."
            )
        if hasattr(trainer.datamodule, "resolve_bins"):
            trainer.datamodule.resolve_bins()
        self._agree_on_profile(trainer, pl_module, train_ds, where)
        if self.profile is not None:
            self._use_profile(self.profile, trainer, pl_module, train_ds, where)
        else:
            groups = self._groups(train_ds, where, pl_module)
            fingerprint = self._fingerprint(trainer, pl_module, groups, train_ds, planned=self.mode == "plan")
            self._find_path(trainer, pl_module, train_ds, where, fingerprint)
            if self.profile is not None:
                self._use_profile(self.profile, trainer, pl_module, train_ds, where)
            elif self.mode == "guard":
                self.profile = profile_of_recipe(groups, where, fingerprint, self._settings(None))
            else:
                self.profile = self._calibrated(trainer, pl_module, groups, train_ds, fingerprint)
                if trainer.is_global_zero:
                    self.profile.write(self.path)
                self._apply(self.profile, train_ds, where)
                self._log_batch_sizes(self.profile, where)
        if self.ends_after_planning:
            self._end(trainer)
            return
        # NeMo's ASR models have their loader from the constructor on.
        if getattr(pl_module, "_train_dl", None) is not None:
            pl_module.setup_training_data(train_ds)
        if self.guards and (adapter := self._adapter_for_guard(pl_module)) is not None:
            self._start_guard(trainer, pl_module, adapter, self._groups(train_ds, where, pl_module))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Let guard look at what is there."""
        if self._guard is not None:
            self._guard.on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let the ranks' guards agree, now and then."""
        if self._guard is not None:
            self._guard.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the ranks' guards agree for the last time."""
        if self._guard is not None:
            self._guard.on_train_end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave Lightning as it was; where another rank ran out of memory, leave with it."""
        self._stop_guard()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave Lightning as it was."""
        self._stop_guard()
        for name, value in self._limits_of_trainer.items():
            setattr(trainer, name, value)
        self._limits_of_trainer = {}

    def _end(self, trainer: Trainer) -> None:
        """Let the fit end before a data loader is built."""
        logging.info(
            f"OOMptimizer: the plan is in {self.path}, and the training ends here; give the callback then_train: true "
            "to train with it, or mode: calibrate."
        )
        for name in _LIMITS_AFTER_FIT:
            setattr(trainer, name, 0)
        for name in _LIMITS_OF_FIT:
            self._limits_of_trainer[name] = getattr(trainer, name)
            setattr(trainer, name, 0)

    # The profile

    def _groups(self, train_ds: DictConfig, where: str, module: LightningModule) -> dict[str, Group]:
        return read_groups(
            train_ds,
            where,
            token_equivalent_duration=_token_equivalent_duration(module),
            tokens_per_second=self.tokens_per_second,
        )

    def _agree_on_profile(self, trainer: Trainer, module: LightningModule, train_ds: DictConfig, where: str) -> None:
        """All ranks go by what rank 0 has read: others may see another disk, or have looked at another time."""
        if not self._path_is_given:
            self.path = self.profile = None  # an earlier fit may have been of another model
        elif trainer.is_global_zero:
            self._restore(trainer, module, train_ds, where)
        self.path, self.profile = trainer.strategy.broadcast((self.path, self.profile))

    def _find_path(
        self,
        trainer: Trainer,
        module: LightningModule,
        train_ds: DictConfig,
        where: str,
        fingerprint: Mapping[str, Any],
    ) -> None:
        """Where no path is given, runs of the same kind with the same settings share one."""
        if self.path is None:
            name = f"oomptimizer-{short_hash({**fingerprint, 'asked': self._asked()})}.yaml"
            self.path = os.path.join(trainer.default_root_dir, name)
        if self.profile is None and trainer.is_global_zero:
            if Path(self.path).exists():
                self.profile = Profile.read(self.path)
            else:
                self._restore(trainer, module, train_ds, where)
        self.path, self.profile = trainer.strategy.broadcast((self.path, self.profile))

    def _restore(self, trainer: Trainer, module: LightningModule, train_ds: DictConfig, where: str) -> None:
        """Put back a profile that NeMo's exp_manager has archived, at this start or an earlier one."""
        known = self.profile  # read by the constructor and archived since; whether it fits is checked where it is used

        def check(archived: Profile) -> None:
            if known is None:
                self._check(archived, trainer, module, copy.deepcopy(train_ds), where)
            elif archived != known:
                raise ConfigError("it is not the one that this run has read.")

        self.profile = restore_archived(self.path, check) or known

    def _fingerprint(
        self,
        trainer: Trainer,
        module: LightningModule,
        groups: Mapping[str, Group],
        train_ds: DictConfig,
        planned: bool,
    ) -> dict[str, Any]:
        return fingerprint_of(trainer, module, groups, planned=planned) | {"zip": is_zip(train_ds)}

    def _use_profile(
        self, profile: Profile, trainer: Trainer, module: LightningModule, train_ds: DictConfig, where: str
    ) -> None:
        self._check(profile, trainer, module, train_ds, where)
        self._log_batch_sizes(profile, where)
        if self.mode == profile.settings.get("mode") == "calibrate":
            self._tell_of_other_settings(profile.settings)

    def _check(
        self, profile: Profile, trainer: Trainer, module: LightningModule, train_ds: DictConfig, where: str
    ) -> None:
        """Write a profile's batch sizes into ``train_ds``, and refuse one that was made for something else."""
        self._apply(profile, train_ds, where)
        if profile.fingerprint:
            planned = profile.settings.get("mode") == "plan"
            groups = self._groups(train_ds, where, module)
            actual = self._fingerprint(trainer, module, groups, train_ds, planned)
            check_fingerprint(profile.fingerprint, actual, self.path)

    def _tell_of_other_settings(self, stored: Mapping[str, Any]) -> None:
        """A profile may well have been measured with other settings than the callback has, but not unnoticed."""
        differing = [
            f"{name} was {stored[name]} and is {value}"
            for name, value in self._asked().items()
            if name in stored and stored[name] != value
        ]
        if differing:
            logging.warning(
                f"OOMptimizer: {self.path}: the profile was measured with other settings ({'; '.join(differing)}); its "
                "batch sizes are used as they are; delete the file to measure anew."
            )

    def _apply(self, profile: Profile, train_ds: DictConfig, where: str) -> None:
        configs = configs_of_groups(train_ds)
        if configs.keys() != profile.groups.keys():
            raise ConfigError(
                f"{self.path}: the profile is for {_named(profile.groups)}, the recipe's {where} has {_named(configs)}."
            )
        for name, config in configs.items():
            self._apply_to_group(profile.groups[name], config, _place(where, name))

    def _apply_to_group(self, buckets: Buckets, config: DictConfig, where: str) -> None:
        asked = bins_of(config, where)
        check_fits(buckets, asked, config, where, self.path)
        with open_dict(config):
            for key, value in buckets.as_config().items():
                if key.endswith("batch_size") or config.get(key) in (None, math.inf):
                    config[key] = value

    def _log_batch_sizes(self, profile: Profile, where: str) -> None:
        for name, buckets in profile.groups.items():
            logging.info(f"OOMptimizer: {_place(where, name)}.{described(buckets)}, from {self.path}.")

    def _settings(self, budget: int | None) -> dict[str, Any]:
        return {"mode": self.mode, "budget": budget, **self._asked()}

    def _asked(self) -> dict[str, Any]:
        """The arguments that decide batch sizes."""
        return {
            "memory_fraction": None if self.memory_budget is not None else self.memory_fraction,
            "memory_budget": self.memory_budget,
            "safety_margin": self.safety_margin,
            "modality_share": self.modality_share,
            "tokens_per_second": self.tokens_per_second,
            "precision": self.precision,
            "max_batch_size": self.max_batch_size,
        }

    # Finding batch sizes

    def _calibrated(
        self,
        trainer: Trainer,
        module: LightningModule,
        groups: Mapping[str, Group],
        train_ds: DictConfig,
        fingerprint: dict[str, Any],
    ) -> Profile:
        adapter = adapter_for(module)
        budget = self._budget(trainer)
        options = SearchOptions(
            budget=round(budget * (1 - self.safety_margin)),
            zipped=is_zip(train_ds),
            modality_share=self.modality_share,
            precision=self.precision,
            max_batch_size=self.max_batch_size,
            timed=self.mode != "plan",
        )
        logging.info(
            f"OOMptimizer: finding batch sizes for {sum(len(g.buckets) for g in groups.values())} buckets in "
            f"{shown_bytes(options.budget)} ({self.mode})."
        )
        with self._stage(trainer, module, adapter) as meter:
            calibration = Calibration(trainer, module, adapter, meter, options, self.listener)
            calibration.run(list(groups.values()))
        return Profile(
            groups={
                name: Buckets(
                    group.bins, tuple(calibration.results[b].batch_size for b in group.buckets), group.limit_key
                )
                for name, group in groups.items()
            },
            settings=self._settings(budget),
            fingerprint=fingerprint,
            measures={name: calibration.measures(group) for name, group in groups.items()},
        )

    def _budget(self, trainer: Trainer) -> int:
        if self.mode == "plan":
            return parse_memory(self.memory_budget, "OOMptimizer.memory_budget")
        arguments = (trainer.strategy.root_device, self.memory_fraction, self.memory_budget)
        budget = budget_of(*arguments)
        if is_cpu_default(*arguments):
            logging.info(
                f"OOMptimizer: training runs on the CPU and no memory_budget is given: a step may take "
                f"{shown_bytes(budget)} (half of the memory that is available, at most {shown_bytes(CPU_BUDGET)}); set "
                "memory_budget for another amount."
            )
        # What is free differs between devices; all must decide the same.
        least = torch.tensor(budget, device=trainer.strategy.root_device)
        if world_size() > 1:
            dist.all_reduce(least, op=dist.ReduceOp.MIN)
        return int(least)

    @contextmanager
    def _stage(self, trainer: Trainer, module: LightningModule, adapter: Adapter) -> Iterator[Meter]:
        """Where steps are run: on the device, or on fake tensors."""
        if self.mode != "plan":
            yield meter_for(trainer.strategy.root_device)
            return
        from nemo_emmett.oomptimizer.fake import fake_model

        with ExitStack() as stack:
            stack.enter_context(fake_model(module, trainer.optimizers))
            stack.enter_context(adapter.planning())
            yield TensorMeter(trainer.strategy.root_device)

    # Guard

    def _adapter_for_guard(self, module: LightningModule) -> Adapter | None:
        try:
            return adapter_for(module)
        except ConfigError as error:
            if self.guard_is_asked_for:
                raise
            logging.warning(f"OOMptimizer: batch sizes are set, but nothing guards the training: {error}")
            return None

    def _start_guard(
        self, trainer: Trainer, module: LightningModule, adapter: Adapter, groups: Mapping[str, Group]
    ) -> None:
        assert self.profile is not None
        sizes = {
            bucket: size
            for name, group in groups.items()
            for bucket, size in zip(group.buckets, self.profile.groups[name].bucket_batch_size, strict=True)
        }
        slopes = {
            bucket: measure.memory.slope
            for name, of_group in self.profile.measures.items()
            for bucket, measure in zip(groups[name].buckets, of_group, strict=True)
            if measure.memory is not None
        }
        self._guard = Guard(
            adapter,
            list(groups.values()),
            sizes,
            self._guard_meter(trainer),
            budget_of(trainer.strategy.root_device, self.memory_fraction, self.memory_budget),
            self._save,
            slopes,
        )
        self._guard.install(trainer, module)

    def _stop_guard(self) -> None:
        if self._guard is not None:
            self._guard.uninstall()
            self.profile = self._lowered(self._guard.sizes, self._guard.events)  # for another fit
            self._guard = None

    def _guard_meter(self, trainer: Trainer) -> Meter:
        device = trainer.strategy.root_device
        # On the CPU each operation would be followed, which takes time: only where a budget asks for it.
        if device.type == "cpu" and self.memory_budget is None:
            return Unmetered()
        return CudaMeter(device, empties_cache=False) if device.type == "cuda" else meter_for(device)

    def _save(self, sizes: dict[Bucket, int], events: list[Event]) -> None:
        self._lowered(sizes, events).write(self.path)

    def _lowered(self, sizes: Mapping[Bucket, int], events: Sequence[Event]) -> Profile:
        """The profile that the fit began with, after what guard did since."""
        assert self.profile is not None
        of_group: dict[str, list[int]] = {}
        for bucket, size in sizes.items():  # in the order of the buckets
            of_group.setdefault(bucket.group, []).append(size)
        return self.profile.with_batch_sizes(of_group, *events)


def _token_equivalent_duration(module: LightningModule) -> float | None:
    """Seconds of speech behind one position, of models that know it and read speech."""
    try:
        return getattr(module, "token_equivalent_duration", None)
    except ModelError:  # ours, without a speech encoder
        return None


def _check_is_alone(trainer: Trainer) -> None:
    count = sum(isinstance(callback, OOMptimizer) for callback in trainer.callbacks)
    if count > 1:
        raise ConfigError(
            f"trainer.callbacks: OOMptimizer stands there {count} times; leave one (NEMO_EMMETT_CALLBACKS may add it)."
        )


def _place(where: str, group: str) -> str:
    return f"{where}.{group}".rstrip(".")


def _named(groups: Mapping[str, Any]) -> str:
    if list(groups) == [ONLY_GROUP]:
        return "one dataset without groups"
    return "the groups " + ", ".join(f"'{name}'" for name in groups)
