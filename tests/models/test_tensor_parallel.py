"""Tensor parallelism: ranks that share each layer get the gradients of one process, resume, and export its model."""

from __future__ import annotations

import re
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader

from nemo_emmett.callbacks.trained_examples import TrainedExamples
from nemo_emmett.models import SALMGPT, BestowGPT, load
from nemo_emmett.models.validation import validation_metrics

from .backbones import backbone
from .memorising import built
from .test_fsdp2 import Endless
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

EVERY_LAYER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA_EVERYWHERE = {"lora": {"r": 2, "lora_alpha": 1, "target_modules": EVERY_LAYER, "init_lora_weights": False}}
CASES: dict[str, tuple[type, str, dict[str, Any]]] = {
    **{f"SALMGPT, {name}": (SALMGPT, name, {}) for name in ("llama", "llama3", "mistral", "qwen2", "qwen3")},
    **{f"SALMGPT, {name}": (SALMGPT, name, {}) for name in ("gemma", "gemma2", "gemma3")},
    "BestowGPT, llama": (BestowGPT, "llama", {}),
    "BestowGPT, qwen2": (BestowGPT, "qwen2", {}),
    "SALMGPT, LoRA": (SALMGPT, "llama3", LORA_EVERYWHERE),
    "SALMGPT, LoRA on speech alone": (SALMGPT, "llama", LORA | {"lora_modality": "audio"}),
    "SALMGPT, objectives": (SALMGPT, "llama", OBJECTIVES),
    "SALMGPT, LoRA, objectives, tied": (SALMGPT, "gemma2", LORA | OBJECTIVES),
    "BestowGPT, smoothed, checkpointed": (
        BestowGPT,
        "llama",
        {"label_smoothing": 0.1, "activation_checkpointing": True},
    ),
    "SALMGPT, packed, frozen": (SALMGPT, "mistral", {"freeze": ["llm"]}),
}
"""Case -> model, backbone, and further keys of its config."""

ON_FOUR = ("SALMGPT, qwen2", "SALMGPT, LoRA", "SALMGPT, objectives", "BestowGPT, llama")
"""Cases that are trained by two ranks of data times two of tensor parallelism, too."""

CLIPPED = {"SALMGPT, qwen2": 0.5, "SALMGPT, llama": 0.5}
"""Case -> the largest norm of a gradient that is applied."""

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


def batch(case: str, model: Any, *rows: slice) -> dict[str, dict[str, Any]]:
    """What a rank trains on; its examples can be counted."""
    made = (packed_batch_of if "packed" in case else batch_of)(model, *rows)
    for modality, part in made.items():
        part["examples"] = [{**example, "modality": modality} for example in part["examples"]]
    return made


