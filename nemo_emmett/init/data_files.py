"""What kind of data a user's files hold, by their names and first records. Nothing here imports torch or NeMo."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from nemo_emmett.data.io.rows import KNOWN_COLUMNS, split_row
from nemo_emmett.errors import ConfigError, DataError
from nemo_emmett.prompts.language_codes import language_of_suffix, normalized

FIELDS = ("audio", "source", "target", "id", "duration", "offset", "source_lang", "target_lang")
"""Fields of a row that ``--column`` may name the column of."""

_FOLDERS_OF_AUDIO = ("clips", "audio", "wav")
"""Folders next to a TSV file that its paths may be relative to, as in Common Voice."""

_RECORDS_LOOKED_AT = 100
_PATTERN = re.compile(r"_OP_|[\[{(<]")


@dataclass(frozen=True)
class DataFile:
    """A file, or several of one kind, as a source of a recipe.

    Args:
        name: for messages: the path, or the two paths of a pair.
        is_speech: whether it holds recordings.
        entry: of ``input_cfg``, without its languages.
        has_languages: its records name their target languages.
        languages: source and target language that its records or the names of its files have, for the summary.
    """

    name: str
    is_speech: bool
    entry: dict[str, Any]
    has_languages: bool = False
    languages: tuple[str | None, str | None] = (None, None)
    notes: tuple[str, ...] = field(default=())


def describe_file(path: str, option: str, columns: Mapping[str, str], audio_dir: str | None) -> DataFile:
    """The source that a file is: a NeMo manifest, text in JSONL, or a TSV file of speech or of text.

    Args:
        path: of the file, or a pattern.
        option: that names it, for messages.
        columns: of TSV files, by field, where the user has named them.
        audio_dir: folder of recordings that a TSV file names by relative paths.

    Raises:
        DataError: if it is missing, empty, or of another kind.
        ConfigError: if a column is missing.
    """
    first = _first_file(path, option)
    suffix = Path(first.removesuffix(".gz")).suffix
    lines = _first_lines(first, option)
    if suffix == ".tsv":
        return _tsv(path, first, lines, columns, audio_dir)
    if suffix in (".json", ".jsonl"):
        return _json_lines(path, lines, option)
    raise DataError(
        f"{option}: '{path}' does not end in .tsv, .json or .jsonl; give such a file, or plain text as a pair of files "
        "(--text SOURCE TARGET)."
    )


def describe_pair(source: str, target: str, option: str) -> DataFile:
    """The source that two line-aligned text files are; their languages may be the ends of their names.

    Raises:
        DataError: if one is missing or empty.
    """
    for path in (source, target):
        _first_lines(_first_file(path, option), option)
    languages = tuple(_language_of_name(path) for path in (source, target))
    entry = {"type": "parallel_text", "source_paths": source, "target_paths": target}
    return DataFile(f"{source}, {target}", False, entry, languages=languages if None not in languages else (None, None))


def parse_columns(given: Sequence[str]) -> dict[str, str]:
    """The values of ``--column``, such as ``target=translation``.

    Raises:
        ConfigError: for one that is not of this form.
    """
    columns = {}
    for one in given:
        field_name, is_named, column = one.partition("=")
        if field_name not in FIELDS or not is_named or not column:
            raise ConfigError(f"--column: '{one}' is not FIELD=NAME with a FIELD of {', '.join(FIELDS)}.")
        columns[field_name] = column
    return columns


def _first_file(path: str, option: str) -> str:
    """The path, or the first file of a pattern.

    Raises:
        DataError: if there is no such file.
    """
    first = path
    if not os.path.lexists(path) and _PATTERN.search(path):
        from nemo_emmett.data.io.files import expand_paths

        first = expand_paths(path)[0]
    if not os.path.isfile(first):
        of_pattern = "" if first == path else f" (of '{path}')"
        raise DataError(f"{option}: there is no file '{first}'{of_pattern}; correct the path.")
    return first


def _first_lines(path: str, option: str) -> list[str]:
    try:
        with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as file:
            lines = [line.rstrip(b"\r\n") for line in islice(file, _RECORDS_LOOKED_AT + 1)]
    except OSError as error:
        raise DataError(f"{option}: '{path}' cannot be read ({error.strerror or error}).") from error
    if not any(line.strip() for line in lines):
        raise DataError(f"{option}: '{path}' is empty; give a file with records.")
    try:
        return [line.decode("utf-8-sig") for line in lines]
    except UnicodeDecodeError:
        return [line.decode("utf-8-sig", errors="replace") for line in lines]  # such records are skipped


def _language_of_name(path: str) -> str | None:
    """The end of a file's name, if it is the code of a language (train.en, train.en.gz)."""
    suffix = Path(path.removesuffix(".gz")).suffix.removeprefix(".")
    return language_of_suffix(suffix)


# TSV


