"""The loss of a step with objectives is that of its definition, from all logits."""

from __future__ import annotations

import pytest
import torch

from nemo_emmett.models import SALMGPT, SALMT5, BestowGPT, head

from ..models.memorising import built
from .transcribed import (
    as_text,
    divergences,
    gradients_of,
    loss_of,
    shaken,
    speech_part,
    taught,
    text_part,
    token_losses,
)

MODELS = {
    "SALMT5": (SALMT5, "t5"),
    "SALMT5, bias": (SALMT5, "mbart"),
    "SALMGPT, tied": (SALMGPT, "qwen2"),
    "SALMGPT, soft cap": (SALMGPT, "gemma2"),
    "BestowGPT": (BestowGPT, "llama"),
}

OBJECTIVES = {
    "distillation": {"weight": 0.7, "temperature": 2.0},
    "retention": {"weight": 0.3},
    "transcription": {"weight": 0.2},
}


@pytest.mark.parametrize("case", MODELS)
def test_loss_gradient_and_log_are_those_of_all_logits(case, folder, tiny_asr):
    options = {"modality_loss_weights": {"audio": 0.5, "text": 2.0}}
    model = built(*MODELS[case], folder, tiny_asr, objectives=OBJECTIVES, **options)
    start = built(*MODELS[case], folder, tiny_asr)
    shaken(model)
    logged = {}
    model.log = lambda name, value, **_: logged.update({name: float(value)})
    batch = {"audio": speech_part(model), "text": text_part(model)}
    found = loss_of(model.training_step(batch, 0))
    gradients = gradients_of(model, found)

    audio, text = batch["audio"], batch["text"]
    losses, _ = token_losses(model, audio)
    asr = audio["is_transcription"]
    kept = {key: value[taught(audio)] for key, value in audio.items() if isinstance(value, torch.Tensor)}
    means = {
        "audio": losses[~asr].sum() / audio["answer_lens"][~asr].sum(),
        "text": token_losses(model, text)[0].sum() / text["answer_lens"].sum(),
        "distillation": divergences(model, kept, start, as_text(audio), 2.0) / kept["answer_lens"].sum(),
        "retention": divergences(model, text, start, text, 1.0) / text["answer_lens"].sum(),
        "transcription": losses[asr].sum() / audio["answer_lens"][asr].sum(),
    }
    weights = {"audio": 0.5, "text": 2.0, "distillation": 0.7, "retention": 0.3, "transcription": 0.2}
    expected = sum(weights[name] * mean for name, mean in means.items())
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert min(mean.item() for mean in means.values()) > 0.01
    for name, mean in means.items():
        assert logged[f"loss_{name}"] == pytest.approx(mean.item(), rel=1e-4), name
    by_definition = gradients_of(model, expected)
    assert gradients.keys() == by_definition.keys()
    largest = max(value.abs().max().item() for value in by_definition.values())
    for name, value in by_definition.items():
        torch.testing.assert_close(gradients[name], value, rtol=1e-3, atol=1e-5 * largest, msg=name)


def both(model) -> dict:
    return {"audio": speech_part(model), "text": text_part(model)}


def test_microbatches_are_logged_as_the_whole_batch_is(folder, tiny_asr):
    """Each term by its own units, which the microbatches hold unequal numbers of."""
    model = built(SALMGPT, "qwen2", folder, tiny_asr, objectives=OBJECTIVES)
    shaken(model)
    logged = {}
    model.log = lambda name, value, **_: logged.update({name: float(value)})
    model.training_step(both(model), 0)
    whole = dict(logged)
    logged.clear()
    model._step_log = None
    batch = both(model)
    total = 0.0
    with model.one_step(batch):
        for microbatch in model.split_batch(batch, 8):
            total += loss_of(model.training_step(microbatch, 0)).item()
    assert logged == pytest.approx(whole, rel=1e-5)
    assert {"loss_distillation", "loss_retention", "loss_transcription"} < logged.keys()
    assert total == pytest.approx(whole["loss"], rel=1e-5)


@pytest.mark.parametrize("linear", ["neither", "student", "teacher"])
def test_output_layers_that_are_not_linear_give_the_same(linear, folder, tiny_asr, monkeypatch):
    """Both, or one of them, compute logits at the answers' positions."""
    model = built(SALMGPT, "gemma2", folder, tiny_asr, objectives=OBJECTIVES)
    shaken(model)
    expected = loss_of(model.training_step(both(model), 0))
    gradients = gradients_of(model, expected)
    (teacher,) = model.teachers.language_models()
    is_linear = {"student": model.llm, "teacher": teacher.llm}.get(linear)
    monkeypatch.setattr(head, "has_linear_head", lambda llm: llm is is_linear)
    found = loss_of(model.training_step(both(model), 0))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    largest = max(value.abs().max().item() for value in gradients.values())
    for name, value in gradients_of(model, found).items():
        torch.testing.assert_close(value, gradients[name], rtol=1e-3, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_in_16_bits_the_loss_is_nearly_that_in_32(precision, folder, tiny_asr):
    """And every weight that is trained has a gradient: autocast keeps no copy of a weight that a teacher has cast."""
    options = {"lora": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}}
    models = [built(SALMGPT, "llama", folder, tiny_asr, objectives=OBJECTIVES, **options) for _ in range(2)]
    for model in models:
        shaken(model)
        model.configure_optimizers()
    exact, model = models
    expected = loss_of(exact.training_step(both(exact), 0))
    batch = both(model)
    if precision == "bf16-true":
        model.bfloat16()
        model.perception.float()  # NeMo's features are made in float32
        batch = {"text": batch["text"]}
        expected = loss_of(exact.training_step(batch, 0))
        found = loss_of(model.training_step(batch, 0))
    else:
        with torch.autocast("cpu", torch.bfloat16):
            found = loss_of(model.training_step(batch, 0))
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=3e-2)
    ours, theirs = (gradients_of(one, loss) for one, loss in ((model, found), (exact, expected)))
    assert ours.keys() == theirs.keys()
    for name in theirs:
        if ".lora_" in name and theirs[name].any():
            assert torch.cosine_similarity(ours[name].flatten().float(), theirs[name].flatten(), dim=0) > 0.9, name
