"""What an evaluation is: translations, their scores, the speed, and everything needed to repeat it; kept as JSON."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from nemo_emmett.errors import DataError

FORMAT = "nemo_emmett.evaluation/1"
"""Stands in every JSON file, so that another program's JSON is not read as an evaluation."""


@dataclass(frozen=True)
class Translation:
    """One sentence of a test set and what the model made of it; None where the test set does not say."""

    test_set: str
    id: str
    modality: str  # "text" or "audio", as in a batch
    source_lang: str | None
    target_lang: str | None
    source_text: str | None
    reference: str | None
    hypothesis: str
    audio_path: str | None = None
    duration: float | None = None  # seconds of speech


@dataclass(frozen=True)
class Throughput:
    """How fast one modality was translated: the model's time alone, without loading and collating the data."""

    seconds: float
    sentences: int
    audio_seconds: float | None = None  # None for text

    @property
    def sentences_per_second(self) -> float | None:
        """Sentences per second of the model's time; None if that was too short to be measured."""
        return self.sentences / self.seconds if self.seconds else None

    @property
    def real_time_factor(self) -> float | None:
        """Seconds of the model's time per second of speech: below 1 is faster than real time. None for text."""
        return self.seconds / self.audio_seconds if self.audio_seconds else None

    def __add__(self, other: Throughput) -> Throughput:
        """The throughput of both one after the other."""
        durations = [one.audio_seconds for one in (self, other) if one.audio_seconds is not None]
        return Throughput(
            seconds=self.seconds + other.seconds,
            sentences=self.sentences + other.sentences,
            audio_seconds=sum(durations) if durations else None,
        )


@dataclass(frozen=True)
class Score:
    """BLEU and chrF, each from 0 to 100, of one direction of one test set in one modality."""

    test_set: str
    modality: str
    source_lang: str
    target_lang: str
    sentences: int
    bleu: float
    chrf: float

    @property
    def direction(self) -> tuple[str, str]:
        """Source and target language."""
        return self.source_lang, self.target_lang


@dataclass(frozen=True)
class Evaluation:
    """One model on its test sets; the unit that is saved, printed, reported and compared."""

    model: str  # folder or class of the model
    date: str  # ISO 8601, UTC
    scores: list[Score]
    translations: list[Translation]
    throughput: dict[str, Throughput]  # by modality
    signatures: dict[str, str]  # sacreBLEU's, by metric
    skipped: dict[str, int] = field(default_factory=dict)  # test set -> records that could not be read
    decoding: dict[str, int | None] = field(default_factory=dict)
    config: dict = field(default_factory=dict)  # the recipe's test_ds
    command: str = ""
    versions: dict[str, str] = field(default_factory=dict)


def to_json(evaluation: Evaluation, path: str | os.PathLike[str]) -> None:
    """Write an evaluation, hypotheses included, to one JSON file; the file appears whole or not at all."""
    record = {"format": FORMAT, **asdict(evaluation)}
    write_text(path, json.dumps(record, ensure_ascii=False, indent=1) + "\n")


def from_json(path: str | os.PathLike[str]) -> Evaluation:
    """Read what :func:`to_json` wrote.

    Raises:
        DataError: if the file is missing, is not JSON, or is not an evaluation of this format.
    """
    record = _read_record(Path(path))
    try:
        return Evaluation(
            **record
            | {
                "scores": [Score(**score) for score in record["scores"]],
                "translations": [Translation(**translation) for translation in record["translations"]],
                "throughput": {name: Throughput(**speed) for name, speed in record["throughput"].items()},
            }
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is a damaged evaluation ({error}): run `nemo-emmett evaluate` again.") from error


def _read_record(path: Path) -> dict:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"The evaluation {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); give an evaluation.json of `nemo-emmett evaluate`.") from error
    if not isinstance(record, Mapping) or record.get("format") != FORMAT:
        raise DataError(f"{path} is not an evaluation of format {FORMAT}; give one of `nemo-emmett evaluate`.")
    return {key: value for key, value in record.items() if key != "format"}


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 file by renaming a finished one into place, so that a reader never meets half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        # mkstemp's files are private to their owner; a result is for everyone whom the umask admits.
        os.chmod(unfinished, 0o666 & ~_umask())
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
