"""Corpora of language pairs: the selected pairs, and segments of several pairs as one list of recordings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_emmett.corpora.corpus import Recording, Sentence, Skipped, is_seconds
from nemo_emmett.corpora.readers.languages import chosen
from nemo_emmett.errors import DataError


@dataclass(frozen=True, order=True)
class Segment:
    """A segment of a talk or speech; the same segment in two pairs is equal."""

    talk: str  # name of the recording, without its ending
    start: float  # seconds
    end: float  # seconds

    @classmethod
    def of(cls, talk: str, start: Any, end: Any) -> Segment | Skipped:
        """A segment from a publisher's values, which may be of any type."""
        if not all(is_seconds(value) for value in (start, end)):
            return Skipped("segment without its times")
        return cls(talk, start, end) if 0 <= start < end else Skipped("segment with impossible times")

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", round(self.start, 3))
        object.__setattr__(self, "end", round(self.end, 3))

    @property
    def id(self) -> str:
        """``ted_767_00016080_00019580``: the talk and the milliseconds."""
        return f"{self.talk}_{round(self.start * 1000):08}_{round(self.end * 1000):08}"


def wanted_pairs(
    pairs: Iterable[tuple[str, str]], languages: Sequence[str] | None, title: str
) -> dict[str, tuple[str, ...]]:
    """The target languages of each spoken language, from the pairs whose languages are both selected.

    Args:
        pairs: the corpus's (spoken, target).
        languages: those selected; None: all.
        title: of the corpus, for messages.

    Raises:
        ConfigError: if a language is in no pair.
        DataError: if no pair is left.
    """
    pairs = sorted(pairs)
    wanted = chosen(languages, (language for pair in pairs for language in pair), f"languages of {title}")
    targets: dict[str, tuple[str, ...]] = {}
    for spoken, target in pairs:
        if spoken in wanted and target in wanted:
            targets[spoken] = (*targets.get(spoken, ()), target)
    if not targets:
        there = ", ".join("-".join(pair) for pair in pairs)
        raise DataError(f"No pair of {title} is among the languages {', '.join(wanted)}; there are {there}.")
    return targets


def joined(
    readings: Iterable[Iterable[tuple[Segment, Mapping[str, str]] | Skipped]], spoken: str, audio: Callable[[str], Path]
) -> Iterator[Sentence | Skipped]:
    """The segments of all pairs of one spoken language, each once with all of its translations, by talk and time.

    Two pairs share a segment if its times and its transcript are the same in both. If one pair has it twice, the first
    translation is used, and the others are skipped.

    Args:
        readings: for each pair, its segments with transcript and translation by language, or causes of skipped rows.
        spoken: the language of the transcripts.
        audio: the recording of a talk.
    """
    found: dict[tuple[Segment, str], dict[str, str]] = {}
    for reading in readings:
        seen_in_pair = set()
        for row in reading:
            if isinstance(row, Skipped):
                yield row
                continue
            segment, texts = row
            if (key := (segment, texts[spoken])) in seen_in_pair:
                yield Skipped("segment occurs twice")
                continue
            seen_in_pair.add(key)
            translations = found.setdefault(key, {})
            for language, text in texts.items():
                translations.setdefault(language, text)
    seen: Counter[Segment] = Counter()
    for (segment, _), texts in sorted(found.items(), key=lambda item: item[0]):
        seen[segment] += 1
        again = f"-{seen[segment]}" if seen[segment] > 1 else ""
        recording = Recording(audio(segment.talk), start=segment.start, duration=round(segment.end - segment.start, 3))
        yield Sentence(segment.id + again, with_translations(texts, spoken), recording)


def with_translations(texts: Mapping[str, str], spoken: str) -> dict[str, str]:
    """``texts`` without the empty translations, unless all are empty.

    In that case they are kept, so that the recording is skipped and counted, not taken as one to transcribe.
    """
    translated = {language: text for language, text in texts.items() if text or language == spoken}
    return translated if len(translated) > 1 else dict(texts)


def need(path: Path, what: str) -> Path:
    """``path``, if it exists.

    Raises:
        DataError: if it does not; ``what`` describes it and where to get it.
    """
    if not path.exists():
        raise DataError(f"'{path}' is missing: {what}.")
    return path


def need_folder(source: Path, what: str) -> Path:
    """``source``, if it is a folder: corpora of whole talks are too large to be read from their archives.

    Raises:
        DataError: if it is an archive or does not exist; ``what`` describes the content of the folder.
    """
    if source.is_file():
        raise DataError(f"'{source}' is a file; unpack it and give the folder that holds {what}.")
    return need(source, f"the folder that holds {what}")
