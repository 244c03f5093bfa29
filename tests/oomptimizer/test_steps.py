"""Probes at fit start take the training's own steps, and measure them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from nemo_emmett.errors import ConfigError, ModelError
from nemo_emmett.oomptimizer import steps
from nemo_emmett.oomptimizer.meter import Reading, TensorMeter
from nemo_emmett.oomptimizer.steps import TrainingSteps
from tests.models.two_ranks import quiet_trainer, run_on_two_ranks
from tests.oomptimizer.probing import Probing, assert_no_side_effects, trainer_for

FLOAT = 4  # bytes
# What is measured, on a model whose bytes can be counted by hand.

WIDTH = 64
WEIGHTS = FLOAT * 2 * WIDTH * WIDTH  # of two square layers without biases


class Layers(LightningModule):
    """Two linear layers with a ReLU in between; the loss is the sum of what comes out."""

    def __init__(self, optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH, bias=False)
        self.second = nn.Linear(WIDTH, WIDTH, bias=False)
        self.optimizer = optimizer
        self.fail: Callable[[str], None] = lambda where: None
        self.gradients_seen: list[bool] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        self.gradients_seen.append(all(p.grad is not None for p in self.parameters()))
        hidden = self.first(batch).relu()
        self.fail("forward")
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: self.fail("backward"))
        loss = self.second(hidden).sum()
        self.log("loss", loss)
        return {"loss": loss}

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters())
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)}


def rows(examples: int) -> Tensor:
    return torch.ones(examples, WIDTH)


def probe_layers(probe: Callable[[TrainingSteps], Any], model: Layers | None = None, **options: Any) -> Any:
    results = []
    probing = Probing(lambda steps: results.append(probe(steps)))
    model = model or Layers()
    trainer_for(probing, max_steps=1, **options).fit(model, DataLoader([rows(2)] * 4, batch_size=None))
    assert_no_side_effects(probing)
    return results[0]


def test_the_floor_is_the_optimizers_step() -> None:
    floor = probe_layers(lambda steps: steps.warm_up(rows(1)))
    # Weights, gradients, and Adam's two moments; its step counters are single floats. Held gradients that a second fit
    # finds are kept aside, off the meter.
    state = 2 * WEIGHTS + 2 * FLOAT
    assert floor.resident == WEIGHTS + WEIGHTS + state
    assert floor.resident <= floor.peak <= floor.resident + 3 * WEIGHTS  # Adam's temporaries
    assert not floor.out_of_memory
    assert floor.seconds > 0


def test_a_probe_holds_weights_state_gradients_and_activations() -> None:
    def probe(steps: TrainingSteps) -> list[Reading]:
        steps.warm_up(rows(1))
        return [steps.run(rows(n)) for n in (1000, 2000, 1000)]

    thousand, two_thousand, again = probe_layers(probe)
    row = FLOAT * WIDTH
    before = 4 * WEIGHTS + 2 * FLOAT
    assert thousand.resident == two_thousand.resident == before
    # After the forward pass: the batch and the ReLU's output, and the loss, before and after it is divided.
    assert thousand.held == before + 2000 * row + 2 * FLOAT
    assert two_thousand.held - thousand.held == 2000 * row
    # At worst: these two, and the gradients behind and before the ReLU.
    assert two_thousand.peak - thousand.peak == 4000 * row
    assert (again.peak, again.held, again.resident) == (thousand.peak, thousand.held, thousand.resident)


def test_accumulated_gradients_are_kept_through_the_backward_pass() -> None:
    def probe(steps: TrainingSteps) -> int:
        steps.warm_up(rows(1))
        return steps.run(rows(8)).peak

    # The batch is small compared with the weights: at worst a layer's old and new gradient are both alive.
    alone, accumulated = probe_layers(probe), probe_layers(probe, accumulate_grad_batches=2)
    assert accumulated - alone >= 0
    assert accumulated > 4 * WEIGHTS + WEIGHTS // 2


def test_gradients_are_there_when_a_probe_begins_also_after_one_that_failed() -> None:
    model = Layers()

    def probe(steps: TrainingSteps) -> None:
        steps.warm_up(rows(1))
        steps.run(rows(2))
        model.fail = out_of_memory_in("backward")
        assert steps.run(rows(2)).out_of_memory
        model.fail = lambda where: None
        steps.run(rows(2))
        assert model.gradients_seen == [True] * 5

    probe_layers(probe, model)


def out_of_memory_in(where: str, error: Exception | None = None) -> Callable[[str], None]:
    def fail(now: str) -> None:
        if now == where:
            raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    return fail


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory: you t"),
    ],
    ids=["cuda", "cpu"],
)
def test_running_out_of_memory_is_a_reading_and_all_is_free_again(where: str, error: Exception) -> None:
    model = Layers()

    def probe(steps: TrainingSteps) -> None:
        steps.warm_up(rows(1))
        alive = steps._meter.alive
        before = steps.run(rows(1000))
        model.fail = out_of_memory_in(where, error)
        failed = steps.run(rows(4000))
        assert failed.out_of_memory
        assert failed.peak >= 2 * FLOAT * WIDTH * 4000
        assert steps._meter.alive <= alive
        model.fail = lambda where: None
        after = steps.run(rows(1000))
        assert (after.peak, after.out_of_memory) == (before.peak, False)

    probe_layers(probe, model)


def test_warming_up_may_run_out_of_memory() -> None:
    model = Layers()

    def probe(steps: TrainingSteps) -> None:
        model.fail = out_of_memory_in("forward")  # put back, as all attributes are
        assert steps.warm_up(rows(1)).out_of_memory
        assert steps.floor.out_of_memory

    probe_layers(probe, model)


def test_other_errors_are_not_swallowed() -> None:
    model = Layers()
    model.fail = out_of_memory_in("forward", RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        probe_layers(lambda steps: steps.warm_up(rows(1)), model)


def test_steps_are_taken_in_the_trainings_precision() -> None:
    kinds = []

    class Noting(Layers):
        def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
            kinds.append(self.first(batch).dtype)
            return super().training_step(batch, batch_idx)

    probe_layers(lambda steps: steps.warm_up(rows(1)), Noting(), precision="bf16-mixed")
    assert set(kinds) == {torch.bfloat16}


def test_batches_are_brought_into_the_trainings_precision() -> None:
    kinds = []

    class Noting(Layers):
        def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
            kinds.append(batch.dtype)
            return super().training_step(batch, batch_idx)

    probe_layers(lambda steps: (steps.warm_up(rows(1)), steps.run(rows(2))), Noting(), precision="bf16-true")
    assert set(kinds) == {torch.bfloat16}


def test_the_gradient_scaler_is_as_before_and_does_not_skip_the_state() -> None:
    class Overflowing(Layers):
        def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
            return {"loss": super().training_step(batch, batch_idx)["loss"] * float("inf")}

    def probe(steps: TrainingSteps) -> None:
        steps.warm_up(rows(1))
        assert len(steps._trainer.optimizers[0].state) == 2

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    from lightning.pytorch.plugins import MixedPrecision

    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    options = {"plugins": [plugin], "max_steps": 0}
    model = Overflowing()
    probing = Probing(probe)
    trainer_for(probing, **options).fit(model, DataLoader([rows(2)], batch_size=None))
    assert_no_side_effects(probing)
    assert scaler.get_scale() == 1024.0
    assert scaler._growth_tracker is None
    assert not scaler._per_optimizer_states


def test_a_model_sharded_by_fsdp2_cannot_go_on_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemo_emmett.oomptimizer.steps.FSDPModule", nn.Linear)

    class Failing(Layers):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(ConfigError, match=r"FSDP2 cannot go on; lower OOMptimizer\.memory_fraction"):
        probe_layers(lambda steps: steps.warm_up(rows(1)), Failing())


# Bad input.


def test_what_ranks_exchange_about_a_probe_is_no_part_of_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real ranks hold it for as long as their threads like."""
    monkeypatch.setattr(steps, "world_size", lambda: 2)
    monkeypatch.setattr(steps.dist, "all_reduce", lambda tensor, _: tensor.mul_(2))
    meter = TensorMeter(torch.device("cpu"))
    with meter.measuring():
        assert steps._most([3.0, 4.0], torch.device("cpu")) == [6.0, 8.0]
    assert (meter.peak, meter.alive) == (0, 0)


