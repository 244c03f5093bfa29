"""A step that ran out of memory is redone in microbatches, and the training is what it would have been."""

from __future__ import annotations

import inspect
import json
import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.loops.optimization.automatic import Closure, _AutomaticOptimization
from nemo.collections.speechlm2 import SALM

from nemo_emmett.models import SALMT5
from nemo_emmett.oomptimizer.adapters.base import Adapter
from nemo_emmett.oomptimizer.adapters.salm import SALMAdapter
from nemo_emmett.oomptimizer.adapters.speech_text import SpeechTextAdapter
from nemo_emmett.oomptimizer.buckets import Bucket, Group, Shape
from nemo_emmett.oomptimizer.guard import Guard
from nemo_emmett.oomptimizer.recovery import Recovery, is_out_of_memory

from .injected import Blind, Bomb, Charges, Guarded, Logged, fit, weights
from .models import encoder, preprocessor, tiny_salm
from .rows import Rows, RowsAdapter, batches_of_rows, text_group


class Recorder:
    """A listener that only records its calls."""

    def __init__(self, microbatches: Callable[[Any], int] = lambda batch: 1) -> None:
        self.microbatches = microbatches
        self.phases: list[str] = []
        self.reason: str | None = None

    @contextmanager
    def measuring(self, batch: Any) -> Iterator[None]:
        yield

    def on_out_of_memory(self, batch: Any, phase: str) -> None:
        self.phases.append(phase)

    def abort(self, batch: Any, reason: str) -> None:
        self.reason = reason
        raise SystemExit(75)


class Recovering(Logged):
    """A training with recovery, and what it logs."""

    def __init__(self, recovery: Recovery) -> None:
        super().__init__()
        self.recovery = recovery

    def on_fit_start(self, trainer, module) -> None:
        self.recovery.install(trainer, module)

    def teardown(self, trainer, module, stage) -> None:
        self.recovery.uninstall()


