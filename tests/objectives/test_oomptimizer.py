"""OOMptimizer measures and plans steps with all objectives, and a plan is one for a set of objectives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nemo_emmett.callbacks import OOMptimizer
from nemo_emmett.models import SALMGPT, SALMT5
from nemo_emmett.oomptimizer.adapters import SpeechTextAdapter, adapter_for
from nemo_emmett.oomptimizer.buckets import Shape
from nemo_emmett.oomptimizer.fingerprint import config_hash
from nemo_emmett.oomptimizer.meter import TensorMeter
from nemo_emmett.oomptimizer.profile import Profile
from nemo_emmett.oomptimizer.snapshot import without_side_effects
from nemo_emmett.oomptimizer.steps import TrainingSteps
from nemo_emmett.planning.architecture import architecture_only
from nemo_emmett.planning.fake_training import fake_training

from ..models.backbones import model_config
from ..models.memorising import built
from ..oomptimizer.adapters.steps import CPU, assert_same, fake, peak_of_step, whole_and_pieces
from ..oomptimizer.fits import AtFitStart, Data, trainer_with

SPEECH = Shape("audio", seconds=1.6, input_tokens=0, output_tokens=6)
TEXT = Shape("text", seconds=0.0, input_tokens=9, output_tokens=4)
LATER = {name: {"start_step": 1000} for name in ("distillation", "retention", "consistency", "transcription")}
MODELS = {"SALMT5": (SALMT5, "t5"), "SALMGPT": (SALMGPT, "llama")}


def measured(case: str, folder: Path, asr: Path, **options) -> SpeechTextAdapter:
    """The adapter of a model whose objectives are all active."""
    model = built(*MODELS[case], folder, asr, **options)
    model.all_objectives_active = True
    return adapter_for(model)


def test_a_synthetic_transcript_is_as_long_as_the_answer(folder, tiny_asr):
    adapter = measured("SALMT5", folder, tiny_asr, objectives=LATER)
    batch = adapter.synthetic_batch(SPEECH, 3, CPU)["audio"]
    assert batch["transcript_ids"].shape == (3, 6)
    assert batch["transcript_lens"].tolist() == batch["answer_lens"].tolist() == [6, 6, 6]
    prompts = batch["context_lens"] - 1  # without the locator
    assert batch["text_context_lens"].tolist() == (prompts + 6).tolist()
    locator, pad_id = adapter.model.audio_locator_id, adapter.model.pad_id
    for name in ("transcript", "text_context"):
        ids, lens = batch[f"{name}_ids"], batch[f"{name}_lens"]
        assert not (ids == locator).any()
        assert ((ids != pad_id).sum(1) == lens).all()
    assert batch["is_transcription"].dtype == torch.bool
    plain = measured("SALMT5", folder, tiny_asr)
    assert not [key for key in plain.synthetic_batch(SPEECH, 3, CPU)["audio"] if "trans" in key]


@pytest.mark.parametrize("case", MODELS)
def test_pieces_weigh_what_they_weigh_in_the_whole(case, folder, tiny_asr):
    adapter = measured(case, folder, tiny_asr, objectives=LATER)
    batch = adapter.join([adapter.synthetic_batch(SPEECH, 3, CPU), adapter.synthetic_batch(TEXT, 4, CPU)])
    batch["audio"]["text_context_lens"][1] = 0
    expected, found, made = whole_and_pieces(adapter, batch, 6)
    assert made == 6
    assert_same(expected, found)


@pytest.mark.parametrize("case", MODELS)
def test_fake_tensors_take_as_many_bytes_as_real_ones(case, folder, tiny_asr):
    adapter = measured(case, folder, tiny_asr, objectives=LATER)

    def batch() -> dict:
        return adapter.join([adapter.synthetic_batch(SPEECH, 3, CPU), adapter.synthetic_batch(TEXT, 3, CPU)])

    real = peak_of_step(adapter, batch())
    with fake(adapter):
        assert peak_of_step(adapter, batch()) == real


def test_a_probe_computes_objectives_that_begin_later(folder, tiny_asr, tmp_path):
    model = built(SALMGPT, "llama", folder, tiny_asr, objectives=LATER)
    del model.log
    seen = []

    def at_start(trainer, module) -> None:
        seen.append(module.active_objectives())
        with without_side_effects(trainer, module):
            seen.append(tuple(objective.name for objective in module.active_objectives()))
        seen.append(module.active_objectives())

    trainer_with(tmp_path, AtFitStart(at_start)).fit(model, datamodule=Data({}))
    assert seen == [(), tuple(LATER), ()]


def test_a_teacher_takes_its_memory_in_every_step(folder, tiny_asr, tmp_path):
    resident = {}
    for objectives in ({}, {"distillation": {"start_step": 1000}}):
        model = built(SALMGPT, "llama", folder, tiny_asr, objectives=objectives)

        def at_start(trainer, module) -> None:
            with TrainingSteps(trainer, module, TensorMeter(CPU)) as steps:
                reading = steps.warm_up(adapter_for(module).synthetic_batch(TEXT, 1, CPU))
            resident[len(module.objectives)] = reading.resident

        del model.log
        trainer_with(tmp_path, AtFitStart(at_start)).fit(model, datamodule=Data({}))
    copied = sum(tensor.nbytes for tensor in (*model.teachers.parameters(), *model.teachers.buffers()))
    assert copied > 100_000
    assert resident[1] - resident[0] == pytest.approx(copied, rel=1e-3)


def test_a_plan_gives_the_batch_sizes_that_calibration_gives(folder, tiny_asr, tmp_path):
    """Also where the objectives begin after the training's last step."""
    found = {}
    for mode in ("plan", "calibrate"):
        model = built(SALMGPT, "llama", folder, tiny_asr, objectives=LATER)
        del model.log
        path = tmp_path / f"{mode}.yaml"
        callback = OOMptimizer(mode=mode, profile=path, memory_budget="16MiB", guard=False)
        trainer_with(tmp_path, callback).fit(model, datamodule=Data({"bucket_duration_bins": [[2, 10]]}))
        found[mode] = Profile.read(path).groups[""].bucket_batch_size
        assert not model.all_objectives_active
    assert found["plan"] == found["calibrate"]


