"""Trainings on ranks that share a model: FSDP2, hybrid sharding, tensor parallelism; and what one process would find.

Each rank trains all cases of a layout, resumes some of them, exports and translates, and writes down what it finds.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from nemo.collections.speechlm2.data import DataModule
from torch.utils.data import DataLoader, IterableDataset

from nemo_emmett.callbacks import OOMptimizer
from nemo_emmett.callbacks.trained_examples import TrainedExamples
from nemo_emmett.models import SALMGPT, load
from nemo_emmett.models.base import SpeechTextModel
from nemo_emmett.models.validation import validation_metrics
from nemo_emmett.oomptimizer.profile import Profile
from nemo_emmett.strategies import HybridShardedStrategy

from ..oomptimizer.fits import Data
from .backbones import backbone
from .memorising import built
from .two_ranks import (
    NONE,
    SGD,
    RankCrashedError,
    Steps,
    assert_equal_gradients,
    batch_of,
    in_one_process,
    joined,
    packed_batch_of,
    quiet_trainer,
    run_on_two_ranks,
    shards,
    weights,
)


@dataclass(frozen=True)
class Case:
    """What is trained."""

    model: type[SpeechTextModel]
    backbone: str
    config: dict[str, Any] = field(default_factory=dict)  # further keys of the model's section
    is_packed: bool = False
    is_resumed: bool = False
    clip: float | None = None  # the largest norm of a gradient that is applied

    def built(self, backbones: Path, asr: Path) -> SpeechTextModel:
        """The model before training."""
        return built(self.model, self.backbone, backbones, asr, max_new_tokens=4, **SGD | self.config)


@dataclass(frozen=True)
class Layout:
    """How the ranks share the model."""

    data: int  # ranks of data
    strategy: type[ModelParallelStrategy]
    arguments: dict[str, int] = field(default_factory=dict)

    @property
    def parallel(self) -> int:
        """Ranks that share each layer."""
        return self.arguments.get("tensor_parallel_size", 1)

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.data * self.parallel

    def made(self) -> ModelParallelStrategy:
        """The strategy."""
        return self.strategy(data_parallel_size=self.data, **{"tensor_parallel_size": 1} | self.arguments)


LAYOUTS = {
    "2 shard weights": Layout(2, ModelParallelStrategy),
    "2 share layers": Layout(1, ModelParallelStrategy, {"tensor_parallel_size": 2}),
    "2 x 2 share layers": Layout(2, ModelParallelStrategy, {"tensor_parallel_size": 2}),
    "2 groups of 2": Layout(4, HybridShardedStrategy, {"replicas": 2}),
    "2 groups of 1 x 2": Layout(2, HybridShardedStrategy, {"replicas": 2, "tensor_parallel_size": 2}),
}

STEPS = {
    "both modalities, unequal counts": ((slice(0, 2), slice(0, 1)), (slice(2, 3), slice(1, 3))),
    "one has text, the other speech": ((slice(0, 3), NONE), (NONE, slice(0, 3))),
    "text": ((slice(0, 1), NONE), (slice(1, 3), NONE)),
    "one has nothing": ((NONE, NONE), (slice(0, 3), slice(0, 2))),
}
"""What a step holds -> of each rank of data, the rows of text and of speech; one rank of data has the second."""

VALIDATION = ([(slice(0, 2), NONE), (NONE, slice(0, 1))], [(NONE, slice(1, 3)), (slice(2, 3), NONE)])
"""Of each rank of data, the rows of text and of speech of each batch."""

SAVED_AFTER = 2


class GradientsAsParameters(Callback):
    """An optimizer's kernels take them as they are: no rank may have a part of a sum."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        for name, parameter in pl_module.named_parameters():
            if parameter.grad is not None:
                placements = getattr(parameter, "placements", None)
                assert getattr(parameter.grad, "placements", None) == placements, name


def rows_of(data: int, of_two: Iterable[Sequence]) -> list[Sequence]:
    """What each rank of data has of what is divided over two: one has the second's, of more the others have nothing."""
    two = list(of_two)
    return {1: two[1:], 2: two}.get(data) or [*two, *[[(NONE, NONE)] * len(two[0])] * (data - 2)]


def batches_of(case: Case, model: Any, data: int) -> list[list[dict]]:
    """What each rank of data trains on; its examples can be counted."""
    make = packed_batch_of if case.is_packed else batch_of
    found = [[make(model, *rows) for rows in steps] for steps in rows_of(data, zip(*STEPS.values(), strict=True))]
    for modality, part in chain.from_iterable(batch.items() for of_rank in found for batch in of_rank):
        part["examples"] = [{**example, "modality": modality} for example in part["examples"]]
    return found


