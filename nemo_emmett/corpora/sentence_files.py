"""Sentences with their place, from text files, manifests and prepared corpora."""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from nemo_emmett.errors import DataError
from nemo_emmett.prompts.language_codes import language_code, language_of_suffix

MANIFESTS = (".json", ".jsonl")

_WITH_LANGUAGE = re.compile(r"(?P<language>[A-Za-z]{2,3}(?:[-_][A-Za-z0-9]+)*)=(?P<path>.+)")

Opener = Callable[[Path], BinaryIO]
"""Opens a file for reading bytes."""


@dataclass(frozen=True)
class PlacedSentence:
    """A sentence in the languages of its line, with its place."""

    texts: Mapping[str, str]  # language code -> text
    file: Path
    line: int  # from 1

    @property
    def place(self) -> str:
        """``test.de:17``."""
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class SentenceFile:
    """A file with a sentence a line."""

    path: Path
    language: str | None  # of a text file; None: a manifest, whose records name it


def find_sentence_files(source: str | Path) -> list[SentenceFile]:
    """The files of a source.

    Args:
        source: a text file whose language is its suffix (``test.de``, ``test.de.gz``), or given (``de=test.txt``); a
            NeMo manifest (``.json``, ``.jsonl``, also ``.gz``); or a folder that ``nemo-emmett prepare`` has written,
            of which all text and manifests are taken.

    Raises:
        DataError: if the file does not exist, the folder has no sentences or an unfinished corpus, or the language is
            unknown.
    """
    path, language = Path(source), None
    if not path.exists() and (given := _WITH_LANGUAGE.fullmatch(str(source))):
        path, language = Path(given["path"]), given["language"]
    if path.is_dir():
        return _files_of_corpus(path)
    if not path.is_file():
        raise DataError(f"'{path}' does not exist; give a text file, a manifest, or the folder of a prepared corpus.")
    if language is not None:
        if (code := language_code(language)) is None:
            raise DataError(
                f"'{source}': '{language}' is not a known language; write an ISO 639-1 code, as in de={path}."
            )
        language = code
    if language is None and not _is_manifest(path) and (language := _suffix_language(path)) is None:
        raise DataError(f"'{path}': its name does not end in a language, as in test.de; write it before: de={path}.")
    return [SentenceFile(path, language)]


def read_sentences(file: SentenceFile, opener: Opener | None = None) -> Iterator[PlacedSentence]:
    """The sentences of a file in its order, without empty lines, which are counted in the numbers of lines.

    Args:
        file: from :func:`find_sentence_files`.
        opener: opens the file; one that shows progress, for instance.

    Raises:
        DataError: if the file is damaged, or a line of a manifest names no language.
    """
    for number, line in enumerate(_lines(file.path, opener), start=1):
        if text := line.strip():
            texts = {file.language: text} if file.language else _texts_of_record(text, file.path, number)
            yield PlacedSentence(texts, file.path, number)


def _files_of_corpus(folder: Path) -> list[SentenceFile]:
    if any(folder.glob("*.started.json")):
        raise DataError(f"'{folder}' holds a corpus that is not finished; start its `prepare` again and let it end.")
    texts = [SentenceFile(path, _suffix_language(path)) for path in sorted(folder.glob("text/*")) if path.is_file()]
    manifests = [SentenceFile(path, None) for path in sorted(folder.glob("speech/**/*")) if _is_manifest(path)]
    files = [file for file in texts if file.language is not None] + manifests
    if not files:
        raise DataError(f"'{folder}' has no sentences in text/ or speech/; give a folder that `prepare` has written.")
    return files


def _is_manifest(path: Path) -> bool:
    # The dataloader's counts next to a manifest are none.
    return _unpacked_name(path).suffix in MANIFESTS and not path.name.endswith(".sizes.json")


def _suffix_language(path: Path) -> str | None:
    return language_of_suffix(_unpacked_name(path).suffix[1:])


def _unpacked_name(path: Path) -> Path:
    return path.with_suffix("") if path.suffix == ".gz" else path


def _lines(path: Path, opener: Opener | None) -> Iterator[str]:
    try:
        with opener(path) if opener else open(path, "rb") as packed:
            unpacked = gzip.GzipFile(fileobj=packed) if path.suffix == ".gz" else packed
            yield from io.TextIOWrapper(unpacked, encoding="utf-8-sig", newline="\n")
    except UnicodeDecodeError as error:
        raise DataError(f"'{path}' is not UTF-8 ({error.reason}); convert it with iconv.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"'{path}' cannot be read to its end ({error}); download or write it again.") from error


def json_record(line: str, path: str | Path, number: int) -> Any:
    """The JSON value of a line of a manifest, whose place is for the message of DataError."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"'{path}', line {number}: not JSON ({error.msg}); write the manifest again.") from error


def _texts_of_record(line: str, path: Path, number: int) -> dict[str, str]:
    """The texts of a line of a manifest; the language of ``text`` is as in docs/data.md."""
    record = json_record(line, path, number)
    texts = _texts(record) if isinstance(record, dict) else {}
    if not texts or not all(isinstance(part, str) for pair in texts.items() for part in pair):
        raise DataError(
            f"'{path}', line {number}: needs a 'text' and its language in 'lang', 'source_lang' or 'target_lang'; "
            "add them to the manifest."
        )
    return texts


def _texts(record: Mapping[str, Any]) -> dict[Any, Any]:
    if supervisions := record.get("supervisions"):  # a Lhotse cut; the other records are those of NeMo manifests
        text = " ".join(supervision.get("text") or "" for supervision in supervisions)
        record = {"text": text, "lang": supervisions[0].get("language"), **(record.get("custom") or {})}
    text, translations = record.get("text"), record.get("translations")
    if isinstance(translations, Mapping):
        language = record.get("lang", record.get("source_lang"))
        return dict(translations) if text is None else {language: text, **translations}
    language = record.get("target_lang", record.get("lang", record.get("source_lang")))
    return {} if text is None else {language: text}
