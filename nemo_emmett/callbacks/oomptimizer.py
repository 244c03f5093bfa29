"""The callback that gives every bucket its batch size, and keeps training within the memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from lhotse.dataset.sampling.base import CutSampler
from lightning.pytorch import Callback, LightningModule, Trainer
from nemo.core.classes.common import Serialization
from nemo.core.classes.modelPT import ModelPT
from nemo.utils import logging
from omegaconf import DictConfig
from torch.utils.data import IterableDataset

from nemo_emmett.data.checks import check_dataset
from nemo_emmett.data.config.dataset_config import parse_dataset
from nemo_emmett.data.worker_batches import prepare_dataset
from nemo_emmett.errors import ConfigError, ModelError
from nemo_emmett.oomptimizer.adapters import adapter_for
from nemo_emmett.oomptimizer.buckets import TOKENS_PER_SECOND, Group, is_zip, read_groups
from nemo_emmett.oomptimizer.calibration import Listener, calibrate
from nemo_emmett.oomptimizer.cuda_meter import CudaMeter, meter_for
from nemo_emmett.oomptimizer.fingerprint import fingerprint_of
from nemo_emmett.oomptimizer.guard import Guard
from nemo_emmett.oomptimizer.memory import MEMORY_FRACTION, budget_of
from nemo_emmett.oomptimizer.meter import Meter, Unmetered
from nemo_emmett.oomptimizer.options import Options
from nemo_emmett.oomptimizer.profile import Profile
from nemo_emmett.oomptimizer.profile_store import ProfiledRun, ProfileStore, profile_of_recipe
from nemo_emmett.oomptimizer.search import MAX_BATCH_SIZE, PRECISION

PROFILE_VARIABLE = "NEMO_EMMETT_PROFILE"
"""Environment variable: the profile, where the callback does not name one."""

_LIMITS_OF_FIT = ("limit_train_batches", "limit_val_batches", "num_sanity_val_steps")
"""Attributes of a trainer that are 0 for the rest of a fit that ends after planning."""

_LIMITS_AFTER_FIT = ("limit_test_batches", "limit_predict_batches")
"""Those that stay 0: NeMo's ASR scripts test after the fit, with a model that was not trained."""


