"""Guard measures the memory of a training's steps, bucket by bucket, and keeps it running when memory runs out.

If a step exceeds the budget, or runs out of memory, its bucket's batch size is lowered. The data loader uses the new
size from the next start on; until then the bucket's larger batches are run as microbatches, with the same gradient
(:mod:`~nemo_emmett.oomptimizer.recovery`). If a step cannot be redone, all ranks exit with ``EXIT_TRY_AGAIN``.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from nemo.utils import logging
from torch.utils._pytree import tree_leaves

from nemo_emmett.errors import EXIT_TRY_AGAIN, EXIT_USER_ERROR, ConfigError, Help, with_help
from nemo_emmett.modules.loss import world_size
from nemo_emmett.oomptimizer.adapters.base import Adapter, Extent
from nemo_emmett.oomptimizer.buckets import Bucket, Group
from nemo_emmett.oomptimizer.coordinated_exit import CoordinatedExit
from nemo_emmett.oomptimizer.memory import is_out_of_memory
from nemo_emmett.oomptimizer.meter import Meter
from nemo_emmett.oomptimizer.profile import Event
from nemo_emmett.oomptimizer.recovery import NOT_EVEN_ONE, Recovery

SHARE_TO_LOWER_BY = 0.05
"""Of a batch size, if the memory of an example is not known."""

LEAST_SHARE = 0.5
"""Of a batch size, below which exceeding the budget does not lower it: what still grows then is not the batch's."""

NEAR_THE_BUDGET = 0.9
"""Share of the budget from which a step's bucket is determined: that reads lengths from the device."""

STEPS_BETWEEN_AGREEMENTS = 50
"""Steps after which the ranks exchange their batch sizes."""

_SECONDS_TOLERANCE = 0.01  # a recording's duration in a manifest is rounded

Save = Callable[[dict[Bucket, int], list[Event]], None]
"""Writes batch sizes and what lowered them to the profile. It must not contain a collective."""


