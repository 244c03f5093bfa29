"""FLORES-200 and FLORES+: the same 2009 sentences of Wikimedia in some 200 languages, to validate and test on.

Read as any of these is distributed, unpacked or, where it is one archive, as it is:

- FLORES-200, ``flores200_dataset.tar.gz`` of the NLLB team (2022): ``dev/deu_Latn.dev``, ``devtest/deu_Latn.devtest``;
- FLORES+ 2.0 as OLDI's GitHub releases have it, ``floresp-v2.0-rc.3.zip``, unpacked with its password:
  ``dev/dev.deu_Latn``;
- FLORES+ 2 and later as OLDI has it on the Hugging Face hub: ``dev/deu_Latn.jsonl``, also ``dev/deu_Latn.parquet``, a
  record for each sentence with ``id``, ``iso_639_3``, ``iso_15924`` and ``text`` among other fields.

``dev`` has 997 sentences and ``devtest`` 1012. **Ids**: a sentence's number in its split, from 0, is its ``id`` in
FLORES+ and the number of its line in the plain files; here it is written ``dev-0`` to ``devtest-1011``. FLEURS, which
has these sentences read aloud, has other ids: they join its own languages with one another, across its own division
into train, dev and test, but are no places in FLORES. Those who brought both together did it by the text of FLEURS'
``raw_transcription``, which is FLORES' sentence of that language (github.com/fdschmidt93/fleurs-slu). So a FLEURS id
gets its FLORES id by a language in which the texts agree, and joins all other languages by id.

Where a language is there in several varieties under one code, such as the two of ``apc_Arab`` in FLORES+, the file
whose name is the plain code is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from nemo_emmett.corpora.corpus import Corpus, Part, Selection, Sentence
from nemo_emmett.corpora.readers.files import SourceFiles
from nemo_emmett.corpora.readers.languages import chosen, iso_code
from nemo_emmett.errors import DataError

SPLITS = ("dev", "devtest")

_PATTERNS = tuple(
    pattern
    for split in SPLITS
    for pattern in (f"{split}/*.{split}", f"{split}/{split}.*", f"{split}/*.jsonl", f"{split}/*.parquet")
)
_FILE = re.compile(r"(?P<split>dev|devtest)/((dev|devtest)\.)?(?P<code>[a-z]{3}_[A-Z][a-z]{3})(\.\w+)?")


def flores_sentences(path: Path | str, split: str, languages: Sequence[str] | None = None) -> dict[str, dict[str, str]]:
    """The sentences of a split of FLORES by language and id.

    Args:
        path: FLORES-200 or FLORES+, as it is distributed.
        split: ``dev`` or ``devtest``.
        languages: ISO 639-1 codes; by default all that are there.

    Returns:
        ``{"de": {"dev-0": text, "dev-1": text, ...}, ...}``, in the order of the ids.

    Raises:
        ConfigError: if a language or the split is not there.
        DataError: if FLORES is not there, or a file is damaged.
    """
    source, files = _files(Path(path))
    chosen([split], files, "splits of FLORES")
    return {
        language: dict(_sentences(source, split, files[split][language]))
        for language in chosen(languages, files[split], f"languages of FLORES' {split}")
    }


def read(path: Path, selection: Selection) -> list[Part]:
    """A part for each split, all languages side by side."""
    source, files = _files(path)
    splits = chosen(selection.splits, files, "splits of FLORES")
    parts = []
    for split in splits:
        languages = chosen(selection.languages, files[split], f"languages of FLORES' {split}")
        names = {language: files[split][language] for language in languages}
        parts.append(Part(split, languages, partial(_parallel, source, split, names)))
    return parts


def _files(path: Path) -> tuple[SourceFiles, dict[str, dict[str, str]]]:
    """The files by split and language."""
    source = SourceFiles(path).rooted(*_PATTERNS)
    files: dict[str, dict[str, str]] = {}
    for name in source.matching(*_PATTERNS):
        if (found := _FILE.fullmatch(name)) is not None:
            files.setdefault(found["split"], {})[iso_code(found["code"])] = name
    if not files:
        raise DataError(f"There is no FLORES in '{path}'; what is needed: {CORPUS.files}")
    return source, files


def _parallel(source: SourceFiles, split: str, names: Mapping[str, str]) -> Iterator[Sentence]:
    texts = {language: dict(_sentences(source, split, name)) for language, name in names.items()}
    first, *others = names
    for language in others:
        if texts[language].keys() != texts[first].keys():
            odd = next(iter(texts[language].keys() ^ texts[first].keys()))
            raise DataError(
                f"{source.where(names[language])} and {source.where(names[first])} are not parallel: "
                f"'{odd}' is in one of them only; take both from the same release."
            )
    for identity in texts[first]:
        yield Sentence(identity, {language: texts[language][identity] for language in names})


def _sentences(source: SourceFiles, split: str, name: str) -> Iterator[tuple[str, str]]:
    for number, text in sorted(_numbered(source, name)):
        yield f"{split}-{number}", text


def _numbered(source: SourceFiles, name: str) -> Iterator[tuple[int, str]]:
    try:
        if name.endswith(".parquet"):
            yield from ((int(record["id"]), record["text"]) for record in _parquet(source, name))
        elif name.endswith(".jsonl"):
            records = (json.loads(line) for line in source.lines(name) if line.strip())
            yield from ((int(record["id"]), record["text"]) for record in records)
        else:
            yield from enumerate(source.lines(name))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{source.where(name)} is no file of FLORES+ ({error!r}); download it again.") from error


def _parquet(source: SourceFiles, name: str) -> list[dict]:
    import pyarrow
    from pyarrow import parquet

    with source.open(name) as stream:
        return parquet.read_table(pyarrow.BufferReader(stream.read()), columns=["id", "text"]).to_pylist()


CORPUS = Corpus(
    name="flores",
    title="FLORES-200 and FLORES+",
    release="FLORES-200 (2022); FLORES+ 2.0 and later",
    licence="CC-BY-SA-4.0",
    url="https://huggingface.co/datasets/openlanguagedata/flores_plus",
    files=(
        "flores200_dataset.tar.gz, or a folder with dev/ and devtest/ in which each language has a file: "
        "deu_Latn.dev (FLORES-200), dev.deu_Latn, deu_Latn.jsonl or deu_Latn.parquet (FLORES+)."
    ),
    read=read,
)
