"""What is to be translated, one :class:`Request` for each text or recording, in the order in which it is given.

What is wrong with a whole file is an error; what is wrong with one record is kept as its ``fault``, so that the others
are translated.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from nemo_emmett.data.io.rows import KNOWN_COLUMNS
from nemo_emmett.errors import ConfigError, DataError
from nemo_emmett.models.inputs import AUDIO_SUFFIXES, Input, PlainText, Segment, check_inputs, is_audio_path
from nemo_emmett.prompts.languages import check_language
from nemo_emmett.typed_config import is_number

STDIN = "-"
"""The argument for standard input, a text or the path of an audio file on each line."""

INPUT_COLUMNS = (*KNOWN_COLUMNS["audio"], *KNOWN_COLUMNS["source"], "text")
"""Columns of a TSV that are translated: the first of them that there is."""

_OPTIONS = {".tsv": "--tsv", ".json": "--manifest", ".jsonl": "--manifest"}


@dataclass(frozen=True)
class Request:
    """A text or a recording to translate."""

    id: str
    shown: str  # the text, or the path of the recording as it was given
    input: Input = ""
    source_lang: str | None = None
    target_lang: str | None = None
    fault: str = ""  # why it cannot be translated; empty if nothing is known to be wrong


@dataclass(frozen=True)
class Languages:
    """The languages that the command line gives; they come before those of a record."""

    source: str | None = None
    target: str | None = None

    def check(self) -> None:
        """Refuse codes that no model knows.

        Raises:
            ConfigError: naming the option.
        """
        for option, code in (("--from", self.source), ("--to", self.target)):
            if code is not None:
                check_language(code, option)

    def of(self, request: Request) -> Request:
        """A request with its languages; one of its own that is not known is its fault."""
        source, target = self.source or request.source_lang, self.target or request.target_lang
        fault = request.fault
        if not fault and target is None:
            fault = "names no target language; give target_lang, or --to for all"
        try:
            if source is not None and not fault:
                source = check_language(source, "source_lang")
            if target is not None and not fault:
                target = check_language(target, "target_lang")
        except ConfigError as error:
            fault = str(error).rstrip(".")
        return replace(request, source_lang=source, target_lang=target, fault=fault)


def read_requests(
    inputs: Iterable[str],
    tsv: Iterable[Path],
    manifests: Iterable[Path],
    *,
    stdin: TextIO,
    languages: Languages,
    column: str | None = None,
) -> Iterator[Request]:
    """All requests, in the order of the arguments; what can be refused without reading all of a file is refused now.

    Args:
        inputs: texts, audio files, folders of audio files, or ``-`` for the lines of ``stdin``.
        tsv: tables with named columns.
        manifests: NeMo manifests.
        stdin: read if ``-`` is among the inputs.
        languages: of the command line.
        column: of the tables, to translate; None: the first of :data:`INPUT_COLUMNS`.

    Raises:
        ConfigError: if a language is missing or unknown.
        DataError: if a file is missing or of the wrong kind.
    """
    languages.check()
    inputs = list(inputs)
    if inputs and languages.target is None:
        raise ConfigError("--to: is missing; name the language to translate to, such as --to de.")
    files = list(chain.from_iterable(_expanded(one) for one in inputs))
    headers = {path: _columns(path, column) for path in tsv}
    for path in manifests:
        _check_file(path, "--manifest")

    def all_requests() -> Iterator[Request]:
        number = 0
        for one in files:
            for text in (line.rstrip("\r\n") for line in stdin) if one == STDIN else (one,):
                number += 1
                yield _of_argument(text, number, one == STDIN)
        for path, (columns, chosen) in headers.items():
            yield from _of_tsv(path, columns, chosen)
        for path in manifests:
            yield from _of_manifest(path)

    return map(languages.of, all_requests())


def _expanded(one: str) -> list[str]:
    """An argument, or the audio files of the folder that it names."""
    if os.path.isdir(one):
        found = (Path(folder, name) for folder, _, names in os.walk(one) for name in names)
        files = sorted(str(path) for path in found if path.suffix.lower() in AUDIO_SUFFIXES)
        if not files:
            kinds = ", ".join(sorted(AUDIO_SUFFIXES))
            raise DataError(f"the folder '{one}' holds no audio files ({kinds}); a text of that name: echo '{one}' |")
        return files
    if os.path.isfile(one) and not is_audio_path(one):
        option = _OPTIONS.get(Path(one).suffix.lower())
        remedy = f"give it by {option}" if option else f"give its lines on standard input: < {one}"
        raise DataError(f"'{one}' is a file, which would be translated as the text of its name; {remedy}.")
    if one != STDIN:
        check_inputs([one])
    return [one]


def _of_argument(text: str, number: int, is_line: bool) -> Request:
    if not is_audio_path(text):
        return Request(str(number), text, PlainText(text))
    fault = f"audio file '{text}' does not exist" if is_line and not os.path.isfile(text) else ""
    return Request(text, text, text, fault=fault)


def _columns(path: Path, column: str | None) -> tuple[list[str], str]:
    """The columns of a table, and the one to translate."""
    _check_file(path, "--tsv")
    columns = next(_rows(path), [])
    chosen = column or next((name for name in INPUT_COLUMNS if name in columns), None)
    if chosen not in columns:
        wanted = f"'{column}' (--column)" if column else "'audio', 'path', 'source', 'sentence' or 'text'"
        raise DataError(
            f"--tsv: '{path}' has no column {wanted} in its first line, but {', '.join(columns) or 'nothing'}; name "
            "the column to translate by --column."
        )
    return columns, chosen


def _rows(path: Path) -> Iterator[list[str]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield from csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"'{path}' is not a table in UTF-8 ({error}); write it again.") from error


def _of_tsv(path: Path, columns: list[str], chosen: str) -> Iterator[Request]:
    rows = _rows(path)
    next(rows)
    for number, row in enumerate(rows, start=2):
        if row:  # a blank line has no cells
            yield _of_row(dict(zip(columns, row, strict=False)), len(row), columns, chosen, path, number)


def _of_row(cells: Mapping[str, str], found: int, columns: list[str], chosen: str, path: Path, number: int) -> Request:
    cell, place = cells.get(chosen, ""), f"'{path}', line {number}"
    languages = (cells.get(key) or None for key in ("source_lang", "target_lang"))
    request = Request(cells.get("id") or f"{path.name}:{number}", cell, PlainText(cell), *languages)
    if found != len(columns):
        return replace(request, fault=f"{place}: has {found} columns, the first line {len(columns)}")
    if not cell.strip():
        return replace(request, fault=f"{place}: the column '{chosen}' is empty")
    if chosen in KNOWN_COLUMNS["audio"] or (chosen not in INPUT_COLUMNS and is_audio_path(cell)):
        part = (_number(cells.get(key)) for key in ("offset", "duration"))
        return _recorded(request, path.parent / cell, place, *part)
    return request


def _number(text: str | None) -> Any:
    """A cell as a number of seconds, None if it is empty; other text as it is, to be refused."""
    if not text:
        return None
    try:
        return float(text)
    except ValueError:
        return text


def _of_manifest(path: Path) -> Iterator[Request]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _of_record(line, path, number)
    except UnicodeDecodeError as error:
        raise DataError(f"'{path}' is not UTF-8 ({error.reason}); write it again.") from error


def _of_record(line: str, path: Path, number: int) -> Request:
    request = Request(f"{path.name}:{number}", line.strip())
    place = f"'{path}', line {number}"
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        return replace(request, fault=f"{place}: not JSON ({error.msg})")
    if not isinstance(record, Mapping):
        return replace(request, fault=f"{place}: is no JSON object")
    audio, text = record.get("audio_filepath"), record.get("text")
    request = replace(
        request,
        id=str(record.get("id", request.id)),
        shown=str(audio or text or ""),
        source_lang=_language(record.get("source_lang", record.get("lang"))),
        target_lang=_language(record.get("target_lang")),
    )
    if audio is None and isinstance(text, str) and text.strip():
        return replace(request, input=PlainText(text))
    if not isinstance(audio, str):
        return replace(request, fault=f"{place}: has neither audio_filepath nor text")
    return _recorded(request, path.parent / audio, place, record.get("offset"), record.get("duration"))


def _language(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _recorded(request: Request, path: Path, place: str, offset: Any, duration: Any) -> Request:
    """A request for a recording, or for a part of it where an offset is given."""
    if not path.is_file():
        return replace(request, fault=f"audio file '{path}' does not exist")
    if offset is None:
        return replace(request, input=path)
    if not (_is_seconds(offset) and (duration is None or (_is_seconds(duration) and duration > 0))):
        return replace(
            request, fault=f"{place}: offset {offset!r} and duration {duration!r} are no part of a recording"
        )
    return replace(request, input=Segment(path, offset, duration))


def _is_seconds(value: Any) -> bool:
    return is_number(value) and 0 <= value < float("inf")


def _check_file(path: Path, option: str) -> None:
    if not path.is_file():
        raise DataError(f"{option}: there is no file '{path}'; correct the path.")
