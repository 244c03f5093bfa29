"""Tatoeba: sentences that volunteers wrote and translated, in some 400 languages, under CC BY 2.0 FR.

Read from the weekly exports of tatoeba.org/downloads, tab-separated without a header, in a folder, packed or not:

- whole: ``sentences.tar.bz2`` (``sentences.csv``: id, ISO 639-3 code, text) or ``sentences_detailed.tar.bz2`` (with
  three more columns), and ``links.tar.bz2`` (``links.csv``: id, id of a translation; each link both ways).
  ``--languages`` is needed then, since any two of 400 could make a pair;
- by language: ``deu_sentences.tsv.bz2`` or ``deu_sentences_detailed.tsv.bz2`` for each language, with
  ``deu-eng_links.tsv.bz2`` for each pair.

Each pair of languages is a part named ``train.de-en``; Tatoeba makes no splits. A pair's id is that of both sentences
(``77-1276``), so a sentence with two translations is in two pairs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from nemo_emmett.corpora.corpus import Corpus, Part, Selection, Sentence, Skipped
from nemo_emmett.corpora.readers.files import WRONG_COLUMNS, SourceFiles
from nemo_emmett.corpora.readers.languages import check_languages, iso_code
from nemo_emmett.errors import ConfigError, DataError

SPLIT = "train"

_SENTENCES = re.compile(r"(?P<code>[a-z]{3})_sentences(_detailed)?\.tsv(\.bz2)?")
_LINKS = re.compile(r"(?P<one>[a-z]{3})-(?P<other>[a-z]{3})_links\.tsv(\.bz2)?")


@dataclass(frozen=True)
class _Table:
    """A file of an export."""

    source: SourceFiles
    name: str

    def rows(self) -> Iterator[tuple[list[str], bool]]:
        """The columns of its lines, and whether their number is right."""
        # A line with another number may have a tab in its sentence.
        num_columns = 2 if "links" in self.name else 6 if "detailed" in self.name else 3
        for line in self.source.lines(self.name):
            row = line.split("\t")
            yield row, len(row) == num_columns


@dataclass(frozen=True)
class _Pair:
    """Two languages and the tables that hold their sentences and links."""

    languages: tuple[str, str]  # ISO 639-1
    sentences: tuple[_Table, _Table]
    links: _Table
    links_are_theirs: bool  # or those of all languages

    def __call__(self) -> Iterator[Sentence | Skipped]:
        one, other = (_texts(table, lang) for table, lang in zip(self.sentences, self.languages, strict=True))
        for row, is_whole in self.links.rows():
            if not is_whole:
                yield Skipped(f"link: {WRONG_COLUMNS}")
                continue
            first, second = row
            if self.links_are_theirs or (first in one and second in other):
                # A sentence that a table of another week lacks is counted as empty.
                texts = (one.get(first, ""), other.get(second, ""))
                if None in texts:
                    yield Skipped(WRONG_COLUMNS)
                else:
                    yield Sentence(f"{first}-{second}", dict(zip(self.languages, texts, strict=True)))


def read(path: Path, selection: Selection) -> list[Part]:
    """A part for each pair of the selected languages that has a table of links; of the whole export, for each pair."""
    if set(selection.splits or [SPLIT]) != {SPLIT}:
        raise ConfigError(f"splits: Tatoeba has none but '{SPLIT}'; leave the option out.")
    whole = _whole(path)
    pairs = _pairs_by_language(path, selection) if whole is None else _pairs_of_whole(*whole, selection)
    return [Part(SPLIT, pair.languages, pair, name=f"{SPLIT}.{'-'.join(pair.languages)}") for pair in pairs]


def _whole(path: Path) -> tuple[_Table, _Table] | None:
    """The tables of sentences and links of the whole export; None if it does not exist."""
    sentences = _table(path, "sentences") or _table(path, "sentences_detailed")
    links = _table(path, "links")
    if sentences is None and links is None:
        return None
    if sentences is None:
        raise DataError(f"'{path}' has links.csv without sentences.csv; download sentences.tar.bz2 too.")
    if links is None:
        raise DataError(f"'{path}' has {sentences.name} without links.csv; download links.tar.bz2 too.")
    return sentences, links


def _table(path: Path, name: str) -> _Table | None:
    archive = path / f"{name}.tar.bz2"
    if archive.is_file():
        return _Table(SourceFiles(archive), f"{name}.csv")
    return _Table(SourceFiles(path), f"{name}.csv") if (path / f"{name}.csv").is_file() else None


def _pairs_of_whole(sentences: _Table, links: _Table, selection: Selection) -> list[_Pair]:
    languages = tuple(dict.fromkeys(selection.languages or ()))
    if len(languages) < 2:
        raise ConfigError("languages: the whole export of Tatoeba has some 400; name two or more, such as en,de.")
    check_languages(languages)
    pairs = combinations(languages, 2)
    return [_Pair(pair, (sentences, sentences), links, links_are_theirs=False) for pair in pairs]


def _pairs_by_language(path: Path, selection: Selection) -> list[_Pair]:
    source = SourceFiles(path)
    tables = {iso_code(found["code"]): _Table(source, name) for name, found in _found(source, _SENTENCES)}
    links = {(iso_code(f["one"]), iso_code(f["other"])): _Table(source, name) for name, f in _found(source, _LINKS)}
    if not links:
        raise DataError(f"There are no links of Tatoeba in '{path}'; what is needed: {CORPUS.files}")
    there = sorted({language for pair in links for language in pair})
    check_languages(selection.languages, there)
    wanted = selection.languages or there
    # Both deu-eng and eng-deu may be there: the same links.
    unique = {frozenset(pair): pair for pair in sorted(links, reverse=True) if set(pair) <= set(wanted)}
    if not unique:
        raise DataError(f"'{path}' has no links between any of {', '.join(wanted)}; download *_links.tsv.bz2 for them.")
    for pair in unique.values():
        for language in set(pair) - tables.keys():
            code = _LINKS.search(links[pair].name).group("one" if language == pair[0] else "other")
            raise DataError(
                f"'{path}' has {links[pair].name} without the sentences in '{language}'; download "
                f"{code}_sentences.tsv.bz2 too."
            )
    return [
        _Pair(pair, (tables[pair[0]], tables[pair[1]]), links[pair], links_are_theirs=True)
        for pair in sorted(unique.values())
    ]


def _found(source: SourceFiles, pattern: re.Pattern) -> Iterator[tuple[str, re.Match]]:
    for name in source.names:
        if (found := pattern.fullmatch(name.rpartition("/")[2])) is not None:
            yield name, found


def _texts(table: _Table, language: str) -> dict[str, str | None]:
    """The sentences of a language by their ids; None if the row has a wrong number of columns."""
    texts: dict[str, str | None] = {}
    for row, is_whole in table.rows():
        if len(row) < 2 or iso_code(row[1]) == language:
            texts[row[0]] = row[2] if is_whole else None
    return texts


CORPUS = Corpus(
    name="tatoeba",
    title="Tatoeba",
    release="the weekly exports of tatoeba.org",
    licence="CC-BY-2.0-FR",
    url="https://tatoeba.org/downloads",
    files=(
        "a folder with sentences.tar.bz2 and links.tar.bz2, or with deu_sentences.tsv.bz2, eng_sentences.tsv.bz2, "
        "deu-eng_links.tsv.bz2, ..., packed or not."
    ),
    read=read,
)