class OOMptimizer(Callback, Serialization):
    """Finds the batch size of every bucket before training, and guards the memory during it.

    It replaces NeMo's OOMptimizer scripts (EMMeTT, arXiv 2409.13523, section 4.3) by a few steps of the training
    itself on synthetic batches, which change nothing: a run that is calibrated equals one that is given the same
    profile by hand. Buckets are read from ``train_ds`` of the datamodule's ``cfg``, or else of the model's, and
    ``bucket_batch_size`` is written there before the data loader is built.

    A profile that exists is used, not measured again; one that was measured on something else is refused, one that was
    measured with other arguments causes a warning. Recipes without ``bucket_duration_bins`` get those of the profile;
    in recipes that have them, they must be the profile's.

    Args:
        mode: ``calibrate``: measure on the device. ``plan``: compute it with fake tensors, for a device that need not
            be there. ``guard``: measure nothing; use the profile's batch sizes, or the recipe's.
        memory_fraction: share of the device's memory that a step may take. On the CPU the default means a quarter of
            the memory that is available, at most 8 GiB.
        memory_budget: what a step may take instead, in bytes or as ``72GiB``; for ``plan`` also a device (``H100``).
        profile: path of the profile, written if it does not exist; by default the environment variable
            ``NEMO_EMMETT_PROFILE``, or else a file in the trainer's ``default_root_dir`` whose name is a hash of what
            it was measured on and of these arguments.
        safety_margin: share of the budget that calibration leaves free, for differences between real and synthetic
            batches and for the allocator; guard acts when it is used up.
        modality_share: share of speech in the memory for batches, where each step holds speech and text
            (``sampler_fusion: zip``); ``auto`` takes the share with the most tokens per second.
        guard: watch the training's steps and redo those that run out of memory; by default, unless the mode is
            ``plan``.
        tokens_per_second: of output, for one-dimensional bins in seconds, which do not bound it.
        precision: a batch size is good enough when none fits that is larger by more than this share.
        max_batch_size: no bucket gets more examples.
        listener: called with each bucket's result as soon as it is found.
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
        self.options = Options.parse(
            {
                "mode": mode,
                "memory_fraction": memory_fraction,
                "memory_budget": memory_budget,
                "safety_margin": safety_margin,
                "modality_share": modality_share,
                "guard": guard,
                "tokens_per_second": tokens_per_second,
                "precision": precision,
                "max_batch_size": max_batch_size,
                "then_train": then_train,
            }
        )
        self.listener = listener
        self._store = ProfileStore(profile or os.environ.get(PROFILE_VARIABLE) or None)
        self._guard: Guard | None = None
        self._limits_of_trainer: dict[str, Any] = {}

    @property
    def path(self) -> str | None:
        """The profile's file; None until the fit begins, if it was not given."""
        return self._store.path

    @property
    def profile(self) -> Profile | None:
        """The profile in use; None until it is found or made."""
        return self._store.profile

    @property
    def ends_after_planning(self) -> bool:
        """Whether the fit ends without a training step."""
        return self.options.ends_after_planning

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write batch sizes into ``train_ds``: the profile's, or those that are found now."""
        train_ds, place = _check_and_find_train_ds(trainer, pl_module)
        if trainer.limit_train_batches != 0 and not self.ends_after_planning:  # else no data is read
            _check_data_of_nemo(trainer.datamodule, train_ds, place)
        if hasattr(trainer.datamodule, "resolve_bins"):
            trainer.datamodule.resolve_bins()

        def groups_of(data: DictConfig) -> dict[str, Group]:
            return read_groups(
                data,
                place,
                token_equivalent_duration=_token_equivalent_duration(pl_module),
                tokens_per_second=self.options.tokens_per_second,
            )

        def fingerprint(data: DictConfig, planned: bool) -> dict[str, Any]:
            zipped = is_zip(data, place)
            return fingerprint_of(trainer, pl_module, groups_of(data), planned=planned) | {"zip": zipped}

        mode, settings = self.options.mode, self.options.settings
        process = trainer.default_root_dir, trainer.is_global_zero, trainer.strategy.broadcast
        run = ProfiledRun(train_ds, place, mode, settings, fingerprint, *process)
        if self._store.find(run) is None:
            groups, identity = groups_of(train_ds), fingerprint(train_ds, mode == "plan")
            if mode == "guard":
                stored = {"mode": mode, "budget": None, **settings}
                self._store.profile = profile_of_recipe(groups, place, identity, stored)
            else:
                found = calibrate(
                    trainer,
                    pl_module,
                    groups,
                    self.options,
                    zipped=is_zip(train_ds, place),
                    fingerprint=identity,
                    listener=self.listener,
                )
                self._store.add(found, run)
        if self.ends_after_planning:
            self._end_fit(trainer)
            return
        # NeMo's ASR models have their loader since they were built.
        if getattr(pl_module, "_train_dl", None) is not None:
            pl_module.setup_training_data(train_ds)
        if self.options.guards:
            self._start_guard(trainer, pl_module, groups_of(train_ds))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Let guard count the optimizer's state."""
        if self._guard is not None:
            self._guard.on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let the ranks' guards agree on batch sizes, at intervals."""
        if self._guard is not None:
            self._guard.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the ranks' guards agree on batch sizes for the last time."""
        if self._guard is not None:
            self._guard.on_train_end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore Lightning's parts; if memory ran out here or on another rank, exit with all."""
        try:
            if self._guard is not None:
                self._guard.on_exception(exception)
        finally:
            self._stop_guard()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore Lightning's parts."""
        self._stop_guard()
        for name, value in self._limits_of_trainer.items():
            setattr(trainer, name, value)
        self._limits_of_trainer = {}

    def _end_fit(self, trainer: Trainer) -> None:
        """Let the fit end before a data loader is built."""
        logging.info(
            f"OOMptimizer: the plan is in {self.path}, and the training ends here; give the callback then_train: true "
            "to train with it, or mode: calibrate."
        )
        self._limits_of_trainer = {name: getattr(trainer, name) for name in _LIMITS_OF_FIT}
        for name in (*_LIMITS_OF_FIT, *_LIMITS_AFTER_FIT):
            setattr(trainer, name, 0)

    def _start_guard(self, trainer: Trainer, module: LightningModule, groups: Mapping[str, Group]) -> None:
        try:
            adapter = adapter_for(module)
        except ConfigError as error:
            if self.options.requires_guard:
                raise
            logging.warning(f"OOMptimizer: batch sizes are set, but nothing guards the training: {error}")
            return
        store, device = self._store, trainer.strategy.root_device
        self._guard = Guard(
            adapter,
            list(groups.values()),
            store.batch_sizes(groups),
            self._guard_meter(trainer),
            budget_of(device, self.options.memory_fraction, self.options.memory_budget),
            lambda sizes, events: store.lowered(sizes, events).write(store.path),
            store.slopes(groups),
        )
        self._guard.install(trainer, module)

    def _guard_meter(self, trainer: Trainer) -> Meter:
        device = trainer.strategy.root_device
        # On the CPU each operation is intercepted, which takes time: only where a budget asks for it.
        if device.type == "cpu" and self.options.memory_budget is None:
            return Unmetered()
        return CudaMeter(device, empties_cache=False) if device.type == "cuda" else meter_for(device)

    def _stop_guard(self) -> None:
        if self._guard is not None:
            self._guard.uninstall()
            self._store.profile = self._store.lowered(self._guard.sizes, self._guard.events)  # for another fit
            self._guard = None