@pytest.fixture(scope="session")
def salm_t5(tiny_t5, tmp_path_factory) -> Callable[[], SALMT5]:
    """Builds a SALM-T5 without dropout, dither and SpecAugment, with layer norm; always the same."""
    folder = tmp_path_factory.mktemp("quiet") / "t5"
    shutil.copytree(tiny_t5, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dropout_rate": 0.0}))
    connector = "nemo.collections.speechlm2.modules.perception.IdentityConnector"
    perception = {
        "target": "nemo.collections.speechlm2.modules.perception.AudioPerceptionModule",
        "output_dim": 32,
        "preprocessor": preprocessor(),
        "encoder": encoder(16, 1),
        "modality_adapter": {"_target_": connector, "d_model": 16},
    }

    def build(**keys: Any) -> SALMT5:
        torch.manual_seed(0)
        return SALMT5({"pretrained_llm": str(folder), "pretrained_weights": False, "perception": perception} | keys)

    return build


@pytest.fixture(scope="session")
def salm_t5_harmonised(salm_t5) -> Callable[[], SALMT5]:
    """The same, which keeps the gradients of speech and text apart until the optimizer's step."""
    return lambda: salm_t5(gradient_conflict="harmonise")


def audio_and_text(model: SALMT5, number: int) -> dict:
    adapter = SpeechTextAdapter(model)
    torch.manual_seed(number)
    speech = adapter.synthetic_batch(Shape("audio", 0.3 + 0.1 * (number % 3), 0, 4), 3, torch.device("cpu"))
    text = adapter.synthetic_batch(Shape("text", 0.0, 5 + number % 4, 6), 4, torch.device("cpu"))
    speech["audio"]["answer_lens"][0] = text["text"]["answer_lens"][1] = 2
    return {0: speech, 1: text}.get(number % 3, adapter.join([speech, text]))


def flat(model: SALM, number: int) -> dict:
    """A batch of NeMo's SALM, of answers that differ in length."""
    torch.manual_seed(number)
    batch = SALMAdapter(model).synthetic_batch(Shape("audio", 0.3 + 0.1 * (number % 3), 0, 4), 3, torch.device("cpu"))
    batch["loss_mask"][0, -2:] = False
    batch["input_ids"][0, -2:] = batch["input_ids"][0, 0]
    return batch


@pytest.fixture(scope="session")
def salm(tmp_path_factory) -> Callable[[], SALM]:
    folder = tmp_path_factory.mktemp("salm")
    return lambda: tiny_salm(folder)


def of_salm_t5(model: SALMT5) -> tuple[Adapter, torch.nn.Module, Callable]:
    return SpeechTextAdapter(model), model.llm.encoder, audio_and_text


def of_salm(model: SALM) -> tuple[Adapter, torch.nn.Module, Callable]:
    return SALMAdapter(model), model.perception, flat


TEXT = text_group((16.0, 16.0))
AUDIO = Group("audio", TEXT.config, (Bucket("audio", 0, 2.0, Shape("audio", 2.0, 0, 24)),))
SIZES = {TEXT.buckets[0]: 4, AUDIO.buckets[0]: 3}


@pytest.mark.parametrize("family", ["salm_t5", "salm_t5_harmonised", "salm"])
def test_96_batches_of_which_every_tenth_runs_out_of_memory(family, request, tmp_path) -> None:
    """No step is lost, the weights are those of a training in which nothing happened, each bucket is lowered once.

    48 batches make a step each, then 48 accumulate by fours.
    """
    build, parts = request.getfixturevalue(family), of_salm if family == "salm" else of_salm_t5
    model = build()
    batches = [parts(model)[2](model, number) for number in range(12)] * 4
    accumulation = GradientAccumulationScheduler({0: 1, 1: 4})
    fit(model, batches, tmp_path, [accumulation], max_epochs=2)
    expected, beginning = weights(model), weights(build())

    model = build()
    adapter, module, _ = parts(model)
    bomb, saved = Bomb(module), []
    guard = Guard(adapter, [TEXT, AUDIO], SIZES, Blind(), 1, lambda sizes, events: saved.append(list(events)))
    phases = {8: "forward", 21: "backward", 28: "forward", 35: "backward", 46: "backward"}
    trainer = fit(model, batches, tmp_path, [accumulation, Guarded(guard), Charges(bomb, phases)], max_epochs=2)
    assert bomb.fired == 10
    assert trainer.global_step == 48 + 12
    assert (expected - beginning).abs().max() > 0.01, "it has learned"
    torch.testing.assert_close(weights(model), expected, rtol=1e-4, atol=1e-5)
    lowered = ["audio: bucket 1 2"] if family == "salm" else ["audio: bucket 1 2", "bucket 1 [16, 16]"]
    assert sorted(event.bucket for event in saved[-1]) == lowered
    assert [len(events) for events in saved] == list(range(1, len(lowered) + 1))


def test_a_step_that_fails_between_the_gradients_of_two_modalities_is_redone(salm_t5_harmonised, tmp_path) -> None:
    """When text's backward pass runs out of memory, speech's has been taken and text's of the decoder: both again."""

    class ChargedByText(Callback):
        def on_before_backward(self, trainer, module, loss) -> None:
            if fails and trainer.global_step == 1 and not bomb.fired:
                module.modality_terms["text"].register_hook(self.charge)

        def charge(self, gradient) -> None:
            bomb.phase = "backward"

    found = []
    for accumulate in (1, 2):
        for fails in (False, True):
            model = salm_t5_harmonised()
            bomb = Bomb(model.llm.encoder)
            batches = [audio_and_text(model, number) for number in (2, 2, 5, 5)]
            recovering = Recovering(Recovery(SpeechTextAdapter(model), listener := Recorder()))
            fit(model, batches, tmp_path, [recovering, ChargedByText()], accumulate)
            assert listener.phases == ["backward"] * fails
            found.append(weights(model))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[3], found[2], rtol=1e-5, atol=1e-6)


