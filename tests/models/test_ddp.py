"""DDP: two ranks get the gradients of one process on the joined batch, whatever modalities a rank has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from nemo_emmett.models import SALMGPT, SALMT5, BestowGPT

from .backbones import backbone
from .memorising import built
from .two_ranks import (
    NONE,
    SGD,
    Steps,
    assert_equal_gradients,
    batch_of,
    in_one_process,
    joined,
    quiet_trainer,
    run_on_two_ranks,
)

MODELS = {"SALMT5": (SALMT5, "t5"), "SALMGPT": (SALMGPT, "llama"), "BestowGPT": (BestowGPT, "qwen2")}
GATED = {"lora": {"r": 2, "target_modules": "all-linear"}, "lora_modality": "audio"}
"""Text trains nothing, and a rank without speech has no gradient of its own."""

STEPS = {
    "both modalities, unequal counts": ((slice(0, 2), slice(0, 1)), (slice(2, 3), slice(1, 3))),
    "one has text, the other speech": ((slice(0, 3), NONE), (NONE, slice(0, 3))),
    "speech": ((NONE, slice(0, 1)), (NONE, slice(1, 3))),
    "text": ((slice(0, 1), NONE), (slice(1, 3), NONE)),
    "one has nothing": ((NONE, NONE), (slice(0, 3), slice(0, 2))),
    "the other has one of both": ((slice(0, 1), slice(0, 2)), (slice(1, 3), NONE)),
}
"""What a step holds -> of each rank, the rows of text and of speech."""

CASES = [
    *((model, find_unused, 1) for model in MODELS for find_unused in (True, False)),
    *(("SALMGPT", find_unused, 2) for find_unused in (True, False)),
    *(("SALMT5", find_unused, 1, "gated") for find_unused in (True, False)),
]
"""Model, whether DDP looks for unused parameters, batches to an optimizer step, whether LoRA acts on speech alone."""


def train(rank: int, folder: Path, asr: Path) -> None:
    """All trainings, in this process, which is one rank."""
    done = {}
    for case in CASES:
        name, find_unused, accumulate, *gated = case
        model = built(*MODELS[name], folder / "backbones", asr, **SGD, **GATED if gated else {})
        del model.log
        steps = Steps()
        trainer = quiet_trainer(
            strategy=DDPStrategy(find_unused_parameters=find_unused, process_group_backend="gloo"),
            callbacks=[steps],
            accumulate_grad_batches=accumulate,
        )
        batches = [batch_of(model, *ranks[rank]) for ranks in STEPS.values()]
        trainer.fit(model, DataLoader(batches, batch_size=None))
        done[case] = (steps.gradients, steps.losses)
    torch.save(done, folder / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def backbones(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ddp")
    for _, name in MODELS.values():
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
    """Also where DDP waits for parameters that a rank has not used, and where gradients are accumulated."""
    name, _, accumulate, *gated = case
    model = built(*MODELS[name], backbones, tiny_asr, **SGD, **GATED if gated else {})
    batches = [joined(model, of_ranks) for of_ranks in STEPS.values()]
    steps = [batches[first : first + accumulate] for first in range(0, len(batches), accumulate)]
    gradients, losses = in_one_process(model, steps)
    for found, _ in (rank[case] for rank in ranks):
        assert len(found) == len(gradients)
        for of_ranks, of_one in zip(found, gradients, strict=True):
            assert_equal_gradients(of_ranks, of_one)
    mean_losses = torch.tensor([rank[case][1] for rank in ranks]).mean(0)
    torch.testing.assert_close(mean_losses, torch.tensor(losses), rtol=1e-5, atol=1e-6)
