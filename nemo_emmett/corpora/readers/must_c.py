"""MuST-C: English TED talks with translations (Di Gangi et al., 2019), as ``MUSTC_v1.0_en-de.tar.gz`` unpacks.

``ted.py`` has the layout. The pairs were segmented independently, so each is a part of its own: ``train.en-de``.
Text is left as it is, with its ``(Applause)`` and names of speakers.

lhotse's ``prepare_must_c`` keeps the translation without the transcript and opens every recording, so that a damaged
one stops it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from nemo_emmett.corpora.corpus import Corpus, Part, Selection, Sentence, Skipped
from nemo_emmett.corpora.readers.languages import chosen
from nemo_emmett.corpora.readers.pairs import joined, wanted_pairs
from nemo_emmett.corpora.readers.ted import TalksOfPair, data_folders

_SPLITS = ("train", "dev", "tst-COMMON", "tst-HE")


def read(source: Path, selection: Selection) -> Sequence[Part]:
    """The parts of MuST-C: a split of a pair.

    Args:
        source: the folder that holds ``en-de``, ``en-fr``, ...
        selection: splits are called ``train``, ``dev``, ``tst-COMMON``, ``tst-HE``.

    Raises:
        ConfigError: if a language or split is not there.
        DataError: if a file of the selection is missing.
    """
    folders = data_folders(source)
    pairs = wanted_pairs(folders, selection.languages, CORPUS.title)
    there = [split for split in _SPLITS if any((folder / split).is_dir() for folder in folders.values())]
    parts = []
    for split in chosen(selection.splits, there, f"splits of {CORPUS.title}"):
        for spoken, targets in pairs.items():
            for target in targets:
                talks = TalksOfPair(folders[spoken, target] / split, spoken, target)
                talks.check(CORPUS.url)
                name = f"{split}.{spoken}-{target}"
                parts.append(Part(split, (spoken, target), partial(_sentences, talks), spoken=spoken, name=name))
    return parts


def _sentences(talks: TalksOfPair) -> Iterator[Sentence | Skipped]:
    return joined([talks.rows()], talks.spoken, lambda talk: talks.folder / "wav" / f"{talk}.wav")


CORPUS = Corpus(
    name="must_c",
    title="MuST-C",
    release="1.0",
    licence="CC-BY-NC-ND-4.0",
    url="https://ict.fbk.eu/must-c-releases/",
    files="the folder that holds en-de/data/train/{wav,txt}/... for each pair",
    read=read,
)
