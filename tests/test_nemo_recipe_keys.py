"""Every key of NeMo's recipes has the status in docs/nemo_recipes.md: works, is ignored as by NeMo, or is refused."""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from nemo.utils.trainer_utils import resolve_trainer_cfg
from omegaconf import OmegaConf

from nemo_emmett.data import get_multimodal_dataloader
from nemo_emmett.data.checks import check_data_config
from nemo_emmett.data.config.dataset_config import parse_dataset
from nemo_emmett.data.config.nemo_config import sampler_config
from nemo_emmett.data.config.schema import LOADER_KEYS
from nemo_emmett.data.config.sources import CLASSIC_KEYS
from nemo_emmett.errors import ConfigError
from nemo_emmett.models import SALMGPT, SALMT5, BestowGPT
from nemo_emmett.models.config import ModelConfig
from nemo_emmett.models.nemo_keys import NEMO_KEYS
from nemo_emmett.training import check_recipe
from tests.models.backbones import model_config
from tests.oomptimizer.test_asr_training import manifest
from tools.nemo_recipe_keys import KEYS, NO_EFFECT, PAGE, REFUSED, WORKS, extract, page, verdict

LISTED = json.loads(KEYS.read_text())


def keys(kind: str, status: str, *sections: str) -> list[str]:
    found = [key for key in LISTED[kind] if verdict(kind, key).status == status]
    return [key for key in found if key.startswith(tuple(f"{section}." for section in sections))]


def section_with(key: str, value: Any, base: dict | None = None) -> dict:
    """A section with the value at the path, which begins with the section's name."""
    cfg = OmegaConf.create(base or {})
    OmegaConf.update(cfg, key.split(".", 1)[1], value, force_add=True)
    return OmegaConf.to_container(cfg)


def test_the_page_holds_every_key_and_is_up_to_date():
    assert PAGE.read_text() == page(LISTED)
    for key in LISTED["speechlm2"]:
        assert f"| `{key}` | {verdict('speechlm2', key).status} |" in PAGE.read_text()


def test_the_list_of_keys_comes_from_recipes(tmp_path):
    conf = tmp_path / "speechlm2" / "conf"
    conf.mkdir(parents=True)
    (conf / "salm.yaml").write_text("model:\n  lr: 1\n  parts: [{a: 1}, {b: 2}]\ntrainer: {}\n")
    asr = tmp_path / "asr" / "conf" / "speech_multitask"
    asr.mkdir(parents=True)
    (asr / "aed.yaml").write_text("name: x\nmodel: {train_ds: {batch_size: 3}, encoder: {d_model: 4}}\n")
    found = extract(tmp_path)
    of_recipe = [key for key, places in found["speechlm2"].items() if places == ["salm"]]
    assert of_recipe == ["model.lr", "model.parts[].a", "model.parts[].b", "trainer"]
    assert found["asr"] == {"model.train_ds.batch_size": ["aed"]}


# The model section.

VALUES: dict[str, Any] = {
    "model.audio_locator_tag": "<|audioplaceholder|>",
    "model.encoder_chunk_size_seconds": 0.3,
    "model.freeze_params": [r"^llm\..+$", r"^perception\.encoder\..+$"],
    "model.incremental_loading": True,
    "model.lora.lora_alpha": 6,
    "model.lora.lora_dropout": 0.25,
    "model.lora.r": 3,
    "model.lora.target_modules": ["q_proj"],
    "model.lora.task_type": "CAUSAL_LM",
    "model.lr_scheduler._target_": "nemo.core.optim.lr_scheduler.CosineAnnealing",
    "model.lr_scheduler.max_steps": 50,
    "model.lr_scheduler.min_lr": 1e-5,
    "model.lr_scheduler.warmup_steps": 5,
    "model.optimizer._target_": "torch.optim.AdamW",
    "model.optimizer.betas": [0.8, 0.9],
    "model.optimizer.foreach": True,
    "model.optimizer.lr": 3e-4,
    "model.optimizer.weight_decay": 0.125,
    "model.perception.modality_adapter._target_": "nemo.collections.speechlm2.modules.perception.IdentityConnector",
    "model.perception.modality_adapter.d_model": 32,
    "model.perception.output_dim": 32,
    "model.perception.spec_augment": {
        "_target_": "nemo.collections.asr.modules.SpectrogramAugmentation",
        "freq_masks": 2,
    },
    "model.perception.target": "nemo.collections.speechlm2.modules.perception.AudioPerceptionModule",
    "model.pretrained_asr": None,  # the fixtures'
    "model.pretrained_llm": None,
    "model.pretrained_weights": True,
    "model.prevent_freeze_params": [r"^llm\.base_model\.model\.model\.norm\..+$"],
    "model.prompt_format": "llama2",
}
"""A value for each key; a model is built of all of them."""