def _tsv(path: str, first: str, lines: list[str], given: Mapping[str, str], audio_dir: str | None) -> DataFile:
    names = [name.strip() for name in lines[0].split("\t")]
    columns: dict[str, str | int] = {f: int(c) if c.isdecimal() else c for f, c in given.items()}
    has_header = not columns or any(isinstance(column, str) for column in columns.values())
    if has_header:
        columns = _columns_by_name(path, names, columns)
    is_speech = "audio" in columns
    if not is_speech and "target" not in columns and not given and len(names) == 2:
        entry = {"type": "parallel_text", "paths": path}
        return DataFile(path, False, entry, notes=("no header: the first column is the source, the second the target",))
    needed = ("audio", "target") if is_speech else ("source", "target")
    for name in needed:
        if name not in columns:
            raise ConfigError(
                f"--column: '{path}' has no column for '{name}' under a usual name; its columns are "
                f"{', '.join(names)}; name it by --column {name}=NAME (of speech, audio too)."
            )
    if is_speech:
        return _speech_tsv(path, first, lines, columns, has_header, audio_dir)
    used = {key: columns[key] for key in ("source", "target", "source_lang", "target_lang") if key in columns}
    entry = {"type": "parallel_text", "paths": path, **{f"{key}_column": column for key, column in used.items()}}
    return DataFile(path, False, entry, has_languages="target_lang" in columns)


def _columns_by_name(path: str, names: list[str], given: Mapping[str, str | int]) -> dict[str, str | int]:
    found: dict[str, str | int] = {}
    for name in FIELDS:
        if name in given:
            if isinstance(given[name], str) and given[name] not in names:
                raise ConfigError(
                    f"--column: '{path}' has no column '{given[name]}'; its columns are {', '.join(names)}."
                )
            found[name] = given[name]
        elif (known := next((known for known in KNOWN_COLUMNS[name] if known in names), None)) is not None:
            found[name] = known
    return found


def _speech_tsv(
    path: str,
    first: str,
    lines: list[str],
    columns: Mapping[str, str | int],
    has_header: bool,
    audio_dir: str | None,
) -> DataFile:
    names = [name.strip() for name in lines[0].split("\t")]
    # A column that has the name of its field need not be written.
    written = {f"{key}_column": column for key, column in columns.items() if column != key}
    entry = {"type": "speech_tsv", "paths": path, **written}
    number = names.index(columns["audio"]) if isinstance(columns["audio"], str) else columns["audio"]
    rows = [split_row(line, len(names)) for line in lines[has_header:] if line.strip()]
    recordings = [row[number].strip() for row in rows if number < len(row)]
    folder = audio_dir or _folder_of_audio(os.path.dirname(first), recordings)
    notes = ()
    if folder is not None:
        entry["audio_dir"] = folder
        notes = () if audio_dir else (f"recordings are in '{folder}'",)
    return DataFile(path, True, entry, has_languages="target_lang" in columns, notes=notes)


def _folder_of_audio(folder: str, recordings: Sequence[str]) -> str | None:
    """The folder next to a TSV file that has its recordings, if the file's own has none of them."""
    if not recordings or any(os.path.isfile(os.path.join(folder, one)) for one in recordings):
        return None
    for name in _FOLDERS_OF_AUDIO:
        if any(os.path.isfile(os.path.join(folder, name, one)) for one in recordings):
            return os.path.join(folder, name)
    return None


# JSON lines


def _json_lines(path: str, lines: list[str], option: str) -> DataFile:
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            records.append(record)
    if any("audio_filepath" in record for record in records):
        entry = {"type": "nemo", "manifest_filepath": path}
        targets = _targets_of(records)
        languages = (_listed([record.get("source_lang") or record.get("lang") for record in records]), _listed(targets))
        return DataFile(path, True, entry, has_languages=bool(targets), languages=languages)
    if any({"source", "target"} <= record.keys() for record in records):
        languages = tuple(_listed([record.get(f"{side}_lang") for record in records]) for side in ("source", "target"))
        entry = {"type": "parallel_text", "paths": path}
        return DataFile(path, False, entry, has_languages=languages[1] is not None, languages=languages)
    raise DataError(
        f"{option}: '{path}' has neither records with audio_filepath (a NeMo manifest) nor with source and target "
        "(text) in its first lines; correct the file, or the path."
    )


def _targets_of(records: Sequence[Mapping[str, Any]]) -> list[Any]:
    targets: list[Any] = []
    for record in records:
        translations, target = record.get("translations"), record.get("target_lang")
        targets += list(translations) if isinstance(translations, Mapping) else []
        targets += target if isinstance(target, list) else [target] if target else []
    return targets


def _listed(languages: Sequence[Any]) -> str | None:
    found = (normalized(language) for language in languages if isinstance(language, str) and language)
    return ", ".join(dict.fromkeys(found)) or None
