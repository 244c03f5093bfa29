"""The objective ``consistency`` in a training step: its loss by definition, and what it trains."""

from __future__ import annotations

import pytest
import torch

from nemo_emmett.models import SALMGPT, SALMT5, BestowGPT
from nemo_emmett.objectives.alignment import best_alignment_distance, cross_attentive_distance
from nemo_emmett.objectives.consistency import Consistency
from nemo_emmett.objectives.objective import EncodedSpeech

from ..models.memorising import built
from .transcribed import gradients_of, loss_of, speech_part, token_losses

MODELS = {"SALMT5": (SALMT5, "t5"), "SALMGPT": (SALMGPT, "qwen2"), "BestowGPT": (BestowGPT, "llama")}
DISTANCES = {"best_alignment": best_alignment_distance, "cross_attention": cross_attentive_distance}


@pytest.mark.parametrize(
    ("case", "distance"),
    [
        ("SALMT5", "best_alignment"),
        ("SALMT5", "cross_attention"),
        ("SALMGPT", "best_alignment"),
        ("BestowGPT", "cross_attention"),
    ],
)
def test_loss_and_gradient_are_those_of_the_definition(case, distance, folder, tiny_asr) -> None:
    model = built(*MODELS[case], folder, tiny_asr, objectives={"consistency": {"weight": 0.5, "distance": distance}})
    logged = {}
    model.log = lambda name, value, **_: logged.update({name: float(value)})
    audio = speech_part(model)
    found = loss_of(model.training_step({"audio": audio}, 0))
    gradients = gradients_of(model, found)

    losses, _ = token_losses(model, audio)
    frames, lens = model.encode_speech(audio["audios"], audio["audio_lens"])
    of_examples = []
    for row, length in enumerate(audio["transcript_lens"].tolist()):
        if length:
            ids = audio["transcript_ids"][row : row + 1, :length]
            alone = (
                frames[row : row + 1, : lens[row]],
                lens[row : row + 1],
                model.embed(ids).detach(),
                torch.tensor([length]),
            )
            of_examples.append(DISTANCES[distance](*alone))
    assert len(of_examples) == 3
    mean = torch.cat(of_examples).mean()
    expected = losses.sum() / audio["answer_lens"].sum() + 0.5 * mean
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert logged["loss_consistency"] == pytest.approx(mean.item(), rel=1e-4)
    by_definition = gradients_of(model, expected)
    largest = max(value.abs().max().item() for value in by_definition.values())
    assert gradients.keys() == by_definition.keys()
    for name, value in by_definition.items():
        torch.testing.assert_close(gradients[name], value, rtol=1e-3, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize("train_text", [False, True])
def test_the_embeddings_stay_unless_they_are_trained(train_text, folder, tiny_asr) -> None:
    model = built(*MODELS["SALMT5"], folder, tiny_asr)
    part = speech_part(model)
    speech_lens = torch.ones(len(part["context_lens"]), dtype=torch.long)
    frames, lens = model.encode_speech(part["audios"], part["audio_lens"])
    loss = Consistency(train_text=train_text).loss_sum(part, EncodedSpeech(frames, lens, speech_lens, model.embed))
    gradients = gradients_of(model, loss)
    assert any(name.startswith("perception") and grad.abs().sum() > 0 for name, grad in gradients.items())
    of_text = [name for name, grad in gradients.items() if name.startswith("llm") and grad.abs().sum() > 0]
    assert bool(of_text) == train_text


def test_a_batch_without_transcripts_adds_nothing(folder, tiny_asr) -> None:
    speech = [(0.6, None, "vier"), (0.5, None, "eins")]
    losses = []
    for objectives in ({"consistency": {}}, {}):
        model = built(*MODELS["SALMT5"], folder, tiny_asr, objectives=objectives)
        losses.append(loss_of(model.training_step({"audio": speech_part(model, speech)}, 0)))
        losses[-1].backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