class Batches(IterableDataset):
    """Those of this rank of data, which is known once the mesh is there. They have no length, as those of a training
    loader: a resumed one goes on where it was."""

    def __init__(self, trainer: Trainer, of_ranks: list[list[dict]], first: int = 0) -> None:
        self.trainer, self.of_ranks, self.first = trainer, of_ranks, first

    def __iter__(self) -> Iterator[dict]:
        place = self.trainer.strategy.device_mesh["data_parallel"].get_local_rank()
        return iter(self.of_ranks[place][self.first :])


def fit(layout: Layout, case: Case, model: Any, steps: Steps, checkpoint: Path | None = None) -> dict[str, Any]:
    """Train; what validation and the counts of examples say."""
    counted = TrainedExamples()
    trainer = quiet_trainer(
        devices=layout.ranks,
        strategy=layout.made(),
        callbacks=[steps, counted, GradientsAsParameters()],
        gradient_clip_val=case.clip,
    )
    first = 0 if checkpoint is None else SAVED_AFTER
    training = Batches(trainer, batches_of(case, model, layout.data), first)
    validated = [[{"dev": batch_of(model, *rows)} for rows in steps] for steps in rows_of(layout.data, VALIDATION)]
    validation = DataLoader(Batches(trainer, validated), batch_size=None)
    trainer.fit(model, training, validation, ckpt_path=checkpoint)
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val_")}
    of_nemo = SimpleNamespace(trainer=trainer)  # how NeMo's datamodule, and so ours, divides the data
    place = DataModule._get_dp_rank(of_nemo), DataModule._get_world_size(of_nemo)
    return {"validated": metrics, "examples": sum(counted.of_all_ranks.values()), "place": place}


def train(rank: int, folder: Path, asr: Path, layout: Layout, cases: Mapping[str, Case], is_calibrated: bool) -> None:
    """All trainings of a layout, in this process, which is one rank."""
    done = {}
    for name, case in cases.items():
        model = case.built(folder.parent / "backbones", asr)
        del model.log
        resumed = deepcopy(model)
        if rank == 1 and layout.data == 1:  # what each rank computes as a whole is alike all the same
            for parameter in model.perception.parameters():
                torch.nn.init.zeros_(parameter)
        checkpoint = folder / f"{name}.ckpt"
        steps = Steps(SAVED_AFTER, checkpoint)
        found = fit(layout, case, model, steps) | {"gradients": steps.gradients, "losses": steps.losses}
        found["weights"] = weights(model)
        model.save_pretrained(folder / name)
        parts = batch_of(model, slice(0, 3), slice(0, 3)).values()
        found["translated"] = [model.translate_batch(part) for part in parts]
        found["shards"] = shards(model)
        if case.is_resumed:
            fit(layout, case, resumed, Steps(), checkpoint)
            found["resumed"] = shards(resumed)
        done[name] = found
    if is_calibrated:
        done["calibrated"] = calibrate(layout, folder, asr)
    torch.save(done, folder / f"rank{rank}.pt")


TRAIN_DS = {
    "multi_config": True,
    "sampler_fusion": "round_robin",
    "audio": {"bucket_duration_bins": [[1.0, 6], [4.0, 20]]},
    "text": {
        "bucket_duration_bins": [[10, 10], [80, 40]],
        "use_multimodal_sampling": True,
        "input_cfg": [{"type": "parallel_text"}],
    },
}

CALIBRATED = Case(SALMGPT, "llama")


def calibrate(layout: Layout, folder: Path, asr: Path) -> dict[str, Any]:
    """The losses of a training whose batch sizes OOMptimizer finds first."""
    model = CALIBRATED.built(folder.parent / "backbones", asr)
    del model.log
    steps, profile = Steps(), folder / "profile.yaml"
    callback = OOMptimizer(profile=profile, memory_budget="24MiB", safety_margin=0.0, guard=False)
    trainer = quiet_trainer(devices=layout.ranks, strategy=layout.made(), callbacks=[callback, steps])
    trainer.fit(model, datamodule=Data(TRAIN_DS, Batches(trainer, batches_of(CALIBRATED, model, layout.data))))
    return {"losses": steps.losses, "sizes": {k: g.bucket_batch_size for k, g in Profile.read(profile).groups.items()}}


