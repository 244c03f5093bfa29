"""Tiny corpora of six datasets (speech and text from English into three languages) of very unequal sizes."""

from __future__ import annotations

import io
import json
import random
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import soundfile

LANGUAGES = ("de", "es", "fr")
SAMPLING_RATE = 16000
WORDS = {"en": "one two three four", "de": "eins zwei drei vier", "es": "uno dos", "fr": "un deux"}

SPEECH_SIZES = {"speech_de": 90, "speech_es": 31, "speech_fr": 7}
TEXT_SIZES = {"text_de": 1500, "text_es": 260, "text_fr": 17}

_DATASET = re.compile(r"(speech|text)_(de|es|fr)")


class Corpus:
    """Datasets on disk, each made when it is asked for; the same seed makes the same bytes.

    Args:
        folder: receives everything.
        tarred: speech lies in tar files, two shards a dataset.
        seconds: shortest and longest recording.
        words: fewest and most words of a text.
        seed: of lengths and sounds.

    Example:
        >>> Corpus(tmp_path).source("speech_de", 90)
        {'type': 'nemo', 'manifest_filepath': '/tmp/.../speech_de.json'}
    """

    def __init__(
        self,
        folder: Path,
        tarred: bool = False,
        seconds: tuple[float, float] = (0.1, 0.4),
        words: tuple[int, int] = (1, 12),
        seed: int = 0,
    ) -> None:
        self.folder = folder
        self.tarred = tarred
        self.seconds = seconds
        self.words = words
        self.seed = seed

    def source(self, name: str, size: int, **keys) -> dict:
        """The entry of ``input_cfg`` for a dataset of so many records, with more keys (``weight``, ...)."""
        rng = random.Random(f"{self.seed} {name}")
        make = self._speech if name.startswith("speech") else self._text
        return {**make(name, size, rng), **keys}

    def audio_path(self, name: str, number: int) -> Path:
        """The recording of a record (from 0) of a dataset that is not tarred."""
        return self.folder / f"{name}_{number:05d}.wav"

    def _speech(self, name: str, size: int, rng: random.Random) -> dict:
        records = []
        for number in range(size):
            seconds = round(rng.uniform(*self.seconds), 2)
            noise = np.random.default_rng([self.seed, number]).normal(scale=0.1, size=round(seconds * SAMPLING_RATE))
            if not self.tarred:
                soundfile.write(self.audio_path(name, number), noise, SAMPLING_RATE)
            records.append((self._record(name, number, seconds, rng), noise))
        if self.tarred:
            return self._tarred(name, records)
        manifest = self.folder / f"{name}.json"
        manifest.write_text("".join(json.dumps(record) + "\n" for record, _ in records))
        return {"type": "nemo", "manifest_filepath": str(manifest)}

    def _record(self, name: str, number: int, seconds: float, rng: random.Random) -> dict:
        return {
            "audio_filepath": self.audio_path(name, number).name,
            "duration": seconds,
            "sampling_rate": SAMPLING_RATE,
            "text": _sentence(name[-2:], rng.randint(*self.words), rng),
            "source_lang": "en",
            "target_lang": name[-2:],
        }

    def _tarred(self, name: str, records: list[tuple[dict, np.ndarray]]) -> dict:
        for shard in (0, 1):
            with (
                tarfile.open(self.folder / f"{name}_audio_{shard}.tar", "w") as tar,
                open(self.folder / f"{name}_manifest_{shard}.json", "w") as manifest,
            ):
                for record, noise in records[shard::2]:
                    manifest.write(json.dumps({**record, "shard_id": shard}) + "\n")
                    wav = io.BytesIO()
                    soundfile.write(wav, noise, SAMPLING_RATE, format="WAV")
                    member = tarfile.TarInfo(record["audio_filepath"])
                    member.size = wav.tell()
                    wav.seek(0)
                    tar.addfile(member, wav)
        return {
            "type": "nemo_tarred",
            "manifest_filepath": f"{self.folder}/{name}_manifest__OP_0..1_CL_.json",
            "tarred_audio_filepaths": f"{self.folder}/{name}_audio__OP_0..1_CL_.tar",
        }

    def _text(self, name: str, size: int, rng: random.Random) -> dict:
        lengths = [rng.randint(*self.words) for _ in range(size)]
        for language in ("en", name[-2:]):
            lines = [_sentence(language, length, rng) + "\n" for length in lengths]
            (self.folder / f"{name}.{language}").write_text("".join(lines))
        return {
            "type": "parallel_text",
            "source_paths": f"{self.folder}/{name}.en",
            "target_paths": f"{self.folder}/{name}.{name[-2:]}",
            "source_lang": "en",
            "target_lang": name[-2:],
        }


def _sentence(language: str, length: int, rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS[language].split(), k=length))


def dataset_of(example_id: str) -> str:
    """The dataset that an example comes from, by its id."""
    return _DATASET.search(Path(example_id).name)[0]


def ids_of(batch: Mapping) -> list[str]:
    """The ids of all examples in a batch, without the folders, which differ from test to test."""
    return [Path(example["id"]).name for part in batch.values() for example in part["examples"]]
