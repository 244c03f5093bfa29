"""Tiny data that the tests make themselves: tones as speech, numbers as words, a word-level tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile
from nemo.collections.common.tokenizers import AutoTokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SAMPLING_RATE = 16000
LOCATOR = "<|audio|>"
LANGUAGE_TAGS = ["<de>", "<en>", "<es>", "<fr>"]
WORDS = ["one", "two", "three", "four", "eins", "zwei", "drei", "vier", "uno", "dos", "tres", "un", "deux"]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> AutoTokenizer:
    """Every word is one token; so are the locator and the language tags."""
    special = ["<pad>", "</s>", "<unk>", LOCATOR, *LANGUAGE_TAGS]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=[LOCATOR, *LANGUAGE_TAGS],
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(folder)
    return AutoTokenizer(str(folder))


@pytest.fixture
def write_tone(tmp_path: Path) -> Callable[..., Path]:
    """Write a tone whose pitch identifies the recording."""

    def write(
        name: str, seconds: float = 1.0, channels: int = 1, rate: int = SAMPLING_RATE, hertz: float = 440
    ) -> Path:
        path = tmp_path / name
        time = np.arange(round(seconds * rate)) / rate
        samples = 0.1 * np.sin(2 * np.pi * hertz * time)
        soundfile.write(path, np.stack([samples] * channels, axis=1), rate)
        return path

    return write


@pytest.fixture
def write_lines(tmp_path: Path) -> Callable[[str, Sequence[str]], Path]:
    def write(name: str, lines: Sequence[str]) -> Path:
        path = tmp_path / name
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path

    return write


@pytest.fixture
def write_manifest(write_lines) -> Callable[[str, Sequence[Mapping]], Path]:
    """Write a NeMo manifest; a record that is a string is written as it is."""

    def write(name: str, records: Sequence[Mapping | str]) -> Path:
        return write_lines(name, [r if isinstance(r, str) else json.dumps(r) for r in records])

    return write


@pytest.fixture
def speech(write_tone, write_manifest) -> Callable[..., Path]:
    """A manifest of so many recordings, each with a transcript and its translations."""

    def make(count: int = 8, name: str = "speech.json", sampling_rate: int | None = SAMPLING_RATE, **fields) -> Path:
        records = []
        for i in range(count):
            path = write_tone(f"{name}-{i}.wav", seconds=1.0 + 0.1 * i, hertz=200 + 10 * i)
            record = {"audio_filepath": str(path), "duration": round(1.0 + 0.1 * i, 3), "text": "one two", "lang": "en"}
            if sampling_rate is not None:
                record["sampling_rate"] = sampling_rate
            records.append({**record, "translations": {"de": "eins zwei", "es": "uno dos"}, **fields})
        return write_manifest(name, records)

    return make


@pytest.fixture
def pairs(write_lines) -> Callable[..., dict]:
    """The paths of a line-aligned text of so many lines."""

    def make(count: int = 8, name: str = "train") -> dict:
        return {
            "source_paths": str(write_lines(f"{name}.en", ["one " * (i % 4 + 1) for i in range(count)])),
            "target_paths": str(write_lines(f"{name}.de", ["eins " * (i % 4 + 1) for i in range(count)])),
            "source_lang": "en",
            "target_lang": "de",
        }

    return make