class Trainings:
    """The trainings of some cases, of each layout when it is first asked for.

    Args:
        folder: receives backbones, logs and exports.
        asr: a .nemo file for the speech encoder.
        cases: layout -> what is trained.
        calibrated: layouts in which the batch sizes of ``CALIBRATED`` are found, too.
    """

    def __init__(
        self, folder: Path, asr: Path, cases: Mapping[str, Mapping[str, Case]], calibrated: Sequence[str]
    ) -> None:
        self.folder, self.asr, self.cases, self.calibrated = folder, asr, cases, calibrated
        self.backbones = folder / "backbones"
        self._found: dict[str, list[dict]] = {}
        for case in chain.from_iterable(of_layout.values() for of_layout in cases.values()):
            backbone(case.backbone, self.backbones)

    def __getitem__(self, layout: str) -> list[dict]:
        """What each rank has found, by case."""
        if layout not in self._found:
            folder, ranks = self.folder / layout, LAYOUTS[layout].ranks
            for is_last in (False, True):
                folder.mkdir()
                try:
                    arguments = (LAYOUTS[layout], self.cases[layout], layout in self.calibrated)
                    run_on_two_ranks(train, folder, folder, self.asr, *arguments, ranks=ranks)
                    break
                except RankCrashedError as error:
                    # One of some thirty runs: in gloo's thread or torch's `wait_tensor`, where `Steps` gathers
                    # gradients. No training without it has crashed (test_watchdog.py, 2,000 steps).
                    if is_last:
                        raise
                    warnings.warn(f"a rank crashed, and the run is repeated:\n{error}", stacklevel=2)
                    shutil.rmtree(folder)
            self._found[layout] = [torch.load(folder / f"rank{rank}.pt") for rank in range(ranks)]
        return self._found[layout]

    def of(self, layout: str, name: str) -> list[dict[str, Any]]:
        """What each rank has found of a case."""
        return [rank[name] for rank in self[layout]]

    def check_training(self, layout: str, name: str) -> None:
        """Gradients and losses of each step, clipped, and the losses of validation are those of one process, which
        trains on the joined batch: padded where the ranks' are packed, and without a cache of the encoder."""
        case, data, found = self.cases[layout][name], LAYOUTS[layout].data, self.of(layout, name)
        config = {key: value for key, value in case.config.items() if key != "cache_encoder"}
        model = replace(case, config=config).built(self.backbones, self.asr)
        joint = [batch_of(model, *ranks[1]) if data == 1 else joined(model, ranks) for ranks in STEPS.values()]
        gradients, losses = in_one_process(model, [[batch] for batch in joint], case.clip)
        for rank in found:
            assert len(rank["gradients"]) == len(gradients)
            for of_ranks, of_one in zip(rank["gradients"], gradients, strict=True):
                assert_equal_gradients(of_ranks, of_one)
        mean_losses = torch.tensor([rank["losses"] for rank in found]).mean(0)
        torch.testing.assert_close(mean_losses, torch.tensor(losses), rtol=1e-5, atol=1e-6)

        with torch.no_grad():
            model.on_validation_epoch_start()
            for rows in chain(*rows_of(data, VALIDATION)):
                model.validation_step({"dev": batch_of(model, *rows)}, 0)
        expected = {k: v for k, v in validation_metrics(model._tallies).items() if "bleu" not in k}
        assert {"val_loss_dev_audio_en-de", "val_loss_dev_text"} < expected.keys()
        examples = sum(len(part["examples"]) for batch in joint for part in batch.values())
        for number, rank in enumerate(found):
            assert rank["validated"] == pytest.approx(expected, rel=1e-5)
            assert rank["examples"] == examples, "each is counted once"
            assert rank["place"] == (number // LAYOUTS[layout].parallel, data)

    def check_resumed(self, layout: str, name: str) -> None:
        """A resumed training ends bit for bit where an uninterrupted one does."""
        checkpoint = self.folder / layout / f"{name}.ckpt"
        assert (checkpoint / ".metadata").is_file(), "each rank writes its shards"
        assert len(list(checkpoint.glob("*.distcp"))) == LAYOUTS[layout].ranks
        for found in self.of(layout, name):
            assert found["resumed"].keys() == found["shards"].keys()
            for weight, shard_of_whole in found["shards"].items():
                assert torch.equal(found["resumed"][weight], shard_of_whole), weight

    def check_export(self, layout: str, name: str) -> SpeechTextModel:
        """Loaded in one process, the export has the ranks' weights, and translates as they did."""
        model = load(self.folder / layout / name)
        found = self.of(layout, name)
        for weight, value in model.named_parameters():
            assert torch.equal(value, found[0]["weights"][weight]), weight
        parts = batch_of(model, slice(0, 3), slice(0, 3)).values()
        translated = [model.translate_batch(part) for part in parts]
        assert all(rank["translated"] == translated for rank in found)
        assert any(map(len, chain(*translated)))
        return model

    def check_calibration(self, layout: str, plain: str) -> None:
        """What is trained after the calibration is trained as without, as the case ``plain`` is."""
        for rank in self[layout]:
            assert rank["calibrated"]["losses"] == rank[plain]["losses"]
            for short, long in rank["calibrated"]["sizes"].values():
                assert short > long >= 1