OTHER_ADAPTERS = (
    "encoder_config",
    "input_dim",
    "llm_config",
    "output_dim",
    "prompt_size",
    "qformer",
    "target_layer_ids",
)
CHECKPOINTS = ("model.init_from_checkpoint", "model.pretrained_s2s_model", "model.pretrained_perception_from_s2s")


@pytest.fixture(scope="module")
def built(tiny_asr, tmp_path_factory):
    """A model of all keys, and its optimizer and schedule."""
    section = model_config("llama", tmp_path_factory.mktemp("backbones"), tiny_asr)
    for key, value in VALUES.items():
        if value is not None:
            section = section_with(key, value, section)
    torch.manual_seed(0)
    model = SALMGPT(section)
    optimizers = model.configure_optimizers()
    return model, optimizers["optimizer"], optimizers["lr_scheduler"]["scheduler"]


EFFECTS = {
    "model.audio_locator_tag": lambda m, *_: (
        m.tokenizer.ids_to_tokens([m.audio_locator_id]) == ["<|audioplaceholder|>"]
    ),
    "model.encoder_chunk_size_seconds": lambda m, *_: m.cfg.encoder_chunk_size_seconds == 0.3,
    "model.freeze_params": lambda m, *_: not any(p.requires_grad for p in m.perception.encoder.parameters()),
    "model.incremental_loading": lambda m, *_: m.options.incremental_loading,
    "model.lora.lora_alpha": lambda m, *_: m.llm.peft_config["default"].lora_alpha == 6,
    "model.lora.lora_dropout": lambda m, *_: m.llm.peft_config["default"].lora_dropout == 0.25,
    "model.lora.r": lambda m, *_: {p.shape[0] for n, p in m.named_parameters() if "lora_A" in n} == {3},
    "model.lora.target_modules": lambda m, *_: (
        {name.split(".")[-4] for name, _ in m.named_parameters() if "lora_A" in name} == {"q_proj"}
    ),
    "model.lora.task_type": lambda m, *_: m.llm.peft_config["default"].task_type == "CAUSAL_LM",
    "model.lr_scheduler._target_": lambda _m, _o, s: type(s).__name__ == "CosineAnnealing",
    "model.lr_scheduler.max_steps": lambda _m, _o, s: s.max_steps == 50,
    "model.lr_scheduler.min_lr": lambda _m, _o, s: s.min_lr == 1e-5,
    "model.lr_scheduler.warmup_steps": lambda _m, _o, s: s.warmup_steps == 5,
    "model.optimizer._target_": lambda _, o, __: type(o) is torch.optim.AdamW,
    "model.optimizer.betas": lambda _, o, __: list(o.defaults["betas"]) == [0.8, 0.9],
    "model.optimizer.foreach": lambda _, o, __: o.defaults["foreach"] is True,
    "model.optimizer.lr": lambda _, o, __: o.defaults["lr"] == 3e-4,
    "model.optimizer.weight_decay": lambda _, o, __: o.defaults["weight_decay"] == 0.125,
    "model.perception.modality_adapter._target_": lambda m, *_: (
        type(m.perception.modality_adapter).__name__ == "IdentityConnector"
    ),
    "model.perception.modality_adapter.d_model": lambda m, *_: m.perception.proj.in_features == 32,
    "model.perception.output_dim": lambda m, *_: m.perception.proj.out_features == 32,
    "model.perception.spec_augment": lambda m, *_: m.perception.spec_augmentation is not None,
    "model.perception.target": lambda m, *_: type(m.perception).__name__ == "AudioPerceptionModule",
    "model.pretrained_asr": lambda m, *_: m.cfg.perception.encoder.d_model == 32,
    "model.pretrained_llm": lambda m, *_: m.llm.config.model_type == "llama",
    "model.pretrained_weights": lambda m, *_: m.cfg.pretrained_weights is True,
    "model.prevent_freeze_params": lambda m, *_: all(
        p.requires_grad for n, p in m.named_parameters() if ".norm." in n and n.startswith("llm")
    ),
    "model.prompt_format": lambda m, *_: m.options.prompt_format == "llama2",
}
"""How the value of each key shows in the model."""


