"""The loss of a step with objectives is that of its definition, from all logits."""

from __future__ import annotations

import pytest
import torch

from nemo_emmett.models import SALMGPT, SALMT5, BestowGPT

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
