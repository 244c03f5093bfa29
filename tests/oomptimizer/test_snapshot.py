"""Whatever probes change is put back, bit for bit; a training goes on as if there had been none."""

from __future__ import annotations

import random
from collections import OrderedDict, defaultdict, deque
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from nemo_emmett.oomptimizer.snapshot import Snapshot
from nemo_emmett.oomptimizer.steps import TrainingSteps
from tests.models.batches import audio_batch, text_batch
from tests.oomptimizer.models import LOCATOR, encoder, tiny_ctc, tiny_salm
from tests.oomptimizer.probing import STEPS, Probing, assert_no_side_effects, losses_of, raw, state_of, trainer_for

# Three models, as their trainings have them.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def ctc_batch(examples: int, seconds: float, tokens: int = 4, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    samples = round(seconds * 16000)
    audios = 0.1 * torch.randn(examples, samples, generator=generator)
    transcripts = torch.randint(1, 30, (examples, tokens), generator=generator)
    return audios, torch.full((examples,), samples), transcripts, torch.full((examples,), tokens)


def salm_batch(model, examples: int, seconds: float, tokens: int = 5) -> dict[str, Tensor]:
    locator = model.tokenizer.token_to_id(LOCATOR)
    ids = torch.tensor([[1, locator, *range(4, 4 + tokens)]] * examples)
    samples = round(seconds * 16000)
    audios = 0.1 * torch.randn(examples, samples, generator=torch.Generator().manual_seed(examples))
    mask = torch.arange(ids.shape[1]) >= 2
    return {
        "audios": audios,
        "audio_lens": torch.full((examples,), samples),
        "input_ids": ids,
        "loss_mask": mask.expand_as(ids),
    }


