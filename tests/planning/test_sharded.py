"""Plans of models that FSDP2 shards: what the first of the ranks holds, byte for byte as on real ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from operator import lt, truediv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

from nemo_emmett.errors import ConfigError
from nemo_emmett.models import SALMGPT, SALMT5, BestowGPT
from nemo_emmett.oomptimizer.adapters import adapter_for
from nemo_emmett.oomptimizer.meter import Reading, TensorMeter
from nemo_emmett.oomptimizer.steps import TrainingSteps
from nemo_emmett.planning.architecture import architecture_only
from nemo_emmett.planning.fake_training import fake_training
from nemo_emmett.planning.sharded import fake_ranks
from nemo_emmett.strategies import HybridShardedStrategy

from ..models.backbones import backbone, model_config
from ..models.two_ranks import LORA, run_on_two_ranks
from ..oomptimizer.fits import AtFitStart, Data
from ..oomptimizer.test_fake import BATCHES

CPU = torch.device("cpu")
CASES: dict[str, tuple[type, str, dict[str, Any], dict[str, Any]]] = {
    "SALMT5": (SALMT5, "t5", {}, {}),
    "SALMT5, bf16-mixed": (SALMT5, "t5", {}, {"precision": "bf16-mixed"}),
    "SALMGPT": (SALMGPT, "llama", {}, {}),
    "SALMGPT, tied": (SALMGPT, "qwen2", {}, {}),
    "SALMGPT, LoRA, bf16-mixed": (SALMGPT, "llama", LORA, {"precision": "bf16-mixed"}),
    "SALMGPT, checkpointing": (SALMGPT, "llama", {"activation_checkpointing": True}, {}),
    "SALMGPT, bf16-true, fused": (
        SALMGPT,
        "llama",
        {"optimizer": {"_target_": "torch.optim.AdamW", "lr": 1e-3, "fused": True}},
        {"precision": "bf16-true"},
    ),
    "BestowGPT, checkpointing, bf16-mixed": (
        BestowGPT,
        "llama",
        {"activation_checkpointing": True},
        {"precision": "bf16-mixed"},
    ),
    "BestowGPT, frozen encoder": (BestowGPT, "qwen2", {"freeze": ["encoder"]}, {}),
    "SALMT5, accumulated": (SALMT5, "t5", {}, {"accumulate_grad_batches": 2}),
    "SALMGPT, tensor parallel": (SALMGPT, "llama", {}, {}),
    "SALMGPT, tied, tensor parallel, bf16-mixed": (SALMGPT, "gemma2", {}, {"precision": "bf16-mixed"}),
    "SALMGPT, LoRA, tensor parallel": (SALMGPT, "qwen3", LORA, {}),
    "BestowGPT, tensor parallel, checkpointing": (BestowGPT, "llama", {"activation_checkpointing": True}, {}),
    "BestowGPT, tied, tensor parallel": (BestowGPT, "qwen2", {}, {}),
    "SALMT5, hybrid": (SALMT5, "t5", {}, {}),
}
"""Model, backbone, further keys of its section, and of the trainer."""

ON_FOUR = ("SALMT5", "SALMGPT, LoRA, bf16-mixed", "BestowGPT, checkpointing, bf16-mixed", "SALMT5, hybrid")
CASES_OF = {
    2: [case for case in CASES if case not in ("SALMT5, hybrid", "BestowGPT, tied, tensor parallel")],
    4: [*ON_FOUR, "SALMGPT, tied, tensor parallel, bf16-mixed", "BestowGPT, tied, tensor parallel"],
}
"""By the number of ranks."""


def strategy_of(case: str, ranks: int) -> ModelParallelStrategy | str:
    if ranks == 1:
        return "auto"
    if "hybrid" in case:
        return HybridShardedStrategy(replicas=2)
    parallel = 2 if "tensor parallel" in case else 1
    return ModelParallelStrategy(data_parallel_size=ranks // parallel, tensor_parallel_size=parallel)


class _Measured(Exception):
    """Ends a fit before it trains."""


def readings_of(case: str, ranks: int, folder: Path, asr: Path, is_planned: bool) -> list[tuple[int, int, int]]:
    """Peak, resident and held bytes of the optimizer's step, and of a step of each batch."""
    kind, name, changes, options = CASES[case]
    section = model_config(name, folder, asr, **changes)
    readings = []

    def least(step: Callable[[], Reading]) -> tuple[int, int, int]:
        """Of several steps, until two are alike: threads of gloo hold what they have sent until they run again, which
        only adds. All ranks have the same readings, and take as many steps."""
        taken: list[tuple[int, int, int]] = []
        while len(taken) < (1 if is_planned else 3) and len(taken) == len({*taken}):
            reading = step()
            taken.append((reading.peak, reading.resident, reading.held))
        return tuple(map(min, *taken)) if len(taken) > 1 else taken[0]

    def measure(trainer, module) -> None:
        adapter = adapter_for(module)
        with ExitStack() as stack:
            if is_planned:
                stack.enter_context(adapter.planning())
            steps = stack.enter_context(TrainingSteps(trainer, module, TensorMeter(CPU)))
            made = [[adapter.synthetic_batch(shape, n, CPU) for shape, n in sizes.items()] for sizes in BATCHES]
            made = [parts[0] if len(parts) == 1 else adapter.join(parts) for parts in made]
            readings.append(least(lambda: steps.warm_up(made[0])))
            readings.extend(least(lambda batch=batch: steps.run(batch)) for batch in made)
        raise _Measured

    with ExitStack() as stack:
        if is_planned:
            section = architecture_only(section)
            stack.enter_context(fake_ranks(ranks))
            stack.enter_context(fake_training())
        torch.manual_seed(0)
        quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        trainer = Trainer(
            accelerator="cpu",
            devices=ranks,
            max_epochs=1,
            strategy=strategy_of(case, ranks),
            callbacks=[AtFitStart(measure)],
            use_distributed_sampler=False,
            **dict.fromkeys(quiet, False),
            **options,
        )
        with trainer.init_module():
            model = kind(section)
        with pytest.raises(_Measured):
            trainer.fit(model, datamodule=Data({"bucket_duration_bins": [1.0]}))
    return readings