# What the rest of a training sees of it


def run_rows(tmp_path, recovery_of=lambda model: None, sizes=(8, 8, 8), accumulate=1, capacity=10**6, phases=None):
    """A training of :class:`Rows`: the model, what was logged, and what the steps returned."""
    model = Rows(capacity)
    recovery = recovery_of(model)
    logged = Recovering(recovery) if recovery else Logged()
    callbacks = [logged, Charges(Bomb(model.first), phases or {})]
    fit(model, batches_of_rows(*sizes), tmp_path, callbacks, accumulate)
    return model, logged


def recovery_with(listener: Recorder) -> Callable[[Rows], Recovery]:
    return lambda model: Recovery(RowsAdapter(model), listener)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_logs_outputs_and_hooks_are_those_of_a_whole_step(tmp_path, phase, accumulate) -> None:
    plain, expected = run_rows(tmp_path, accumulate=accumulate)
    redone, logged = run_rows(tmp_path, recovery_with(Recorder()), accumulate=accumulate, phases={1: phase})
    assert redone.ran == [8, 8, 4, 4, 8]
    assert redone.zeroed == plain.zeroed
    torch.testing.assert_close(weights(redone), weights(plain))
    for step, (mine, theirs) in enumerate(zip(logged.metrics, expected.metrics, strict=True)):
        if phase == "forward" and step == 1:
            theirs = theirs | dict.fromkeys(("largest", "largest_step"), None)
            halves = [half.max().item() for half in batches_of_rows(8, 8)[1].tensor_split(2)]
            assert mine["largest_step"] == pytest.approx(sum(halves) / 2)
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    for mine, theirs in zip(logged.outputs, expected.outputs, strict=True):
        assert mine["loss"].item() == pytest.approx(theirs["loss"].item(), rel=1e-5)
        assert mine["mean"].item() == pytest.approx(theirs["mean"].item(), abs=1e-6)
        assert mine["name"] == "rows"


def test_microbatches_are_halved_until_they_fit(tmp_path) -> None:
    listener = Recorder()
    plain, _ = run_rows(tmp_path, sizes=(13, 3))
    model, _ = run_rows(tmp_path, recovery_with(listener), sizes=(13, 3), capacity=3)
    assert model.ran == [2, 2, 2, 1, 2, 1, 2, 1, 3], "13 = 7 + 6 = 4 + 3 + 3 + 3, where 4 is too many: halves of all"
    assert listener.phases == ["forward"]
    torch.testing.assert_close(weights(model), weights(plain))


def test_a_microbatch_that_fails_in_its_backward_pass_adds_nothing_twice(tmp_path) -> None:
    """The whole batch fails, and then its first half; both when the last layer has its gradient already."""
    plain, _ = run_rows(tmp_path, sizes=(8, 8), accumulate=2)
    model = Rows()
    bomb, listener = Bomb(model.first), Recorder()
    listener.on_out_of_memory = lambda batch, phase: setattr(bomb, "phase", "backward")
    callbacks = [Recovering(Recovery(RowsAdapter(model), listener)), Charges(bomb, {1: "backward"})]
    fit(model, batches_of_rows(8, 8), tmp_path, callbacks, accumulate=2)
    assert bomb.fired == 2
    assert model.ran == [8, 8, 4, 2, 2, 2, 2]
    torch.testing.assert_close(weights(model), weights(plain))


def test_a_batch_may_be_run_in_microbatches_from_the_start(tmp_path) -> None:
    plain, expected = run_rows(tmp_path)
    model, logged = run_rows(tmp_path, recovery_with(Recorder(microbatches=lambda batch: 3)))
    assert model.ran == [3, 3, 2] * 3
    torch.testing.assert_close(weights(model), weights(plain))
    assert logged.metrics[-1]["loss"] == pytest.approx(expected.metrics[-1]["loss"], rel=1e-5)