@pytest.mark.parametrize("teacher", ["start", "other", "export"])
def test_a_plan_builds_the_teacher_without_its_weights(teacher, folder, tiny_asr, tmp_path, monkeypatch):
    """The same parameters, by name, shape and type."""
    if teacher == "export":
        built(SALMGPT, "llama", folder, tiny_asr).save_pretrained(tmp_path / "export")
    name = {"start": "start", "other": model_config("llama", folder)["pretrained_llm"]}.get(
        teacher, str(tmp_path / "export")
    )
    section = model_config("llama", folder, tiny_asr, objectives={"distillation": {"teacher": name}})

    def described(model) -> list:
        return [(n, tuple(p.shape), p.dtype, p.requires_grad) for n, p in model.named_parameters()]

    real = SALMGPT(section)
    expected, hashed = described(real), config_hash(real.cfg)
    assert [n for n, *_ in expected if n.startswith("teachers.")]

    def refuse(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr("torch.load", refuse)
    monkeypatch.setattr("safetensors.torch.load_file", refuse)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", refuse)
    monkeypatch.setattr(SALMGPT, "from_pretrained", refuse)
    with fake_training():
        planned = SALMGPT(architecture_only(section))
        assert described(planned) == expected
        assert config_hash(planned.cfg) == hashed


def test_a_profile_is_one_for_a_set_of_objectives():
    """Their weights and schedules change no memory; a weight of 0 does."""

    def hashed(**objectives) -> str:
        return config_hash({"pretrained_llm": "t5", "objectives": objectives})

    plain = config_hash({"pretrained_llm": "t5"})
    assert hashed() == plain
    assert hashed(retention=None, distillation={"weight": 0}) == plain
    one = hashed(distillation={})
    assert one != plain
    assert hashed(distillation={"weight": 0.5, "start_step": 7, "warmup_steps": 3, "temperature": 2.0}) == one
    assert hashed(distillation={"teacher": "/a/large"}) != one
    assert hashed(distillation={"teacher": "/a/large"}) == hashed(distillation={"teacher": "/b/large"})
    assert len({one, hashed(retention={}), hashed(transcription={}), hashed(distillation={}, retention={})}) == 4
