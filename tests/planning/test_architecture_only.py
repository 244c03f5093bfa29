"""The same architecture without its weights."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from nemo_emmett.errors import ModelError
from nemo_emmett.models import SALMT5
from nemo_emmett.oomptimizer.fingerprint import config_hash
from nemo_emmett.planning.architecture import architecture_only


def shapes(model) -> dict:
    return {name: (tuple(p.shape), p.dtype, p.requires_grad) for name, p in model.named_parameters()}


def test_it_has_the_shapes_of_the_pretrained_model(salm_t5_config) -> None:
    section = architecture_only(OmegaConf.create(salm_t5_config))
    assert section["pretrained_weights"] is False
    real, random = SALMT5(salm_t5_config), SALMT5(section)
    assert shapes(random) == shapes(real)
    assert random.token_equivalent_duration == real.token_equivalent_duration
    assert config_hash(random.cfg) == config_hash(real.cfg)  # a plan's profile is taken by the training
    different = [n for n, p in real.named_parameters() if p.ndim > 1 and not p.equal(random.get_parameter(n))]
    assert different


def test_the_weights_are_not_read(salm_t5_config, monkeypatch) -> None:
    def refuse(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr("torch.load", refuse)
    monkeypatch.setattr("safetensors.torch.load_file", refuse)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", refuse)
    SALMT5(architecture_only(salm_t5_config))


def test_the_recipes_own_keys_of_the_encoder_win(salm_t5_config) -> None:
    perception = salm_t5_config["perception"] | {"encoder": {"n_layers": 3, "dropout": None}}
    section = architecture_only(salm_t5_config | {"perception": perception})
    assert section["perception"]["encoder"]["n_layers"] == 3
    assert section["perception"]["encoder"]["dropout"] == 0.1
    assert "n_layers" not in salm_t5_config["perception"].get("encoder", {})


def test_a_model_that_reads_text_only_needs_no_encoder(salm_t5_config) -> None:
    section = architecture_only({**salm_t5_config, "perception": None, "pretrained_asr": None})
    assert section["perception"] is None


@pytest.mark.parametrize("key", ["pretrained_asr", "pretrained_llm"])
def test_a_part_that_is_not_there_is_reported(salm_t5_config, tmp_path, key: str) -> None:
    gone = str(tmp_path / "gone.nemo")
    with pytest.raises(
        ModelError, match=rf"model\.{key}: the config of '.*gone\.nemo' cannot be read \(.*\); give"
    ) as error:
        architecture_only(salm_t5_config | {key: gone})
    assert "\n" not in str(error.value)
