"""Tensor parallelism and hybrid sharding: ranks that share each layer, and groups of ranks of which each has a whole
model, get the gradients of one process, resume, and export its model."""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from functools import cache
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from nemo.collections.speechlm2.data import DataModule
from nemo.collections.speechlm2.models import SALM
from torch.utils.data import DataLoader

from nemo_emmett.callbacks.trained_examples import TrainedExamples
from nemo_emmett.errors import ConfigError
from nemo_emmett.models import SALMGPT, SALMT5, BestowGPT, load
from nemo_emmett.models.tensor_parallel import check_tensor_parallel
from nemo_emmett.models.validation import validation_metrics
from nemo_emmett.strategies import HybridShardedStrategy

from .backbones import backbone
from .memorising import built
from .test_fsdp2 import Endless, calibrate
from .two_ranks import (
    LORA,
    NONE,
    OBJECTIVES,
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

EVERY_LAYER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA_EVERYWHERE = {"lora": {"r": 2, "lora_alpha": 1, "target_modules": EVERY_LAYER, "init_lora_weights": False}}
CASES: dict[str, tuple[type, str, dict[str, Any]]] = {
    **{f"SALMGPT, {name}": (SALMGPT, name, {}) for name in ("llama", "mistral", "qwen2", "qwen3")},
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
    "SALMT5": (SALMT5, "t5", {}),
    "SALMGPT, packed, frozen": (SALMGPT, "mistral", {"freeze": ["llm"]}),
}
"""Case -> model, backbone, and further keys of its config."""

LAYOUTS = {
    "2 share layers": (1, ModelParallelStrategy, {"tensor_parallel_size": 2}),
    "2 x 2 share layers": (2, ModelParallelStrategy, {"tensor_parallel_size": 2}),
    "2 groups of 2": (4, HybridShardedStrategy, {"replicas": 2}),
    "2 groups of 1 x 2": (2, HybridShardedStrategy, {"replicas": 2, "tensor_parallel_size": 2}),
}
"""Layout -> ranks of data, strategy, and its arguments."""

CASES_OF = {
    "2 share layers": [case for case in CASES if case != "SALMT5"],
    "2 x 2 share layers": ["SALMGPT, qwen2", "SALMGPT, LoRA", "SALMGPT, objectives", "BestowGPT, llama"],
    "2 groups of 2": ["SALMGPT, qwen2", "SALMT5"],
    "2 groups of 1 x 2": ["BestowGPT, qwen2"],
}
"""Layout -> what is trained."""

RESUMED = ("SALMGPT, llama", "SALMGPT, qwen2", "SALMGPT, qwen3", "SALMGPT, LoRA", "SALMGPT, objectives", "SALMT5")
"""Cases whose training is also resumed: weights that are tied, that have parts of a gradient, and all others."""

CLIPPED = {"SALMGPT, qwen2": 0.5, "SALMGPT, qwen3": 0.5}
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


class GradientsAsParameters(Callback):
    """An optimizer's kernels take them as they are: no rank may have a part of a sum."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        for name, parameter in pl_module.named_parameters():
            if parameter.grad is not None:
                assert parameter.grad.placements == parameter.placements, name


def batch(case: str, model: Any, *rows: slice) -> dict[str, dict[str, Any]]:
    """What a rank trains on; its examples can be counted."""
    made = (packed_batch_of if "packed" in case else batch_of)(model, *rows)
    for modality, part in made.items():
        part["examples"] = [{**example, "modality": modality} for example in part["examples"]]
    return made


def fit(layout: str, case: str, model: Any, steps: Steps, checkpoint: Path | None = None) -> dict[str, Any]:
    """Train; what validation and the counts of examples say."""
    data, strategy, arguments = LAYOUTS[layout]
    counted = TrainedExamples()
    trainer = quiet_trainer(
        devices=data * arguments.get("tensor_parallel_size", 1),
        strategy=strategy(data_parallel_size=data, **arguments),
        callbacks=[steps, counted, GradientsAsParameters()],
        gradient_clip_val=CLIPPED.get(case),
    )

    class Batches(Endless):
        """Those of this rank, which is known once the mesh is there."""

        def __init__(self, of_ranks: list, first: int) -> None:
            self.batches, self.first = of_ranks, first

        def __iter__(self) -> Any:
            place = trainer.strategy.device_mesh["data_parallel"].get_local_rank()
            return iter(self.batches[place][self.first :])

    class Validation(Batches, torch.utils.data.IterableDataset):
        """The same for validation."""

    of_two = zip(*STEPS.values(), strict=True)
    training = [[batch(case, model, *rows) for rows in steps] for steps in rows_of(data, of_two)]
    validation = [[{"dev": batch_of(model, *rows)} for rows in steps] for steps in rows_of(data, VALIDATION)]
    batches = Batches(training, 0 if checkpoint is None else SAVED_AFTER)
    trainer.fit(model, batches, DataLoader(Validation(validation, 0), batch_size=None), ckpt_path=checkpoint)
    validated = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val_")}
    of_nemo = SimpleNamespace(trainer=trainer)  # how NeMo's datamodule, and so ours, divides the data
    place = DataModule._get_dp_rank(of_nemo), DataModule._get_world_size(of_nemo)
    return {"validated": validated, "examples": sum(counted.of_all_ranks.values()), "place": place}


def rows_of(data: int, of_two: Iterable[Sequence]) -> list[Sequence]:
    """What each rank of data has of what is divided over two: one has the second's, of more the others have nothing."""
    two = list(of_two)
    return {1: two[1:], 2: two}.get(data) or [*two, *[[(NONE, NONE)] * len(two[0])] * (data - 2)]


def train(rank: int, folder: Path, asr: Path, layout: str) -> None:
    """All trainings of a layout, in this process, which is one rank."""
    done = {}
    for case in CASES_OF[layout]:
        model_class, name, config = CASES[case]
        model = built(model_class, name, folder.parent / "backbones", asr, max_new_tokens=4, **SGD, **config)
        del model.log
        resumed = deepcopy(model)
        if rank == 1 and layout == "2 share layers":  # what each rank computes as a whole is alike all the same
            for parameter in model.perception.parameters():
                torch.nn.init.zeros_(parameter)
        checkpoint = folder / f"{case}.ckpt"
        steps = Steps(SAVED_AFTER, checkpoint)
        found = fit(layout, case, model, steps) | {"gradients": steps.gradients, "losses": steps.losses}
        found["weights"] = weights(model)
        model.save_pretrained(folder / case)
        parts = batch_of(model, slice(0, 3), slice(0, 3)).values()
        found["translated"] = [model.translate_batch(part) for part in parts]
        found["shards"] = shards(model)
        if case in RESUMED:
            fit(layout, case, resumed, Steps(), checkpoint)
            found["resumed"] = shards(resumed)
        done[case] = found
    if layout == "2 share layers":
        strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)
        done["calibrated"] = calibrate(1, folder, folder.parent / "backbones", asr, strategy)
    torch.save(done, folder / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def backbones(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tensor_parallel")
    for _, name, _ in CASES.values():
        backbone(name, folder / "backbones")
    return folder / "backbones"


@pytest.fixture(scope="module")
def ranks(backbones, tiny_asr) -> Callable[[str], list[dict]]:
    """Layout -> what each rank has found, by case."""

    @cache
    def train_in(layout: str) -> list[dict]:
        folder, (data, _, arguments) = backbones.parent / layout, LAYOUTS[layout]
        number = data * arguments.get("tensor_parallel_size", 1)
        for is_last in (False, True):
            folder.mkdir()
            try:
                run_on_two_ranks(train, folder, folder, tiny_asr, layout, ranks=number)
                break
            except RankCrashedError as error:
                # One of some thirty runs: in gloo's thread or torch's `wait_tensor`, where `Steps` gathers gradients.
                # No training without it has crashed (test_watchdog.py, 2,000 steps).
                if is_last:
                    raise
                warnings.warn(f"a rank crashed, and the run is repeated:\n{error}", stacklevel=2)
                shutil.rmtree(folder)
        return [torch.load(folder / f"rank{rank}.pt") for rank in range(number)]

    return train_in


every_training = pytest.mark.parametrize(
    ("layout", "case"), [(layout, case) for layout, cases in CASES_OF.items() for case in cases]
)


@every_training
def test_training_is_that_of_one_process(ranks, backbones, tiny_asr, layout, case):
    """Gradients and losses of each step, clipped as those of one process; then the losses of validation."""
    model_class, name, config = CASES[case]
    model = built(model_class, name, backbones, tiny_asr, **SGD, **config)
    data = LAYOUTS[layout][0]
    steps = [[batch_of(model, *of_ranks[1]) if data == 1 else joined(model, of_ranks)] for of_ranks in STEPS.values()]
    gradients, losses = in_one_process(model, steps, CLIPPED.get(case))
    for rank in ranks(layout):
        found = rank[case]
        assert len(found["gradients"]) == len(gradients)
        for of_ranks, of_one in zip(found["gradients"], gradients, strict=True):
            assert_equal_gradients(of_ranks, of_one)
    mean_losses = torch.tensor([rank[case]["losses"] for rank in ranks(layout)]).mean(0)
    torch.testing.assert_close(mean_losses, torch.tensor(losses), rtol=1e-5, atol=1e-6)

    with torch.no_grad():
        model.on_validation_epoch_start()
        for rows in chain(*rows_of(data, VALIDATION)):
            model.validation_step({"dev": batch_of(model, *rows)}, 0)
    expected = {k: v for k, v in validation_metrics(model._tallies).items() if "bleu" not in k}
    assert {"val_loss_dev_audio_en-de", "val_loss_dev_text"} < expected.keys()
    examples = sum(len(part["examples"]) for (step,) in steps for part in step.values())
    for rank in ranks(layout):
        assert rank[case]["validated"] == pytest.approx(expected, rel=1e-5)
        assert rank[case]["examples"] == examples, "each is counted once"
    parallel = LAYOUTS[layout][2].get("tensor_parallel_size", 1)
    assert [rank[case]["place"] for rank in ranks(layout)] == [(n // parallel, data) for n in range(data * parallel)]


@pytest.mark.parametrize(
    ("layout", "case"), [(layout, case) for layout, cases in CASES_OF.items() for case in cases if case in RESUMED]
)
def test_a_resumed_training_ends_bit_for_bit_where_an_uninterrupted_one_does(ranks, backbones, layout, case):
    for rank in ranks(layout):
        found = rank[case]
        assert found["resumed"].keys() == found["shards"].keys()
        for name, shard_of_whole in found["shards"].items():
            assert torch.equal(found["resumed"][name], shard_of_whole), name


@every_training
def test_the_export_is_the_model(ranks, backbones, layout, case):
    """Loaded in one process it has the same weights, and translates as the ranks did; NeMo's SALM loads it, too."""
    trained = ranks(layout)[0][case]["weights"]
    model = load(backbones.parent / layout / case)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, trained[name]), name
    parts = batch_of(model, slice(0, 3), slice(0, 3)).values()
    translated = [model.translate_batch(part) for part in parts]
    assert all(translated == rank[case]["translated"] for rank in ranks(layout))
    assert any(map(len, chain(*translated)))
    if isinstance(model, SALMGPT) and not CASES[case][2]:
        theirs = SALM.from_pretrained(str(backbones.parent / layout / case)).state_dict()
        assert theirs.keys() == model.state_dict().keys()
        assert all(torch.equal(theirs[name], value) for name, value in model.state_dict().items())


@every_training
def test_each_rank_has_its_share_of_the_language_model(ranks, backbones, layout, case):
    """Of two ranks, half of each matrix; of four, a quarter. The table of tokens may not be divisible."""
    data, _, arguments = LAYOUTS[layout]
    share = arguments.get("replicas", 1) / data / arguments.get("tensor_parallel_size", 1)
    for rank in ranks(layout):
        for name, whole in rank[case]["weights"].items():
            if re.search(r"^(llm|embed_tokens)\..*weight$", name) and "norm" not in name and "lora" not in name:
                assert rank[case]["shards"][name].numel() / whole.numel() == pytest.approx(share, rel=0.02), name


def test_oomptimizer_calibrates_without_a_trace(ranks):
    """What is trained after the calibration is trained as without."""
    for rank in ranks("2 share layers"):
        assert rank["calibrated"]["losses"] == rank["SALMGPT, llama"]["losses"]
        for short, long in rank["calibrated"]["sizes"].values():
            assert short > long >= 1


DORA = {"lora": {**LORA["lora"], "use_dora": True}}
IN_THE_HEAD = {"lora": {"r": 2, "target_modules": ["lm_head"]}}


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("t5", {}, r"trainer\.strategy\.tensor_parallel_size: 2 is not possible for SALMT5 on .* 't5', .* not at all"),
        ("llama", {"loss_implementation": "naive"}, r"model\.loss_implementation: naive cannot compute"),
        ("llama", DORA, r"model\.lora: LoRA in 'model\.layers\.0\.self_attn\.q_proj' cannot be split"),
        ("llama", IN_THE_HEAD, r"model\.lora: LoRA in 'lm_head' cannot be split"),
    ],
)
def test_what_cannot_be_split_is_refused(backbones, tiny_asr, name, changes, sentence):
    model = built(SALMT5 if name == "t5" else SALMGPT, name, backbones, tiny_asr, **changes)
    with pytest.raises(ConfigError, match=f"^{sentence}"):
        check_tensor_parallel(model, 2)


@pytest.mark.parametrize(("size", "what"), [(3, "num_attention_heads .* 4"), (4, "num_key_value_heads .* 2")])
def test_heads_must_be_divisible(backbones, tiny_asr, size, what):
    model = built(SALMGPT, "llama", backbones, tiny_asr)
    with pytest.raises(ConfigError, match=rf"^trainer\.strategy\.tensor_parallel_size: {size} does not divide {what};"):
        check_tensor_parallel(model, size)


def test_those_of_a_teacher_too(backbones, tiny_asr):
    model = built(SALMGPT, "llama", backbones, tiny_asr, **OBJECTIVES)
    model.teachers.language_models()[0].llm.config.num_key_value_heads = 1
    with pytest.raises(ConfigError, match=r"2 does not divide num_key_value_heads .* \(llama\), which is 1;"):
        check_tensor_parallel(model, 2)


def test_groups_must_be_divisible():
    strategy = HybridShardedStrategy(replicas=3, data_parallel_size=4)
    with pytest.raises(ConfigError, match=r"^trainer\.strategy\.replicas: 4 devices cannot be divided into 3 groups"):
        strategy.setup_environment()
