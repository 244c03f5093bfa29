"""What is counted in lines of text and of manifests: examples, seconds of speech, tokens of text."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerFast

from nemo_emmett.data.io.skipped_records import InvalidRecord
from nemo_emmett.data.readers.json_records import check_sampling_rate, check_times, is_seconds, sampling_rate_of
from nemo_emmett.prompts.encoding import encode_texts
from nemo_emmett.prompts.markup import Prompt

PROBE = "One two, 3.50 €! Schöne Grüße; ¿qué más? Où est l'été? 漢字 Привет <de> xyzzy."
"""Tokenizers of the same vocabulary that split differently (merges, scores, normalisation) differ here."""


@dataclass(frozen=True)
class Size:
    """What a source, or a part of it, holds.

    Each example counts: a recording that is translated into two languages makes two, as does a line of text.
    """

    examples: int = 0
    seconds: float = 0.0  # of speech
    tokens: int = 0  # of text without speech, source and target together; words where there is no tokenizer

    @property
    def hours(self) -> float:
        """Of speech."""
        return self.seconds / 3600

    def __add__(self, other: Size) -> Size:
        return Size(self.examples + other.examples, self.seconds + other.seconds, self.tokens + other.tokens)


class TokenCounter:
    """Counts the tokens of texts.

    Args:
        tokenizer: NeMo tokenizer; without one, words between blanks are counted.
    """

    def __init__(self, tokenizer: Any = None) -> None:
        self.tokenizer = tokenizer
        self.unit = "words" if tokenizer is None else "tokens"
        self._fast = _fast_tokenizer(tokenizer)

    def count(self, texts: Sequence[str]) -> list[int]:
        """Number of tokens of each text."""
        if not texts:
            return []
        if self.tokenizer is None:
            return [len(text.split()) for text in texts]
        return [len(ids) for ids in encode_texts(self.tokenizer, [Prompt([text]) for text in texts])]

    @cached_property
    def fingerprint(self) -> str:
        """The same for tokenizers that split text alike; tokens that were added to the vocabulary do not matter."""
        if self.tokenizer is None:
            return "words"
        if self._fast is not None:
            added = self._fast.get_added_vocab()
            vocabulary = sorted(token for token in self._fast.get_vocab() if token not in added)
        else:
            vocabulary = list(map(str, getattr(self.tokenizer, "vocab", ())))
        probe = self.count(PROBE.split()), list(map(int, self.tokenizer.text_to_ids(PROBE)))
        return hashlib.sha256(json.dumps([vocabulary, probe]).encode()).hexdigest()[:16]


def _fast_tokenizer(tokenizer: Any) -> PreTrainedTokenizerFast | None:
    """The tokenizer inside NeMo's that takes many texts at once, if it has one that gives the same tokens."""
    inner = getattr(tokenizer, "tokenizer", None)
    if isinstance(inner, PreTrainedTokenizerFast) and not getattr(tokenizer, "include_special_tokens", False):
        return inner
    return None


class Measure(ABC):
    """What is counted in the lines of some kind of file. Measures are dataclasses: their fields identify counts."""

    uses_tokens: bool = False

    @abstractmethod
    def count(self, lines: Sequence[tuple[bytes, ...]], counter: TokenCounter) -> Size:
        """Count in lines, each of which is given with those of the files parallel to it."""


@dataclass(frozen=True)
class TextMeasure(Measure):
    """Text, with one or several sides in each line.

    Args:
        layout: ``aligned`` (a file is a side), ``tsv`` or ``jsonl``.
        fields: of the sides: column numbers or the names of JSON fields.
        examples: for each example that a line makes, the numbers of the sides in it.
    """

    layout: str
    fields: tuple[int | str, ...]
    examples: tuple[tuple[int, ...], ...]

    uses_tokens = True

    def count(self, lines: Sequence[tuple[bytes, ...]], counter: TokenCounter) -> Size:
        """See :meth:`Measure.count`."""
        records = [self._sides(line) for line in lines]
        lengths = iter(counter.count([side for sides in records for side in sides if side is not None]))
        examples = tokens = 0
        for sides in records:
            of_side = [None if side is None else next(lengths) for side in sides]
            for members in self.examples:
                if all(of_side[member] is not None for member in members):
                    examples += 1
                    tokens += sum(of_side[member] for member in members)
        return Size(examples=examples, tokens=tokens)

    def _sides(self, lines: tuple[bytes, ...]) -> list[str | None]:
        """The text of each side, None where it cannot be used."""
        if self.layout == "aligned":
            return [_text(_decoded(line)) for line in lines]
        if self.layout == "tsv":
            cells = (_decoded(lines[0]) or "").split("\t")
            return [_text(cells[column]) if column < len(cells) else None for column in self.fields]
        record = _json_object(lines[0]) or {}
        return [_text(record.get(field)) for field in self.fields]


