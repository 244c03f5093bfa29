"""Batches with transcripts, made by hand, and losses by definition from all logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_emmett.models.base import SpeechTextModel

from ..models.batches import padded, prompted_batch, with_recordings

TEXTS = [("one red house", "ein haus"), ("two", "zwei blaue autos"), ("three green trees", "drei")]
SPEECH = [
    (0.6, "four old doors", "vier alte türen"),
    (0.9, None, "fünf"),
    (0.5, "six big dogs", "six big dogs"),
    (0.7, "two blue cars", "zwei blaue autos"),
]
"""Seconds, transcript, answer."""


def text_part(model: SpeechTextModel) -> dict[str, Any]:
    return prompted_batch(model, *map(list, zip(*TEXTS, strict=True)))


def speech_part(model: SpeechTextModel, speech: list[tuple[float, str | None, str]] = SPEECH) -> dict[str, Any]:
    """A batch of recordings with the keys that `transcripts: true` adds."""
    seconds, transcripts, answers = (list(column) for column in zip(*speech, strict=True))
    locator = model.options.audio_locator_tag
    batch = with_recordings(model, prompted_batch(model, [locator] * len(speech), answers), seconds)
    texts = prompted_batch(model, [text or "" for text in transcripts], answers)
    is_there = torch.tensor([text is not None for text in transcripts])
    lens = texts["context_lens"] * is_there
    ids = texts["context_ids"].masked_fill(torch.arange(texts["context_ids"].shape[1]) >= lens[:, None], model.pad_id)
    batch |= {"text_context_ids": ids[:, : int(lens.max())], "text_context_lens": lens}
    encoded = [model.tokenizer.text_to_ids(text) if text else [] for text in transcripts]
    batch["transcript_ids"], batch["transcript_lens"] = padded(encoded, model.pad_id)
    batch["transcript_ids"] = batch["transcript_ids"].long()
    batch["is_transcription"] = torch.tensor([text == answer for _, text, answer in speech])
    return batch


def taught(part: Mapping[str, Any]) -> Tensor:
    """(B,) bool, the examples that are distilled: translations with a transcript."""
    return (part["text_context_lens"] > 0) & ~part["is_transcription"]


def as_text(part: Mapping[str, Any]) -> dict[str, Any]:
    """The text batch of the transcripts of all examples that are distilled."""
    rows = taught(part)
    text = {key: part[key][rows] for key in ("answer_ids", "answer_lens")}
    return text | {"context_ids": part["text_context_ids"][rows], "context_lens": part["text_context_lens"][rows]}


def token_losses(model: SpeechTextModel, part: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """(B, A) cross-entropies and (B, A) bool, where there is one; from all logits."""
    logits, targets = SpeechTextModel.forward(model, part)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    return losses, targets != -100


def divergences(
    student: SpeechTextModel, part: Mapping[str, Any], teacher: SpeechTextModel, read: Mapping[str, Any], T: float
) -> Tensor:
    """Sum of T^2 KL(teacher || student) over the answer tokens of a batch, from all logits."""
    logits, targets = SpeechTextModel.forward(student, part)
    with torch.no_grad():
        predicted, taught_targets = SpeechTextModel.forward(teacher, read)
    there = targets != -100
    assert torch.equal(targets[there], taught_targets[taught_targets != -100]), "the same answers"
    ours, theirs = (logits[there] / T).log_softmax(-1), (predicted[taught_targets != -100] / T).log_softmax(-1)
    return T**2 * F.kl_div(ours, theirs, log_target=True, reduction="sum")


def shaken(model: SpeechTextModel, seed: int = 1) -> SpeechTextModel:
    """The model with other weights, as if it had been trained; its teachers stay as they are."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("teachers."):
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def loss_of(output: Any) -> Tensor:
    return output["loss"] if isinstance(output, dict) else output


def gradients_of(model: SpeechTextModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
