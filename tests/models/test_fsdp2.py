"""FSDP2: two ranks that share one model get the weights of one process, resume, and export them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from copy import deepcopy
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader

from nemo_emmett.callbacks import OOMptimizer
from nemo_emmett.models import SALMGPT, SALMT5, BestowGPT, load
from nemo_emmett.models.validation import validation_metrics
from nemo_emmett.oomptimizer.profile import Profile

from ..oomptimizer.fits import Data
from .backbones import backbone
from .memorising import built
from .two_ranks import (
    LORA,
    NONE,
    OBJECTIVES,
    SGD,
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

CASES: dict[str, tuple[type, str, dict[str, Any]]] = {
    "SALMGPT, untied": (SALMGPT, "llama", {}),
    "SALMGPT, tied": (SALMGPT, "qwen2", {}),
    "SALMGPT, LoRA": (SALMGPT, "llama", LORA),
    "SALMGPT, LoRA on speech alone": (SALMGPT, "llama", LORA | {"lora_modality": "audio"}),
    "BestowGPT, untied": (BestowGPT, "llama", {}),
    "BestowGPT, tied": (BestowGPT, "qwen2", {}),
    "BestowGPT, frozen": (BestowGPT, "llama", {"freeze": ["llm"]}),
    "SALMT5, tied": (SALMT5, "t5", {}),
    "SALMT5, untied": (SALMT5, "t5v1_1", {}),
    "SALMGPT, untied, objectives": (SALMGPT, "llama", OBJECTIVES),
    "SALMGPT, LoRA, objectives": (SALMGPT, "llama", LORA | OBJECTIVES),
    "SALMT5, tied, objectives": (SALMT5, "t5", OBJECTIVES),
    "SALMT5, packed": (SALMT5, "t5", {}),
    "SALMGPT, packed, cached": (SALMGPT, "llama", {"freeze": ["encoder"], "cache_encoder": True}),
}
"""Case -> model, backbone, and further keys of its config."""

CLIPPED = {"SALMGPT, tied": 0.5}
"""Case -> the largest norm of a gradient that is applied."""

STEPS = {
    "both modalities, unequal counts": ((slice(0, 2), slice(0, 1)), (slice(2, 3), slice(1, 3))),
    "one has text, the other speech": ((slice(0, 3), NONE), (NONE, slice(0, 3))),
    "text": ((slice(0, 1), NONE), (slice(1, 3), NONE)),
    "one has nothing": ((NONE, NONE), (slice(0, 3), slice(0, 2))),
}
"""What a step holds -> of each rank, the rows of text and of speech."""

SAVED_AFTER = 2


def batches_of(case: str, model: Any, rank: int) -> list[dict]:
    """What a rank trains on."""
    make = packed_batch_of if "packed" in case else batch_of
    return [make(model, *ranks[rank]) for ranks in STEPS.values()]


VALIDATION = (
    [(slice(0, 2), NONE), (NONE, slice(0, 1))],
    [(NONE, slice(1, 3)), (slice(2, 3), NONE)],
)
"""Of each rank, the rows of text and of speech of each batch."""


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


class Endless:
    """Batches without a length, as a training loader has them: a resumed one goes on where it was."""

    def __init__(self, batches: list[dict]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[dict]:
        return iter(self.batches)


def fit(
    case: str, rank: int, model: Any, steps: Steps, checkpoint: Path | None = None, **options: Any
) -> dict[str, float]:
    trainer = quiet_trainer(
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        callbacks=[steps],
        **options,
    )
    batches = batches_of(case, model, rank)
    validation = [{"dev": batch_of(model, *rows)} for rows in VALIDATION[rank]]
    first = 0 if checkpoint is None else SAVED_AFTER
    trainer.fit(model, Endless(batches[first:]), DataLoader(validation, batch_size=None), ckpt_path=checkpoint)
    return {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val_")}


def train(rank: int, folder: Path, asr: Path) -> None:
    """All trainings, in this process, which is one rank."""
    os.environ["XDG_CACHE_HOME"] = str(folder)  # of the encoder's outputs
    done = {}
    for case, (model_class, name, config) in CASES.items():
        whole = built(model_class, name, folder / "backbones", asr, max_new_tokens=4, **SGD, **config)
        del whole.log
        resumed = deepcopy(whole)
        checkpoint = folder / f"{case}.ckpt"
        steps = Steps(SAVED_AFTER, checkpoint)
        options = {"gradient_clip_val": CLIPPED.get(case)}
        found = {
            "validated": fit(case, rank, whole, steps, **options),
            "gradients": steps.gradients,
            "losses": steps.losses,
        }
        found["weights"] = weights(whole)
        whole.save_pretrained(folder / case)
        found["translated"] = [
            whole.translate_batch(part) for part in batch_of(whole, slice(0, 3), slice(0, 3)).values()
        ]
        fit(case, rank, resumed, Steps(), checkpoint, **options)
        found["shards"], found["resumed"] = shards(whole), shards(resumed)
        done[case] = found
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    done["calibrated"] = calibrate(rank, folder, folder / "backbones", asr, strategy)
    torch.save(done, folder / f"rank{rank}.pt")


def calibrate(rank: int, folder: Path, backbones: Path, asr: Path, strategy: ModelParallelStrategy) -> dict[str, Any]:
    """The losses of a training whose batch sizes OOMptimizer finds first."""
    model = built(SALMGPT, "llama", backbones, asr, **SGD)
    del model.log
    steps = Steps()
    profile = folder / "profile.yaml"
    callback = OOMptimizer(profile=profile, memory_budget="24MiB", safety_margin=0.0, guard=False)
    trainer = quiet_trainer(strategy=strategy, callbacks=[callback, steps])
    batches = batches_of("", model, rank)
    trainer.fit(model, datamodule=Data(TRAIN_DS, batches))
    return {"losses": steps.losses, "sizes": {k: g.bucket_batch_size for k, g in Profile.read(profile).groups.items()}}


@pytest.fixture(scope="module")
def backbones(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fsdp2")
    for _, name, _ in CASES.values():
        backbone(name, folder / "backbones")
    return folder / "backbones"


@pytest.fixture(scope="module")
def ranks(backbones, tiny_asr) -> list[dict]:
    """What each rank has found, by case."""
    folder = backbones.parent
    run_on_two_ranks(train, folder, folder, tiny_asr)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_training_is_that_of_one_process_on_the_joined_batch(ranks, backbones, tiny_asr, case):
    """Gradients and losses of each step, whatever the ranks have in it; then the losses of validation. The process has
    padded batches where the ranks' are packed, and encodes in each step what they find on disk."""
    model_class, name, config = CASES[case]
    config = {key: value for key, value in config.items() if key != "cache_encoder"}
    model = built(model_class, name, backbones, tiny_asr, **SGD, **config)
    steps = [[joined(model, of_ranks)] for of_ranks in STEPS.values()]
    gradients, losses = in_one_process(model, steps, CLIPPED.get(case))
    for found in (rank[case] for rank in ranks):
        assert len(found["gradients"]) == len(gradients)
        for of_ranks, of_one in zip(found["gradients"], gradients, strict=True):
            assert_equal_gradients(of_ranks, of_one)
    mean_losses = torch.tensor([rank[case]["losses"] for rank in ranks]).mean(0)
    torch.testing.assert_close(mean_losses, torch.tensor(losses), rtol=1e-5, atol=1e-6)

    with torch.no_grad():
        model.on_validation_epoch_start()
        for rows in chain(*VALIDATION):
            model.validation_step({"dev": batch_of(model, *rows)}, 0)
    expected = {k: v for k, v in validation_metrics(model._tallies).items() if "bleu" not in k}
    assert {"val_loss_dev_audio_en-de", "val_loss_dev_text"} < expected.keys()
    for rank in ranks:
        assert rank[case]["validated"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_training_ends_bit_for_bit_where_an_uninterrupted_one_does(ranks, backbones, case):
    checkpoint = backbones.parent / f"{case}.ckpt"
    assert (checkpoint / ".metadata").is_file(), "each rank writes its shards"
    assert len(list(checkpoint.glob("*.distcp"))) == 2
    for rank in ranks:
        found = rank[case]
        assert found["resumed"].keys() == found["shards"].keys()
        for name, shard_of_whole in found["shards"].items():
            assert torch.equal(found["resumed"][name], shard_of_whole), name


@pytest.mark.parametrize("case", CASES)
def test_the_export_of_a_sharded_model_is_the_model(ranks, backbones, case):
    """Loaded in one process it has the same weights, and translates as the sharded model did."""
    model = load(backbones.parent / case)
    trained = ranks[0][case]["weights"]
    for name, weight in model.named_parameters():
        assert torch.equal(weight, trained[name]), name
    parts = batch_of(model, slice(0, 3), slice(0, 3)).values()
    translated = [model.translate_batch(part) for part in parts]
    assert translated == ranks[0][case]["translated"] == ranks[1][case]["translated"]
    assert any(map(len, chain(*translated)))


def test_oomptimizer_calibrates_a_sharded_model_without_a_trace(ranks):
    """What is trained after the calibration is trained as without."""
    plain, calibrated = ([rank[case] for rank in ranks] for case in ("SALMGPT, untied", "calibrated"))
    for of_plain, of_calibrated in zip(plain, calibrated, strict=True):
        assert of_calibrated["losses"] == of_plain["losses"]
        for short, long in of_calibrated["sizes"].values():
            assert short > long >= 1