def test_salm_t5_trains_as_if_it_had_not_been_probed(salm_t5_config) -> None:
    from nemo_emmett.models import SALMT5

    def make():
        torch.manual_seed(0)
        return SALMT5(salm_t5_config)

    speech = [(1.0, "ein rotes haus"), (0.6, "zwei blaue autos")]
    text = [("one red house", "ein rotes haus"), ("two blue cars", "zwei blaue autos")]
    batches = [{"audio": audio_batch(make(), speech, seed=i), "text": text_batch(make(), text)} for i in range(2)]
    batches = [*batches, {"text": batches[0]["text"]}, {"audio": batches[1]["audio"]}] * (STEPS // 4)

    def probe(steps: TrainingSteps) -> None:
        steps.warm_up(batches[2])
        for batch in batches[:4]:
            assert steps.run(batch).peak >= steps.floor.resident

    probing = Probing(probe)
    probed = losses_of(make, batches, probing)
    assert_no_side_effects(probing)
    assert probed == losses_of(make, batches)
    assert len(set(probed)) == STEPS


def test_salm_trains_as_if_it_had_not_been_probed(folder: Path) -> None:
    make = lambda: tiny_salm(folder / "salm")  # noqa: E731
    model = make()
    batches = [salm_batch(model, 2, 1.0 + 0.1 * i) for i in range(STEPS)]

    def probe(steps: TrainingSteps) -> None:
        steps.warm_up(batches[0])
        steps.run(salm_batch(model, 6, 2.0))

    probing = Probing(probe)
    probed = losses_of(make, batches, probing)
    assert_no_side_effects(probing)
    assert probed == losses_of(make, batches)


def make_ctc(folder: Path):
    """With batch norm, dropout, and SpecAugment, which brings a random generator of its own."""
    noisy = encoder(16, 1) | {"conv_norm_type": "batch_norm", "dropout": 0.1, "pos_emb_max_len": 40}
    spec_augment = {
        "_target_": "nemo.collections.asr.modules.SpectrogramAugmentation",
        "freq_masks": 1,
        "freq_width": 4,
        "time_masks": 1,
        "time_width": 5,
    }
    model = tiny_ctc(folder / "ctc", encoder=noisy, spec_augment=spec_augment)
    for part in model.spec_augmentation.modules():
        if hasattr(part, "_rng"):
            part._rng = random.Random(5)  # otherwise seeded by the operating system, differently in each run
    return model


@pytest.mark.parametrize("accumulated", [1, 3])
def test_a_ctc_model_with_batch_norm_trains_as_if_it_had_not_been_probed(folder: Path, accumulated: int) -> None:
    batches = [ctc_batch(2, 1.0 + 0.1 * i, seed=i) for i in range(STEPS)]
    grown = []

    def probe(steps: TrainingSteps) -> None:
        model = steps._module
        assert model.encoder.max_audio_length == 40
        steps.warm_up(batches[0])
        steps.run(ctc_batch(3, 5.0))
        # 5 s are 63 frames: more than the positional table had.
        grown.append((model.encoder.max_audio_length, model.encoder.pos_enc.pe.shape[1]))

    probing = Probing(probe)
    options = {"accumulate_grad_batches": accumulated, "max_steps": STEPS // accumulated}
    probed = losses_of(lambda: make_ctc(folder), batches, probing, **options)
    ((frames, positions),) = grown
    assert frames > 40
    assert positions == 2 * frames - 1
    assert_no_side_effects(probing)
    assert probed == losses_of(lambda: make_ctc(folder), batches, **options)


def test_after_an_error_nothing_is_left_either(folder: Path) -> None:
    batches = [ctc_batch(2, 1.0)] * 2

    def probe(steps: TrainingSteps) -> None:
        steps.warm_up(batches[0])
        steps.run(ctc_batch(2, 5.0))
        raise KeyError("of the search")

    class Surviving(Probing):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            with pytest.raises(KeyError, match="of the search"):
                super().on_fit_start(trainer, pl_module)
            self.after = state_of(trainer, pl_module)
            pl_module.zero_grad()

    probing = Surviving(probe)
    losses_of(lambda: make_ctc(folder), batches, probing, max_steps=1)
    assert_no_side_effects(probing)


class Layer(LightningModule):
    """One linear layer; its loss is what comes out of it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.linear(batch).square().mean()
        self.log_dict({"loss": loss})
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_probes_call_no_callback_or_logger(tmp_path: Path) -> None:
    calls = []

    class Hearing(Callback):
        def on_before_backward(self, trainer, pl_module, loss) -> None:
            calls.append("before backward")

        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            calls.append("before optimizer step")

    class Telling(Layer):
        def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
            if probing.before and not probing.after:
                self.logger.log_metrics({"of a probe": 1.0})
            return super().training_step(batch, batch_idx)

    probing = Probing(lambda steps: (steps.warm_up(torch.ones(1, 8)), steps.run(torch.ones(2, 8))))
    logger = CSVLogger(tmp_path)
    trainer = trainer_for(probing, Hearing(), max_steps=1, logger=logger)
    trainer.fit(Telling(), DataLoader([torch.ones(2, 8)], batch_size=None))
    assert_no_side_effects(probing)
    assert calls == ["before backward", "before optimizer step"]  # of the one step of the training
    logger.save()
    assert "of a probe" not in (Path(logger.log_dir) / "metrics.csv").read_text()


# What a snapshot holds.


class Odd(nn.Module):
    """Holds something of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)
        self.register_buffer("table", torch.arange(4.0))
        self.register_buffer("wide", torch.ones(1).expand(4))
        self.plain = torch.zeros(3)
        self.metric = MeanMetric()
        self.length = 1000
        self.nested = {"list": [torch.zeros(2), {1, 2}], "deque": deque([1], maxlen=2)}
        self.ordered = OrderedDict(a=1, b=2)
        self.counts = defaultdict(int, a=1)
        self.unregistered = [nn.Linear(2, 2)]
        self.python, self.numpy = random.Random(0), np.random.default_rng(0)
        self.old_numpy, self.torch = np.random.RandomState(0), torch.Generator().manual_seed(0)


def draws(odd: Odd) -> list[float]:
    numpy = [odd.numpy.random(), odd.old_numpy.random_sample()]
    return [odd.python.random(), *numpy, torch.rand(1, generator=odd.torch).item()]


def change(odd: Odd) -> None:
    odd.eval()
    odd.norm.weight.data.mul_(2)
    odd.norm.running_mean.add_(1)
    odd.table = torch.arange(8.0)
    odd.register_buffer("new", torch.ones(1))
    odd.plain += 1
    odd.metric.update(5.0)
    odd.length += 1000
    odd.later = None
    odd.nested["list"][0].fill_(3)
    odd.nested["list"][1].add(3)
    odd.nested["list"].append("more")
    odd.nested["deque"].append(2)
    odd.nested["other"] = 1
    odd.ordered.move_to_end("a")
    odd.counts["b"] += 1
    odd.unregistered[0].weight.data.zero_()
    draws(odd)


def described(odd: Odd) -> dict:
    return {
        "state": {name: (id(value), raw(value)) for name, value in odd.state_dict(keep_vars=True).items()},
        "plain": (id(odd.plain), raw(odd.plain)),
        "unregistered": raw(odd.unregistered[0].weight),
        "nested": (id(odd.nested), repr(odd.nested)),
        "others": (odd.length, odd.training, odd.norm.training, list(odd.ordered), dict(odd.counts)),
        "metric": (odd.metric.update_count, raw(odd.metric.mean_value), raw(odd.metric.weight)),
        "names": sorted(vars(odd)),
    }


def test_a_snapshot_restores_everything_in_the_same_objects() -> None:
    odd = Odd()
    before = described(odd)
    snapshot = Snapshot([odd])
    drawn = draws(odd)
    change(odd)
    changed = described(odd)
    assert [what for what in before if before[what] == changed[what]] == []
    snapshot.restore()
    assert before == described(odd)
    assert draws(odd) == drawn


def test_a_snapshot_of_an_optimizer_in_the_midst_of_training() -> None:
    layer = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(layer.parameters(), amsgrad=True)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    def step() -> None:
        layer(torch.ones(2, 4)).sum().backward()
        optimizer.step()

    step()
    schedule.step()
    moments = [id(state["exp_avg"]) for state in optimizer.state.values()]
    before = repr(optimizer.state_dict()), raw(layer.weight)
    snapshot = Snapshot([layer, optimizer])
    step()
    optimizer.param_groups[0]["lr"] = 7.0
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    assert before != (repr(optimizer.state_dict()), raw(layer.weight))
    snapshot.restore()
    assert before == (repr(optimizer.state_dict()), raw(layer.weight))
    assert moments == [id(state["exp_avg"]) for state in optimizer.state.values()]


def test_containers_that_refuse_changes_are_left_alone_if_they_had_none() -> None:
    class Sealed(dict):
        def clear(self) -> None:
            raise TypeError("sealed")

    layer = nn.Linear(2, 2)
    layer.options = Sealed(a=10**6)
    snapshot = Snapshot([layer])
    layer.bias.data.fill_(9)
    snapshot.restore()
    assert layer.bias.max() < 9


def test_a_snapshot_copies_no_frozen_weights() -> None:
    layer = nn.Linear(100, 100).requires_grad_(False)
    layer.register_buffer("scale", torch.ones(3))
    assert [value.numel() for _, value in Snapshot([layer])._tensors] == [3]
