"""OPUS: parallel text of all kinds, one corpus and language pair a download, in Moses form or as TMX.

Read, any number of them, from a folder, or one by itself:

- Moses, ``{corpus}/{version}/moses/de-en.txt.zip``: ``Europarl.de-en.de``, ``Europarl.de-en.en``, in most corpora
  ``Europarl.de-en.ids`` (documents and sentences of both sides, tab-separated), ``README`` and ``LICENSE``. Zipped
  or unpacked;
- TMX, ``{corpus}/{version}/tmx/de-en.tmx.gz``: ``<tu>`` with a ``<tuv xml:lang=...>`` for each side. Gzipped or not.

Each is a part named ``train.{corpus}.de-en``; OPUS makes no splits. Ids are the lines' (from 1) or the units' numbers.
Licences differ from corpus to corpus, see each one's page.

TMX (Translation Memory eXchange) is read unit by unit: files are larger than memory, and an XML parser stops at the
first character that XML forbids, of which crawled text has many. Hence the text between ``<tu>`` and ``</tu>`` is
extracted first and parsed by itself: a unit that is not well-formed does not affect the others.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from xml.etree import ElementTree

from nemo_emmett.corpora.corpus import Corpus, Part, Selection, Sentence, Skipped
from nemo_emmett.corpora.readers.files import SourceFiles, zipped_lines
from nemo_emmett.corpora.readers.languages import check_languages, iso_code
from nemo_emmett.errors import ConfigError, DataError

SPLIT = "train"

_CODE = r"[a-z]{2,3}(?:_[A-Za-z]{2,4})?"
_MOSES = re.compile(rf"(?P<corpus>.+)\.(?P<one>{_CODE})-(?P<other>{_CODE})\.(?P<side>{_CODE})")
_TMX = re.compile(rf"(?P<one>{_CODE})-(?P<other>{_CODE})\.tmx(?:\.gz)?")

_XML_LANG = "{http://www.w3.org/XML/1998/namespace}lang"

_CHARACTERS = 1 << 20
"""Characters to read at once."""

_START = re.compile(r"<tu(?=[\s/>])|<!--")
_END = re.compile(r"</tu\s*>|<tu(?=[\s/>])")
_DECLARED = re.compile(rb"""^\s*<\?xml[^>]*?encoding\s*=\s*["']([\w.-]+)""")


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
    """A part for each corpus and pair of the selected languages; some languages may be in no pair."""
    source = SourceFiles(path)
    zips = [SourceFiles(path / name) for name in source.names if path.is_dir() and name.endswith(".zip")]
    bitexts = sorted(
        (bitext for files in (source, *zips) for bitext in _bitexts(files)), key=lambda bitext: bitext.name
    )
    if not bitexts:
        raise DataError(f"There is no text of OPUS in '{path}'; what is needed: {CORPUS.files}")
    if set(selection.splits or [SPLIT]) != {SPLIT}:
        raise ConfigError(f"splits: OPUS has none but '{SPLIT}'; leave the option out.")
    check_languages(selection.languages, (language for bitext in bitexts for language in bitext.languages))
    wanted = [bitext for bitext in bitexts if set(bitext.languages) <= set(selection.languages or bitext.languages)]
    if not wanted:
        pairs = ", ".join(dict.fromkeys("-".join(bitext.languages) for bitext in bitexts))
        raise ConfigError(f"languages: no pair of {', '.join(selection.languages or ())} is there, but {pairs}.")
    by_name: dict[str, _Bitext] = {}
    for bitext in wanted:
        if (other := by_name.setdefault(bitext.name, bitext)) is not bitext:
            raise DataError(
                f"{bitext.source.where(bitext.names[0])} and {other.source.where(other.names[0])} are the same text; "
                "leave one of them."
            )
        if len(set(bitext.languages)) == 1:  # two varieties with one code in recipes, such as pt-pt_BR
            raise DataError(
                f"Both sides of {bitext.source.where(bitext.names[0])} are '{bitext.languages[0]}', by the codes of "
                "recipes; leave it out of the folder."
            )
    return [Part(SPLIT, bitext.languages, partial(_sentences, bitext), name=bitext.name) for bitext in wanted]


def _bitexts(source: SourceFiles) -> Iterator[_Bitext]:
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


