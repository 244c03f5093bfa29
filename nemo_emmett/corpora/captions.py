"""Image captions, line-aligned in several languages (Multi30k), spoken by eSpeak NG.

The source is a folder with ``train.en``, ``train.de``, ``val.en``, ``val.de`` ..., one caption a line. Of its
validation set the first captions become the dev split and the rest the test split; Multi30k's own test sets are not
read. The layout of the files is the phrasebook's (:mod:`nemo_emmett.corpora.phrasebook.speaking`).

Example:
    >>> from pathlib import Path
    >>> config = CaptionsConfig(languages=("en", "de"), max_words=10, spoken_train_captions=3000)
    >>> summary = prepare_captions(Path("multi30k"), Path("data/captions"), config)  # doctest: +SKIP
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_emmett.corpora.leaks import HeldOut
from nemo_emmett.corpora.phrasebook.config import LANGUAGES, Names, check_choices, check_interval, check_range
from nemo_emmett.corpora.phrasebook.espeak import check_variants, draw_voice
from nemo_emmett.corpora.phrasebook.speaking import Contents, Spoken, SpokenSummary, prepare_spoken
from nemo_emmett.corpora.readers.files import SourceFiles
from nemo_emmett.corpora.sentence_files import PlacedSentence
from nemo_emmett.errors import ConfigError, DataError
from nemo_emmett.typed_config import Count, PositiveWhole, Switch, Whole, parse_fields


@dataclass(frozen=True)
class CaptionsConfig:
    """Everything that a captions corpus's bytes depend on, except its source and the library that speaks it.

    Raises:
        ConfigError: if a field has a value that cannot work.
    """

    languages: Names = ("en", "de", "fr")  # of the text, by the suffixes of the source's files
    spoken_languages: Names = ("en",)
    max_words: PositiveWhole | None = None  # captions with more words in any language are left out; None: none are
    train_captions: PositiveWhole | None = None  # the first of the remaining train captions; None: all
    spoken_train_captions: Count | None = None  # how many of them are spoken as well; None: all
    dev_captions: Count = 100  # the first of the remaining validation captions; the others are the test split
    accents: Switch = False  # speak English and Spanish in two accents each
    variants: Names = ("f1", "m1", "m3")  # eSpeak NG's
    speed: tuple[Whole, ...] = (190, 210)  # words a minute, slowest and fastest
    pitch: tuple[Whole, ...] = (40, 60)  # of eSpeak NG's 0 to 99, lowest and highest
    seed: Count = 0  # of the voices

    def __post_init__(self) -> None:
        parse_fields(self, "captions")
        check_choices("captions.languages", self.languages, None)
        check_choices("captions.spoken_languages", self.spoken_languages, LANGUAGES)
        for language in self.spoken_languages:
            if language not in self.languages:
                raise ConfigError(f"captions.spoken_languages: '{language}' is not among languages; add it there")
        check_choices("captions.variants", self.variants, None)
        if None not in (self.spoken_train_captions, self.train_captions):
            check_range("captions.spoken_train_captions", self.spoken_train_captions, 0, self.train_captions)
        check_interval("captions.speed", self.speed, 80, 450)
        check_interval("captions.pitch", self.pitch, 0, 99)

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


@dataclass(frozen=True)
class Caption:
    """A caption in every language, and its line in the source."""

    line: int  # from 1
    texts: Mapping[str, str]


def prepare_captions(
    source: Path | str,
    out: Path | str,
    config: CaptionsConfig | None = None,
    *,
    num_jobs: int | None = None,
    show_progress: bool = True,
) -> SpokenSummary:
    """Write and speak captions into ``out``. The same source and configuration give the same bytes.

    A train caption that equals one of the validation set in any language is left out, and so is one that is empty
    in any language. A finished corpus of the same source and configuration is left as it is; an unfinished one is
    completed.

    Args:
        source: folder of ``train.{language}`` and ``val.{language}``, UTF-8, one caption a line.
        out: the folder to write to; created if it does not exist.
        config: its content.
        num_jobs: processes to speak with; by default one for each core. Does not change the result.
        show_progress: show a bar while the recordings are made.

    Raises:
        ConfigError: if the configuration asks for more captions than remain or for an unknown voice, or ``num_jobs``
            is below 1.
        DataError: if a file of the source is missing, is not UTF-8 or has another number of lines than the others, or
            ``out`` holds anything else.
        EmmettError: if a library is missing or an utterance cannot be spoken.
    """
    source, config = Path(source), config or CaptionsConfig()
    lines = {split: _read_lines(source, split, config.languages) for split in ("train", "val")}
    digest = hashlib.sha256()
    for split, by_language in lines.items():
        for language, captions in by_language.items():
            digest.update("\n".join((f"{split}.{language}", *captions, "")).encode())
    return prepare_spoken(
        Path(out),
        "captions",
        "captions corpus",
        {**config.as_dict(), "source": f"sha256:{digest.hexdigest()[:16]}"},
        lambda: _contents(lines, config),
        num_jobs=num_jobs,
        show_progress=show_progress,
    )


def _read_lines(source: Path, split: str, languages: Sequence[str]) -> dict[str, list[str]]:
    """The lines of a split's files by language."""
    lines = {}
    for language in languages:
        path = source / f"{split}.{language}"
        if not path.is_file():
            raise DataError(f"'{path}' does not exist; give the folder of Multi30k's raw text, unpacked, as SOURCE")
        lines[language] = list(SourceFiles(source).lines(path.name, errors="strict"))
    first = languages[0]
    for language in languages[1:]:
        if len(lines[language]) != len(lines[first]):
            raise DataError(
                f"'{source / f'{split}.{language}'}' has {len(lines[language])} lines and {split}.{first} "
                f"{len(lines[first])}; captions must be line-aligned, so download the files again"
            )
    return lines


