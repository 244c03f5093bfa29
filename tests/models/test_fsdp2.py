"""FSDP2: two ranks that share one model get the gradients of one process, resume, and export its model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nemo_emmett.models import SALMGPT, SALMT5, BestowGPT

from .sharded_trainings import Case, Trainings
from .two_ranks import LORA, OBJECTIVES

LAYOUT = "2 shard weights"
CASES = {
    "SALMGPT, untied": Case(SALMGPT, "llama"),
    "SALMGPT, tied": Case(SALMGPT, "qwen2", clip=0.5),
    "SALMGPT, LoRA": Case(SALMGPT, "llama", LORA),
    "SALMGPT, LoRA on speech alone": Case(SALMGPT, "llama", LORA | {"lora_modality": "audio"}),
    "BestowGPT, untied": Case(BestowGPT, "llama"),
    "BestowGPT, tied": Case(BestowGPT, "qwen2"),
    "BestowGPT, frozen": Case(BestowGPT, "llama", {"freeze": ["llm"]}),
    "SALMT5, tied": Case(SALMT5, "t5"),
    "SALMT5, untied": Case(SALMT5, "t5v1_1"),
    "SALMGPT, untied, objectives": Case(SALMGPT, "llama", OBJECTIVES),
    "SALMGPT, LoRA, objectives": Case(SALMGPT, "llama", LORA | OBJECTIVES),
    "SALMT5, tied, objectives": Case(SALMT5, "t5", OBJECTIVES),
    "SALMT5, packed": Case(SALMT5, "t5", is_packed=True),
    "SALMGPT, packed, cached": Case(SALMGPT, "llama", {"freeze": ["encoder"], "cache_encoder": True}, is_packed=True),
}
CASES = {name: replace(case, is_resumed=True) for name, case in CASES.items()}

every_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(scope="module")
def trainings(tmp_path_factory, tiny_asr) -> Trainings:
    return Trainings(tmp_path_factory.mktemp("fsdp2"), tiny_asr, {LAYOUT: CASES}, calibrated=[LAYOUT])


@every_case
def test_training_is_that_of_one_process_on_the_joined_batch(trainings, case):
    trainings.check_training(LAYOUT, case)


@every_case
def test_a_resumed_training_ends_bit_for_bit_where_an_uninterrupted_one_does(trainings, case):
    trainings.check_resumed(LAYOUT, case)


@every_case
def test_the_export_of_a_sharded_model_is_the_model(trainings, case):
    trainings.check_export(LAYOUT, case)


def test_oomptimizer_calibrates_a_sharded_model_without_a_trace(trainings):
    trainings.check_calibration(LAYOUT, "SALMGPT, untied")
