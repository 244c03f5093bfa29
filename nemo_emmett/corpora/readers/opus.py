"""OPUS: parallel text of all kinds, one corpus and language pair a download, in Moses form or as TMX.

Read, any number of them, from a folder, or one by itself:

- Moses, ``{corpus}/{version}/moses/de-en.txt.zip``: ``Europarl.de-en.de``, ``Europarl.de-en.en``, in most corpora
  ``Europarl.de-en.ids`` (documents and sentences of both sides, tab-separated), ``README`` and ``LICENSE``. Zipped
  or unpacked;
- TMX, ``{corpus}/{version}/tmx/de-en.tmx.gz``: ``<tu>`` with a ``<tuv xml:lang=...>`` for each side. Gzipped or not.

Each is a part named ``train.{corpus}.de-en``; OPUS makes no splits. Ids are the lines' (from 1) or the units' numbers.
Licences differ from corpus to corpus, see each one's page.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

from nemo_emmett.corpora.corpus import Corpus, Part, Selection, Sentence, Skipped
from nemo_emmett.corpora.readers.files import SourceFiles, zipped_lines
from nemo_emmett.corpora.readers.languages import check_languages, iso_code
from nemo_emmett.corpora.readers.tmx import read_units
from nemo_emmett.errors import ConfigError, DataError

SPLIT = "train"

_CODE = r"[a-z]{2,3}(?:_[A-Za-z]{2,4})?"
_MOSES = re.compile(rf"(?P<corpus>.+)\.(?P<one>{_CODE})-(?P<other>{_CODE})\.(?P<side>{_CODE})")
_TMX = re.compile(rf"(?P<one>{_CODE})-(?P<other>{_CODE})\.tmx(?:\.gz)?")

_XML_LANG = "{http://www.w3.org/XML/1998/namespace}lang"


@dataclass(frozen=True)
class _Bitext:
    """One corpus in one pair of languages."""

    corpus: str
    languages: tuple[str, str]  # ISO 639-1
    source: SourceFiles
    names: tuple[str, ...]  # of the two sides in Moses form, or of the one TMX file

    @property
    def name(self) -> str:
        """Of its part."""
        return ".".join(filter(None, (SPLIT, self.corpus, "-".join(self.languages))))


def read(path: Path, selection: Selection) -> list[Part]:
    """A part for each corpus and pair of the languages asked for; of some of them there may be none."""
    bitexts = sorted(_bitexts(path), key=lambda bitext: bitext.name)
    if not bitexts:
        raise DataError(f"There is no text of OPUS in '{path}'; what is needed: {CORPUS.files}")
    if set(selection.splits or [SPLIT]) != {SPLIT}:
        raise ConfigError(f"splits: OPUS has none but '{SPLIT}'; leave the option out.")
    check_languages(selection.languages, (language for bitext in bitexts for language in bitext.languages))
    wanted = [bitext for bitext in bitexts if set(bitext.languages) <= set(selection.languages or bitext.languages)]
    if not wanted:
        pairs = ", ".join(dict.fromkeys("-".join(bitext.languages) for bitext in bitexts))
        raise ConfigError(f"languages: no pair of {', '.join(selection.languages or ())} is there, but {pairs}.")
    _refuse_doubles(wanted)
    _refuse_one_language(wanted)
    return [Part(SPLIT, bitext.languages, partial(_sentences, bitext), name=bitext.name) for bitext in wanted]


def _bitexts(path: Path) -> Iterator[_Bitext]:
    source = SourceFiles(path)
    yield from _bitexts_in(source)
    if path.is_dir():
        for name in source.names:
            if name.endswith(".zip"):
                yield from _bitexts_in(SourceFiles(path / name))


def _bitexts_in(source: SourceFiles) -> Iterator[_Bitext]:
    for name in source.names:
        file = PurePosixPath(name)
        if (found := _TMX.fullmatch(file.name)) is not None:
            corpus = file.parent.name or (source.path if source.path.is_dir() else source.path.parent).name
            yield _Bitext(corpus, _pair(found), source, (name,))
        elif (found := _MOSES.fullmatch(file.name)) is not None and found["side"] == found["one"]:
            stem = f"{found['corpus']}.{found['one']}-{found['other']}"
            other = str(file.with_name(f"{stem}.{found['other']}"))
            source.need(other, f"'{name}' is parallel to it; unpack or download both")
            yield _Bitext(found["corpus"], _pair(found), source, (name, other))


def _pair(found: re.Match) -> tuple[str, str]:
    return iso_code(found["one"]), iso_code(found["other"])


def _refuse_doubles(bitexts: list[_Bitext]) -> None:
    by_name: dict[str, _Bitext] = {}
    for bitext in bitexts:
        if (other := by_name.setdefault(bitext.name, bitext)) is not bitext:
            raise DataError(
                f"{bitext.source.where(bitext.names[0])} and {other.source.where(other.names[0])} are the same text; "
                "leave one of them."
            )


def _refuse_one_language(bitexts: list[_Bitext]) -> None:
    """Refuse what is parallel in two varieties (pt-pt_BR) that recipes know by one code."""
    for bitext in bitexts:
        if len(set(bitext.languages)) == 1:
            raise DataError(
                f"Both sides of {bitext.source.where(bitext.names[0])} are '{bitext.languages[0]}', by the codes that "
                "recipes know; leave it out of the folder."
            )


def _sentences(bitext: _Bitext) -> Iterator[Sentence | Skipped]:
    read_texts = _moses if len(bitext.names) == 2 else _tmx
    for number, texts in enumerate(read_texts(bitext), start=1):
        yield texts if isinstance(texts, Skipped) else Sentence(str(number), texts)


def _moses(bitext: _Bitext) -> Iterator[Mapping[str, str]]:
    for lines in zipped_lines([(bitext.source, name) for name in bitext.names]):
        yield dict(zip(bitext.languages, lines, strict=True))


def _tmx(bitext: _Bitext) -> Iterator[Mapping[str, str] | Skipped]:
    (name,) = bitext.names
    with bitext.source.open(name) as stream:
        try:
            for unit in read_units(stream):
                if isinstance(unit, Skipped):
                    yield unit
                else:
                    texts = dict(_variants(unit))
                    yield {language: texts.get(language, "") for language in bitext.languages}
        except (LookupError, UnicodeDecodeError) as error:
            raise DataError(f"{bitext.source.where(name)} is no TMX ({error}); download it again.") from error


def _variants(unit: ElementTree.Element) -> Iterator[tuple[str, str]]:
    for variant in unit.iter("tuv"):
        code = variant.get(_XML_LANG) or variant.get("lang") or ""
        segment = variant.find("seg")
        if code and segment is not None:
            yield iso_code(code), "".join(segment.itertext())


CORPUS = Corpus(
    name="opus",
    title="OPUS",
    release="any corpus of opus.nlpl.eu in Moses or TMX form",
    licence="LicenseRef-see-corpus",
    url="https://opus.nlpl.eu",
    files="de-en.txt.zip (or Corpus.de-en.de and Corpus.de-en.en from it), or de-en.tmx.gz; or a folder with several.",
    read=read,
)
