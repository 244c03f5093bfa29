"""The section ``model.objectives``: schedules of weights, and what is refused."""

from __future__ import annotations

import pytest
import torch

from nemo_emmett.errors import ConfigError, DataError
from nemo_emmett.models import SALMT5
from nemo_emmett.models.config import ModelConfig
from nemo_emmett.objectives.registry import OBJECTIVES, parse_objectives
from nemo_emmett.objectives.transcription import Transcription

from ..models.memorising import built
from .transcribed import speech_part, text_part


def config(**keys) -> ModelConfig:
    return ModelConfig.from_section({"pretrained_llm": "t5", "perception": {}} | keys, "SALMT5")


def test_a_schedule_by_hand():
    objective = Transcription(weight=0.8, start_step=10, warmup_steps=3, end_step=20)
    assert [objective.weight_at(step) for step in (0, 9, 10, 11, 12, 13, 19, 20, 1000)] == pytest.approx(
        [0, 0, 0.2, 0.4, 0.6, 0.8, 0.8, 0, 0]
    )
    assert objective.has_schedule
    constant = Transcription(weight=0.8)
    assert [constant.weight_at(step) for step in (0, 10**6)] == [0.8, 0.8]
    assert not constant.has_schedule


def test_objectives_come_in_one_order_and_those_without_a_weight_are_left_out():
    section = {"transcription": {"weight": "0.5"}, "distillation": {}, "retention": None}
    assert [objective.name for objective in parse_objectives(section)] == ["distillation", "transcription"]
    assert parse_objectives(section)[1].weight == 0.5
    kept = config(objectives=section | {"distillation": {"weight": 0}}).training_objectives()
    assert [objective.name for objective in kept] == ["transcription"]
    assert config().training_objectives() == ()
    assert config(objectives=None).training_objectives() == ()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"distilation": {}}, "model.objectives.distilation: there is no such key; did you mean 'distillation'?"),
        ({"adversarial": {}}, "model.objectives.adversarial: there is no such objective; use distillation, retention"),
        (
            {"retention": {"wieght": 1}},
            "model.objectives.retention.wieght: there is no such key; did you mean 'weight'",
        ),
        (
            {"retention": {"labels": 1}},
            "model.objectives.retention.labels: there is no such key; use weight, start_step",
        ),
        ({"transcription": {"teacher": "start"}}, "model.objectives.transcription.teacher: there is no such key; use"),
        ({"retention": {"weight": -1}}, "model.objectives.retention.weight: -1 cannot be used; give a number from 0"),
        ({"retention": {"weight": True}}, "model.objectives.retention.weight: True cannot be used"),
        ({"retention": {"start_step": 0.5}}, "model.objectives.retention.start_step: 0.5 cannot be used"),
        ({"retention": {"warmup_steps": -1}}, "model.objectives.retention.warmup_steps: -1 cannot be used"),
        ({"retention": {"end_step": 0}}, "model.objectives.retention.end_step: 0 cannot be used"),
        (
            {"retention": {"start_step": 5, "end_step": 5}},
            "model.objectives.retention.end_step: 5 is not after start_st",
        ),
        ({"distillation": {"temperature": 0}}, "model.objectives.distillation.temperature: 0 cannot be used"),
        ({"distillation": {"teacher": ""}}, "model.objectives.distillation.teacher: '' cannot be used"),
        ({"distillation": 1}, "model.objectives.distillation: 1 cannot be used; give a mapping"),
        ({"distillation": {}} | {"retention": [1]}, "model.objectives.retention: [1] cannot be used; give a mapping"),
        ([], "model.objectives: [] cannot be used; give a mapping"),
    ],
)
def test_mistakes_are_told_in_a_sentence(section, message):
    with pytest.raises(ConfigError) as error:
        config(objectives=section)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("name", [name for name, kind in OBJECTIVES.items() if kind.modality == "audio"])
def test_objectives_of_speech_need_a_speech_encoder(name):
    with pytest.raises(ConfigError, match=rf"^model\.objectives\.{name}: needs speech, but this model reads text only"):
        config(objectives={name: {}}, perception=None)


@pytest.mark.parametrize("implementation", ["liger", "cut_cross_entropy"])
def test_kernels_that_cannot_weight_rows_are_refused(implementation):
    with pytest.raises(
        ConfigError,
        match=rf"^model\.loss_implementation: {implementation} does not compute model\.objectives\.retention",
    ):
        config(objectives={"retention": {}}, loss_implementation=implementation)


def test_a_model_that_is_loaded_has_none(folder, tiny_asr, tmp_path):
    """Not even if its config names some that do not exist: they are no part of the model."""
    section = {"pretrained_llm": "t5", "objectives": {"of_a_later_version": {"weight": 1}}}
    assert ModelConfig.from_section(section, "SALMT5", for_loading=True).training_objectives() == ()


@pytest.mark.parametrize(("name", "key"), [("distillation", "text_context_ids"), ("transcription", "is_transcription")])
def test_a_batch_without_transcripts_is_refused(name, key, folder, tiny_asr):
    model = built(SALMT5, "t5", folder, tiny_asr, objectives={name: {}})
    assert model.data_defaults["transcripts"] is True
    part = speech_part(model)
    del part[key]
    with pytest.raises(
        DataError, match=rf"^model\.objectives\.{name}: a batch of audio has no `{key}`; set data\.train_d"
    ):
        model.training_step({"audio": part}, 0)
    model.training_step({"text": text_part(model)}, 0)
    assert "transcripts" not in built(SALMT5, "t5", folder, tiny_asr, objectives={"retention": {}}).data_defaults


def test_the_log_has_a_term_where_its_modality_comes_and_its_weight_where_it_changes(folder, tiny_asr):
    objectives = {"transcription": {"weight": 0.5}, "retention": {"weight": 0.3, "warmup_steps": 2}}
    model = built(SALMT5, "t5", folder, tiny_asr, objectives=objectives)
    logged = {}
    model.log = lambda name, value, **_: logged.update({name: float(value)})
    model.training_step({"text": text_part(model)}, 0)
    assert "loss_transcription" not in logged
    assert logged["weight_retention"] == pytest.approx(0.1)
    assert "weight_transcription" not in logged
    logged.clear()
    speech = speech_part(model)
    model.training_step({"audio": speech}, 1)
    assert "loss_retention" not in logged
    assert logged["tokens_audio"] == speech["answer_lens"].sum(), "all of them, whichever term they count in"
    before = logged["loss_transcription"]
    speech["is_transcription"] = torch.zeros_like(speech["is_transcription"])
    model.training_step({"audio": speech}, 2)
    assert logged["loss_transcription"] == before, "the last one, where there is none"
