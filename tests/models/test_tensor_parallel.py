"""Tensor parallelism and hybrid sharding: ranks that share each layer, and groups of ranks of which each has a whole
model, get the gradients of one process, resume, and export its model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from nemo.collections.speechlm2.models import SALM

from nemo_emmett.errors import ConfigError
from nemo_emmett.models import SALMGPT, SALMT5, BestowGPT
from nemo_emmett.models.tensor_parallel import check_tensor_parallel
from nemo_emmett.strategies import HybridShardedStrategy

from .memorising import built
from .sharded_trainings import LAYOUTS, Case, Trainings
from .two_ranks import LORA, OBJECTIVES

EVERY_LAYER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA_EVERYWHERE = {"lora": {"r": 2, "lora_alpha": 1, "target_modules": EVERY_LAYER, "init_lora_weights": False}}
CASES = {
    "SALMGPT, llama": Case(SALMGPT, "llama", is_resumed=True),
    "SALMGPT, mistral": Case(SALMGPT, "mistral"),
    # Weights that are tied, and such that have parts of a gradient, are resumed as well.
    "SALMGPT, qwen2": Case(SALMGPT, "qwen2", clip=0.5, is_resumed=True),
    "SALMGPT, qwen3": Case(SALMGPT, "qwen3", clip=0.5, is_resumed=True),
    **{f"SALMGPT, {name}": Case(SALMGPT, name) for name in ("gemma", "gemma2", "gemma3")},
    "BestowGPT, llama": Case(BestowGPT, "llama"),
    "BestowGPT, qwen2": Case(BestowGPT, "qwen2"),
    "SALMGPT, LoRA": Case(SALMGPT, "llama3", LORA_EVERYWHERE, is_resumed=True),
    "SALMGPT, LoRA on speech alone": Case(SALMGPT, "llama", LORA | {"lora_modality": "audio"}),
    "SALMGPT, objectives": Case(SALMGPT, "llama", OBJECTIVES, is_resumed=True),
    "SALMGPT, LoRA, objectives, tied": Case(SALMGPT, "gemma2", LORA | OBJECTIVES),
    "BestowGPT, smoothed, checkpointed": Case(
        BestowGPT, "llama", {"label_smoothing": 0.1, "activation_checkpointing": True}
    ),
    "SALMGPT, packed, frozen": Case(SALMGPT, "mistral", {"freeze": ["llm"]}, is_packed=True),
    "SALMT5": Case(SALMT5, "t5", is_resumed=True),
}

NAMES = {
    "2 share layers": [name for name in CASES if name != "SALMT5"],
    "2 x 2 share layers": ["SALMGPT, qwen2", "SALMGPT, LoRA", "SALMGPT, objectives", "BestowGPT, llama"],
    "2 groups of 2": ["SALMGPT, qwen2", "SALMT5"],
    "2 groups of 1 x 2": ["BestowGPT, qwen2"],
}
"""Layout -> what is trained."""

PAIRS = [(layout, name) for layout, names in NAMES.items() for name in names]
every_training = pytest.mark.parametrize(("layout", "name"), PAIRS)


@pytest.fixture(scope="module")
def trainings(tmp_path_factory, tiny_asr) -> Trainings:
    cases = {layout: {name: CASES[name] for name in names} for layout, names in NAMES.items()}
    return Trainings(tmp_path_factory.mktemp("tensor_parallel"), tiny_asr, cases, calibrated=["2 share layers"])


@pytest.fixture
def backbones(trainings) -> Path:
    return trainings.backbones


@every_training
def test_training_is_that_of_one_process(trainings, layout, name):
    trainings.check_training(layout, name)


@pytest.mark.parametrize(("layout", "name"), [pair for pair in PAIRS if CASES[pair[1]].is_resumed])
def test_a_resumed_training_ends_bit_for_bit_where_an_uninterrupted_one_does(trainings, layout, name):
    trainings.check_resumed(layout, name)


@every_training
def test_the_export_is_the_model(trainings, layout, name):
    """NeMo's SALM loads it, too."""
    model = trainings.check_export(layout, name)
    if isinstance(model, SALMGPT) and not CASES[name].config:
        theirs = SALM.from_pretrained(str(trainings.folder / layout / name)).state_dict()
        assert theirs.keys() == model.state_dict().keys()
        assert all(torch.equal(theirs[key], value) for key, value in model.state_dict().items())


@every_training
def test_each_rank_has_its_share_of_the_language_model(trainings, layout, name):
    """Of two ranks, half of each matrix; of four, a quarter. The table of tokens may not be divisible."""
    share = LAYOUTS[layout].arguments.get("replicas", 1) / LAYOUTS[layout].ranks
    for rank in trainings.of(layout, name):
        for key, whole in rank["weights"].items():
            if re.search(r"^(llm|embed_tokens)\..*weight$", key) and "norm" not in key and "lora" not in key:
                assert rank["shards"][key].numel() / whole.numel() == pytest.approx(share, rel=0.02), key


def test_oomptimizer_calibrates_without_a_trace(trainings):
    trainings.check_calibration("2 share layers", "SALMGPT, llama")


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