def _check_and_find_train_ds(trainer: Trainer, module: LightningModule) -> tuple[DictConfig, str]:
    """The section of the training data, and its place in the recipe.

    Raises:
        ConfigError: if there is none, or if batch sizes in it would have no effect.
    """
    count = sum(isinstance(callback, OOMptimizer) for callback in trainer.callbacks)
    if count > 1:
        raise ConfigError(
            f"trainer.callbacks: OOMptimizer is there {count} times; leave one (NEMO_EMMETT_CALLBACKS may add it)."
        )
    for section, owner in (("data", getattr(trainer, "datamodule", None)), ("model", module)):
        train_ds, place = getattr(getattr(owner, "cfg", None), "train_ds", None), f"{section}.train_ds"
        if isinstance(train_ds, DictConfig):
            break
    else:
        raise ConfigError(
            "OOMptimizer: there is nowhere to put batch sizes: neither the datamodule nor the model has a cfg.train_ds."
        )
    _check_loader_of_model(module)
    if trainer.train_dataloader is not None:
        raise ConfigError(
            "OOMptimizer: the batch sizes come too late, the training data loader has already been built; give the "
            "lr_scheduler its max_steps and the trainer its max_steps, so that nothing has to count the batches."
        )
    return train_ds, place


def _check_data_of_nemo(datamodule: Any, train_ds: DictConfig, place: str) -> None:
    """Find mistakes in data that our loader reads for NeMo's datamodule before measuring, which takes minutes.

    Raises:
        EmmettError: for the first mistake.
    """
    tokenizer, dataset = (getattr(datamodule, name, None) for name in ("tokenizer", "dataset"))
    if train_ds.get("use_emmett") and tokenizer is not None and dataset is not None:
        _, kind = prepare_dataset(dataset)
        check_dataset(parse_dataset(train_ds, place), tokenizer, kind, reads=False, has_sizes=False)


def _check_loader_of_model(module: LightningModule) -> None:
    """Refuse a NeMo model whose loader makes batches by ``batch_size``, whatever its buckets are."""
    loader = module._train_dl if isinstance(module, ModelPT) else None  # which NeMo's models build themselves
    if loader is None or isinstance(getattr(loader, "sampler", None), CutSampler):
        return
    size = getattr(loader, "batch_size", None)
    if isinstance(getattr(loader, "dataset", None), IterableDataset) and size is None:
        return  # lhotse samples in the workers
    raise ConfigError(
        "OOMptimizer: model.train_ds.use_lhotse is not set, so NeMo's older dataloader makes "
        f"{'its own batches' if size is None else f'batches of {size}'}, whatever bucket_batch_size is; set "
        "++model.train_ds.use_lhotse=true and ++model.train_ds.use_bucketing=true, or remove the callback."
    )


def _token_equivalent_duration(module: LightningModule) -> float | None:
    """Seconds of speech per position, of models that define it and read speech."""
    try:
        return getattr(module, "token_equivalent_duration", None)
    except ModelError:  # ours, without a speech encoder
        return None