def measure_on_rank(rank: int, ranks: int, folder: Path, asr: Path) -> None:
    """The cases, in this process, which is one rank; every rank finds the largest of the ranks."""
    found = {case: readings_of(case, ranks, folder / "backbones", asr, is_planned=False) for case in CASES_OF[ranks]}
    torch.save(found, folder / f"{rank} of {ranks}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    for _, name, _, _ in CASES.values():
        backbone(name, folder / "backbones")
    return folder


@pytest.fixture(scope="module")
def measured(folder, tiny_asr) -> dict[int, dict[str, list[tuple[int, int, int]]]]:
    for ranks in CASES_OF:
        run_on_two_ranks(measure_on_rank, folder, ranks, folder, tiny_asr, ranks=ranks)
    return {ranks: torch.load(folder / f"0 of {ranks}.pt") for ranks in CASES_OF}


@pytest.mark.parametrize(("ranks", "case"), [(ranks, case) for ranks, cases in CASES_OF.items() for case in cases])
def test_a_plan_is_what_the_ranks_measure(ranks, case, folder, tiny_asr, measured) -> None:
    planned = readings_of(case, ranks, folder / "backbones", tiny_asr, is_planned=True)
    if CASES[case][0] is SALMT5:
        assert planned == measured[ranks][case]
    else:  # fake tensors do not know the kernel of causal attention on a CPU
        for of_plan, of_ranks in zip(planned, measured[ranks][case], strict=True):
            assert of_plan == pytest.approx(of_ranks, rel=0.01)


def test_tensor_parallelism_halves_a_large_vocabulary(tmp_path, tiny_asr) -> None:
    """Table, output layer, their gradients and the logits: no rank ever has them whole, while FSDP2 gathers them. Where
    a step has both modalities, torch adds their two gradients of the output layer in copies."""
    config = backbone("llama", tmp_path) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 256_000}))
    alone, parallel, sharded = (
        [peak for peak, _, _ in readings_of(case, ranks, tmp_path, tiny_asr, is_planned=True)]
        for case, ranks in (("SALMGPT", 1), ("SALMGPT, tensor parallel", 2), ("SALMGPT", 2))
    )
    *of_one_modality, of_both = map(truediv, parallel, alone)
    assert of_one_modality == pytest.approx([0.5] * len(of_one_modality), abs=0.01)
    assert of_both < 0.66
    assert all(map(lt, parallel, sharded))


def test_more_ranks_hold_less(folder, tiny_asr) -> None:
    floors = [readings_of("SALMGPT", ranks, folder / "backbones", tiny_asr, is_planned=True)[0] for ranks in (2, 4, 64)]
    residents = [resident for _, resident, _ in floors]
    assert residents == sorted(residents, reverse=True)
    assert not torch.distributed.is_initialized()


def test_a_plan_within_other_ranks_is_refused(folder, tiny_asr) -> None:
    with fake_ranks(2), pytest.raises(ConfigError, match=r"^plan: runs in one process"), fake_ranks(2):
        pass
