"""The guard lowers batch sizes where memory runs short, and brings the training through."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from torch.utils.data import DataLoader

from nemo_emmett.errors import EXIT_TRY_AGAIN, EXIT_USER_ERROR
from nemo_emmett.oomptimizer.adapters.base import Extent
from nemo_emmett.oomptimizer.buckets import Bucket, Shape
from nemo_emmett.oomptimizer.guard import Guard
from nemo_emmett.oomptimizer.meter import Meter, TensorMeter

from .injected import Bomb, Charges, Guarded, fit, weights
from .rows import Rows, RowsAdapter, batches_of_rows, text_group

GROUP = text_group((4.0, 4.0), (8.0, 8.0))
SMALL, LARGE = GROUP.buckets
MIB = 2**20


class Steps(Meter):
    """A device on which a step of n rows takes n times so many bytes, and what has leaked until then."""

    def __init__(self, model: Rows, per_row: int, leak: int = 0) -> None:
        self.model, self.per_row, self.leak = model, per_row, leak
        self.steps = 0

    def track(self, tensors: Iterable[torch.Tensor]) -> None:
        pass

    @contextmanager
    def measuring(self) -> Iterator[None]:
        self.steps += 1
        yield

    @property
    def alive(self) -> int:
        return self.steps * self.leak

    @property
    def peak(self) -> int:
        return self.alive + sum(self.model.ran[-1:]) * self.per_row


class Saved:
    """What was saved: the sizes by bucket, and the events, each time."""

    def __init__(self) -> None:
        self.sizes: list[dict[Bucket, int]] = []
        self.events: list[list[tuple]] = []

    def __call__(self, sizes: dict, events: list) -> None:
        self.sizes.append(dict(sizes))
        self.events.append([(e.step, e.bucket, e.cause, e.before, e.after) for e in events])


def guard_of(model: Rows, saved: Saved, meter: Meter, budget: int, **options) -> Guard:
    return Guard(RowsAdapter(model), [GROUP], {SMALL: 40, LARGE: 20}, meter, budget, saved, **options)


def test_above_the_budget_a_bucket_is_lowered_by_what_its_examples_take(tmp_path) -> None:
    """20 rows of 10 bytes against 170: three are too many; then 17 fit, and 20 are run as 10 and 10."""
    plain = Rows()
    fit(plain, batches_of_rows(20, 20, 17, 18), tmp_path)
    model, saved = Rows(), Saved()
    guard = guard_of(model, saved, Steps(model, 10), 170, slopes={LARGE: 10.0})
    fit(model, batches_of_rows(20, 20, 17, 18), tmp_path, [Guarded(guard)])
    assert saved.sizes == [{SMALL: 40, LARGE: 17}]
    assert saved.events == [[(0, "bucket 2 [8, 8]", "above the watermark", 20, 17)]]
    assert model.ran == [20, 10, 10, 17, 9, 9]
    assert guard.high_water == {LARGE: 200}
    torch.testing.assert_close(weights(model), weights(plain))


def test_without_a_known_slope_it_is_lowered_by_a_twentieth(tmp_path) -> None:
    model, saved = Rows(), Saved()
    fit(model, batches_of_rows(20), tmp_path, [Guarded(guard_of(model, saved, Steps(model, 10), 170))])
    assert saved.sizes == [{SMALL: 40, LARGE: 19}]


def test_a_step_within_the_budget_changes_nothing(tmp_path) -> None:
    model, saved = Rows(), Saved()
    guard = guard_of(model, saved, Steps(model, 10), 200)
    fit(model, batches_of_rows(20, 10), tmp_path, [Guarded(guard)])
    assert saved.sizes == []
    assert guard.sizes == {SMALL: 40, LARGE: 20}
    assert model.ran == [20, 10]


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_running_out_of_memory_lowers_a_bucket_once(tmp_path, phase) -> None:
    """The batches of 20 that come later were made before: that they do not fit is no news."""
    model, saved = Rows(), Saved()
    guard = guard_of(model, saved, Steps(model, 0), 100)
    charges = Charges(Bomb(model.first), dict.fromkeys((1, 3, 5), phase))
    trainer = fit(model, batches_of_rows(*[20] * 7), tmp_path, [Guarded(guard), charges])
    assert saved.events == [[(1, "bucket 2 [8, 8]", f"out of memory in {phase}", 20, 19)]]
    assert trainer.global_step == 7


def test_smaller_batches_may_run_out_of_memory_too(tmp_path) -> None:
    """20 do not fit, then 18 do not: each time the size goes below."""
    model, saved = Rows(capacity=17), Saved()
    fit(model, batches_of_rows(20, 18, 17), tmp_path, [Guarded(guard_of(model, saved, Steps(model, 0), 100))])
    assert saved.sizes == [{SMALL: 40, LARGE: 19}, {SMALL: 40, LARGE: 17}]
    assert model.ran == [10, 10, 9, 9, 17]


class Leaking(Rows):
    """Two MiB more are alive after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[torch.Tensor] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> dict:
        result = super().training_step(batch, batch_idx)
        if len(self.kept) == batch_idx:  # once, also where the batch is run in pieces
            self.kept.append(torch.zeros(MIB // 2) + 1)
        work = torch.ones(len(batch), MIB // 4) * 2  # one MiB per row
        return result | {"loss": result["loss"] + 0.0 * work.sum()}


def test_a_slow_leak_lowers_the_bucket_before_memory_runs_out(tmp_path) -> None:
    """40 MiB for a step's own, and 2 for each step before: above 60 after some ten steps, at 80 after some twenty."""
    model, saved = Leaking(), Saved()
    meter, capacity = TensorMeter(torch.device("cpu")), 80 * MIB
    peaks = []

    class Watched(Guarded):
        def on_train_batch_end(self, *args) -> None:
            super().on_train_batch_end(*args)
            peaks.append(meter.peak)

    guard = guard_of(model, saved, meter, 60 * MIB)
    fit(model, batches_of_rows(*[20] * 18), tmp_path, [Watched(guard)])
    first = next(step for step, peak in enumerate(peaks) if peak > 60 * MIB)
    assert saved.events == [[(first, "bucket 2 [8, 8]", "above the watermark", 20, 19)]]
    assert 5 < first < 15
    assert max(peaks) < 65 * MIB < capacity
    assert 2 * 18 * MIB + 40 * MIB > 75 * MIB, "what it would have come to"


def test_what_the_batch_size_cannot_correct_is_reported_and_not_lowered_for(tmp_path) -> None:
    """More than the budget is alive whatever the batch: the size stops at half of what it was."""
    model, saved = Rows(), Saved()
    guard = guard_of(model, saved, Steps(model, 10, leak=20), 100)
    fit(model, batches_of_rows(*[20] * 12), tmp_path, [Guarded(guard)])
    assert guard.sizes == {SMALL: 40, LARGE: 10}


# Where a step cannot be redone


def test_a_model_that_cannot_be_split_ends_with_the_exit_code_to_try_again(tmp_path, capsys) -> None:
    class Whole(RowsAdapter):
        can_split = False

    model, saved = Rows(capacity=10), Saved()
    guard = Guard(Whole(model), [GROUP], {SMALL: 40, LARGE: 20}, Steps(model, 0), 100, saved)
    with pytest.raises(SystemExit) as end:
        fit(model, batches_of_rows(20), tmp_path, [Guarded(guard)])
    assert end.value.code == EXIT_TRY_AGAIN == 75
    assert saved.sizes[-1] == {SMALL: 40, LARGE: 19}
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("OOMptimizer: ")]
    assert sentence.startswith(
        "OOMptimizer: a step of bucket 2 [8, 8] (20 examples) ran out of memory, and no adapter can "
    )


def test_a_single_example_that_does_not_fit_halves_the_size_until_nothing_is_left(tmp_path) -> None:
    model, saved = Rows(capacity=0), Saved()
    with pytest.raises(SystemExit) as end:
        fit(model, batches_of_rows(20), tmp_path, [Guarded(guard_of(model, saved, Steps(model, 0), 100))])
    assert end.value.code == EXIT_TRY_AGAIN
    assert saved.sizes[-1] == {SMALL: 40, LARGE: 9}

    guard = Guard(RowsAdapter(model), [GROUP], {SMALL: 1, LARGE: 1}, Steps(model, 0), 100, saved)
    with pytest.raises(SystemExit) as end:
        fit(model, batches_of_rows(1), tmp_path, [Guarded(guard)])
    assert end.value.code == EXIT_USER_ERROR


@pytest.mark.parametrize(
    ("where", "exit_code", "sentence"),
    [
        (
            "on_train_batch_end",
            EXIT_TRY_AGAIN,
            "memory ran out after step 1 outside of its forward and backward pass",
        ),
        ("on_validation_start", EXIT_USER_ERROR, "validation ran out of memory after step 0"),
    ],
)
def test_out_of_memory_elsewhere_ends_the_training(tmp_path, capsys, where, exit_code, sentence) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("injected: out of memory")

    model, saved = Rows(), Saved()
    guard = guard_of(model, saved, Steps(model, 0), 100)
    model.val_dataloader = lambda: DataLoader(batches_of_rows(4), batch_size=None)
    model.validation_step = lambda *_: None
    with pytest.raises(SystemExit) as end:
        fit(model, batches_of_rows(20, 20), tmp_path, [Guarded(guard), LambdaCallback(**{where: fail})])
    assert end.value.code == exit_code
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith(f"OOMptimizer: {sentence}")]
    assert f"in fail ({__file__}:" in said
    assert saved.sizes == []
    assert "_make_closure" not in vars(guard._trainer.fit_loop.epoch_loop.automatic_optimization)


# Which bucket a batch came from


def bucket(index: int, bin_: float | tuple, shape: Shape) -> Bucket:
    return Bucket("", index, bin_, shape)


SECONDS = [bucket(i, s, Shape("audio", s, 0, 12 * int(s))) for i, s in enumerate((4.0, 8.0))]
PAIRS = [
    bucket(i, b, Shape("text", 0.0, int(b[0]), int(b[1]))) for i, b in enumerate(((8.0, 4.0), (8.0, 9.0), (16.0, 9.0)))
]
TOTALS = [bucket(i, n, Shape("text", 0.0, int(n), int(n), True)) for i, n in enumerate((20.0, 30.0, 40.0))]


@pytest.mark.parametrize(
    ("buckets", "extent", "expected"),
    [
        (SECONDS, Extent("audio", 5, 3.9, 20, 99), 0),
        (SECONDS, Extent("audio", 5, 4.003, 3, 9), 0),  # the manifest's duration was rounded
        (SECONDS, Extent("audio", 5, 4.2, 3, 9), 1),
        (SECONDS, Extent("audio", 5, 9.0, 3, 9), 1),  # longer than any: the last
        (PAIRS, Extent("text", 5, 0.0, 8, 4), 0),
        (PAIRS, Extent("text", 5, 0.0, 8, 5), 1),
        (PAIRS, Extent("text", 5, 0.0, 9, 2), 2),
        (TOTALS, Extent("text", 50, 0.0, 12, 8), 0),
        (TOTALS, Extent("text", 50, 0.0, 12, 9), 1),  # whether one example holds 12 and 9 cannot be seen ...
        (TOTALS, Extent("text", 10, 0.0, 12, 9), 0),  # ... but batches of ten come from the first bucket
        (TOTALS, Extent("text", 10, 0.0, 25, 2), 1),
    ],
)
def test_the_bucket_of_a_batch(buckets, extent, expected) -> None:
    from nemo_emmett.oomptimizer.buckets import Group

    group = Group("", GROUP.config, tuple(buckets))
    model = Rows()
    guard = Guard(RowsAdapter(model), [group], dict.fromkeys(buckets, 10), Steps(model, 0), 1, Saved())
    assert guard._bucket(extent) == buckets[expected]
