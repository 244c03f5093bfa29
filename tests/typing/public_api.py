"""The public functions and classes as a user's own typed code calls them; read by mypy, never run (``make lint``)."""

from __future__ import annotations

from pathlib import Path
from typing import assert_type

import numpy as np
import torch
from lightning.pytorch import Trainer

from nemo_emmett import corpora, evaluation
from nemo_emmett.callbacks import (
    OOMptimizer,
    RandomState,
    ResumableData,
    SkipNonFiniteSteps,
    StopOnSignal,
    TrainingClock,
)
from nemo_emmett.data import MultimodalDataLoader, MultimodalDataModule, SpeechTextDataset, get_multimodal_dataloader
from nemo_emmett.errors import EmmettError
from nemo_emmett.models import SALMGPT, SALMT5, BestowGPT, load
from nemo_emmett.models.base import SpeechTextModel
from nemo_emmett.models.inputs import Waveform
from nemo_emmett.oomptimizer import Profile
from nemo_emmett.schedulers import InfiniteLR


def translate(folder: Path) -> list[str]:
    model = load(folder)
    assert_type(model, SpeechTextModel)
    assert_type(model.translate(["Hello."], "en", "de", num_beams=2), list[str])
    waveform = Waveform(np.zeros(16000, np.float32), 16000)
    model.translate([waveform, "Hello."], [None, "en"], ["de", "fr"])
    return model.translate([Path("hello.wav")], source_lang=None, target_lang="de", max_new_tokens=100)


def evaluate(model: SpeechTextModel, recipe: Path) -> float | None:
    result = evaluation.evaluate(model, recipe, output="scores", num_beams=4)
    if result is None:  # another rank than the first
        return None
    assert_type(evaluation.score(result.translations), list[evaluation.Score])
    assert_type(evaluation.compare(result, result), list[evaluation.Comparison])
    evaluation.write_report(result, Path("report.html"))
    assert_type(evaluation.from_json("scores/evaluation.json"), evaluation.Evaluation)
    return result.scores[0].bleu


def train(data: MultimodalDataModule, model: SALMT5 | SALMGPT | BestowGPT) -> None:
    callbacks = [OOMptimizer(mode="calibrate", memory_fraction=0.9), ResumableData(), RandomState()]
    trainer = Trainer(callbacks=[*callbacks, SkipNonFiniteSteps(), StopOnSignal(), TrainingClock()])
    trainer.fit(model, data)


def schedule(optimizer: torch.optim.Optimizer) -> list[float]:
    return InfiniteLR(optimizer, warmup_steps=100, cooldown_steps=1000, constant_lr=1e-4).get_lr()


def batches(config: dict[str, object], dataset: SpeechTextDataset) -> MultimodalDataLoader:
    loader = get_multimodal_dataloader(config, 0, 1, dataset)
    assert_type(loader, MultimodalDataLoader)
    assert_type(len(loader), int)
    assert isinstance(dataset, torch.utils.data.Dataset)
    return loader


def prepare(folder: Path) -> corpora.CorpusSummary:
    try:
        corpus = corpora.find_corpus("phrasebook")
    except EmmettError:
        raise SystemExit(1) from None
    assert_type(corpus, corpora.Corpus)
    return corpora.prepare_corpus(corpus, folder / "download", folder / "out")


def sizes(path: Path) -> Profile:
    return Profile.read(path)