def test_nothing_of_a_failed_attempt_is_left_when_its_microbatches_run(tmp_path) -> None:
    model, alive = Rows(), []

    def keep(module, args, output) -> None:
        alive.append(weakref.ref(args[0].untyped_storage()))  # autograd saves it for the backward pass

    class Looking(RowsAdapter):
        def split_batch(self, batch, count):
            assert alive
            assert all(reference() is None for reference in alive)
            return super().split_batch(batch, count)

    hook = model.second.register_forward_hook(keep)
    bomb = Bomb(model.second)
    callbacks = [Recovering(Recovery(Looking(model), Recorder())), Charges(bomb, {0: "backward"})]
    fit(model, batches_of_rows(8), tmp_path, callbacks)
    hook.remove()
    assert bomb.fired == 1


def test_loss_scaling_does_not_change_it(tmp_path) -> None:
    """What the scaler of fp16 does to a loss: backward multiplies it, whatever it is a loss of."""

    class Scaled(Rows):
        def backward(self, loss, *args, **kwargs) -> None:
            (loss * 1024.0).backward()

        def on_before_optimizer_step(self, optimizer) -> None:
            for parameter in self.parameters():
                parameter.grad /= 1024.0

    plain, _ = run_rows(tmp_path)
    model = Scaled()
    callbacks = [Recovering(Recovery(RowsAdapter(model), Recorder())), Charges(Bomb(model.first), {0: "backward"})]
    fit(model, batches_of_rows(8, 8, 8), tmp_path, callbacks)
    torch.testing.assert_close(weights(model), weights(plain))


# What cannot be redone


def test_a_single_example_that_does_not_fit_ends_the_training(tmp_path) -> None:
    listener = Recorder()
    with pytest.raises(SystemExit):
        run_rows(tmp_path, recovery_with(listener), capacity=0)
    assert listener.reason == "not even one example of it fits"


def test_a_model_whose_batches_cannot_be_split_ends_the_training(tmp_path) -> None:
    listener = Recorder()

    class Whole(RowsAdapter):
        can_split = False

    with pytest.raises(SystemExit):
        run_rows(tmp_path, lambda model: Recovery(Whole(model), listener), capacity=4)
    assert listener.phases == ["forward"]
    assert listener.reason == "no adapter can split the batches of Rows"


def test_other_errors_pass(tmp_path) -> None:
    def fail(batch: Any) -> int:
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run_rows(tmp_path, recovery_with(Recorder(microbatches=fail)))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("anything"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, expected) -> None:
    assert is_out_of_memory(error) is expected


# Lightning's private seam


def test_lightning_still_makes_its_closures_where_recovery_takes_their_place(tmp_path) -> None:
    """If this fails, Lightning has changed: see how its automatic optimization makes and calls closures now."""
    assert list(inspect.signature(_AutomaticOptimization._make_closure).parameters) == [
        "self",
        "kwargs",
        "optimizer",
        "batch_idx",
    ]
    assert list(inspect.signature(Closure.__init__).parameters) == ["self", "step_fn", "backward_fn", "zero_grad_fn"]
    assert "self._make_closure(kwargs, optimizer, batch_idx)" in inspect.getsource(_AutomaticOptimization.run)
    source = inspect.getsource(Closure.closure)
    order = [source.index(call) for call in ("self._step_fn()", "self._zero_grad_fn()", "self._backward_fn(")]
    assert order == sorted(order)


def test_afterwards_lightning_is_as_it_was(tmp_path) -> None:
    recovery = recovery_with(Recorder())
    model = Rows()
    trainer = fit(model, batches_of_rows(8), tmp_path, [Recovering(recovery(model))])
    assert "_make_closure" not in vars(trainer.fit_loop.epoch_loop.automatic_optimization)
    assert "log" not in vars(model)
