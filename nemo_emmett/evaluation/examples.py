"""Translations as the page shows them: the random sample, and the content of a card."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nemo_emmett.evaluation.changes import RankedSentence, sentence_chrf, sentence_of
from nemo_emmett.evaluation.recordings import Recording, Recordings, is_playable
from nemo_emmett.evaluation.results import Translation
from nemo_emmett.evaluation.table import MODALITY_NAMES, direction_title
from nemo_emmett.evaluation.words import compare_words


@dataclass(frozen=True)
class Hypothesis:
    """One model's translation on a card."""

    title: str
    words: list[tuple[str, bool]]  # whether it differs from the reference
    is_exact: bool
    chrf: float


@dataclass(frozen=True)
class Example:
    """One sentence and its translations, on a card of the page."""

    direction: str
    modality: str  # as shown: "text", "speech"
    test_set: str
    id: str
    source_tag: str | None  # the languages as HTML names them
    target_tag: str | None
    source: str | None
    reference: str | None
    hypotheses: list[Hypothesis]
    change: float | None  # chrF gained or lost against the second hypothesis
    recording: Recording | None  # None for text
    seconds: float | None


def choose_examples(translations: Sequence[Translation], number: int) -> list[Translation]:
    """Draw translations at random with a fixed seed, spread over the directions.

    Speech whose recording can be played is preferred; text fills up the number. Sentences that were already drawn in
    another direction are used only when no others are left.
    """
    speech = [translation for translation in translations if translation.modality == "audio"]
    text = [translation for translation in translations if translation.modality == "text"]
    chosen = _spread(speech, number, is_playable)
    return chosen + _spread(text, number - len(chosen), lambda _: True)


def example(judged: RankedSentence, recordings: Recordings, models: Sequence[str]) -> Example:
    """The card of one sentence.

    Args:
        judged: this model's translation, and the baseline's where the card shows both.
        recordings: those of the page.
        models: the names of this model and of the baseline, for the titles of their translations.

    Raises:
        DataError: if the recording cannot be read.
    """
    translation = judged.translation
    systems = [translation] if judged.baseline is None else [translation, judged.baseline]
    return Example(
        direction=direction_title(translation.source_lang, translation.target_lang),
        modality=MODALITY_NAMES.get(translation.modality, translation.modality),
        test_set=translation.test_set,
        id=translation.id,
        source_tag=_language_tag(translation.source_lang),
        target_tag=_language_tag(translation.target_lang),
        source=translation.source_text,
        reference=translation.reference,
        hypotheses=[
            Hypothesis(
                title=title,
                words=compare_words(system.hypothesis, system.reference or ""),
                is_exact=system.hypothesis == system.reference,
                chrf=sentence_chrf(system),
            )
            for system, title in zip(systems, models, strict=False)
        ],
        change=None if judged.baseline is None else judged.change,
        recording=recordings.recording(translation),
        seconds=translation.duration,
    )


def _spread(
    translations: Sequence[Translation], number: int, admits: Callable[[Translation], bool]
) -> list[Translation]:
    """Up to ``number`` translations, the directions taking turns; translations before transcriptions."""
    draw = random.Random(0)
    by_direction: dict[tuple, list[Translation]] = defaultdict(list)
    for translation in translations:
        by_direction[translation.source_lang, translation.target_lang].append(translation)
    directions = sorted(by_direction, key=str)
    draw.shuffle(directions)
    directions.sort(key=lambda direction: direction[0] == direction[1])
    for direction in directions:
        draw.shuffle(by_direction[direction])

    chosen: list[Translation] = []
    seen: set[tuple] = set()
    while len(chosen) < number and any(by_direction.values()):
        for direction in directions:
            if len(chosen) == number:
                break
            left = by_direction[direction]
            left.sort(key=lambda translation: sentence_of(translation) in seen)
            # one at a time, since `admits` opens a file
            if drawn := next(filter(admits, (left.pop(0) for _ in range(len(left)))), None):
                seen.add(sentence_of(drawn))
                chosen.append(drawn)
    return chosen


def _language_tag(language: str | None) -> str | None:
    """A language code as HTML's ``lang`` attribute, by which browsers choose voice and font: ``de``, ``eng-Latn``."""
    return None if language is None else language.replace("_", "-")
