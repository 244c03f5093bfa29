"""A small evaluation: twelve directions between four languages, text and speech, with recordings of short tones."""

from __future__ import annotations

import random
from itertools import permutations
from pathlib import Path

import numpy as np
import soundfile

from nemo_emmett.evaluation.metrics import DEFAULT_METRICS, signatures
from nemo_emmett.evaluation.results import Evaluation, Throughput, Translation
from nemo_emmett.evaluation.scoring import score

LANGUAGES = ("de", "en", "es", "fr")
DIRECTIONS = list(permutations(LANGUAGES, 2))
SAMPLING_RATE = 16000
SENTENCES = 3


WORDS = {
    "de": [
        "die",
        "eine",
        "rote",
        "katze",
        "hund",
        "saß",
        "lief",
        "auf",
        "über",
        "matte",
        "zaun,",
        ".",
        "3.5",
        "straße",
    ],
    "zh": ["这", "是", "一", "只", "红色的", "猫", "狗", "坐在", "垫子", "上", "。", "3.5", "NeMo"],
    "ja": ["これは", "赤い", "猫", "犬", "が", "を", "見た", "マット", "の", "上", "。", "3.5", "NeMo"],
    "ko": ["이것은", "빨간", "고양이", "개가", "매트", "위에", "앉았다", ".", "3.5", "NeMo"],
}


def noisy_sentences(seed: int, number: int = 30, language: str = "de", noise: float = 0.1) -> tuple[list, list]:
    """Hypotheses and references that share most of their words."""
    draw, words, space = random.Random(seed), WORDS[language], "" if language in ("zh", "ja") else " "
    references = [draw.choices(words, k=draw.randint(5, 12)) for _ in range(number)]
    hypotheses = [[word for word in reference if draw.random() > noise] for reference in references]
    return [space.join(words) for words in hypotheses], [space.join(words) for words in references]


def sentence(number: int, language: str) -> str:
    return f"{language} sentence number {number} of the test set"


def tone(path: Path, hertz: float, seconds: float = 0.1) -> Path:
    time = np.arange(int(SAMPLING_RATE * seconds)) / SAMPLING_RATE
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * hertz * time), SAMPLING_RATE)
    return path


def build_translations(folder: Path, modality: str, hypothesis: str | None = None) -> list[Translation]:
    """Perfect translations unless a hypothesis is given."""
    return [
        Translation(
            test_set=f"test_{modality}",
            id=str(number),
            modality=modality,
            source_lang=source,
            target_lang=target,
            source_text=sentence(number, source),
            reference=sentence(number, target),
            hypothesis=sentence(number, target) if hypothesis is None else hypothesis,
            audio_path=str(folder / f"{source}{number}.wav") if modality == "audio" else None,
            duration=0.1 if modality == "audio" else None,
        )
        for source, target in DIRECTIONS
        for number in range(SENTENCES)
    ]


def build_evaluation(translations: list[Translation], model: str = "exp/model") -> Evaluation:
    modalities = dict.fromkeys(one.modality for one in translations)
    return Evaluation(
        model=model,
        name="/".join(model.split("/")[-2:]),
        date="2025-03-01T12:00:00+00:00",
        scores=score(translations),
        translations=translations,
        throughput={name: Throughput(2.0, 36, 252, 8.0 if name == "audio" else None) for name in modalities},
        signatures=signatures(DEFAULT_METRICS, LANGUAGES),
        decoding={"num_beams": 1, "max_new_tokens": None},
        config={"batch_size": 2},
        command="evaluate.py",
        versions={"sacrebleu": "2.6.0"},
    )
