"""Parallel text: line-aligned files, TSV and JSONL, in two languages or in many.

Each source is an iterable of NeMo's ``SourceTargetTextExample``; a record that cannot be used is noted and skipped.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import permutations

from nemo.collections.common.data.lhotse.cutset import attach_tags
from nemo.collections.common.data.lhotse.text_adapters import SourceTargetTextExample, TextExample

from nemo_emmett.data.config.sources import Source
from nemo_emmett.data.io.files import ShardOrder, decoded, expand_paths, is_unicode, open_lines, zip_lines
from nemo_emmett.data.io.line_index import open_numbered_lines
from nemo_emmett.data.io.skipped_records import InvalidRecord, SkippedRecords
from nemo_emmett.data.readers.base import Records
from nemo_emmett.data.readers.examples import mark_origin
from nemo_emmett.data.readers.tsv import TsvColumns
from nemo_emmett.errors import ConfigError
from nemo_emmett.prompts.language_codes import normalized
from nemo_emmett.prompts.languages import is_known_language


class AlignedText:
    """Line-aligned files, one per side: each line is one example per direction.

    Args:
        shards: for each shard, the file of each side. Sides are language codes, or ``source`` and ``target``.
        directions: the pairs of sides to translate between, (from, to).
        languages: language code of each side; None where it is not known.
        skipped_records: receives the lines that cannot be used.
        order: order of the shards.
    """

    def __init__(
        self,
        shards: Sequence[Mapping[str, str]],
        directions: Sequence[tuple[str, str]],
        languages: Mapping[str, str | None],
        skipped_records: SkippedRecords,
        order: ShardOrder,
    ) -> None:
        self.shards = list(shards)
        self.directions = list(directions)
        self.languages = dict(languages)
        self.skipped_records = skipped_records
        self.order = order

    def __iter__(self) -> Iterator[SourceTargetTextExample]:
        for shard in self.order(range(len(self.shards))):
            for number, lines in zip_lines(self.files[shard]):
                yield from self.examples_of(shard, number, lines)

    @property
    def files(self) -> list[tuple[str, ...]]:
        """The files of each shard."""
        return [tuple(shard.values()) for shard in self.shards]

    def examples_of(self, index: int, number: int, lines: Sequence[bytes]) -> Iterator[SourceTargetTextExample]:
        """The examples of one line of the shard ``index``, one per direction; ``number`` is from 1."""
        shard, place = self.shards[index], f"line {number}"
        first = next(iter(shard.values()))  # the lines of all sides are one record, counted under this file
        self.skipped_records.read(first)
        texts = {}
        for (side, path), line in zip(shard.items(), lines, strict=True):
            note = partial(self.skipped_records.add, path, place, record=(first, place))
            if (text := decoded(line, note)) is None:
                continue
            if text := text.strip():
                texts[side] = text
            else:
                note("empty text")
        for source, target in self.directions:
            if source in texts and target in texts:
                yield self._pair(shard, number, source, target, texts[source], texts[target])

    def example_of(self, index: int, number: int, k: int, lines: Sequence[bytes]) -> SourceTargetTextExample | None:
        """The example of direction ``k`` of a line of the shard ``index``, of the two sides of this direction; None if
        either cannot be used, which is not noted."""
        texts = [decoded(line, lambda _: None) for line in lines]
        if not all(text and text.strip() for text in texts):
            return None
        source, target = (text.strip() for text in texts)
        return self._pair(self.shards[index], number, *self.directions[k], source, target)

    def _pair(
        self, shard: Mapping[str, str], number: int, from_side: str, to_side: str, source: str, target: str
    ) -> SourceTargetTextExample:
        identity = f"{shard[from_side]}:{number}"
        if len(self.directions) > 1:
            identity += f":{from_side}-{to_side}"
        pair = _text_pair(identity, source, target, self.languages[from_side], self.languages[to_side])
        mark_origin(pair, next(iter(shard.values())), f"line {number}")
        return pair


class _OneFileText(ABC):
    """Text files with both sides of an example in one line. A subclass defines the format of a line.

    Blank lines are no records.
    """

    def __init__(
        self,
        paths: Sequence[str],
        source_lang: str | None,
        target_lang: str | None,
        skipped_records: SkippedRecords,
        order: ShardOrder,
    ) -> None:
        self.paths = list(paths)
        self.source_lang = source_lang
        self.target_lang = target_lang
        self.skipped_records = skipped_records
        self.order = order

    @property
    def files(self) -> list[tuple[str, ...]]:
        """The file of each shard."""
        return [(path,) for path in self.paths]

    @abstractmethod
    def _fields(self, path: str, line: str) -> dict:
        """The fields ``source``, ``target`` and, perhaps, ``source_lang`` and ``target_lang`` of one line."""

    def __iter__(self) -> Iterator[SourceTargetTextExample]:
        for index in self.order(range(len(self.paths))):
            for number, line in enumerate(open_lines(self.paths[index]), start=1):
                yield from self.examples_of(index, number, (line,))

    def examples_of(self, index: int, number: int, lines: Sequence[bytes]) -> Iterator[SourceTargetTextExample]:
        """The example of one line of the file ``index``, if it has one; ``number`` is from 1."""
        path, (line,) = self.paths[index], lines
        if not line.strip(b" "):  # a line of tabs is a row of empty cells
            return
        self.skipped_records.read(path)
        note = partial(self.skipped_records.add, path, f"line {number}")
        if (text := decoded(line, note)) is None:
            return
        try:
            pair = self._example(f"{path}:{number}", self._fields(path, text))
        except InvalidRecord as cause:
            note(str(cause))
            return
        mark_origin(pair, path, f"line {number}")
        yield pair

    def _example(self, identity: str, fields: Mapping) -> SourceTargetTextExample:
        source, target = fields["source"], fields["target"]
        if not isinstance(source, str) or not isinstance(target, str):
            raise InvalidRecord("text is not a string")
        if not source.strip() or not target.strip():
            raise InvalidRecord("empty text")
        if not is_unicode(source) or not is_unicode(target):
            raise InvalidRecord("text is not Unicode")
        source_lang = normalized(fields.get("source_lang") or self.source_lang)
        target_lang = normalized(fields.get("target_lang") or self.target_lang)
        if not target_lang:
            raise InvalidRecord("no target language")
        for language in (source_lang, target_lang):
            if language is not None and not is_known_language(str(language)):
                raise InvalidRecord(f"unknown language '{language}'")
        return _text_pair(identity, source.strip(), target.strip(), source_lang, target_lang)


class TsvText(_OneFileText):
    """Tab-separated files.

    Args:
        columns: of ``source`` and ``target``, and perhaps of ``source_lang`` and ``target_lang``: numbers from 0, or
            names in the first line of each file.
    """

    def __init__(self, paths: Sequence[str], columns: Mapping[str, int | str], **kwargs) -> None:
        super().__init__(paths, **kwargs)
        self.columns = TsvColumns(columns)

    def examples_of(self, index: int, number: int, lines: Sequence[bytes]) -> Iterator[SourceTargetTextExample]:
        """The example of one line of the file ``index``, if it has one, which the header has not."""
        if self.columns.has_header and number == 1:
            self.columns.read_header(self.paths[index], *lines)
            return iter(())
        return super().examples_of(index, number, lines)

    def _fields(self, path: str, line: str) -> dict:
        return self.columns.row(path, line)


class JsonlText(_OneFileText):
    """One JSON object a line.

    Args:
        fields: names of the fields with the source and the target text.
    """

    def __init__(self, paths: Sequence[str], fields: tuple[str, str], **kwargs) -> None:
        super().__init__(paths, **kwargs)
        self.fields = fields

    def _fields(self, path: str, line: str) -> dict:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # the latter where it is nested too deeply
            raise InvalidRecord("not JSON") from None
        if not isinstance(record, dict):
            raise InvalidRecord("not a JSON object")
        for field in self.fields:
            if field not in record:
                raise InvalidRecord(f"no field '{field}'")
        source, target = (record[field] for field in self.fields)
        return {**record, "source": source, "target": target}


class TextRecords(Records):
    """The lines of parallel text by number."""

    def __init__(
        self, name: str, text: AlignedText | TsvText | JsonlText, index_dir: str | None, tags: Mapping | None
    ) -> None:
        super().__init__(name, text.files, partial(open_numbered_lines, index_dir=index_dir), tags)
        self.text = text

    @property
    def examples_of_complete(self) -> int | None:
        """See :meth:`Records.examples_of_complete`: of line-aligned text, one per direction."""
        return len(self.text.directions) if isinstance(self.text, AlignedText) else None

    def _examples(self, shard: int, number: int, lines: Sequence[bytes]) -> Iterator[SourceTargetTextExample]:
        return self.text.examples_of(shard, number, lines)

    def read_one(self, shard: int, number: int, k: int) -> SourceTargetTextExample | None:
        """See :meth:`Records.read_one`; of line-aligned text, only the two files of the direction are read."""
        if not isinstance(self.text, AlignedText):
            return None
        sides = list(self.text.shards[shard])
        files = [self.shard_lines[shard][sides.index(side)] for side in self.text.directions[k]]
        pair = self.text.example_of(shard, number + 1, k, self._lines(shard, number, files))
        return None if pair is None else attach_tags(pair, self.tags)


def _text_pair(
    identity: str, source: str, target: str, source_lang: str | None, target_lang: str | None
) -> SourceTargetTextExample:
    custom = {"id": identity, "source_lang": source_lang, "target_lang": target_lang}
    texts = {"source": _text(source, source_lang), "target": _text(target, target_lang)}
    pair = SourceTargetTextExample.__new__(SourceTargetTextExample)
    pair.__dict__.update(texts, question=None, custom=custom)
    return pair


def _text(text: str, language: str | None) -> TextExample:
    # Not by its constructor: lhotse's __setattr__ makes that of a pair and its texts take a fifth of the reading.
    made = TextExample.__new__(TextExample)
    made.__dict__.update(text=text, language=language, tokens=None, custom=None)
    return made


def text_layout(source: Source) -> str:
    """How the files of a ``parallel_text`` or ``txt_pair`` source hold their text.

    Returns:
        ``pair`` (two line-aligned files), ``many`` (line-aligned files in many languages), ``tsv`` or ``jsonl``.

    Raises:
        ConfigError: if it names no files, or files of an unknown kind.
    """
    if source.source_paths is not None or source.target_paths is not None:
        for key in ("source_paths", "target_paths"):
            if getattr(source, key) is None:
                raise ConfigError(
                    f"{source.place}.{key}: missing; parallel text needs both source_paths and target_paths."
                )
        return "pair"
    paths, place = source.paths, f"{source.place}.paths"
    if paths is None:
        raise ConfigError(
            f"{place}: missing; give source_paths and target_paths, or paths (TSV, JSONL, one per language)."
        )
    if isinstance(paths, Mapping):
        return "many"
    suffixes = {path.removesuffix(".gz").rpartition(".")[2] for path in expand_paths(paths)}
    if suffixes == {"tsv"}:
        return "tsv"
    if suffixes <= {"jsonl", "json"}:
        return "jsonl"
    raise ConfigError(
        f"{place}: {paths} is neither .tsv nor .jsonl (or .gz of these); for line-aligned files give source_paths and "
        "target_paths, or a mapping of each language to its file(s)."
    )


def aligned_shards(source: Source) -> list[dict[str, str]]:
    """For each shard of a line-aligned source, the file of each side.

    Raises:
        ConfigError: if the sides have different numbers of shards.
    """
    if text_layout(source) == "pair":
        sides = {"source": expand_paths(source.source_paths), "target": expand_paths(source.target_paths)}
    else:
        sides = {str(lang): expand_paths(paths) for lang, paths in source.paths.items()}
    counts = {side: len(paths) for side, paths in sides.items()}
    if len(set(counts.values())) > 1:
        raise ConfigError(f"{source.place}: parallel text must have as many files on each side, but has {counts}.")
    return [dict(zip(sides, shard, strict=True)) for shard in zip(*sides.values(), strict=True)]


def directions_of(source: Source) -> list[tuple[str, str]]:
    """The directions of an n-way source: those it names (``en-de``), or all between different languages.

    Raises:
        ConfigError: if a direction names a language that has no file.
    """
    languages = [str(language) for language in source.paths]
    if source.directions is None:
        return list(permutations(languages, 2))
    return [_direction(direction, languages, f"{source.place}.directions") for direction in source.directions]


def _direction(direction: str, languages: Sequence[str], place: str) -> tuple[str, str]:
    """The two languages that a direction names by any of their codes, which may have hyphens: ``eng-deu``."""
    parts = direction.split("-")
    for number in range(1, len(parts)):
        sides = normalized("-".join(parts[:number])), normalized("-".join(parts[number:]))
        if sides[0] != sides[1] and sides[0] in languages and sides[1] in languages:
            return sides
    raise ConfigError(
        f"{place}: '{direction}' is not a pair of two languages that have files ({', '.join(languages)}); "
        f"write such as {languages[0]}-{languages[-1]}."
    )


def open_parallel_text(source: Source, skipped_records: SkippedRecords) -> AlignedText | TsvText | JsonlText:
    """Open a ``parallel_text`` or ``txt_pair`` source.

    Args:
        source: names the files.
        skipped_records: receives the lines that cannot be used.

    Raises:
        ConfigError: if its keys do not fit together.
    """
    layout = text_layout(source)
    order = ShardOrder(bool(source.shuffle), "trng" if source.shard_seed is None else source.shard_seed)
    if layout == "pair":
        of_side = {"source": source.source_lang, "target": source.target_lang}
        return AlignedText(aligned_shards(source), [("source", "target")], of_side, skipped_records, order)
    if layout == "many":
        of_side = {str(language): str(language) for language in source.paths}
        return AlignedText(aligned_shards(source), directions_of(source), of_side, skipped_records, order)
    paths = expand_paths(source.paths)
    languages = {"source_lang": source.source_lang, "target_lang": source.target_lang}
    common = {**languages, "skipped_records": skipped_records, "order": order}
    if layout == "tsv":
        columns = {side: getattr(source, f"{side}_column") for side in ("source", "target", *languages)}
        columns |= {side: number for number, side in enumerate(("source", "target")) if columns[side] is None}
        return TsvText(paths, {side: column for side, column in columns.items() if column is not None}, **common)
    return JsonlText(paths, (source.source_field or "source", source.target_field or "target"), **common)