@dataclass(frozen=True)
class SpeechMeasure(Measure):
    """Records of speech: how long they are, and how many examples their translations make.

    Args:
        is_cuts: lhotse cuts rather than records of a NeMo manifest.
        source_lang: spoken language, where the records do not say it.
        target_lang: the languages to translate to, where the records do not say them; None: all that they have.
        overrules: whether that holds for records that do say them.
        is_tarred: of a NeMo manifest, whether the audio lies in tar files, whose headers alone say the sampling rate.
    """

    is_cuts: bool
    source_lang: str | None = None
    target_lang: str | tuple[str, ...] | None = None
    overrules: bool = False
    is_tarred: bool = False

    def count(self, lines: Sequence[tuple[bytes, ...]], counter: TokenCounter) -> Size:
        """See :meth:`Measure.count`."""
        examples, seconds = 0, 0.0
        for (line,) in lines:
            # A value of a wrong type may stand anywhere in a record: such records are the reader's to report.
            with suppress(AttributeError, LookupError, TypeError, ArithmeticError):
                record = _json_object(line) or {}
                length = _seconds_of_cut(record) if self.is_cuts else _seconds_of_record(record, self.is_tarred)
                made = 0 if length is None else self._examples(record)
                if made:
                    examples += made
                    seconds += made * length
        return Size(examples=examples, seconds=seconds)

    def _examples(self, record: Mapping) -> int:
        custom, spoken = (_first_cut(record), None) if self.is_cuts else (record, record.get("lang"))
        transcript = record.get("text")
        if self.is_cuts:
            supervisions = custom.get("supervisions") or [{}]
            transcript, spoken = supervisions[0].get("text"), supervisions[0].get("language")
            custom = custom.get("custom") or {}
        if "translations" not in custom:
            return 1
        texts = custom["translations"]
        if not isinstance(texts, Mapping):
            return 0
        spoken = custom.get("source_lang") or self.source_lang or custom.get("lang") or spoken
        wanted = custom.get("target_lang") or self.target_lang
        if self.overrules:
            wanted = self.target_lang
        targets = [wanted] if isinstance(wanted, str) else list(wanted or texts)
        return sum(_text(texts.get(t, transcript if t == spoken else None)) is not None for t in targets)


def _seconds_of_record(record: Mapping, is_tarred: bool) -> float | None:
    """Length of a NeMo manifest's record; None if our reader skips it for what it says."""
    if record.get("_skipme", False) or not isinstance(record.get("audio_filepath"), str):
        return None
    with suppress(InvalidRecord):
        check_times(record)
        if not is_tarred and (rate := sampling_rate_of(record)) is not None:
            check_sampling_rate(rate)
        return float(record["duration"])
    return None


def _seconds_of_cut(cut: Mapping) -> float | None:
    """Length of a lhotse cut, which a mixed one does not say itself."""
    if cut.get("type") == "MixedCut":
        ends = [_positive((track.get("cut") or {}).get("duration")) for track in cut.get("tracks") or ()]
        if not ends or None in ends:
            return None
        starts = [track.get("offset") or 0.0 for track in cut["tracks"]]
        return max(start + end for start, end in zip(starts, ends, strict=True))
    start = cut.get("start")
    if cut.get("type") not in ("MonoCut", "MultiCut") or not is_seconds(start) or start < 0:
        return None
    return _positive(cut.get("duration"))


def _first_cut(cut: Mapping) -> Mapping:
    """The one whose fields are those of the whole: of a mixed cut, the first that is not padding."""
    tracks = [track["cut"] for track in cut.get("tracks") or ()]
    return next((track for track in tracks if track.get("type") != "PaddingCut"), cut)


def _positive(seconds: object) -> float | None:
    return float(seconds) if is_seconds(seconds) and seconds > 0 else None


def _decoded(line: bytes) -> str | None:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _text(value: object) -> str | None:
    """A text that is one, and not blank."""
    return (value.strip() or None) if isinstance(value, str) else None


def _json_object(line: bytes) -> dict | None:
    with suppress(ValueError, RecursionError):  # not JSON, not UTF-8, or nested a thousand times
        if isinstance(record := json.loads(line), dict):
            return record
    return None
