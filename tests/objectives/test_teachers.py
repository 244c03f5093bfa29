"""Teachers: what they are, that they stay it, and that nothing of the model holds them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from nemo_emmett.errors import ConfigError, ModelError
from nemo_emmett.models import SALMGPT, SALMT5, load
from nemo_emmett.models.base import SpeechTextModel

from ..models.backbones import DECODER_ONLY, backbone
from ..models.memorising import built
from .transcribed import as_text, divergences, loss_of, shaken, speech_part, taught, text_part

MODELS = {"SALMT5": (SALMT5, "t5"), "SALMGPT": (SALMGPT, "qwen2")}
LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
BOTH = {"distillation": {"weight": 0.5}, "retention": {"weight": 0.5}}
SGD = {"optimizer": {"_target_": "torch.optim.SGD", "lr": 0.05}}


def whole_batch(model: SpeechTextModel) -> dict:
    return {"audio": speech_part(model), "text": text_part(model)}


def weights_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def trained(model: SpeechTextModel, steps: int = 3) -> list[float]:
    """The losses of some steps of plain gradient descent."""
    learning = [p for group in model.configure_optimizers()["optimizer"].param_groups for p in group["params"]]
    batch, losses = whole_batch(model), []
    for step in range(steps):
        model.zero_grad()
        loss = loss_of(model.training_step(batch, step))
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for parameter in learning:
                if parameter.grad is not None:
                    parameter -= 0.05 * parameter.grad
    return losses


def only_divergence(model: SpeechTextModel, name: str) -> float:
    """The mean divergence that a step logs."""
    logged = {}
    model.log = lambda name, value, **_: logged.update({name: float(value)})
    model.training_step(whole_batch(model), 0)
    return logged[f"loss_{name}"]


def expected_divergence(model: SpeechTextModel, teacher: SpeechTextModel) -> float:
    """That of distillation, from all logits."""
    part = speech_part(model)
    kept = {k: v[taught(part)] for k, v in part.items() if isinstance(v, torch.Tensor)}
    with torch.no_grad():
        return (divergences(model, kept, teacher, as_text(part), 1.0) / kept["answer_lens"].sum()).item()


# A copy.


@pytest.mark.parametrize("case", MODELS)
def test_a_copy_is_neither_trained_nor_part_of_any_state(case, folder, tiny_asr, tmp_path):
    """And the export is that of a model without objectives."""
    kind, name = MODELS[case]
    model = built(kind, name, folder, tiny_asr, objectives=BOTH, **SGD)
    plain = built(kind, name, folder, tiny_asr, **SGD)
    (teacher,) = model.teachers.language_models()
    before, start = weights_of(teacher), weights_of(model.llm)
    assert len(list(teacher.parameters())) == len(list(plain.llm.parameters())) + hasattr(plain, "embed_tokens") - (
        name == "qwen2"  # the output layer is the embeddings
    )
    model.train()
    losses = trained(model)
    assert losses[-1] < losses[0]
    assert not any(part.training for part in teacher.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in teacher.parameters())
    for parameter_name, value in weights_of(teacher).items():
        assert torch.equal(value, before[parameter_name]), parameter_name
    assert any(not torch.equal(value, start[n]) for n, value in weights_of(model.llm).items())

    assert model.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(model.state_dict())
    model.load_state_dict(plain.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.* in state_dict"):
        model.load_state_dict({n: v for n, v in plain.state_dict().items() if not n.startswith("perception.encoder")})
    optimizer = model.configure_optimizers()["optimizer"]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not held & {id(p) for p in teacher.parameters()}

    model.save_pretrained(tmp_path / "export")
    exported = load(tmp_path / "export")
    assert not list(exported.teachers.parameters())
    assert exported.data_defaults.keys() == plain.data_defaults.keys()
    for n, value in exported.state_dict().items():
        assert torch.equal(value, model.state_dict()[n]), n


def test_objectives_of_the_same_teacher_share_one_copy_and_a_frozen_language_model_needs_none(folder, tiny_asr):
    both = built(SALMGPT, "qwen2", folder, tiny_asr, objectives=BOTH)
    assert len(both.teachers.language_models()) == 1
    frozen = {"freeze": ["llm"], "objectives": {"distillation": {}}}
    model, plain = (built(SALMGPT, "qwen2", folder, tiny_asr, **keys) for keys in (frozen, {}))
    assert model.teachers.language_models() == []
    with torch.no_grad():
        for parameter in model.perception.modality_adapter.parameters():
            parameter.add_(0.1)
    assert only_divergence(model, "distillation") == pytest.approx(expected_divergence(model, plain), rel=1e-4)
    off = built(SALMGPT, "qwen2", folder, tiny_asr, objectives={"distillation": {"weight": 0}})
    assert off.teachers.language_models() == []


@pytest.mark.parametrize("teacher", ["start", "without_lora"])
def test_dropout_is_the_students_alone(teacher, salm_t5_config):
    """Two steps in training mode differ by the student's dropout; the teacher's answers do not."""
    lora = {"r": 2, "lora_alpha": 4, "target_modules": ["q", "v"]}
    model = SALMT5(salm_t5_config | {"lora": lora, "objectives": {"distillation": {"teacher": teacher}}})
    model.log = lambda *_, **__: None
    model.train()
    part = speech_part(model)
    distillation = model.objectives[0]
    first, second = (model.teachers.answers(model, distillation, part) for _ in range(2))
    assert torch.equal(first.states_NX, second.states_NX)
    assert all(p.training for p in model.llm.modules())
    losses = [loss_of(model.training_step({"audio": part}, 0)).item() for _ in range(2)]
    assert losses[0] != losses[1]


def test_weights_that_a_training_starts_from_are_the_teachers(folder, tiny_asr, tmp_path):
    first = shaken(built(SALMGPT, "qwen2", folder, tiny_asr))
    first.save_pretrained(tmp_path / "first")
    model = built(SALMGPT, "qwen2", folder, tiny_asr, init_from_checkpoint=str(tmp_path / "first"), objectives=BOTH)
    (teacher,) = model.teachers.language_models()
    assert torch.equal(teacher.embed_tokens.weight, first.embed_tokens.weight)
    assert teacher.llm.lm_head.weight is teacher.embed_tokens.weight


# Without LoRA.


def test_without_lora_is_the_model_before_it_and_changes_nothing(folder, tiny_asr):
    options = {"lora": LORA, "objectives": {"distillation": {}, "retention": {"teacher": "without_lora"}}}
    model = built(SALMGPT, "llama", folder, tiny_asr, **options)
    assert model.teachers.language_models() == [], "by default, with model.lora"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.3)
    model.configure_optimizers()
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    plain = built(SALMGPT, "llama", folder, tiny_asr)
    plain.perception.load_state_dict(model.perception.state_dict())
    found = only_divergence(model, "distillation")
    assert found == pytest.approx(expected_divergence(model, plain), rel=1e-4)
    assert found > 0.01
    assert {name for name, p in model.named_parameters() if p.requires_grad} == learning
    with_lora = SpeechTextModel.forward(model, text_part(model))[0]
    assert not torch.allclose(with_lora, SpeechTextModel.forward(plain, text_part(plain))[0]), "they are on again"


def test_lora_in_the_output_layer_is_computed_by_logits(folder, tiny_asr):
    options = {"lora": LORA | {"target_modules": ["q_proj", "lm_head"]}, "objectives": {"distillation": {}}}
    model, plain = built(SALMGPT, "llama", folder, tiny_asr, **options), built(SALMGPT, "llama", folder, tiny_asr)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.3)
    plain.perception.load_state_dict(model.perception.state_dict())
    assert only_divergence(model, "distillation") == pytest.approx(expected_divergence(model, plain), rel=1e-4)


# A folder.


def other_backbone(name: str, folder: Path) -> Path:
    """The same tokenizer and architecture with other weights."""
    folder.mkdir()
    torch.manual_seed(7)
    return DECODER_ONLY[name](folder)


def test_a_folder_of_hugging_face_or_of_an_exported_model_is_the_teacher(folder, tiny_asr, tmp_path):
    other = other_backbone("qwen2", tmp_path / "other")
    expected = built(SALMGPT, "qwen2", folder, tiny_asr, pretrained_llm=str(other))
    expected.save_pretrained(tmp_path / "export")
    plain = built(SALMGPT, "qwen2", folder, tiny_asr)
    for path in (other, tmp_path / "export"):
        objectives = {"distillation": {"teacher": str(path)}}
        model = built(SALMGPT, "qwen2", folder, tiny_asr, objectives=objectives)
        for name, value in plain.state_dict().items():
            assert torch.equal(value, model.state_dict()[name]), "the model does not depend on its teacher"
        found = only_divergence(model, "distillation")
        assert found == pytest.approx(expected_divergence(model, expected), rel=1e-4)
        assert found > 0.1


@pytest.mark.parametrize(
    ("teacher", "options", "error", "message"),
    [
        ("nowhere", {}, ModelError, "'nowhere' is no folder; give start, without_lora, the folder of"),
        ("without_lora", {}, ConfigError, "without_lora needs LoRA; give the model model.lora, or write start"),
        (
            "without_lora",
            {"lora": LORA, "prevent_freeze_params": [r"^llm\..+\.model\.norm\.weight$"]},
            ConfigError,
            "without_lora is no fixed teacher, since 'llm.base_model.model.model.norm.weight' of the language",
        ),
        (
            "without_lora",
            {"lora": LORA | {"init_lora_weights": "pissa"}},
            ConfigError,
            "without_lora is not the language model that was given, whose weights model.lora.init_lora_weights: pissa",
        ),
        ("LLAMA", {}, ModelError, "has another tokenizer than this model"),
        ("T5", {}, ModelError, "has another tokenizer than this model"),
        ("EMPTY", {}, ModelError, "has no config.json that can be read"),
    ],
)
def test_what_is_no_teacher_is_told_in_a_sentence(teacher, options, error, message, folder, tiny_asr, tmp_path):
    paths = {
        "LLAMA": lambda: backbone("llama", folder),
        "T5": lambda: backbone("t5", folder),
        "EMPTY": lambda: tmp_path,
    }
    name = str(paths[teacher]()) if teacher in paths else teacher
    with pytest.raises(error, match=r"^model\.objectives\.distillation\.teacher: ") as raised:
        built(SALMGPT, "qwen2", folder, tiny_asr, objectives={"distillation": {"teacher": name}}, **options)
    assert message in str(raised.value)
    assert str(raised.value).count("\n") == 0


def test_an_export_of_another_class_and_a_frozen_language_model_are_refused(folder, tiny_asr, tmp_path):
    from nemo_emmett.models import BestowGPT

    built(BestowGPT, "qwen2", folder, tiny_asr).save_pretrained(tmp_path / "bestow")
    objectives = {"retention": {"teacher": str(tmp_path / "bestow")}}
    with pytest.raises(
        ModelError, match=r"is a nemo_emmett\.models\.bestow_gpt\.BestowGPT, but this model is a SALMGPT"
    ):
        built(SALMGPT, "qwen2", folder, tiny_asr, objectives=objectives)
    with pytest.raises(ConfigError, match=r"model\.objectives\.retention: the language model is frozen, so it forgets"):
        built(SALMGPT, "qwen2", folder, tiny_asr, objectives={"retention": {}}, freeze=["llm"])


# Trainings.


class Endless:
    """Batches without a length, as a training loader has them."""

    def __init__(self, batches: list[dict]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[dict]:
        return iter(self.batches)


def fit(model: SpeechTextModel, first: int, steps: int, tmp_path: Path, checkpoint: Path | None = None) -> Trainer:
    """Steps ``first`` to ``steps`` of a training on alternating batches."""
    del model.log
    parts = whole_batch(model)
    batches = [parts, {"audio": parts["audio"]}, {"text": parts["text"]}] * 2
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(accelerator="cpu", devices=1, max_steps=steps, default_root_dir=tmp_path, **quiet)
    trainer.fit(model, Endless(batches[first:]), ckpt_path=checkpoint)
    return trainer


SCHEDULED = {
    "distillation": {"weight": 0.5, "start_step": 1, "warmup_steps": 3},
    "retention": {"weight": 0.5, "end_step": 4},
    "transcription": {"weight": 0.3, "end_step": 2},
}


def test_a_resumed_training_ends_where_an_uninterrupted_one_does(folder, tiny_asr, tmp_path):
    """Schedules go on, and the teacher is the model before the first step."""
    whole = built(SALMGPT, "qwen2", folder, tiny_asr, objectives=SCHEDULED, **SGD)
    fit(whole, 0, 6, tmp_path)
    interrupted = built(SALMGPT, "qwen2", folder, tiny_asr, objectives=SCHEDULED, **SGD)
    fit(interrupted, 0, 3, tmp_path).save_checkpoint(tmp_path / "three.ckpt")
    held = torch.load(tmp_path / "three.ckpt", weights_only=False)
    assert not [name for name in held["state_dict"] if "teacher" in name]
    resumed = built(SALMGPT, "qwen2", folder, tiny_asr, objectives=SCHEDULED, **SGD)
    fit(resumed, 3, 6, tmp_path, tmp_path / "three.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert any(not torch.equal(interrupted.state_dict()[n], v) for n, v in whole.state_dict().items())


def test_a_weight_of_nothing_is_the_absence_of_the_objective_bit_for_bit(folder, tiny_asr, tmp_path):
    """Also where it begins after the last step."""
    plain = built(SALMGPT, "qwen2", folder, tiny_asr, **SGD)
    fit(plain, 0, 4, tmp_path)
    for keys in ({"weight": 0}, {"weight": 1.0, "start_step": 4}):
        objectives = dict.fromkeys(("distillation", "retention", "transcription"), keys)
        other = built(SALMGPT, "qwen2", folder, tiny_asr, objectives=objectives, **SGD)
        fit(other, 0, 4, tmp_path)
        for name, value in plain.state_dict().items():
            assert torch.equal(other.state_dict()[name], value), name
    begun = built(SALMGPT, "qwen2", folder, tiny_asr, objectives={"retention": {"start_step": 3}}, **SGD)
    fit(begun, 0, 4, tmp_path)
    assert not all(torch.equal(begun.state_dict()[name], value) for name, value in plain.state_dict().items())