def test_a_module_that_optimizes_by_itself_is_refused() -> None:
    class Manual(Layers):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(ConfigError, match=r"Manual optimizes by itself .*set bucket_batch_size by hand"):
        probe_layers(lambda steps: None, Manual())


def test_an_optimizer_that_needs_a_closure_is_refused() -> None:
    with pytest.raises(ConfigError, match="LBFGS runs the model several times in a step"):
        probe_layers(lambda steps: None, Layers(torch.optim.LBFGS))


def test_a_step_without_a_loss_is_refused() -> None:
    class Lossless(Layers):
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            return None

    with pytest.raises(ModelError, match=r"Lossless\.training_step returned no loss"):
        probe_layers(lambda steps: steps.warm_up(rows(1)), Lossless())


# Two ranks.

STRATEGIES = {
    "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
    "ddp_views": lambda: DDPStrategy(process_group_backend="gloo", gradient_as_bucket_view=True),
    "fsdp2": lambda: ModelParallelStrategy(2, 1, process_group_backend="gloo"),
}


class NormalisedLayers(LightningModule):
    """Two layers with a batch norm in between, whose second rank fails."""

    def __init__(self, sharded: bool) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 64)
        self.sharded = sharded
        self.failing: str | None = None  # where the second rank runs out of memory

    def configure_model(self) -> None:
        for part in (self.first, self.norm, self.second) * self.sharded:
            fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        hidden = self.norm(self.first(batch)).relu()
        if self.trainer.global_rank == 1:
            self.fail("forward")
            hidden.register_hook(lambda gradient: self.fail("backward"))
        return self.second(hidden).square().mean()

    def fail(self, where: str) -> None:
        if where == self.failing:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


