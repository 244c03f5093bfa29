"""Learning a handful of items by heart: the least that any model on any backbone must be able to do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from nemo_emmett.models.base import SpeechTextModel

from .backbones import model_config
from .batches import prompted_batch, rows, with_recordings

TEXTS = [("one red house", "ein haus"), ("two", "zwei blaue autos")]
SPEECH = [(0.9, "drei bäume"), (0.5, "sechs große")]
MODES = {"text": ("text",), "speech": ("audio",), "zip": ("audio", "text")}


def built(model_class: type[SpeechTextModel], name: str, folder: Path, asr: Path, **overrides) -> SpeechTextModel:
    """A model on a tiny backbone, without dropout: in evaluation mode, though it is to be trained."""
    section = model_config(name, folder, asr, **{"max_new_tokens": 48} | overrides)
    torch.manual_seed(0)
    model = model_class(section).eval()
    model.log = lambda *_, **__: None  # there is no trainer
    return model


def items(model: SpeechTextModel, modalities: Sequence[str]) -> dict[str, dict]:
    """The training batch, and the test: the two texts, the two recordings, or both."""
    batch = {}
    if "audio" in modalities:
        locator = model.options.audio_locator_tag
        speech = prompted_batch(model, [locator] * len(SPEECH), [answer for _, answer in SPEECH])
        batch["audio"] = with_recordings(model, speech, [seconds for seconds, _ in SPEECH])
    if "text" in modalities:
        batch["text"] = prompted_batch(model, *map(list, zip(*TEXTS, strict=True)))
    return batch


def memorise(model: SpeechTextModel, batch: dict[str, dict], steps: int = 300, lr: float = 1e-2) -> None:
    """Train until the loss is almost zero; fails if it does not become so."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    for step in range(steps):
        output = model.training_step(batch, step)
        loss = output["loss"] if isinstance(output, dict) else output
        if loss < 0.005 * len(batch):  # so little that no other answer is likelier, however long it is
            return
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    raise AssertionError(f"after {steps} steps the loss is still {loss.item():.3f}")


def check_generation(model: SpeechTextModel, batch: dict[str, dict]) -> None:
    """Generation gives the answers: greedy and by beams, batched and alone, whichever side is padded."""
    for part in batch.values():
        answers = [example["target_text"] for example in part["examples"]]
        for num_beams in (1, 4):
            assert model.translate_batch(part, num_beams) == answers
        alone = [model.translate_batch(rows(part, [i]))[0] for i in range(len(answers))]
        assert alone == answers
        check_padding(model, part, answers)


def check_padding(model: SpeechTextModel, part: dict, answers: list[str]) -> None:
    contexts = [ids[:n] for ids, n in zip(part["context_ids"], part["context_lens"], strict=True)]
    speech = {key: part[key] for key in ("audios", "audio_lens") if key in part}
    for side in ("left", "right"):
        prompts = pad_sequence(contexts, batch_first=True, padding_value=model.pad_id, padding_side=side)
        ids = model.generate(prompts, **speech, do_sample=False, target_lang="de")
        # Llama 3 has no token for padding: what follows the end of an answer may be an ordinary one.
        said = [
            row[: row.index(model.tokenizer.eos_id)] if model.tokenizer.eos_id in row else row for row in ids.tolist()
        ]
        decoded = model.tokenizer.tokenizer.batch_decode(said, skip_special_tokens=True)
        assert [text.strip() for text in decoded] == answers
