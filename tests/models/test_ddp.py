"""DDP: two ranks get the gradients of one process on the joined batch, whatever modalities a rank has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from nemo_emmett.models import SALMGPT, SALMT5, BestowGPT
from nemo_emmett.models.base import SpeechTextModel

from .backbones import backbone
from .memorising import built
from .test_gradient_conflict import expected_gradients, expected_values
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
)
from .two_ranks import gradients as all_gradients

MODELS = {
    "SALMT5": (SALMT5, "t5", {}),
    "SALMGPT": (SALMGPT, "llama", {}),
    "BestowGPT": (BestowGPT, "qwen2", {}),
    "SALMT5, objectives": (SALMT5, "t5", OBJECTIVES),
    "SALMGPT, LoRA, objectives": (SALMGPT, "llama", LORA | OBJECTIVES),
}
"""Name -> class, backbone, and further keys of its config."""

SECTIONS = {
    # Text trains nothing, and a rank without speech has no gradient of its own.
    "gated": {"lora": {"r": 2, "target_modules": "all-linear"}, "lora_modality": "audio"},
    "harmonised": {"gradient_conflict": {"mode": "harmonise", "every_n_steps": 1}},
    # Compared in every second step, between which DDP averages by itself.
    "monitored": {"gradient_conflict": {"mode": "monitor", "every_n_steps": 2}},
    "frozen": {"freeze": ["encoder"]},
    "cached": {"freeze": ["encoder"], "cache_encoder": True},
    "packed": {},
}
"""Further keys of the model's section."""

STEPS = {
    "both modalities, unequal counts": ((slice(0, 2), slice(0, 1)), (slice(2, 3), slice(1, 3))),
    "one has text, the other speech": ((slice(0, 3), NONE), (NONE, slice(0, 3))),
    "speech": ((NONE, slice(0, 1)), (NONE, slice(1, 3))),
    "text": ((slice(0, 1), NONE), (slice(1, 3), NONE)),
    "one has nothing": ((NONE, NONE), (slice(0, 3), slice(0, 2))),
    "the other has one of both": ((slice(0, 1), slice(0, 2)), (slice(1, 3), NONE)),
}
"""What a step holds -> of each rank, the rows of text and of speech."""

PLAIN = ("SALMT5", "SALMGPT", "BestowGPT")


class ConflictSteps(Steps):
    """Also the cosine and norms of each batch that are logged."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, module, *args) -> None:
        super().on_train_batch_end(trainer, module, *args)
        names = [name for name in trainer.callback_metrics if name.startswith("gradient_")]
        self.values.append({name: float(trainer.callback_metrics.pop(name)) for name in names})


def harmonised(model, steps):
    """As :func:`in_one_process`, with a backward pass for each modality alone, and PCGrad in NumPy."""
    model.configure_optimizers()
    found, losses, values = [], [], []
    for step in steps:
        of_each = {}
        for modality in ("audio", "text"):
            model.zero_grad()
            for batch in step:
                output = model.training_step({modality: batch[modality]} if modality in batch else {}, 0)
                loss = output["loss"] if isinstance(output, dict) else output
                (loss / len(step)).backward()
                losses.append(loss.item())
            of_each[modality] = all_gradients(model)
        found.append(expected_gradients(**of_each))
        values += [{}] * (len(step) - 1) + [expected_values(**of_each)]
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter -= SGD["optimizer"]["lr"] * found[-1][name]
    of_batches = torch.tensor(losses).view(len(steps), 2, -1)
    return found, of_batches.sum(1).flatten().tolist(), values


CASES = [
    *((model, find_unused, 1) for model in PLAIN for find_unused in (True, False)),
    *((model, False, 1) for model in MODELS if model not in PLAIN),
    *(("SALMGPT", find_unused, 2) for find_unused in (True, False)),
    *(("SALMT5", find_unused, 1, keys) for find_unused in (True, False) for keys in ("gated", "harmonised")),
    ("SALMGPT", False, 2, "harmonised"),
    ("SALMT5", True, 1, "monitored"),
    *((model, False, 1, "packed") for model in MODELS),
    *((model, False, 1, "cached") for model in PLAIN),
]
"""Model, whether DDP looks for unused parameters, batches to an optimizer step, further keys of the model."""


def build(name: str, keys: list[str], folder: Path, asr: Path) -> SpeechTextModel:
    model_class, backbone_name, config = MODELS[name]
    return built(model_class, backbone_name, folder, asr, **SGD, **config, **(SECTIONS[keys[0]] if keys else {}))


def train(rank: int, folder: Path, asr: Path) -> None:
    """All trainings, in this process, which is one rank."""
    os.environ["XDG_CACHE_HOME"] = str(folder)  # of the encoder's outputs
    done = {}
    for case in CASES:
        name, find_unused, accumulate, *keys = case
        model = build(name, keys, folder / "backbones", asr)
        del model.log
        steps = ConflictSteps()
        trainer = quiet_trainer(
            strategy=DDPStrategy(find_unused_parameters=find_unused, process_group_backend="gloo"),
            callbacks=[steps],
            accumulate_grad_batches=accumulate,
        )
        make = packed_batch_of if keys == ["packed"] else batch_of
        batches = [make(model, *ranks[rank]) for ranks in STEPS.values()]
        trainer.fit(model, DataLoader(batches, batch_size=None))
        done[case] = (steps.gradients, steps.losses, steps.values)
    torch.save(done, folder / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def backbones(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ddp")
    for _, name, _ in MODELS.values():
        backbone(name, folder / "backbones")
    return folder / "backbones"


@pytest.fixture(scope="module")
def ranks(backbones, tiny_asr) -> list[dict]:
    """What each rank has found: case -> gradients of each step, losses of each batch."""
    folder = backbones.parent
    run_on_two_ranks(train, folder, folder, tiny_asr)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_gradients_and_losses_are_those_of_one_process_on_the_joined_batch(ranks, backbones, tiny_asr, case):
    """Also where DDP waits for parameters that a rank has not used, and where gradients are accumulated. The process
    has padded batches where the ranks' are packed, and encodes in each step what they find on disk."""
    name, _, accumulate, *keys = case
    model = build(name, ["frozen"] if keys == ["cached"] else keys, backbones, tiny_asr)
    batches = [joined(model, of_ranks) for of_ranks in STEPS.values()]
    steps = [batches[first : first + accumulate] for first in range(0, len(batches), accumulate)]
    if keys == ["harmonised"]:
        gradients, losses, values = harmonised(model, steps)
        for *_, of_rank in (rank[case] for rank in ranks):
            assert of_rank == [pytest.approx(one, rel=1e-3, abs=1e-5) for one in values]
    else:
        gradients, losses = in_one_process(model, steps)
    if keys == ["monitored"]:
        both = [{"audio", "text"} <= batch.keys() for batch in batches]
        for *_, of_rank in (rank[case] for rank in ranks):
            assert [bool(one) for one in of_rank] == [both[step] and step % 2 == 1 for step in range(len(batches))]
    for found, *_ in (rank[case] for rank in ranks):
        assert len(found) == len(gradients)
        for of_ranks, of_one in zip(found, gradients, strict=True):
            assert_equal_gradients(of_ranks, of_one)
    mean_losses = torch.tensor([rank[case][1] for rank in ranks]).mean(0)
    torch.testing.assert_close(mean_losses, torch.tensor(losses), rtol=1e-5, atol=1e-6)