class ProbingRanks(Callback):
    """Takes readings of which some fail."""

    def __init__(self, failures: Sequence[str]) -> None:
        self.failures = failures
        self.readings: list[list] = []

    def on_fit_start(self, trainer: Trainer, pl_module: NormalisedLayers) -> None:
        # The ranks' batches differ in size: the larger one's reading is everybody's.
        rows = torch.ones(1000 * (1 + trainer.global_rank), 64)
        with TrainingSteps(trainer, pl_module, TensorMeter(torch.device("cpu"))) as steps:
            self.note(steps.warm_up(torch.ones(4, 64)))
            for pl_module.failing in (None, *self.failures, None):
                self.note(steps.run(rows))

    def note(self, reading: Reading) -> None:
        self.readings.append([reading.peak, reading.held, reading.seconds, reading.out_of_memory])


class Losses(Callback):
    """Keeps the loss of each step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(outputs["loss"].item())


def losses_of(strategy: str, *callbacks: Callback) -> list[float]:
    seed_everything(1, verbose=False)
    losses = Losses()
    trainer = quiet_trainer(strategy=STRATEGIES[strategy](), max_steps=10, callbacks=[losses, *callbacks])
    generator = torch.Generator().manual_seed(trainer.global_rank)
    batches = [torch.randn(4, 64, generator=generator) for _ in range(10)]
    trainer.fit(NormalisedLayers(strategy == "fsdp2"), DataLoader(batches, batch_size=None))
    return losses.losses


def probe_and_train(rank: int, folder: Path) -> None:
    """What this rank finds, by strategy."""
    found = {}
    for strategy, failures in FAILURES.items():
        probing = ProbingRanks(failures)
        losses = losses_of(strategy, probing)
        found[strategy] = {"probed": losses, "plain": losses_of(strategy), "readings": probing.readings}
    (folder / f"{rank}.json").write_text(json.dumps(found))


# Where the second of two ranks runs out of memory; where gradients are averaged, none may do so in its backward pass.
FAILURES = {"ddp": ["forward", "backward"], "ddp_views": ["forward"], "fsdp2": []}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of two ranks found, by strategy."""
    folder = tmp_path_factory.mktemp("ranks")
    run_on_two_ranks(probe_and_train, folder, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("strategy", FAILURES)
def test_two_ranks_agree_on_readings_and_train_as_if_not_probed(two_ranks: list[dict], strategy: str) -> None:
    first, second = (rank[strategy] for rank in two_ranks)
    assert first["readings"] == second["readings"]
    floor, probe, *failed, again = first["readings"]
    assert [reading[-1] for reading in failed] == [True] * len(FAILURES[strategy])
    assert probe[0] == pytest.approx(again[0], rel=0.01)
    assert probe[0] > floor[0] + 3 * 2000 * FLOAT * WIDTH  # of the rank with the larger batch
    for rank in (first, second):
        assert rank["probed"] == rank["plain"]
    assert first["plain"] != second["plain"]
