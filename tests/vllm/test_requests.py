"""Requests, precisions and folders of all kinds in vLLM, and folders that it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_emmett.errors import ModelError
from nemo_emmett.models import SALMGPT, load

from ..models.memorising import built
from .serving import ADAPTERS, answers_of, backbone, engine, exported, moved, own_answers, requests


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_asr) -> Path:
    return exported("qwen3", "identity", tmp_path_factory.mktemp("model"), tiny_asr)


def test_several_recordings_in_a_prompt_and_the_same_one_again(folder):
    model, signals = load(folder), [signals[0] for _, signals in requests(24)[12:]]
    chosen = [(None, signals[:2]), ("one red house", signals[2:5]), (None, [signals[6]] * 2), (None, signals[6:7])]
    with engine(folder) as llm:
        assert answers_of(llm, model, chosen) == own_answers(model, chosen)


def test_long_recordings_are_encoded_in_chunks(tmp_path, tiny_asr):
    folder = exported("qwen3", "mlp2", tmp_path, tiny_asr, encoder_chunk_size_seconds=1.0)
    random = np.random.default_rng(0)
    signals = [(0.1 * random.standard_normal(n)).astype(np.float32) for n in (15999, 16001, 16200, 60000, 100000)]
    model, chosen = load(folder), [(None, [signal]) for signal in signals]
    with engine(folder) as llm:
        assert answers_of(llm, model, chosen) == own_answers(model, chosen)


def test_bfloat16(folder):
    chosen = requests(40)
    known = [*range(6), *range(20, 26)]  # of the training: answers that rounding does not change
    expected = own_answers(load(folder), chosen)
    model = load(folder).to(torch.bfloat16)
    with engine(folder, "bfloat16") as llm:
        answers = answers_of(llm, model, chosen)
    assert [answers[i] for i in known] == [expected[i] for i in known]
    assert sum(a == b for a, b in zip(answers, own_answers(model, chosen), strict=True)) >= 36


def test_lora_is_merged(tmp_path, tiny_asr):
    """Of random weights, for LoRA to change the answers; the greatest logits of such models are well apart."""
    lora = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    made = backbone("llama", tmp_path)
    section = {"perception": {"modality_adapter": ADAPTERS["identity"]}, "lora": lora}
    model = built(SALMGPT, "llama", made, tiny_asr, **section)
    without, chosen = own_answers(model, requests(20)), requests(20)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.3)
    expected = own_answers(model, chosen)
    assert sum(a != b for a, b in zip(expected, without, strict=True)) > 10
    with engine(moved(model, tmp_path)) as llm:
        assert answers_of(llm, model, chosen) == expected


def test_a_model_that_reads_text_only(tmp_path):
    made = backbone("gemma3", tmp_path)
    model = built(SALMGPT, "gemma3", made, None)
    chosen = requests(20)[:10]
    with engine(moved(model, tmp_path)) as llm:
        assert answers_of(llm, model, chosen) == own_answers(model, chosen)
        with pytest.raises(ValueError, match="text-only"):
            answers_of(llm, model, [(None, [np.zeros(16000, np.float32)])])


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("perception.encoder.layers.0.norm_out.weight", None, "lacks 'encoder.layers.0.norm_out.weight'"),
        ("perception.proj.weight", torch.zeros(3, 3), r"'proj.weight' in the shape \(3, 3\)"),
        ("perception.other.weight", torch.zeros(3), "surplus 'other.weight'"),
        ("llm.model.layers.1.mlp.up_proj.weight", None, "lacks 'model.layers.1.mlp.up_proj.weight'"),
        ("llm.model.layers.7.mlp.up_proj.weight", torch.zeros(3, 3), "surplus 'model.layers.7"),
    ],
)
def test_other_weights_are_refused(folder, tmp_path, name, change, sentence):
    shutil.copytree(folder, tmp_path / "damaged")
    weights = load_file(tmp_path / "damaged" / "model.safetensors")
    assert (change is None or "shape" in sentence) == (name in weights)
    weights.pop(name, None)
    if change is not None:
        weights[name] = change
    save_file(weights, tmp_path / "damaged" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=sentence), engine(tmp_path / "damaged"):
        pass


def test_code_in_a_folder_is_not_run(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "hostile")
    path = tmp_path / "hostile" / "config.json"
    config = json.loads(path.read_text())
    config["perception"]["modality_adapter"]["_target_"] = "os.system"
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"os\.system"), engine(tmp_path / "hostile"):
        pass
