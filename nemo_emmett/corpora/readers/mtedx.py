"""Multilingual TEDx (Salesky et al., 2021): talks in eight languages, as ``mtedx_es.tgz``, ``mtedx_es-en.tgz``, ...

``ted.py`` has the layout that the archives unpack to; recordings are .flac. The pairs of a spoken language share its
talks: each segment is one recording with all of its translations. ``es-es`` has only transcripts, of more talks, and is
a part of its own: ``train.es-es``. Text is left as it is.

lhotse's ``prepare_mtedx`` reads subtitles, without translations, lower-cases them and drops punctuation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from nemo_emmett.corpora.corpus import Corpus, Part, Selection, Sentence, Skipped
from nemo_emmett.corpora.readers.languages import chosen
from nemo_emmett.corpora.readers.pairs import joined, wanted_pairs
from nemo_emmett.corpora.readers.ted import TalksOfPair, data_folders

_SPLITS = ("train", "valid", "test")


def read(source: Path, selection: Selection) -> Sequence[Part]:
    """The parts of mTEDx: a split of a spoken language, with its translations.

    Args:
        source: the folder that holds ``es-es``, ``es-en``, ...
        selection: splits are called ``train``, ``valid``, ``test``; one language: its transcripts.

    Raises:
        ConfigError: if a language or split is not there.
        DataError: if a file of the selection is missing.
    """
    folders = data_folders(source)
    there = [split for split in _SPLITS if any((folder / split).is_dir() for folder in folders.values())]
    parts = []
    for split in chosen(selection.splits, there, f"splits of {CORPUS.title}"):
        for spoken, targets in wanted_pairs(folders, selection.languages, CORPUS.title).items():
            pairs = [TalksOfPair(folders[spoken, target] / split, spoken, target) for target in targets]
            for pair in pairs:
                pair.check(CORPUS.url)
            parts += _parts(split, spoken, pairs)
    return parts


def _parts(split: str, spoken: str, pairs: Sequence[TalksOfPair]) -> Iterator[Part]:
    """Separate parts for translation and transcription, which a recipe can weight differently."""
    if translated := [pair for pair in pairs if pair.target != spoken]:
        languages = (spoken, *(pair.target for pair in translated))
        yield Part(split, languages, partial(_sentences, spoken, translated), spoken=spoken)
    for pair in pairs:
        if pair.target == spoken:
            name = f"{split}.{spoken}-{spoken}"
            yield Part(split, (spoken,), partial(_sentences, spoken, [pair]), spoken=spoken, name=name)


def _sentences(spoken: str, pairs: Sequence[TalksOfPair]) -> Iterator[Sentence | Skipped]:
    return joined((pair.rows() for pair in pairs), spoken, partial(_audio, pairs))


def _audio(pairs: Sequence[TalksOfPair], talk: str) -> Path:
    """The talk's file in the first pair that has it: not all talks are translated into all languages."""
    places = [pair.folder / "wav" / f"{talk}.flac" for pair in pairs]
    return next((place for place in places if place.is_file()), places[0])


CORPUS = Corpus(
    name="mtedx",
    title="Multilingual TEDx",
    release="SLR100",
    licence="CC-BY-NC-ND-4.0",
    url="https://www.openslr.org/100/",
    files="the folder that holds es-es/data/train/{wav,txt}/..., es-en/data/..., ... for each pair",
    read=read,
)
