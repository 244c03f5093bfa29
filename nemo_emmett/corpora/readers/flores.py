"""FLORES-200 and FLORES+: the same 2009 sentences of Wikimedia in some 200 languages, to validate and test on.

Read as any of these is distributed, unpacked or, where it is one archive, as it is:

- FLORES-200, ``flores200_dataset.tar.gz`` of the NLLB team (2022): ``dev/deu_Latn.dev``, ``devtest/deu_Latn.devtest``;
- FLORES+ 2.0 as OLDI's GitHub releases have it, ``floresp-v2.0-rc.3.zip``, unpacked with its password:
  ``dev/dev.deu_Latn``;
- FLORES+ 2 and later as OLDI has it on the Hugging Face hub: ``dev/deu_Latn.jsonl``, also ``dev/deu_Latn.parquet``, a
  record for each sentence with ``id``, ``iso_639_3``, ``iso_15924`` and ``text`` among other fields.

``dev`` has 997 sentences and ``devtest`` 1012. **Ids**: a sentence's number in its split, from 0, is its ``id`` in
FLORES+ and the number of its line in the plain files; here it is written ``dev-0`` to ``devtest-1011``. FLEURS,
in which these sentences are read aloud, has other ids; ``fleurs.py`` joins them by text.

If a code has several varieties, such as ``apc_Arab`` in FLORES+, the file whose name is the plain code is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from nemo_emmett.corpora.corpus import Corpus, Part, Selection, Sentence, Skipped
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
        language: _sentences(source, split, files[split][language])[0]
        for language in chosen(languages, files[split], f"languages of FLORES' {split}")
    }


def read(path: Path, selection: Selection) -> list[Part]:
    """A part for each split, all languages side by side."""
    source, files = _files(path)
    parts = []
    for split in chosen(selection.splits, files, "splits of FLORES"):
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


def _parallel(source: SourceFiles, split: str, names: Mapping[str, str]) -> Iterator[Sentence | Skipped]:
    read = {language: _sentences(source, split, name) for language, name in names.items()}
    every = dict.fromkeys(identity for texts, _ in read.values() for identity in texts)
    causes: list[str] = []  # of records beyond those whose ids are missing
    for language, (texts, skipped) in read.items():
        missing = [identity for identity in every if identity not in texts]
        if len(missing) > len(skipped):  # a record that cannot be read lacks its id, too
            other = next(other for other, (texts, _) in read.items() if missing[0] in texts)
            raise DataError(
                f"{source.where(names[language])} and {source.where(names[other])} are not parallel: "
                f"'{missing[0]}' is in one of them only; take both from the same release."
            )
        causes = max(causes, skipped[len(missing) :], key=len)
    yield from map(Skipped, causes)
    for identity in every:
        if all(identity in texts for texts, _ in read.values()):
            yield Sentence(identity, {language: texts[identity] for language, (texts, _) in read.items()})
        else:
            yield Skipped("not in all languages")


def _sentences(source: SourceFiles, split: str, name: str) -> tuple[dict[str, str], list[str]]:
    """The texts by their ids, in the order of the ids, and the causes for which records were left out."""
    found: dict[int, str] = {}
    skipped = []
    for record in _records(source, name):
        try:
            number, text = int(record["id"]), record["text"]
        except (ValueError, KeyError, TypeError):
            number, text = None, None
        if not isinstance(text, str):
            skipped.append("record without an id and a text")
        elif found.setdefault(number, text) is not text:
            skipped.append("id occurs twice")
    if skipped and not found:
        raise DataError(f"{source.where(name)} is no file of FLORES+ ({skipped[0]}); download it again.")
    return {f"{split}-{number}": found[number] for number in sorted(found)}, skipped


def _records(source: SourceFiles, name: str) -> Iterator[Any]:
    if name.endswith(".parquet"):
        yield from _parquet(source, name)
    elif name.endswith(".jsonl"):
        for line in filter(str.strip, source.lines(name)):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            yield record
    else:
        yield from ({"id": number, "text": line} for number, line in enumerate(source.lines(name)))


def _parquet(source: SourceFiles, name: str) -> list[dict]:
    import pyarrow
    from pyarrow import parquet

    with source.open(name) as stream:
        content = pyarrow.BufferReader(stream.read())
    try:
        return parquet.read_table(content, columns=["id", "text"]).to_pylist()
    except (pyarrow.ArrowException, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{source.where(name)} is no file of FLORES+ ({error!r}); download it again.") from error


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
