"""Corpora of any size for the benchmarks: words of invented languages, and noise as speech."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path

import numpy as np

SAMPLING_RATE = 16_000
LOCATOR = "<|audio|>"
LANGUAGES = ("en", "de")
WORDS_OF_A_LANGUAGE = 20_000
VOCABULARY = 8_000
RECORDINGS = 400
"""Files that all lines of a speech manifest share: read often enough, they are in the page cache for everybody."""

SECONDS = (1.0, 8.0)
_SYLLABLES = (
    "ba",
    "de",
    "fi",
    "go",
    "hu",
    "ka",
    "le",
    "mi",
    "no",
    "pu",
    "ra",
    "se",
    "ti",
    "vo",
    "wu",
    "sch",
    "en",
    "er",
)


def make_text(folder: Path, lines: int) -> dict[str, str]:
    """Parallel text of 3 to 40 words a line, words as frequent as Zipf says.

    Returns:
        The path of each language's file.
    """
    return make_aligned(folder, lines, LANGUAGES)


def make_aligned(folder: Path, lines: int, languages: Sequence[str]) -> dict[str, str]:
    """The same in these languages."""
    paths = {language: folder / f"text-{lines}.{language}" for language in languages}
    for seed, path in enumerate(paths.values()):
        if not path.exists():
            _write(path, _sentences(lines, seed))
    return {language: str(path) for language, path in paths.items()}


def repeated(paths: Mapping[str, str], folder: Path, lines: int, languages: Sequence[str]) -> dict[str, str]:
    """The first lines of a corpus, or all of them again and again; the path of each language's file."""
    folder.mkdir(exist_ok=True)
    made = {language: folder / f"text-{lines}.{language}" for language in languages}
    for language, path in made.items():
        if not path.exists():
            text = Path(paths[language]).read_text(encoding="utf-8").splitlines()
            _write(path, islice(cycle(text), lines))
    return {language: str(path) for language, path in made.items()}


def make_speech(folder: Path, lines: int) -> str:
    """A manifest of noise of 1 to 8 seconds with 3 to 40 words each; its path."""
    manifest = folder / f"speech-{lines}.json"
    if manifest.exists():
        return str(manifest)
    recordings = _make_recordings(folder)
    records = (
        {
            "audio_filepath": path,
            "duration": seconds,
            "sampling_rate": SAMPLING_RATE,
            "text": text,
            "source_lang": "en",
            "target_lang": "de",
            "audio_locator_tag": LOCATOR,
        }
        for number, text in enumerate(_sentences(lines, seed=7))
        for path, seconds in [recordings[number % RECORDINGS]]
    )
    _write(manifest, (json.dumps(record) for record in records))
    return str(manifest)


def make_tokenizer(folder: Path) -> str:
    """A subword tokenizer in a Hugging Face folder, with the locator as one token; its path."""
    home = folder / "tokenizer"
    if not home.exists():
        from transformers import AutoTokenizer

        from nemo_emmett.corpora.tokenizers import file_texts, train_t5_tokenizer

        texts = make_text(folder, 20_000)
        train_t5_tokenizer(file_texts(texts.values()), home, VOCABULARY, LANGUAGES)
        tokenizer = AutoTokenizer.from_pretrained(home)
        tokenizer.add_special_tokens({"additional_special_tokens": [LOCATOR, *(f"<{lang}>" for lang in LANGUAGES)]})
        tokenizer.save_pretrained(home)
    return str(home)


def _make_recordings(folder: Path) -> list[tuple[str, float]]:
    import soundfile

    rng = np.random.default_rng(3)
    made = []
    (folder / "audio").mkdir(exist_ok=True)
    for number, seconds in enumerate(rng.uniform(*SECONDS, size=RECORDINGS).round(2)):
        path = folder / "audio" / f"{number}.wav"
        soundfile.write(path, rng.normal(scale=0.05, size=round(seconds * SAMPLING_RATE)), SAMPLING_RATE)
        made.append((str(path), float(seconds)))
    return made


def _sentences(lines: int, seed: int) -> Iterator[str]:
    rng = np.random.default_rng(seed)
    words = np.array(["".join(rng.choice(_SYLLABLES, size=size)) for size in rng.integers(1, 5, WORDS_OF_A_LANGUAGE)])
    odds = 1.0 / np.arange(1, WORDS_OF_A_LANGUAGE + 1)
    lengths = np.random.default_rng(11).integers(3, 41, lines)  # the same in both languages
    drawn = words[rng.choice(WORDS_OF_A_LANGUAGE, size=lengths.sum(), p=odds / odds.sum())]
    start = 0
    for length in lengths:
        yield " ".join(drawn[start : start + length])
        start += length


def _write(path: Path, lines: Iterator[str]) -> None:
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)
    part.rename(path)