def test_every_key_of_the_model_that_works_is_tried():
    of_adapters = {key for key in LISTED["speechlm2"] if any(f"adapter.{name}" in key for name in OTHER_ADAPTERS)}
    assert set(keys("speechlm2", WORKS, "model")) == EFFECTS.keys() | of_adapters | set(CHECKPOINTS)
    assert EFFECTS.keys() == VALUES.keys()


@pytest.mark.parametrize("key", EFFECTS)
def test_a_key_of_the_model_has_its_effect(key, built):
    assert EFFECTS[key](*built)


@pytest.mark.parametrize("model_class", [SALMT5, SALMGPT, BestowGPT])
def test_all_models_take_them_without_a_warning(model_class, caplog):
    section = {"pretrained_llm": "somewhere"}
    for key in keys("speechlm2", WORKS, "model"):
        section = section_with(key, VALUES.get(key) or "x", section)
    caplog.clear()
    options = ModelConfig.from_section(section, model_class.__name__)
    assert not caplog.records
    # Of adapters that are not built here: what NeMo's module gets.
    for key in (key for key in LISTED["speechlm2"] if any(f"adapter.{name}" in key for name in OTHER_ADAPTERS)):
        assert OmegaConf.select(OmegaConf.create({"model": {"perception": options.perception}}), key) == "x"


@pytest.mark.parametrize("key", [*keys("speechlm2", REFUSED, "model"), *(f"model.{key}" for key in NEMO_KEYS)])
def test_a_key_of_another_model_of_nemos_is_refused(key):
    section = section_with(key, True, {"pretrained_llm": "somewhere"})
    name = ".".join(key.split(".")[:2])
    with pytest.raises(ConfigError, match=rf"^{name}[.:]") as refused:
        ModelConfig.from_section(section, "SALMGPT")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("value", [None, False, 0, 0.0, [], {}, {"enabled": False, "mode": "brief"}])
@pytest.mark.parametrize("key", ["use_nemo_automodel", "moe_metrics"])
def test_a_value_that_asks_for_nothing_is_accepted(key, value, caplog):
    ModelConfig.from_section({"pretrained_llm": "somewhere", key: value}, "SALMGPT")
    assert not caplog.records


def test_a_folder_with_keys_of_nemos_is_loaded_with_a_warning(caplog):
    section = {"pretrained_llm": "somewhere", "packed_sequences": True}
    ModelConfig.from_section(section, "SALMGPT", for_loading=True)
    assert "model.packed_sequences" in caplog.text


# Trainer and experiment manager.


def recipe(**sections: Any) -> Any:
    return OmegaConf.create({"model": {"_target_": "salm_gpt"}, "trainer": {}, "data": {}, **sections})


@pytest.mark.parametrize("key", keys("speechlm2", WORKS, "trainer", "exp_manager"))
def test_a_key_of_trainer_or_experiment_manager_is_accepted(key):
    section = key.split(".")[0]
    of_every_type = (1, True, False, "min", "00:01:00:00", "s3://bucket/name")

    def is_accepted(value: Any) -> bool:
        with suppress(ConfigError):
            check_recipe(recipe(**{"trainer": {"enable_checkpointing": False}, section: section_with(key, value)}))
            return True
        return False

    assert any(map(is_accepted, of_every_type))


@pytest.mark.parametrize(
    ("strategy", "values"),
    [
        ("DDPStrategy", {"gradient_as_bucket_view": True, "find_unused_parameters": True}),
        ("ModelParallelStrategy", {"data_parallel_size": 1, "tensor_parallel_size": 1}),
    ],
)
def test_keys_of_a_strategy_reach_it(strategy, values):
    target = {"_target_": f"lightning.pytorch.strategies.{strategy}"}
    made = resolve_trainer_cfg(OmegaConf.create({"strategy": target | values}))["strategy"]
    held = vars(made) | getattr(made, "_ddp_kwargs", {})
    for key, value in values.items():
        assert held.get(key, held.get(f"_{key}")) == value
    of_strategies = {key.split(".")[2] for key in keys("speechlm2", WORKS, "trainer.strategy")}
    assert set(values) < of_strategies


