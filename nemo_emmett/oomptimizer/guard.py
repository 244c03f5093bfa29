"""The guard watches the memory of a training, bucket by bucket, and brings it through when memory runs out.

Above the budget, or out of memory, a bucket's batch size is lowered. The data loader goes by the new size from the next
start on; until then the bucket's larger batches are run in pieces, at once and with the same gradient
(:mod:`~nemo_emmett.oomptimizer.recovery`). Where a step cannot be redone, all ranks leave with ``EXIT_TRY_AGAIN``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from nemo.utils import logging

from nemo_emmett.errors import EXIT_TRY_AGAIN, EXIT_USER_ERROR, ConfigError
from nemo_emmett.modules.loss import world_size
from nemo_emmett.oomptimizer.adapters.base import Adapter, Extent
from nemo_emmett.oomptimizer.buckets import Bucket, Group
from nemo_emmett.oomptimizer.coordinated_exit import CoordinatedExit
from nemo_emmett.oomptimizer.meter import Meter
from nemo_emmett.oomptimizer.profile import Event
from nemo_emmett.oomptimizer.recovery import NOT_EVEN_ONE, Recovery

SHARE_TO_LOWER_BY = 0.05
"""Of a batch size, where the memory of an example is not known."""

LEAST_SHARE = 0.5
"""Of a batch size, below which the watermark does not lower it: what goes on growing then is not the batch's."""

NEAR_THE_BUDGET = 0.9
"""Share of the budget from which a step's bucket is looked for: that reads lengths from the device."""

STEPS_BETWEEN_AGREEMENTS = 50
"""Steps after which the ranks tell each other their batch sizes."""

_SECONDS_TOLERANCE = 0.01  # a recording's duration in a manifest is rounded

Save = Callable[[dict[Bucket, int], list[Event]], None]
"""Writes batch sizes and what lowered them to the profile. It must not contain a collective."""


