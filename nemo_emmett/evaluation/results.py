"""The results of an evaluation: translations, scores, speed, and everything needed to repeat it; saved as JSON."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any

from nemo_emmett.errors import DataError
from nemo_emmett.files import write_text
from nemo_emmett.prompts.language_codes import normalized

FORMAT = "nemo_emmett.evaluation/2"
"""Written into every JSON file, so that another program's JSON is not read as an evaluation."""

FILE_NAME = "evaluation.json"
"""Name of an evaluation's file in its folder."""

SIGNIFICANCE_LEVEL = 0.05
"""Differences with a lower p-value are marked as significant."""

Key = tuple[str, str, str, str]
"""Identifies a score: test set, modality, source language, target language."""


class _Keyed:
    """What counts towards a score."""

    @property
    def key(self) -> Key:
        """Identifies the score."""
        return self.test_set, self.modality, self.source_lang, self.target_lang


@dataclass(frozen=True)
class Translation(_Keyed):
    """One sentence of a test set and its translation; None for what the test set does not give."""

    test_set: str
    id: str
    modality: str  # "text" or "audio", as in a batch
    source_lang: str | None
    target_lang: str | None
    source_text: str | None
    reference: str | None
    hypothesis: str
    audio_path: str | None = None
    audio_start: float | None = None  # seconds into the file at audio_path
    duration: float | None = None  # seconds of speech


@dataclass(frozen=True)
class Throughput:
    """How fast one modality was translated: the model's time alone, without loading and collating the data."""

    seconds: float  # of the slowest process
    sentences: int
    tokens: int = 0  # of the translations, by the model's tokenizer
    audio_seconds: float | None = None  # None for text
    processes: int = 1  # that translated some of it

    @property
    def sentences_per_second(self) -> float | None:
        """Sentences per second of the model's time; None if that was too short to be measured."""
        return self.sentences / self.seconds if self.seconds else None

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of the translations per second of the model's time; None as for sentences."""
        return self.tokens / self.seconds if self.seconds else None

    @property
    def real_time_factor(self) -> float | None:
        """Seconds of the model's time per second of speech: below 1 is faster than real time. None for text."""
        return self.seconds / self.audio_seconds if self.audio_seconds else None

    def combined_with(self, other: Throughput, in_parallel: bool = False) -> Throughput:
        """The throughput of both: of the same processes one after the other, or of different ones at the same time."""
        durations = [one.audio_seconds for one in (self, other) if one.audio_seconds is not None]
        return Throughput(
            seconds=max(self.seconds, other.seconds) if in_parallel else self.seconds + other.seconds,
            sentences=self.sentences + other.sentences,
            tokens=self.tokens + other.tokens,
            audio_seconds=sum(durations) if durations else None,
            processes=self.processes + other.processes if in_parallel else max(self.processes, other.processes),
        )


@dataclass(frozen=True)
class Score(_Keyed):
    """The scores of one direction of one test set in one modality."""

    test_set: str
    modality: str
    source_lang: str
    target_lang: str
    sentences: int
    metrics: dict[str, float]  # by the metric's name, in the order asked for; BLEU is always among them
    interval: float | None = None  # BLEU plus or minus this: 95 % of its bootstrap resamples; None: not estimated

    @property
    def bleu(self) -> float:
        """BLEU, from 0 to 100."""
        return self.metrics["BLEU"]

    @property
    def direction(self) -> tuple[str, str]:
        """Source and target language."""
        return self.source_lang, self.target_lang


@dataclass(frozen=True)
class Comparison(_Keyed):
    """One metric of one score, compared with a baseline's on the same sentences."""

    baseline: str  # its name
    test_set: str
    modality: str
    source_lang: str
    target_lang: str
    metric: str
    score: float
    baseline_score: float
    p_value: float | None  # of the difference, by paired bootstrap; None where the metric has no such test

    @property
    def difference(self) -> float:
        """The metric minus the baseline's."""
        return self.score - self.baseline_score

    @property
    def is_significant(self) -> bool:
        """Whether the difference is larger than chance explains."""
        return self.p_value is not None and self.p_value < SIGNIFICANCE_LEVEL


