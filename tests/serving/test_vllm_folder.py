"""What vLLM is given of a folder: its config and its weights. Needs no vLLM."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from nemo_emmett.errors import ModelError
from nemo_emmett.serving.request_errors import RequestError
from nemo_emmett.serving.vllm.config import ExportedConfig
from nemo_emmett.serving.vllm.parts import direction_of
from nemo_emmett.serving.vllm.weights import language_model_weights

LLAMA = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "tie_word_embeddings": False,
}


def named_as_ours(llm: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights as our folders have them: token embeddings are kept outside of the language model."""
    state = {f"llm.{name}": value for name, value in llm.state_dict().items()}
    (embeddings,) = [name for name in state if name.endswith("embed_tokens.weight")]
    return {"embed_tokens.weight": state.pop(embeddings)} | state


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_alpha": 2}])
def test_lora_is_merged_as_peft_merges_it(options):
    torch.manual_seed(0)
    lora = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "up_proj"]} | options
    llm = get_peft_model(LlamaForCausalLM(LlamaConfig(**LLAMA)), LoraConfig(**lora))
    for name, value in llm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value)
    merged = dict(language_model_weights(named_as_ours(llm).items(), lora, is_tied=False))
    expected = llm.merge_and_unload().state_dict()
    assert merged.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(merged[name], value)


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"rank_pattern": {"q_proj": 2}}, {"modules_to_save": ["norm"]}]
)
def test_lora_that_cannot_be_merged_is_refused(options):
    with pytest.raises(ModelError, match=f"model.lora.{next(iter(options))}"):
        list(language_model_weights([], {"r": 4} | options, is_tied=False))


def test_a_part_of_lora_that_is_missing_is_refused():
    weights = [("llm.base_model.model.model.layers.0.q_proj.base_layer.weight", torch.zeros(2, 2))]
    with pytest.raises(ModelError, match=r"lacks a part of the LoRA of 'model\.layers\.0\.q_proj\.weight'"):
        list(language_model_weights(weights, {"r": 4}, is_tied=False))


@pytest.mark.parametrize("name", ["embed_tokens.weight", "llm.lm_head.weight"])
def test_tied_embeddings_have_either_name(name):
    weights = [(name, torch.ones(2, 2)), ("llm.model.norm.weight", torch.ones(2))]
    found = dict(language_model_weights(weights, None, is_tied=True))
    assert found.keys() == {"model.embed_tokens.weight", "model.norm.weight"}


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ({"architectures": ["BestowGPT"]}, "this is a BestowGPT; serve it with `nemo-emmett serve`"),
        ({"architectures": ["SALMGPT"], "lora_modality": "audio"}, "lora_modality: audio"),
        ({"architectures": ["SALMGPT"], "perception": {"encoder": {"_target_": "os.system"}}}, "os.system"),
        ({"architectures": ["SALMGPT"], "trust_remote_code": True}, "trust_remote_code"),
    ],
)
def test_folders_that_are_refused(section, sentence):
    with pytest.raises(ModelError, match=sentence):
        ExportedConfig.from_dict(section, name_or_path="folder")


def test_the_language_models_config_is_read_from_the_folder(tmp_path):
    LlamaConfig(**LLAMA).save_pretrained(tmp_path / "llm_backbone")
    section = {"architectures": ["SALMGPT"], "pretrained_llm": "gone", "perception": None}
    config = ExportedConfig.from_dict(section, name_or_path=str(tmp_path))
    assert config.get_text_config().hidden_size == LLAMA["hidden_size"]
    assert config.section["pretrained_llm"] == "gone"


def test_the_plugin_costs_nothing_before_vllm_calls_it():
    names = "{'torch', 'transformers', 'nemo', 'vllm'} & set(sys.modules)"
    code = f"import sys, nemo_emmett.serving.vllm; print({names})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_the_languages_of_a_request_are_those_of_the_api_here():
    section = {"training": {"directions": {"audio": [["en", "de"], ["en", "en"]]}}}
    assert direction_of(section, "translate", None, "de")[:2] == ("en", "de")
    assert direction_of(section, "transcribe", None, None)[:2] == ("en", "en")
    with pytest.raises(RequestError, match="does not translate to fr"):
        direction_of(section, "translate", "en", "fr")