@pytest.mark.parametrize("key", keys("speechlm2", REFUSED, "trainer"))
def test_automodels_strategy_is_refused_with_its_keys(key):
    strategy = {"_target_": "nemo.collections.speechlm2.parts.parallel.AutomodelParallelStrategy"}
    trainer = section_with(key, 1, {"strategy": strategy})
    with pytest.raises(ConfigError, match=r"^trainer\.strategy\._target_: Automodel") as refused:
        check_recipe(recipe(trainer=trainer))
    assert key.rsplit(".", 1)[1] in str(refused.value)


def test_trainer_keys_are_lightnings():
    assert {key.split(".")[1] for key in keys("speechlm2", WORKS, "trainer")} <= set(
        Trainer.__init__.__wrapped__.__code__.co_varnames
    )


# Datasets.


@pytest.fixture(scope="module")
def speech(tmp_path_factory) -> Path:
    return manifest(tmp_path_factory.mktemp("speech"))


SAMPLES = {
    "batch_duration": 30.0,
    "batch_tokens": 100,
    "bucket_duration_bins": [10, 20],
    "max_duration": 20.0,
    "max_tokens": 512,
    "min_duration": 0.1,
    "prompt_format": "llama2",
    "quadratic_duration": 15.0,
    "token_equivalent_duration": 0.08,
    "use_bucketing": True,
}
NAMES_OF_FILES = ("manifest_filepath", "tarred_audio_filepaths", "cuts_path")


def of_datasets(status: str) -> list[str]:
    """The keys that stand in datasets themselves."""
    found = {key.split(".", 2)[2] for key in keys("speechlm2", status, "data.train_ds")}
    found |= {key.split(".", 2)[2] for key in keys("asr", status, "model")}
    return sorted(key for key in found if not key.startswith("input_cfg"))


class Cuts(torch.utils.data.Dataset):
    def __getitem__(self, cuts):
        return cuts


def load(speech: Path, **settings: Any):
    config = {"manifest_filepath": str(speech), "batch_size": 2, "use_emmett": True, "num_workers": 0, **settings}
    return get_multimodal_dataloader(OmegaConf.create(config), 0, 1, Cuts(), None)


@pytest.mark.parametrize("key", of_datasets(WORKS))
def test_a_key_of_a_dataset_is_passed_on(key, speech, caplog):
    if key in NAMES_OF_FILES or key == "use_lhotse":
        return  # other tests read files by them
    default = sampler_config(parse_dataset({"manifest_filepath": str(speech)}, "train_ds").groups[0])[key]
    value = SAMPLES.get(key, default)
    settings = {"manifest_filepath": str(speech), "target_lang": "de", "batch_size": 2, "use_multimodal_sampling": True}
    settings[key] = value
    check_data_config(settings)
    assert key not in caplog.text
    assert key in LOADER_KEYS - CLASSIC_KEYS
    assert sampler_config(parse_dataset(settings, "train_ds").groups[0])[key] == value


@pytest.mark.parametrize("key", of_datasets(NO_EFFECT))
@pytest.mark.parametrize("sampling", ["nemo", "emmett"])
def test_a_key_without_effect_is_told(key, sampling, speech, caplog):
    with caplog.at_level(logging.WARNING):
        load(speech, sampling=sampling, **{key: 4})
    assert f"ignored by Lhotse dataloader: {key}" in caplog.text


def test_above_groups_as_well(speech, caplog):
    group = {"manifest_filepath": str(speech), "batch_size": 2}
    config = OmegaConf.create({"multi_config": True, "use_emmett": True, "shuffle_n": 4, "a": group, "seed": 0})
    get_multimodal_dataloader(config, 0, 1, Cuts(), None)
    assert "these keys are ignored: shuffle_n" in caplog.text


@pytest.mark.parametrize("key", ["audio_locator_tag", "cuts_path", "tags", "type"])
def test_a_key_of_a_source_is_known(key, speech, caplog):
    listed = {key.split("input_cfg[].")[1].split(".")[0] for key in LISTED["speechlm2"] if "input_cfg[]." in key}
    assert listed == {"audio_locator_tag", "cuts_path", "tags", "type"}
    source = {"type": "lhotse_as_conversation", "manifest_filepath": str(speech), "audio_locator_tag": "<|audio|>"}
    source |= {"tags": {"context": "Repeat", "system_prompt": "Be kind"}, "target_lang": "de"}
    check_data_config({"input_cfg": [source], "batch_size": 2})
    assert "have no meaning" not in caplog.text