@dataclass(frozen=True)
class Evaluation:
    """One model on its test sets; the unit that is saved, printed, reported and compared."""

    model: str  # folder or class of the model
    name: str  # in tables
    date: str  # ISO 8601, UTC
    scores: list[Score]
    translations: list[Translation]
    throughput: dict[str, Throughput]  # by modality
    signatures: dict[str, str]  # by metric; "BLEU (zh)" where a target language has its own tokeniser
    comparisons: list[Comparison] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)  # test set -> records that could not be read
    decoding: dict[str, int | None] = field(default_factory=dict)
    config: dict = field(default_factory=dict)  # the recipe's test_ds
    command: str = ""
    versions: dict[str, str] = field(default_factory=dict)


def one_line(text: str | None) -> str:
    r"""A text as a line of a file, which is what is scored: ``sacrebleu`` on the command line is given files.

    Example:
        >>> one_line("zwei\nZeilen ")
        'zwei Zeilen'
    """
    return " ".join((text or "").splitlines()).rstrip()


def to_json(evaluation: Evaluation, path: str | os.PathLike[str]) -> None:
    """Write an evaluation, hypotheses included, to one JSON file; the file appears whole or not at all."""
    record = {"format": FORMAT, **asdict(evaluation)}
    write_text(path, json.dumps(record, ensure_ascii=False, indent=1) + "\n")


def from_json(path: str | os.PathLike[str]) -> Evaluation:
    """Read what :func:`to_json` wrote.

    Raises:
        DataError: if the file is missing, is not JSON, or is not an evaluation of this format.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"The evaluation {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); give an evaluation.json of `nemo-emmett evaluate`.") from error
    found_format = record.pop("format", None) if isinstance(record, dict) else None
    if str(found_format).startswith(FORMAT.partition("/")[0]) and found_format != FORMAT:
        raise DataError(f"{path} is of format {found_format}, not {FORMAT}: evaluate that model again.")
    if found_format != FORMAT:
        raise DataError(f"{path} is not an evaluation of format {FORMAT}; give one of `nemo-emmett evaluate`.")
    try:
        for key, kind in {"scores": Score, "comparisons": Comparison, "translations": Translation}.items():
            record[key] = [kind(**one | _languages(one)) for one in record[key]]
        record["throughput"] = {name: Throughput(**speed) for name, speed in record["throughput"].items()}
        return Evaluation(**record)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is a damaged evaluation ({error}): run `nemo-emmett evaluate` again.") from error


def _languages(one: Mapping[str, Any]) -> dict[str, Any]:
    """The languages of a record in the one form of their codes: earlier versions wrote any."""
    return {key: normalized(one[key]) for key in ("source_lang", "target_lang")}


def write_hypotheses(evaluation: Evaluation, folder: str | os.PathLike[str]) -> None:
    """Write hypotheses and references as plain text: ``{test_set}.{modality}.{source}-{target}.hyp`` and ``.ref``.

    One sentence a line, as ``sacrebleu REF -i HYP`` takes them. Such files of other test sets are removed.
    """
    folder = Path(folder)
    texts: dict[str, list[str]] = defaultdict(list)
    file_names = names_of_files(one.test_set for one in evaluation.translations)
    for one in evaluation.translations:
        # An evaluation may come from a file of someone else: no name in it may lead out of the folder.
        name = f"{file_names[one.test_set]}.{one.modality}.{one.source_lang}-{one.target_lang}".replace("/", "_")
        texts[f"{name}.hyp"].append(one_line(one.hypothesis) + "\n")
        texts[f"{name}.ref"].append(one_line(one.reference) + "\n")
    for stale in [*folder.glob("*.hyp"), *folder.glob("*.ref")]:
        if stale.name not in texts:
            stale.unlink()
    for name, lines in texts.items():
        write_text(folder / name, "".join(lines))


def names_of_files(names: Iterable[str]) -> dict[str, str]:
    """Names with ``_`` for ``/``; where two would be the same, the later one gets a number.

    Example:
        >>> names_of_files(["a/b", "a_b", "c", "c"])
        {'a/b': 'a_b', 'a_b': 'a_b-2', 'c': 'c'}
    """
    found: dict[str, str] = {}
    for name in dict.fromkeys(names):
        found[name] = unused_name(name.replace("/", "_"), found.values())
    return found


def unused_name(name: str, taken: Collection[str], numbered: str = "{}-{}") -> str:
    """The name, or the first of ``name-2``, ``name-3``, ... that is not taken."""
    candidates = chain([name], (numbered.format(name, number) for number in count(2)))
    return next(candidate for candidate in candidates if candidate not in taken)