def _sentences(bitext: _Bitext) -> Iterator[Sentence | Skipped]:
    if len(bitext.names) == 1:
        found: Iterator[Mapping[str, str] | Skipped] = _tmx(bitext)
    else:
        files = [(bitext.source, name) for name in bitext.names]
        found = (dict(zip(bitext.languages, lines, strict=True)) for lines in zipped_lines(files))
    for number, texts in enumerate(found, start=1):
        yield texts if isinstance(texts, Skipped) else Sentence(str(number), texts)


def _tmx(bitext: _Bitext) -> Iterator[Mapping[str, str] | Skipped]:
    (name,) = bitext.names
    with bitext.source.open(name) as stream:
        try:
            for unit in read_units(stream):
                if isinstance(unit, Skipped):
                    yield unit
                    continue
                texts = {}
                for variant in unit.iter("tuv"):
                    code = variant.get(_XML_LANG) or variant.get("lang") or ""
                    segment = variant.find("seg")
                    if code and segment is not None:
                        texts[iso_code(code)] = "".join(segment.itertext())
                yield {language: texts.get(language, "") for language in bitext.languages}
        except (LookupError, UnicodeDecodeError) as error:
            raise DataError(f"{bitext.source.where(name)} is no TMX ({error}); download it again.") from error


def read_units(stream: BinaryIO) -> Iterator[ElementTree.Element | Skipped]:
    """The ``<tu>`` elements of a TMX file, and the causes of those that cannot be parsed, in the order of the file.

    Raises:
        LookupError: if the file declares an encoding that does not exist.
        UnicodeDecodeError: if it is in UTF-16, and damaged.
    """
    for unit in _cut_out(_as_text(stream)):
        if unit is None:
            yield Skipped("unit without its end")
            continue
        try:
            yield ElementTree.fromstring(unit)
        except UnicodeEncodeError:  # bytes that could not be decoded
            yield Skipped("not UTF-8")
        except ElementTree.ParseError:
            yield Skipped("not well-formed XML")


def _as_text(stream: BinaryIO) -> io.TextIOWrapper:
    buffered = io.BufferedReader(stream)  # type: ignore[arg-type]
    head = buffered.peek(1024)[:1024]
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return io.TextIOWrapper(buffered, encoding="utf-16", newline="")
    declared = _DECLARED.match(head)
    encoding = "utf-8" if declared is None else declared[1].decode()
    return io.TextIOWrapper(buffered, encoding=encoding, errors="surrogateescape", newline="")


def _cut_out(text: io.TextIOWrapper) -> Iterator[str | None]:
    """The text of each unit; None for one without end, at the end of the file or the beginning of the next unit."""
    buffer, place = "", 0

    def fill() -> bool:
        nonlocal buffer, place
        more = text.read(_CHARACTERS)
        buffer, place = buffer[place:] + more, 0
        return bool(more)

    while True:
        start = _START.search(buffer, place)
        if start is None:
            place = max(place, len(buffer) - len("<!--"))  # it may be cut in two
            if not fill():
                return
            continue
        place = start.start()
        if start[0] == "<!--":
            while (end := buffer.find("-->", place)) < 0:
                if not fill():
                    return
            place = end + len("-->")
            continue
        while (end := _end_of_unit(buffer, place)) is None:
            if not fill():
                yield None
                return
        is_whole, place_after = end
        yield buffer[place:place_after] if is_whole else None
        place = place_after


def _end_of_unit(buffer: str, start: int) -> tuple[bool, int] | None:
    """Whether the unit that begins at ``start`` has an end, and where to continue; None if the buffer ends before."""
    tag_end = buffer.find(">", start)
    if tag_end > 0 and buffer[tag_end - 1] == "/":
        return True, tag_end + 1
    end = _END.search(buffer, start + 1)
    if end is None:
        return None
    return (True, end.end()) if end[0].startswith("</") else (False, end.start())


CORPUS = Corpus(
    name="opus",
    title="OPUS",
    release="any corpus of opus.nlpl.eu in Moses or TMX form",
    licence="LicenseRef-see-corpus",
    url="https://opus.nlpl.eu",
    files="de-en.txt.zip (or Corpus.de-en.de and Corpus.de-en.en from it), or de-en.tmx.gz; or a folder with several.",
    read=read,
)
