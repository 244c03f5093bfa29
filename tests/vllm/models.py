"""Exported models to serve: tiny, trained until they answer, in a folder that has been moved from where it was written."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from nemo_emmett.models import SALMGPT, load
from nemo_emmett.models.base import SpeechTextModel
from nemo_emmett.prompts.instruction import translation_turns
from nemo_emmett.prompts.markup import Markup, Prompt

from ..conftest import ENCODER_DIM
from ..models import backbones
from ..models.memorising import SPEECH, TEXTS, built, items, memorise

_MLP = {"_target_": "nemo_emmett.modules.modality_adapters.MLPConnector", "input_dim": ENCODER_DIM, "output_dim": None}
ADAPTERS = {
    "identity": {
        "_target_": "nemo.collections.speechlm2.modules.perception.IdentityConnector",
        "d_model": ENCODER_DIM,
    },
    "mlp": _MLP,
    "mlp2": _MLP | {"subsampling_factor": 2},
    "qformer": {
        "_target_": "nemo_emmett.modules.modality_adapters.QFormer",
        "prompt_size": 4,
        "target_layer_ids": [0],
        "qformer_num_hidden_layers": 1,
        "encoder_config": {"d_model": ENCODER_DIM, "encoder_attention_heads": 4},
        "output_dim": None,
    },
}
FAMILIES = ("llama", "llama3", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3")


def exported(family: str, adapter: str, folder: Path, asr: Path, steps: int = 300, **overrides) -> Path:
    """A folder of a model that answers, moved; nothing that it was made of is left."""
    made = folder / "made"
    made.mkdir()
    own_asr = shutil.copy(asr, made / "encoder.nemo")
    with pytest.MonkeyPatch.context() as patch:  # vLLM on a CPU has heads of 32 at least
        for name, value in {"HIDDEN": 64, "HEADS": 2, "HEAD_DIM": 32}.items():
            patch.setattr(backbones, name, value)
        backbones.backbone(family, made)
    section = {"perception": {"modality_adapter": ADAPTERS[adapter]}} | overrides
    model = built(SALMGPT, family, made, own_asr, **section)
    memorise(model, items(model, ("audio", "text")), steps=steps)
    model.save_pretrained(made / "export")
    shutil.move(made / "export", folder / "moved")
    shutil.rmtree(made)
    return folder / "moved"


def contexts(model: SpeechTextModel, messages: list[str | None], source: str = "en", target: str = "de") -> list[list[int]]:
    """Ids of the prompts of texts, and of recordings where a message is None."""
    formatter = model._prompt_formatter()
    locator = Markup(model.options.audio_locator_tag)
    prompts = [locator if message is None else Prompt([message]) for message in messages]
    turns = [translation_turns(formatter, prompt, target, source) for prompt in prompts]
    return [formatter.encode_dialog(turns=own)["context_ids"].tolist() for own in turns]


def texts(count: int) -> list[str]:
    """Texts of the training, and texts of its words in other orders."""
    words = sorted({word for text, _ in TEXTS for word in text.split()} | {"red", "blue", "house", "cars"})
    random = np.random.default_rng(0)
    others = [" ".join(random.choice(words, size=random.integers(1, 6))) for _ in range(count)]
    return ([text for text, _ in TEXTS] + others)[:count]


def recordings(count: int) -> list[np.ndarray]:
    """Noise of 0.1 to 3 seconds."""
    random = np.random.default_rng(1)
    return [(0.1 * random.standard_normal(random.integers(1600, 48000))).astype(np.float32) for _ in range(count)]


@torch.no_grad()
def own_answers(folder: Path, messages: list[str | None], signals: list[np.ndarray], new: int = 12) -> list[list[int]]:
    """Greedy ids of our own generation, one request at a time, up to the token that ends an answer."""
    model = load(folder)
    answers, left = [], iter(signals)
    for message, context in zip(messages, contexts(model, messages), strict=True):
        speech = {}
        if message is None:
            signal = torch.from_numpy(next(left))
            speech = {"audios": signal[None], "audio_lens": torch.tensor([len(signal)])}
        ids = model.generate(torch.tensor([context]), **speech, max_new_tokens=new)
        answers.append(ids[0].tolist())
    return answers


__all__ = ["ADAPTERS", "FAMILIES", "SPEECH", "TEXTS", "contexts", "exported", "own_answers", "recordings", "texts"]