def fit(case: str, data: int, model: Any, steps: Steps, checkpoint: Path | None = None) -> dict[str, Any]:
    """Train on ``data`` ranks of data, each two ranks of tensor parallelism; what validation and the counts say."""
    counted = TrainedExamples()
    trainer = quiet_trainer(
        devices=2 * data,
        strategy=ModelParallelStrategy(data_parallel_size=data, tensor_parallel_size=2),
        callbacks=[steps, counted],
        gradient_clip_val=CLIPPED.get(case),
    )

    class Batches(Endless):
        """Those of this rank, which is known once the mesh is there."""

        def __init__(self, first: int) -> None:
            self.first = first

        def __iter__(self) -> Any:
            place = trainer.strategy.device_mesh["data_parallel"].get_local_rank() if data == 2 else 1
            return iter([batch(case, model, *ranks[place]) for ranks in STEPS.values()][self.first :])

    class Validation(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            place = trainer.strategy.device_mesh["data_parallel"].get_local_rank()
            return iter([{"dev": batch_of(model, *rows)} for rows in VALIDATION[place]])

    batches = Batches(0 if checkpoint is None else SAVED_AFTER)
    trainer.fit(model, batches, DataLoader(Validation(), batch_size=None), ckpt_path=checkpoint)
    validated = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val_")}
    return {"validated": validated, "examples": sum(counted.of_all_ranks.values())}


def train(rank: int, folder: Path, asr: Path, data: int) -> None:
    """All trainings, in this process, which is one rank."""
    done = {}
    for case in CASES if data == 1 else ON_FOUR:
        model_class, name, config = CASES[case]
        model = built(model_class, name, folder.parent / "backbones", asr, max_new_tokens=4, **SGD, **config)
        del model.log
        resumed = deepcopy(model)
        if rank == 1:  # what each rank computes as a whole is alike all the same
            for parameter in model.perception.parameters():
                torch.nn.init.zeros_(parameter)
        checkpoint = folder / f"{case}.ckpt"
        steps = Steps(SAVED_AFTER, checkpoint)
        found = fit(case, data, model, steps) | {"gradients": steps.gradients, "losses": steps.losses}
        found["weights"] = weights(model)
        model.save_pretrained(folder / case)
        parts = batch_of(model, slice(0, 3), slice(0, 3)).values()
        found["translated"] = [model.translate_batch(part) for part in parts]
        fit(case, data, resumed, Steps(), checkpoint)
        found["shards"], found["resumed"] = shards(model), shards(resumed)
        done[case] = found
    torch.save(done, folder / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def backbones(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tensor_parallel")
    for _, name, _ in CASES.values():
        backbone(name, folder / "backbones")
    return folder / "backbones"


@pytest.fixture(scope="module")
def ranks(backbones, tiny_asr) -> Callable[[int], list[dict]]:
    """Number of ranks of data -> what each rank has found, by case."""

    @cache
    def train_on(data: int) -> list[dict]:
        folder = backbones.parent / f"{data}"
        folder.mkdir()
        run_on_two_ranks(train, folder, folder, tiny_asr, data, ranks=2 * data)
        return [torch.load(folder / f"rank{rank}.pt") for rank in range(2 * data)]

    return train_on


every_training = pytest.mark.parametrize(
    ("data", "case"), [*((1, case) for case in CASES), *((2, case) for case in ON_FOUR)]
)


@every_training
def test_training_is_that_of_one_process(ranks, backbones, tiny_asr, data, case):
    """Gradients and losses of each step, clipped as those of one process; then the losses of validation."""
    model_class, name, config = CASES[case]
    model = built(model_class, name, backbones, tiny_asr, **SGD, **config)
    steps = [[joined(model, of_ranks) if data == 2 else batch_of(model, *of_ranks[1])] for of_ranks in STEPS.values()]
    gradients, losses = in_one_process(model, steps, CLIPPED.get(case))
    for rank in ranks(data):
        found = rank[case]
        assert len(found["gradients"]) == len(gradients)
        for of_ranks, of_one in zip(found["gradients"], gradients, strict=True):
            assert_equal_gradients(of_ranks, of_one)
    mean_losses = torch.tensor([rank[case]["losses"] for rank in ranks(data)]).mean(0)
    torch.testing.assert_close(mean_losses, torch.tensor(losses), rtol=1e-5, atol=1e-6)

    with torch.no_grad():
        model.on_validation_epoch_start()
        for rows in chain(*VALIDATION[:data]):
            model.validation_step({"dev": batch_of(model, *rows)}, 0)
    expected = {k: v for k, v in validation_metrics(model._tallies).items() if "bleu" not in k}
    assert {"val_loss_dev_audio_en-de", "val_loss_dev_text"} < expected.keys()
    examples = sum(len(part["examples"]) for (step,) in steps for part in step.values())
    for rank in ranks(data):
        assert rank[case]["validated"] == pytest.approx(expected, rel=1e-5)
        assert rank[case]["examples"] == examples, "each is counted once"


@every_training
def test_a_resumed_training_ends_bit_for_bit_where_an_uninterrupted_one_does(ranks, backbones, data, case):
    for rank in ranks(data):
        found = rank[case]
        assert found["resumed"].keys() == found["shards"].keys()
        for name, shard_of_whole in found["shards"].items():
            assert torch.equal(found["resumed"][name], shard_of_whole), name


@every_training
def test_the_export_is_the_model(ranks, backbones, data, case):
    """Loaded in one process it has the same weights, and translates as the ranks did."""
    trained = ranks(data)[0][case]["weights"]
    model = load(backbones.parent / f"{data}" / case)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, trained[name]), name
    parts = batch_of(model, slice(0, 3), slice(0, 3)).values()
    translated = [model.translate_batch(part) for part in parts]
    assert all(translated == rank[case]["translated"] for rank in ranks(data))
    assert any(map(len, chain(*translated)))


@every_training
def test_each_rank_has_its_share_of_the_language_model(ranks, backbones, data, case):
    """Of two ranks, half of each matrix; of four, a quarter. The table of tokens may not be divisible."""
    for rank in ranks(data):
        for name, whole in rank[case]["weights"].items():
            if re.search(r"^(llm|embed_tokens)\..*weight$", name) and "norm" not in name and "lora" not in name:
                share = rank[case]["shards"][name].numel() / whole.numel()
                assert share == pytest.approx(1 / (2 * data), rel=0.02), name
