"""Steps whose loss or gradients are not finite are skipped, and weights that are not finite are never saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from nemo.utils.callbacks.nemo_model_checkpoint import NeMoModelCheckpoint
from torch.distributed.fsdp import fully_shard

from nemo_emmett.callbacks.nonfinite import SkipNonFiniteSteps
from nemo_emmett.errors import EXIT_NOT_FINITE, ConfigError, NonFiniteError
from nemo_emmett.modules.tensors import nonfinite_weight

from ..models.two_ranks import run_on_two_ranks

GOOD = [torch.arange(8.0).view(4, 2).roll(i) / 10 for i in range(6)]
FAULTS = ("the loss is NaN", "the loss alone is infinite", "the gradient alone is NaN")
SAID = dict(zip(FAULTS, ("nan", "inf", "gradient norm nan"), strict=True))


def batch(rows: torch.Tensor, fault: str | None = None, name: str = "good") -> dict:
    examples = [{"id": f"{name}-{row}", "audio_path": f"/data/{name}.wav", "audio_start": 1.5} for row in range(4)]
    return {"text": {"rows": rows, "fault": fault, "examples": examples}}


class Regression(LightningModule):
    """With batch norm, whose statistics a forward pass changes."""

    def __init__(self, optimizer: type = torch.optim.AdamW) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
        self.optimizer = optimizer

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        rows, fault = batch["text"]["rows"], batch["text"]["fault"]
        out = self.layers(rows * float("nan") if fault == FAULTS[0] else rows).square().mean()
        if fault == FAULTS[1]:
            return out + torch.tensor(float("inf"))
        # The square root's slope at 0 is infinite: 0 in the forward pass.
        return out + (out - out).abs().sqrt() if fault == FAULTS[2] else out

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            fully_shard(self.layers, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters(), lr=0.01)


def fit(batches: list[dict], callback: SkipNonFiniteSteps | None = None, model: Regression | None = None, **options):
    model = model or Regression()
    callbacks = [callback or SkipNonFiniteSteps(), *options.pop("callbacks", [])]
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"accelerator": "cpu", "max_epochs": 1, "enable_checkpointing": len(callbacks) > 1, **quiet, **options}
    trainer = Trainer(callbacks=callbacks, **options)
    trainer.fit(model, loader)
    return model, trainer


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adafactor])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_bad_step_has_no_effect(fault: str, optimizer: type, accumulate: int, caplog) -> None:
    good = [batch(rows) for rows in GOOD]
    options = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 1.0}
    bad = [batch(GOOD[0]), batch(GOOD[1], fault, "bad")][2 - accumulate :]
    with_it, trainer = fit([*good[:2], *bad, *good[2:]], model=Regression(optimizer), **options)
    without, _ = fit(good, model=Regression(optimizer), **options)
    for (name, one), other in zip(with_it.state_dict().items(), without.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert trainer.global_step == len(good) // accumulate + 1  # the schedule goes on
    (said,) = [record.message for record in caplog.records if "is skipped" in record.message]
    assert f"Step {2 // accumulate} is skipped" in said
    assert "text: examples " in said
    assert "bad-3 (/data/bad.wav from 1.5 s)" in said
    assert SAID[fault] in said


def test_the_training_ends_when_bad_steps_pile_up(caplog) -> None:
    bad = batch(GOOD[0], FAULTS[0])
    with pytest.raises(NonFiniteError, match="step 4: 3 of the last 100 steps") as error:
        fit([batch(GOOD[0]), batch(GOOD[1]), *[bad] * 9], SkipNonFiniteSteps(max_steps=3))
    assert error.value.exit_code == EXIT_NOT_FINITE == 70
    spread = [batch(GOOD[0]), bad, batch(GOOD[1])] * 3
    fit(spread, SkipNonFiniteSteps(max_steps=3, window=6))  # at steps 1, 4 and 7
    with pytest.raises(NonFiniteError, match="step 7: 3 of the last 7"):
        fit(spread, SkipNonFiniteSteps(max_steps=3, window=7))
    resumed = SkipNonFiniteSteps(max_steps=3, window=7)
    resumed.load_state_dict({"skipped": [-3, -1]})  # as steps before
    with pytest.raises(NonFiniteError, match="step 1: 3 of"):
        fit(spread, resumed)


def test_a_run_that_skipped_more_than_it_made_is_no_training() -> None:
    batches = [batch(GOOD[0]), *[batch(GOOD[0], FAULTS[0])] * 2]
    with pytest.raises(NonFiniteError, match="2 of 3 steps of this run"):
        fit(batches)
    fit(batches, SkipNonFiniteSteps(max_steps=None))


@pytest.mark.parametrize(
    "arguments", [{"max_steps": 0}, {"window": 0}, {"max_steps": "three"}, {"max_steps": 2.5}, {"window": None}]
)
def test_counts_that_mean_nothing(arguments: dict) -> None:
    with pytest.raises(ConfigError, match=f"SkipNonFiniteSteps.{next(iter(arguments))}"):
        SkipNonFiniteSteps(**arguments)


def test_with_a_loss_scaler_only_the_loss_counts(caplog) -> None:
    def scaled(fault: str):
        precision = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
        return fit([batch(GOOD[0]), batch(GOOD[1], fault), batch(GOOD[2])], plugins=[precision])[0]

    model = scaled(FAULTS[2])
    assert "is skipped" not in caplog.text
    assert nonfinite_weight(model.named_parameters(), model.named_buffers()) is None
    model = scaled(FAULTS[0])
    assert "Step 2 is skipped" in caplog.text
    assert nonfinite_weight(model.named_parameters(), model.named_buffers()) is None


class Explode(SkipNonFiniteSteps):
    """The weights become infinite after a step."""

    after: int

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)
        if trainer.global_step == self.after:
            module.layers[2].weight.data[0, 1] = float("inf")


def test_weights_that_are_not_finite_are_not_saved_and_cost_no_earlier_checkpoint(tmp_path: Path) -> None:
    explode = Explode()
    explode.after = 2
    saving = {"filename": "model", "every_n_train_steps": 1, "save_last": True, "save_nemo_on_train_end": False}
    NeMoModelCheckpoint.CHECKPOINT_NAME_LAST = "model-last"
    checkpoint = NeMoModelCheckpoint(dirpath=tmp_path, **saving)
    with pytest.raises(NonFiniteError, match=r"step 2: .*\(layers.2.weight\)"):
        fit([batch(rows) for rows in GOOD], explode, callbacks=[checkpoint])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model-last.ckpt", "model.ckpt"]
    kept = torch.load(tmp_path / "model-last.ckpt", weights_only=False)
    assert kept["global_step"] == 1
    assert all(value.isfinite().all() for value in kept["state_dict"].values())


class TwoModalities(Regression):
    """Speech whose loss is not finite with text whose loss is, in the form of our models."""

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        losses = [
            super(TwoModalities, self).training_step({"text": batch[name]}, batch_idx) for name in ("audio", "text")
        ]
        self.modality_losses = dict(zip(("audio", "text"), losses, strict=True))
        return sum(losses)


def test_only_the_modality_whose_loss_is_not_finite_is_named(caplog) -> None:
    speech, text = batch(GOOD[0], FAULTS[0], "speech")["text"], batch(GOOD[1])["text"]
    healthy = {"audio": text, "text": text}
    long = {**text, "examples": [{"id": f"long-{row}"} for row in range(70)]}
    fit([healthy, {"audio": speech, "text": text}, healthy, healthy], model=TwoModalities())
    assert "audio: examples speech-0 (/data/speech.wav from 1.5 s), speech-1" in caplog.text
    assert "text: " not in caplog.text
    fit([healthy, {"audio": {**speech, "examples": long["examples"]}, "text": text}, healthy], model=TwoModalities())
    assert "long-63 and 6 more" in caplog.text
    fit([healthy, {"audio": {**speech, "examples": None}, "text": text}, healthy], model=TwoModalities())
    assert "audio: examples unknown" in caplog.text


# Several ranks


def train_on_this_rank(rank: int, folder: Path) -> None:
    for name, strategy in {"ddp": DDPStrategy, "fsdp2": ModelParallelStrategy}.items():
        for fault in FAULTS:
            batches = [batch(rows + rank) for rows in GOOD]
            batches[2] = batch(GOOD[2], fault if rank == 1 else None, f"rank{rank}")
            options = {"data_parallel_size": 2, "tensor_parallel_size": 1} if name == "fsdp2" else {}
            made = strategy(process_group_backend="gloo", **options)
            model, _ = fit(batches, strategy=made, devices=2, max_steps=4, use_distributed_sampler=False)
            weights = [_whole(parameter) for parameter in model.parameters()]
            torch.save(weights, folder / f"{name}-{fault}-{rank}.pt")


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach()


def test_all_ranks_skip_the_step_that_one_must_skip(tmp_path: Path) -> None:
    run_on_two_ranks(train_on_this_rank, tmp_path, tmp_path)
    for name in ("ddp", "fsdp2"):
        for fault in FAULTS:
            first, second = (torch.load(tmp_path / f"{name}-{fault}-{rank}.pt") for rank in range(2))
            assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(first, second, strict=True))
    said = [line for line in (tmp_path / "rank0.log").read_text().splitlines() if "is skipped" in line]
    assert len(said) == 2 * len(FAULTS)
    assert all("rank 0: " in line and "rank 1: " in line and "rank1-0" in line for line in said)