class Guard:
    """Measures steps and lowers batch sizes while a model is trained, and redoes steps that run out of memory.

    Args:
        adapter: of the model.
        groups: of the training data.
        sizes: the batch size of each bucket, with which the data loader was built.
        meter: measures a step.
        budget: bytes that a step may take.
        save: called on the rank that lowered a size, if it is rank 0 or about to exit, and on rank 0 for all others.
        slopes: bytes per example of the buckets for which they are known.
        agree_every: steps after which the ranks agree on the smallest sizes.

    Example:
        >>> guard = Guard(adapter, groups, sizes, CudaMeter(device), budget=72 * 2**30, save=write_profile)
        >>> guard.install(trainer, module)  # in on_fit_start; then its hooks, and at the end:
        >>> guard.uninstall()
    """

    def __init__(
        self,
        adapter: Adapter,
        groups: Sequence[Group],
        sizes: Mapping[Bucket, int],
        meter: Meter,
        budget: int,
        save: Save,
        slopes: Mapping[Bucket, float] | None = None,
        agree_every: int = STEPS_BETWEEN_AGREEMENTS,
    ) -> None:
        self._adapter, self._meter, self._budget, self._save = adapter, meter, budget, save
        self._buckets = [bucket for group in groups for bucket in group.buckets]
        self._first_sizes, self._sizes = dict(sizes), dict(sizes)
        self._slopes = dict(slopes or {})
        self._agree_every = agree_every
        self._recovery = Recovery(adapter, self)
        self._exit = CoordinatedExit()
        self._module: LightningModule | None = None
        self._trainer: Trainer | None = None
        self._optimizer_is_tracked = False
        self._batches = 0
        self._warned: set[Bucket] = set()
        self.high_water: dict[Bucket, int] = {}
        self.events: list[Event] = []

    @property
    def sizes(self) -> dict[Bucket, int]:
        """The batch sizes as they are now."""
        return dict(self._sizes)

    # Lightning's hooks.

    def install(self, trainer: Trainer, module: LightningModule) -> None:
        """Begin: before the first training step, with the strategy set up."""
        self._trainer, self._module = trainer, module
        self._meter.track([*module.parameters(), *module.buffers()])
        self._recovery.install(trainer, module)
        self._exit.start()
        if not self._adapter.can_split:
            logging.warning(
                f"OOMptimizer: no adapter can split the batches of {type(module).__name__}: guard measures and lowers "
                "batch sizes, but cannot redo a step that runs out of memory."
            )

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the optimizer's state, once it exists."""
        if not self._optimizer_is_tracked:
            leaves = tree_leaves([optimizer.state for optimizer in trainer.optimizers])
            state = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
            self._meter.track(state)
            self._optimizer_is_tracked = bool(state)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Agree with the other ranks, at intervals. A collective."""
        self._batches += 1
        if self._batches % self._agree_every == 0:
            self._agree()

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Agree with the other ranks for the last time. A collective."""
        self._agree()

    def on_exception(self, exception: BaseException) -> None:
        """End on all ranks if memory ran out where nothing can be redone, such as in the optimizer's step, in which a
        part of the weights may be updated already. No collective."""
        if not is_out_of_memory(exception):
            return
        *_, frame = traceback.extract_tb(exception.__traceback__)
        step, place = f"{self._trainer.global_step:,}", f"{frame.name} ({frame.filename}:{frame.lineno})"
        if self._trainer.validating or self._trainer.sanity_checking:
            sentence = (
                f"validation ran out of memory after step {step}, in {place}; lower the batch size of validation_ds. "
                "The last checkpoint remains."
            )
            self._exit.exit(with_help(sentence, Help.OUT_OF_MEMORY), EXIT_USER_ERROR)
        self._exit.exit(
            f"memory ran out after step {step} outside of its forward and backward pass, in {place}, where smaller "
            "batches are no remedy; the training goes on from its last checkpoint, in fresh memory, when it is started "
            f"again (exit code {EXIT_TRY_AGAIN}).",
            EXIT_TRY_AGAIN,
        )

    def uninstall(self) -> None:
        """End, in teardown and on_exception: restore Lightning's parts. No collective; may be called twice."""
        self._recovery.uninstall()
        self._exit.stop()

    # Called by recovery (recovery.RecoveryListener).

    def microbatches(self, batch: Any) -> int:
        """In how many microbatches to run a batch: more than one if its bucket was lowered below its size."""
        if self._sizes == self._first_sizes:
            return 1
        extents = self._adapter.extents(batch)
        count = max((math.ceil(e.examples / self._sizes[self._bucket(e)]) for e in extents), default=1)
        return count * len(extents) if count > 1 else 1

    @contextmanager
    def measuring(self, batch: Any) -> Iterator[None]:
        """Measure a forward and backward pass; lower its buckets if it took more than the budget."""
        with self._meter.measuring():
            yield
        peak = self._meter.peak
        if peak < NEAR_THE_BUDGET * self._budget:
            return
        for extent in self._adapter.extents(batch):
            bucket = self._bucket(extent)
            self.high_water[bucket] = max(peak, self.high_water.get(bucket, 0))
            if peak <= self._budget or extent.examples > self._sizes[bucket]:
                continue
            least = math.ceil(LEAST_SHARE * self._first_sizes[bucket])
            if self._sizes[bucket] > least:
                self._lower(bucket, extent.examples, "above the watermark", peak, least)
            elif bucket not in self._warned:
                self._warned.add(bucket)
                logging.warning(
                    f"OOMptimizer: {bucket}: a step of {extent.examples} examples takes {peak / 2**20:.0f} MiB, more "
                    f"than the budget of {self._budget / 2**20:.0f} MiB, although the batch size was lowered by half; "
                    "it is not lowered further. If this grows from step to step, look for what keeps tensors alive."
                )

    def on_out_of_memory(self, batch: Any, phase: str) -> None:
        """Lower the buckets of a batch that ran out of memory."""
        for extent in self._adapter.extents(batch):
            bucket = self._bucket(extent)
            # A batch that was made before its bucket was lowered adds no information.
            if extent.examples <= self._sizes[bucket]:
                self._lower(bucket, extent.examples, f"out of memory in {phase}", self._meter.peak)

    def abort(self, batch: Any, reason: str) -> NoReturn:
        """Write the profile and end the training on all ranks."""
        buckets = {self._bucket(extent): extent.examples for extent in self._adapter.extents(batch)}
        named = " and ".join(f"{bucket} ({examples} examples)" for bucket, examples in buckets.items())
        if reason == NOT_EVEN_ONE:
            if all(self._sizes[bucket] == 1 for bucket in buckets):
                sentence = (
                    f"{named}: not even one example fits into the memory, and its batch size is 1 already; lower the "
                    "last bin, or train on a larger device."
                )
                self._exit.exit(with_help(sentence, Help.OUT_OF_MEMORY), EXIT_USER_ERROR)
            for bucket in buckets:
                self._set(bucket, max(1, self._sizes[bucket] // 2), reason)
        try:
            self._save(self.sizes, self.events)
        except ConfigError as error:
            # Started again it would fail in the same step; and no rank may be left waiting.
            self._exit.exit(f"a step of {named} ran out of memory, and {error}", EXIT_USER_ERROR)
        self._exit.exit(
            f"a step of {named} ran out of memory, and {reason}; the profile is saved, and the training goes on from "
            f"its last checkpoint with lower batch sizes when it is started again (exit code {EXIT_TRY_AGAIN}).",
            EXIT_TRY_AGAIN,
        )

    # Buckets and their sizes.

    def _bucket(self, extent: Extent) -> Bucket:
        """The bucket that a batch came from: the first one that holds its longest input and output.

        If a bin bounds their sum, the longest example cannot be identified; then the number of examples decides.
        """
        buckets = [b for b in self._buckets if b.shape.modality == extent.modality] or self._buckets
        fits = {b: bucket_fit(b, extent, self._adapter.measures_conversations) for b in buckets}
        possible = [bucket for bucket in buckets if fits[bucket].may_fit] or buckets[-1:]
        candidates = []
        for group in dict.fromkeys(bucket.group for bucket in possible):
            of_group = [bucket for bucket in possible if bucket.group == group]
            surely = next((i for i, bucket in enumerate(of_group) if fits[bucket].surely_fits), len(of_group) - 1)
            full = (bucket for bucket in of_group[:surely] if self._first_sizes[bucket] == extent.examples)
            candidates.append(next(full, of_group[surely]))
        # Several groups may hold such examples, but not so many: a full batch identifies its group, and no batch is
        # fuller.
        large_enough = [bucket for bucket in candidates if self._first_sizes[bucket] >= extent.examples]
        return min(large_enough or candidates[:1], key=self._first_sizes.__getitem__)

    def _lower(self, bucket: Bucket, examples: int, cause: str, peak: int, least: int = 1) -> None:
        """Lower a bucket below the size that took too much, but not below the least one."""
        too_many = min(examples, self._sizes[bucket])
        excess = max(0, peak - self._budget)
        by = math.ceil(excess / self._slopes[bucket]) if excess and bucket in self._slopes else 0
        by = by or math.ceil(SHARE_TO_LOWER_BY * too_many)
        self._set(bucket, max(least, too_many - by), cause)

    def _set(self, bucket: Bucket, size: int, cause: str) -> None:
        before = self._sizes[bucket]
        if size >= before:
            return
        self._sizes[bucket] = size
        when = datetime.now().astimezone().isoformat(timespec="seconds")
        self.events.append(Event(when, self._trainer.global_step, str(bucket), cause, before, size))
        logging.warning(
            f"OOMptimizer: {bucket}: {cause} in step {self._trainer.global_step}; the batch size is lowered from "
            f"{before} to {size}, and larger batches are run in microbatches."
        )
        if self._trainer.is_global_zero:
            try:
                self._save(self.sizes, self.events)
            except ConfigError as error:  # which is no reason to end a training that can go on
                logging.warning(f"OOMptimizer: the lowered batch size holds for this run only: {error}")

    def _agree(self) -> None:
        """All ranks take the smallest size that any has."""
        if world_size() == 1:
            return
        sizes = torch.tensor([self._sizes[bucket] for bucket in self._buckets], device=self._module.device)
        dist.all_reduce(sizes, op=dist.ReduceOp.MIN)
        for bucket, size in zip(self._buckets, sizes.tolist(), strict=True):
            self._set(bucket, size, "lowered on another rank")


class BucketFit(NamedTuple):
    """Whether a batch's examples fit into a bucket: the longest parts may be those of one example or of several."""

    may_fit: bool
    surely_fits: bool


def bucket_fit(bucket: Bucket, extent: Extent, as_conversation: bool) -> BucketFit:
    """Whether a batch fits by what the loader measures (:mod:`nemo_emmett.oomptimizer.adapters.lengths`).

    Args:
        bucket: which.
        extent: the longest parts of the batch's examples.
        as_conversation: the examples are conversations, not cuts.
    """
    shape = bucket.shape
    bound, output_bound = bucket.bin if isinstance(bucket.bin, tuple) else (bucket.bin, math.inf)
    prompt, answer = float(extent.input_tokens), float(extent.output_tokens)
    inputs, outputs = [prompt], [answer]
    if shape.seconds:
        per_second = bound / shape.seconds
        inputs = [max(0.0, extent.seconds - _SECONDS_TOLERANCE) * per_second]
        in_tokens = per_second != 1.0
        if as_conversation:
            inputs += [prompt] * in_tokens
        else:
            tokens = [prompt + 1] if prompt else []  # of a cut the recording's locator is counted too
            inputs += tokens if in_tokens and shape.total else []
            outputs += tokens if shape.contents.two_dimensional else []
    if shape.total:
        inputs += [answer]
    bounds = ((inputs, bound), (outputs, output_bound))
    return BucketFit(
        may_fit=all(max(parts, default=0.0) <= most for parts, most in bounds),
        surely_fits=all(sum(parts) <= most for parts, most in bounds),
    )
