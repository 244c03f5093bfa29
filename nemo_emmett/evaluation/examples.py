"""Translations as the page shows them: which are drawn at random, and what stands on the card of each."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nemo_emmett.evaluation.changes import Judged, sentence_chrf, sentence_of
from nemo_emmett.evaluation.recordings import Recording, Recordings, is_playable
from nemo_emmett.evaluation.results import Translation
from nemo_emmett.evaluation.table import MODALITY_NAMES, direction_title
from nemo_emmett.evaluation.words import compare_words

Admission = Callable[[Translation], bool]


@dataclass(frozen=True)
class Hypothesis:
    """What one model made of a sentence."""

    title: str
    words: list[tuple[str, bool]]  # true where the reference does not have it
    is_exact: bool
    chrf: float


@dataclass(frozen=True)
class Example:
    """One sentence and its translations, on a card of the page."""

    direction: str
    modality: str  # as a reader calls it
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
    """Draw translations at random, the same ones each time, spread over the directions.

    Speech whose recording can be played comes first; text fills up what is missing. Sentences that an example already
    has in another direction are passed over as long as there are others.
    """
    speech = [translation for translation in translations if translation.modality == "audio"]
    text = [translation for translation in translations if translation.modality == "text"]
    chosen = _spread(speech, number, is_playable)
    return chosen + _spread(text, number - len(chosen), lambda _: True)


def example(judged: Judged, recordings: Recordings, models: Sequence[str]) -> Example:
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
        hypotheses=[_hypothesis(system, title) for system, title in zip(systems, models, strict=False)],
        change=None if judged.baseline is None else judged.change,
        recording=recordings.recording(translation),
        seconds=translation.duration,
    )


def _spread(
    translations: Sequence[Translation], number: int, admits: Callable[[Translation], bool]
) -> list[Translation]:
    """Up to ``number`` translations, the directions taking turns; translations between languages before others."""
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
            if len(chosen) < number and (drawn := _draw(by_direction[direction], seen, admits)):
                seen.add(sentence_of(drawn))
                chosen.append(drawn)
    return chosen


def _draw(stack: list[Translation], seen: set[tuple], admits: Admission) -> Translation | None:
    """Take the first translation that is admitted off the stack, those of unseen sentences before others.

    Only those that would be drawn are asked for admission: asking opens a file.
    """
    stack.sort(key=lambda translation: sentence_of(translation) in seen)
    while stack:
        if admits(drawn := stack.pop(0)):
            return drawn
    return None


def _hypothesis(translation: Translation, title: str) -> Hypothesis:
    return Hypothesis(
        title=title,
        words=compare_words(translation.hypothesis, translation.reference or ""),
        is_exact=translation.hypothesis == translation.reference,
        chrf=sentence_chrf(translation),
    )


def _language_tag(language: str | None) -> str | None:
    """A language code as HTML writes it, for the right voice and font: ``de``, ``eng-Latn``."""
    return None if language is None else language.replace("_", "-")
