"""A mistake in the `model` section gives one sentence that names the key, when the model is built."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_emmett.errors import EmmettError
from nemo_emmett.models import SALMGPT, SALMT5, BestowGPT

from .backbones import model_config

ADAMW = {"_target_": "torch.optim.AdamW", "lr": 1e-3}
COSINE = {"_target_": "nemo.core.optim.lr_scheduler.CosineAnnealing", "max_steps": 100, "warmup_steps": 5}
MLP = {"_target_": "nemo_emmett.modules.modality_adapters.MLPConnector", "input_dim": 32, "output_dim": None}
IDENTITY = {"_target_": "nemo.collections.speechlm2.modules.perception.IdentityConnector", "d_model": 32}
SPEC_AUGMENT = {"_target_": "nemo.collections.asr.modules.SpectrogramAugmentation"}


def refusal(model_class: type, section: dict[str, Any]) -> str:
    with pytest.raises(EmmettError) as refused:
        model_class(section)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"lr": -1}, "model.optimizer.lr: torch.optim.AdamW cannot be built with -1 (Invalid learning rate"),
        ({"lr": "abc"}, "model.optimizer.lr: 'abc' cannot be used; give a number."),
        ({"lr": float("nan")}, "model.optimizer.lr: nan cannot be used; give a number."),
        ({"lr": True}, "model.optimizer.lr: True cannot be used"),
        ({"betas": [0.9]}, "model.optimizer.betas: [0.9] cannot be used"),
        ({"betas": [0.9, "x"]}, "model.optimizer.betas.1: 'x' cannot be used; give a number."),
        ({"betas": [0.9, 2]}, "model.optimizer.betas: torch.optim.AdamW cannot be built with (0.9, 2.0)"),
        ({"weight_decai": 1}, "model.optimizer.weight_decai: there is no such key; did you mean 'weight_decay'?"),
        ({"momentum": 1}, "model.optimizer.momentum: there is no such key; use lr, betas"),
        ({"fused": "false"}, "model.optimizer.fused: 'false' cannot be used; give true or false, or null."),
        ({"fused": True, "foreach": True}, "model.optimizer: torch.optim.AdamW cannot be built with {'lr': 0.001"),
        (
            {"_target_": "torch.optim.AdamWW"},
            "model.optimizer._target_: there is no 'torch.optim.AdamWW'; did you mean",
        ),
        ({"_target_": "torch.optm.AdamW"}, "model.optimizer._target_: 'torch.optm.AdamW' is not imported"),
        (
            {"_target_": "megatron.core.optimizer.Adam"},
            "model.optimizer._target_: 'megatron.core.optimizer.Adam' needs the package 'megatron', which is not",
        ),
        ({"_target_": "torch.nn.Linear"}, "model.optimizer._target_: 'torch.nn.Linear' is no Optimizer"),
        ({"_target_": None}, "model.optimizer._target_ is missing"),
    ],
)
def test_of_the_optimizer(folder, change, sentence) -> None:
    section = model_config("llama", folder) | {"optimizer": ADAMW | change}
    assert refusal(SALMGPT, section).startswith(sentence)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"max_steps": -1}, "max_steps: -1 cannot be used; give a whole number from 1."),
        ({"max_steps": "abc"}, "max_steps: 'abc' cannot be used"),
        ({"warmup_steps": -3}, "warmup_steps: -3 cannot be used; give a whole number from 0, or null."),
        ({"warmup_step": 3}, "warmup_step: there is no such key; did you mean 'warmup_steps'?"),
        ({"gamma": 3}, "gamma: there is no such key; use max_steps, min_lr"),
        ({"min_lr": "x"}, "min_lr: 'x' cannot be used"),
        # NeMo would raise when the warm-up has ended.
        ({"min_lr": 1.0}, "min_lr: nemo.core.optim.lr_scheduler.CosineAnnealing cannot be built with 1.0"),
        ({"_target_": "nemo.core.optim.lr_scheduler.CosineAnealing"}, "_target_: there is no 'nemo.core.optim."),
        ({"_target_": "torch.optim.AdamW"}, "_target_: 'torch.optim.AdamW' is no LRScheduler"),
    ],
)
def test_of_the_schedule(folder, change, sentence) -> None:
    section = model_config("llama", folder) | {"optimizer": ADAMW, "lr_scheduler": COSINE | change}
    assert refusal(SALMGPT, section).startswith(f"model.lr_scheduler.{sentence}")


def test_numbers_may_be_given_as_text(folder) -> None:
    schedule = COSINE | {"max_steps": "50"}
    section = model_config("llama", folder, optimizer=ADAMW | {"lr": "0.5"}, lr_scheduler=schedule)
    made = SALMGPT(section).configure_optimizers()
    assert made["optimizer"].defaults["lr"] == 0.5
    assert made["lr_scheduler"]["scheduler"].max_steps == 50


def test_of_a_model_without_anything_to_train(folder) -> None:
    section = model_config("llama", folder)
    with pytest.raises(EmmettError, match=r"model\.freeze, model\.freeze_params: all parameters are frozen"):
        SALMGPT(section | {"freeze": ["llm"]}).configure_optimizers()
    with pytest.raises(EmmettError, match=r"model\.optimizer is missing"):
        SALMGPT(section | {"optimizer": None}).configure_optimizers()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"encoder": {"d_model": 64}}, "encoder.d_model: 64 does not fit the weights of"),
        ({"encoder": {"dropout": 0.0, "n_layers": 3}}, "encoder.n_layers: 3 does not fit the weights of"),
        ({"encoder": {"feat_in": 40}}, "encoder.feat_in: 40 does not fit the weights of"),
        ({"encoder": {"n_layers": 0}}, "encoder.n_layers: 0 cannot be used; give a whole number from 1."),
        ({"encoder": {"n_layer": 2}}, "encoder.n_layer: there is no such key; did you mean 'n_layers'?"),
        ({"encoder": {"use_bias": "false"}}, "encoder.use_bias: 'false' cannot be used"),
        ({"encoder": {"self_attention_model": "none"}}, "encoder.self_attention_model: "),
        ({"encoder": {"_target_": "nemo.collections.asr.modules.ConformrEncoder"}}, "encoder._target_: there is no"),
        ({"encoder": "conformer"}, "encoder: 'conformer' cannot be used; give a mapping, or null."),
        ({"modality_adapter": None}, "modality_adapter is missing: give it a `_target_`, such as nemo_emmett."),
        ({"modality_adapter": {}}, "modality_adapter._target_ is missing"),
        ({"modality_adapter": IDENTITY | {"d_model": "x"}}, "modality_adapter.d_model: 'x' cannot be used"),
        ({"modality_adapter": MLP | {"dropout": 1.5}}, "modality_adapter.dropout: 1.5 cannot be used"),
        ({"modality_adapter": MLP | {"subsampling_factor": 0}}, "modality_adapter.subsampling_factor: 0 cannot be"),
        ({"modality_adpter": 3}, "modality_adpter: there is no such key; did you mean 'modality_adapter'?"),
        ({"spec_augment": SPEC_AUGMENT | {"freq_masks": -1}}, "spec_augment.freq_masks: -1 cannot be used"),
        ({"spec_augment": SPEC_AUGMENT | {"time_width": 2.5}}, "spec_augment.time_width: 2.5 cannot be used"),
        ({"spec_augment": SPEC_AUGMENT | {"freq_mask": 1}}, "spec_augment.freq_mask: there is no such key"),
    ],
)
def test_of_the_speech_encoder(folder, tiny_asr, change, sentence) -> None:
    section = model_config("llama", folder, tiny_asr)
    section["perception"] = section["perception"] | change
    assert refusal(SALMGPT, section).startswith(f"model.perception.{sentence}")


def test_an_encoder_may_change_what_has_no_weights(folder, tiny_asr) -> None:
    section = model_config("llama", folder, tiny_asr)
    section["perception"] = section["perception"] | {"encoder": {"dropout": 0.0, "att_context_size": [8, 8]}}
    assert SALMGPT(section).perception.encoder.att_context_size == [8, 8]


@pytest.mark.parametrize(
    ("model_class", "backbone", "name", "problem"),
    [
        (SALMGPT, "llama", "emmett_llam2", "'emmett_llam2' is not a prompt format; did you mean 'emmett_llama2'?"),
        (SALMGPT, "llama", "emmett_t5", "'emmett_t5' does not fit this language model: it is a format of encoder-dec"),
        (BestowGPT, "llama", "emmett_qwen", "'emmett_qwen' does not fit this language model: its tokenizer has no tok"),
        (SALMT5, "t5", "emmett_nllb", "'emmett_nllb' does not fit this language model: its tokenizer has none of the"),
        (SALMT5, "t5", "emmett_gemma", "'emmett_gemma' does not fit this language model: its tokenizer has no"),
        (SALMT5, "t5", 3, "3 cannot be used; give a text, or null."),
    ],
)
def test_of_the_prompt_format(folder, model_class, backbone, name, problem) -> None:
    section = model_config(backbone, folder) | {"prompt_format": name}
    assert refusal(model_class, section).startswith(f"model.prompt_format: {problem}")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"lora": {"r": 2.5}}, "model.lora.r: 2.5 cannot be used; give a whole number from 1"),
        ({"lora": {"use_rslora": "false"}}, "model.lora.use_rslora: 'false' cannot be used"),
        ({"lora": {"target_modules": 5}}, "model.lora.target_modules: 5 cannot be used"),
        ({"lora": []}, "model.lora: [] cannot be used; give a mapping, or null."),
        ({"compile": "yes"}, "model.compile: 'yes' cannot be used; give true or false, or a mapping."),
        ({"compile": {"mode": "fastest"}}, "model.compile: "),
        ({"compile": {"backend": "egaer"}}, "model.compile: "),
        ({"compile": {"fullgraf": True}}, "model.compile.fullgraf: there is no such key; did you mean 'fullgraph'?"),
        ({"cross_attention": {"dropout": 1}}, "model.cross_attention.dropout: 1 cannot be used"),
        ({"cross_attention": {"num_layers": 0}}, "model.cross_attention.num_layers: 0 cannot be used"),
        ({"freeze_params": ["("]}, "model.freeze_params.0: '(' is not a regular expression"),
        ({"modality_loss_weights": {"adio": 1}}, "model.modality_loss_weights.adio: there is no such key"),
        ({"audio_locator_tag": "</s>"}, "model.audio_locator_tag: '</s>' has another meaning for the tokenizer"),
        ({"audio_locator_tag": ""}, "model.audio_locator_tag: is empty"),
        ({"activation_checkpointing": "true"}, "model.activation_checkpointing: 'true' cannot be used"),
        ({"pretrained_asr": __file__, "perception": {}}, "model.pretrained_asr: the config of"),
    ],
)
def test_of_other_keys(folder, change, sentence) -> None:
    assert refusal(BestowGPT, model_config("llama", folder) | change).startswith(sentence)