def _contents(lines: Mapping[str, Mapping[str, Sequence[str]]], config: CaptionsConfig) -> Contents:
    check_variants("captions", config.variants)
    splits = _split(lines, config)
    texts = {split: [caption.texts for caption in captions] for split, captions in splits.items()}
    recordings = []
    for split, captions in splits.items():
        spoken = captions[: config.spoken_train_captions] if split == "train" else captions
        published = "train" if split == "train" else "val"
        for language in config.spoken_languages:
            for caption in spoken:
                voice = draw_voice(f"{published}:{caption.line}", language, 0, config)
                name = f"{caption.line:05d}"
                recordings.append(Spoken(split, language, name, caption.texts, voice, {"line": caption.line}))
    return Contents(config.languages, texts, config.spoken_languages, recordings)


def _split(lines: Mapping[str, Mapping[str, Sequence[str]]], config: CaptionsConfig) -> dict[str, list[Caption]]:
    held_out = HeldOut(
        (PlacedSentence(one.texts, Path("val"), one.line) for one in _captions(lines["val"])), near=False
    )
    validation = [caption for caption in _captions(lines["val"]) if _fits(caption, config.max_words)]
    train = [
        caption
        for caption in _captions(lines["train"])
        if _fits(caption, config.max_words) and held_out.match(caption.texts) is None
    ]
    for name, left in (("dev_captions", len(validation) - 1), ("train_captions", len(train))):
        if (count := getattr(config, name)) is not None and count > left:
            raise ConfigError(
                f"captions.{name}: {count} are asked for and {left} can be had; lower it or raise max_words"
            )
    return {
        "test": validation[config.dev_captions :],
        "dev": validation[: config.dev_captions],
        "train": train[: config.train_captions],
    }


def _captions(lines: Mapping[str, Sequence[str]]) -> Iterator[Caption]:
    for number, texts in enumerate(zip(*lines.values(), strict=True), start=1):
        texts = [" ".join(text.split()) for text in texts]
        if all(texts):
            yield Caption(number, dict(zip(lines, texts, strict=True)))


def _fits(caption: Caption, max_words: int | None) -> bool:
    return max_words is None or all(len(text.split()) <= max_words for text in caption.texts.values())