class Guard:
    """Watches and lowers batch sizes while a model is trained, and redoes steps that run out of memory.

    Args:
        adapter: of the model.
        groups: of the training data.
        sizes: the batch size of each bucket, with which the data loader was built.
        meter: measures a step.
        budget: bytes that a step may take.
        save: called on the rank that lowered a size, if it is rank 0 or about to leave, and on rank 0 for all others.
        slopes: bytes per example of the buckets of which they are known.
        agree_every: steps after which the ranks agree on the least sizes.

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
        self._departure = CoordinatedExit()
        self._module: LightningModule | None = None
        self._trainer: Trainer | None = None
        self._optimizer_is_tracked = False
        self._batches = 0
        self._told: set[Bucket] = set()
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
        self._departure.start()
        if not self._adapter.can_split:
            logging.warning(
                f"OOMptimizer: no adapter can split the batches of {type(module).__name__}: guard watches and lowers "
                "batch sizes, but cannot redo a step that runs out of memory."
            )

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the optimizer's state, once it is there."""
        if not self._optimizer_is_tracked:
            state = [
                value
                for optimizer in trainer.optimizers
                for of_parameter in optimizer.state.values()
                for value in of_parameter.values()
                if isinstance(value, torch.Tensor)
            ]
            self._meter.track(state)
            self._optimizer_is_tracked = bool(state)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Agree with the other ranks, from time to time. A collective."""
        self._batches += 1
        if self._batches % self._agree_every == 0:
            self._agree()

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Agree with the other ranks for the last time. A collective."""
        self._agree()

    def uninstall(self) -> None:
        """End, in teardown and on_exception: leave Lightning as it was. No collective; may be called twice."""
        self._recovery.uninstall()
        self._departure.stop()

    # What recovery asks and tells (recovery.Watcher).

    def pieces(self, batch: Any) -> int:
        """In how many pieces to run a batch: more than one if its bucket was lowered below its size."""
        if self._sizes == self._first_sizes:
            return 1
        extents = self._adapter.extents(batch)
        pieces = max((math.ceil(e.examples / self._sizes[self._bucket(e)]) for e in extents), default=1)
        return pieces * len(extents) if pieces > 1 else 1

    @contextmanager
    def watching(self, batch: Any) -> Iterator[None]:
        """Measure a forward and backward pass; lower its buckets if it took more than the budget."""
        with self._meter.measuring():
            yield
        peak = self._meter.peak
        if peak < NEAR_THE_BUDGET * self._budget:
            return
        for extent in self._adapter.extents(batch):
            bucket = self._bucket(extent)
            self.high_water[bucket] = max(peak, self.high_water.get(bucket, 0))
            if peak > self._budget and extent.examples <= self._sizes[bucket]:
                self._above_the_budget(bucket, extent.examples, peak)

    def _above_the_budget(self, bucket: Bucket, examples: int, peak: int) -> None:
        least = math.ceil(LEAST_SHARE * self._first_sizes[bucket])
        if self._sizes[bucket] > least:
            self._lower(bucket, examples, "above the watermark", peak, least)
        elif bucket not in self._told:
            self._told.add(bucket)
            logging.warning(
                f"OOMptimizer: {bucket}: a step of {examples} examples takes {peak / 2**20:.0f} MiB, more than the "
                f"budget of {self._budget / 2**20:.0f} MiB, although the batch size was lowered by half; it is not "
                "lowered further. If this grows from step to step, look for what keeps tensors alive."
            )

    def ran_out(self, batch: Any, phase: str) -> None:
        """Lower the buckets of a batch that ran out of memory."""
        for extent in self._adapter.extents(batch):
            bucket = self._bucket(extent)
            # A batch that was made before its bucket was lowered says nothing new.
            if extent.examples <= self._sizes[bucket]:
                self._lower(bucket, extent.examples, f"out of memory in {phase}", self._meter.peak)

    def give_up(self, batch: Any, reason: str) -> NoReturn:
        """Write the profile and end the training on all ranks."""
        buckets = {self._bucket(extent): extent.examples for extent in self._adapter.extents(batch)}
        if reason == NOT_EVEN_ONE:
            if all(self._sizes[bucket] == 1 for bucket in buckets):
                self._departure.leave(_TOO_LONG.format(_named(buckets)), EXIT_USER_ERROR)
            for bucket in buckets:
                self._set(bucket, max(1, self._sizes[bucket] // 2), reason)
        try:
            self._save(self.sizes, self.events)
        except ConfigError as error:
            # Started again it would fail in the same step; and no rank may be left waiting.
            self._departure.leave(f"a step of {_named(buckets)} ran out of memory, and {error}", EXIT_USER_ERROR)
        told = _TRY_AGAIN.format(f"a step of {_named(buckets)} ran out of memory, and {reason}")
        self._departure.leave(told, EXIT_TRY_AGAIN)

    # Buckets and their sizes.

    def _bucket(self, extent: Extent) -> Bucket:
        """The bucket that a batch came from: the first one that holds its longest input and output.

        Where a bin bounds their sum, which example is the longest cannot be seen; then the number of examples decides.
        """
        buckets = [b for b in self._buckets if b.shape.modality == extent.modality] or self._buckets
        possible = [bucket for bucket in buckets if self._measured(bucket, extent).may_fit] or buckets[-1:]
        names = dict.fromkeys(bucket.group for bucket in possible)
        of_groups = [self._of_one_group([b for b in possible if b.group == name], extent) for name in names]
        # Several groups may hold such examples, but not so many: a full batch tells its group, and no batch is fuller.
        large_enough = [bucket for bucket in of_groups if self._first_sizes[bucket] >= extent.examples]
        return min(large_enough or of_groups[:1], key=self._first_sizes.__getitem__)

    def _of_one_group(self, possible: Sequence[Bucket], extent: Extent) -> Bucket:
        surely = next(
            (i for i, bucket in enumerate(possible) if self._measured(bucket, extent).surely_fits), len(possible) - 1
        )
        for bucket in possible[:surely]:
            if self._first_sizes[bucket] == extent.examples:
                return bucket
        return possible[surely]

    def _measured(self, bucket: Bucket, extent: Extent) -> Measured:
        return measured(bucket, extent, self._adapter.measures_conversations)

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
            f"{before} to {size}, and larger batches are run in pieces."
        )
        if self._trainer.is_global_zero:
            self._save_or_tell()

    def _save_or_tell(self) -> None:
        """A training that goes on does not end for want of a file."""
        try:
            self._save(self.sizes, self.events)
        except ConfigError as error:
            logging.warning(f"OOMptimizer: the lowered batch size holds for this run only: {error}")

    def _agree(self) -> None:
        """All ranks take the least size that any has."""
        if world_size() == 1:
            return
        sizes = torch.tensor([self._sizes[bucket] for bucket in self._buckets], device=self._module.device)
        dist.all_reduce(sizes, op=dist.ReduceOp.MIN)
        for bucket, size in zip(self._buckets, sizes.tolist(), strict=True):
            self._set(bucket, size, "lowered on another rank")


_TRY_AGAIN = (
    "{}; the profile is saved, and the training goes on from its last checkpoint with lower batch sizes when it is "
    f"started again (exit code {EXIT_TRY_AGAIN})."
)
_TOO_LONG = (
    "{}: not even one example fits into the memory, and its batch size is 1 already; lower the last bin, or train on a "
    "larger device."
)


def _named(buckets: Mapping[Bucket, int]) -> str:
    return " and ".join(f"{bucket} ({examples} examples)" for bucket, examples in buckets.items())


class Measured(NamedTuple):
    """Whether a batch's examples fit into a bucket: the longest parts may be those of one example or of several."""

    may_fit: bool
    surely_fits: bool


def measured(bucket: Bucket, extent: Extent, as_conversation: bool) -> Measured:
    """Whether a batch fits by what the loader measures (:mod:`nemo_emmett.oomptimizer.adapters.lengths`).

    Args:
        bucket: which.
        extent: the longest parts of the batch's examples.
        as_conversation: the examples are conversations, not cuts.
    """
    shape = bucket.shape
    prompt, answer = float(extent.input_tokens), float(extent.output_tokens)
    inputs, outputs = [prompt], [answer]
    if shape.seconds:
        per_second = _bound(bucket) / shape.seconds
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
    if not isinstance(bucket.bin, tuple):  # only a bin of two dimensions bounds the output by itself
        outputs = []
    bounds = ((inputs, _bound(bucket)), (outputs, bucket.bin[1] if outputs else math.inf))
    return Measured(
        may_fit=all(max(parts, default=0.0) <= most for parts, most in bounds),
        surely_fits=all(sum(parts) <= most for parts, most in bounds),
    )


def _bound(bucket: Bucket) -> float:
    return bucket.bin[0] if isinstance(bucket.bin, tuple) else bucket.bin
