"""Europarl-ST v1.1: debates of the European Parliament with translations (Iranzo-Sánchez et al., 2020).

As ``v1.1.tar.gz`` unpacks, each spoken language with its speeches, each pair with what it has of them:

    v1.1/en/audios/en.20080924.31.3-243.m4a
    v1.1/en/de/train/segments.lst         en.20080924.31.3-243 0.00 4.37, a segment of a speech and its seconds
    v1.1/en/de/train/segments.{en,de}     its transcript and its translation, on the same line

The pairs of a spoken language share its speeches: each segment is one recording with all of its translations. lhotse
has no recipe for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from nemo_emmett.corpora.corpus import Corpus, Part, Selection, Sentence, Skipped
from nemo_emmett.corpora.readers.files import SourceFiles, zipped_lines
from nemo_emmett.corpora.readers.languages import chosen
from nemo_emmett.corpora.readers.pairs import Segment, joined, need, need_folder, wanted_pairs
from nemo_emmett.errors import DataError

_SPLITS = ("train", "train-noisy", "dev", "test")


def read(source: Path, selection: Selection) -> Sequence[Part]:
    """The parts of Europarl-ST: a split of a spoken language, with its translations.

    Args:
        source: the folder ``v1.1``, or the one that holds it.
        selection: splits are called ``train``, ``train-noisy``, ``dev``, ``test``.

    Raises:
        ConfigError: if a language or split is not there.
        DataError: if a file of the selection is missing.
    """
    root = _root(source)
    pairs = [(folder.parent.name, folder.name) for folder in sorted(root.glob("??/??")) if folder.is_dir()]
    there = [split for split in _SPLITS if any((root / spoken / target / split).is_dir() for spoken, target in pairs)]
    parts = []
    for split in chosen(selection.splits, there, f"splits of {CORPUS.title}"):
        for spoken, targets in wanted_pairs(pairs, selection.languages, CORPUS.title).items():
            need(root / spoken / "audios", f"the speeches in {spoken}; get them from {CORPUS.url}")
            for target in targets:
                for name in ("segments.lst", f"segments.{spoken}", f"segments.{target}"):
                    path = root / spoken / target / split / name
                    need(path, f"a part of {spoken}-{target}; get it from {CORPUS.url}")
            sentences = partial(_sentences, root, split, spoken, targets)
            parts.append(Part(split, (spoken, *targets), sentences, spoken=spoken))
    return parts


def _root(source: Path) -> Path:
    what = "v1.1 (v1.1/en/audios, v1.1/en/de/...)"
    need_folder(source, what)
    for root in (source, source / "v1.1"):
        if any(root.glob("??/??/*/segments.lst")):
            return root
    raise DataError(f"'{source}' does not hold {what}; unpack v1.1.tar.gz of {CORPUS.url} there.")


def _sentences(root: Path, split: str, spoken: str, targets: Sequence[str]) -> Iterator[Sentence | Skipped]:
    readings = (_rows(root / spoken / target / split, spoken, target) for target in targets)
    return joined(readings, spoken, lambda speech: root / spoken / "audios" / f"{speech}.m4a")


def _rows(folder: Path, spoken: str, target: str) -> Iterator[tuple[Segment, dict[str, str]] | Skipped]:
    files = SourceFiles(folder)
    names = ("segments.lst", f"segments.{spoken}", f"segments.{target}")
    for place, *texts in zipped_lines([(files, name) for name in names]):
        try:
            speech, start, end = place.split()
            segment = Segment.of(speech, float(start), float(end))
        except ValueError:
            segment = Skipped("segment without its times")
        if isinstance(segment, Skipped):
            yield segment
        else:
            yield segment, {language: text.strip() for language, text in zip((spoken, target), texts, strict=True)}


CORPUS = Corpus(
    name="europarl_st",
    title="Europarl-ST",
    release="1.1",
    licence="CC-BY-NC-4.0",
    url="https://www.mllp.upv.es/europarl-st/",
    files="the folder v1.1 with {language}/audios/*.m4a and {language}/{target}/{split}/segments.*",
    read=read,
)
