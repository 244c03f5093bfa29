"""The sentences worth reading: the worst, and those that changed most against a baseline.

Sentences are ranked by chrF (Popović, 2015), which, unlike BLEU, still tells short and bad translations apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice, zip_longest

from sacrebleu.metrics import CHRF

from nemo_emmett.evaluation.results import Translation
from nemo_emmett.evaluation.significance import by_key

SMALLEST_CHANGE = 0.05
"""Of chrF: what is printed as 0.0 is no change."""

_CHRF = CHRF()


@dataclass(frozen=True)
class Judged:
    """A translation, and the baseline's of the same sentence where the two are compared, with their sentence chrF."""

    translation: Translation
    baseline: Translation | None = None

    @property
    def chrf(self) -> float:
        """Sentence chrF, from 0 to 100."""
        return sentence_chrf(self.translation)

    @property
    def change(self) -> float:
        """chrF gained (positive) or lost against the baseline; 0 without one."""
        return 0.0 if self.baseline is None else self.chrf - sentence_chrf(self.baseline)


@dataclass(frozen=True)
class Changes:
    """What a baseline translated otherwise."""

    compared: int  # sentences that both translated
    differing: int  # of these, those whose translations differ
    gained: list[Judged]  # the largest gain first
    lost: list[Judged]  # the largest loss first


def sentence_chrf(translation: Translation) -> float:
    """The chrF of one sentence, from 0 to 100, as ``sacrebleu -m chrf --sentence-level`` computes it."""
    return _chrf(translation.hypothesis, translation.reference or "")


def worst(translations: Iterable[Translation], number: int) -> list[Judged]:
    """Up to ``number`` translations of lowest chrF, ties by id, the modalities taking turns.

    No sentence comes twice, and no translation: that of a model which gives the same one again and again, such as an
    empty one, is shown once in each modality.
    """
    judged = [Judged(translation) for translation in translations]
    return _choose(sorted(judged, key=lambda one: (one.chrf, *_place(one))), number)


def most_changed(translations: Iterable[Translation], others: Iterable[Translation], number: int) -> Changes:
    """The translations that gained and those that lost most chrF against a baseline's.

    Args:
        translations: this model's.
        others: the baseline's, of the same sentences wherever it has a test set, modality and direction at all
            (:func:`~nemo_emmett.evaluation.significance.comparable_scores`).
        number: the most to choose, gained and lost each, in turns and without repetition as for :func:`worst`.
    """
    theirs = by_key(others)
    compared = [
        Judged(one, other)
        for key, ours in by_key(translations).items()
        if key in theirs
        for one, other in zip(ours, theirs[key], strict=True)
    ]
    differing = [one for one in compared if one.translation.hypothesis != one.baseline.hypothesis]
    ranked = sorted(differing, key=lambda one: (-abs(one.change), *_place(one)))
    return Changes(
        compared=len(compared),
        differing=len(differing),
        gained=_choose([one for one in ranked if one.change >= SMALLEST_CHANGE], number),
        lost=_choose([one for one in ranked if one.change <= -SMALLEST_CHANGE], number),
    )


def sentence_of(translation: Translation) -> tuple[str | None, str]:
    """What makes two translations those of one sentence: its language and its text, or its id where that is unknown."""
    return translation.source_lang, translation.source_text or translation.id


def _choose(ranked: Sequence[Judged], number: int) -> list[Judged]:
    """The first of a ranking, the modalities taking turns, without repetition; text before speech in the end."""
    seen: set[tuple] = set()
    turns: dict[str, Iterator[Judged]] = {}
    for modality in sorted({one.translation.modality for one in ranked}, key=lambda name: name != "text"):
        turns[modality] = _unseen([one for one in ranked if one.translation.modality == modality], seen)
    chosen = islice(filter(None, chain.from_iterable(zip_longest(*turns.values()))), number)
    return sorted(chosen, key=lambda one: list(turns).index(one.translation.modality))


def _unseen(ranked: Iterable[Judged], seen: set[tuple]) -> Iterator[Judged]:
    """Those of which neither the sentence nor a translation was chosen before; ``seen`` grows as they are taken."""
    for one in ranked:
        marks = {sentence_of(one.translation), *_translations(one)}
        if seen.isdisjoint(marks):
            seen |= marks
            yield one


def _translations(judged: Judged) -> set[tuple[str, str, str]]:
    """What each model said in which modality."""
    modality = judged.translation.modality
    said = {("this", modality, judged.translation.hypothesis)}
    return said if judged.baseline is None else said | {("baseline", modality, judged.baseline.hypothesis)}


def _place(judged: Judged) -> tuple[str, ...]:
    """Where a sentence stands among those of equal chrF."""
    return judged.translation.id, *map(str, judged.translation.key)


@lru_cache(maxsize=2**18)
def _chrf(hypothesis: str, reference: str) -> float:
    return _CHRF.sentence_score(hypothesis, [reference]).score
