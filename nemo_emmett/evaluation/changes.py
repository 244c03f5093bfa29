"""The worst sentences, and those that changed most against a baseline.

Sentences are ranked by chrF (Popović, 2015), which, unlike BLEU, still differs between short and bad translations.
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
"""Of chrF: a smaller one is printed as 0.0."""

_CHRF = CHRF()


@dataclass(frozen=True)
class RankedSentence:
    """A translation, and the baseline's of the same sentence where two models are compared."""

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
    """The differences between a model's translations and a baseline's."""

    compared: int  # sentences that both translated
    differing: int  # of these, those whose translations differ
    gained: list[RankedSentence]  # the largest gain first
    lost: list[RankedSentence]  # the largest loss first


@lru_cache(maxsize=2**18)
def sentence_chrf(translation: Translation) -> float:
    """The chrF of one sentence, from 0 to 100, as ``sacrebleu -m chrf --sentence-level`` computes it."""
    return _CHRF.sentence_score(translation.hypothesis, [translation.reference or ""]).score


def worst(translations: Iterable[Translation], number: int) -> list[RankedSentence]:
    """Up to ``number`` translations of lowest chrF, ties by id, the modalities taking turns.

    No sentence and no translation is chosen twice: one that a model repeats, such as an empty one, is shown once in
    each modality.
    """
    judged = map(RankedSentence, translations)
    return _choose(sorted(judged, key=lambda one: (one.chrf, *_place(one))), number)


def most_changed(translations: Iterable[Translation], others: Iterable[Translation], number: int) -> Changes:
    """The translations that gained and those that lost most chrF against a baseline's.

    Args:
        translations: this model's.
        others: the baseline's, of the same sentences wherever it has a test set, modality and direction at all
            (:func:`~nemo_emmett.evaluation.significance.comparable_scores`).
        number: how many to choose at most, of gained and of lost each; modalities and repetitions as for :func:`worst`.
    """
    theirs = by_key(others)
    compared = [
        RankedSentence(one, other)
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
    """Identifies a source sentence: its language and its text, or its id where the text is unknown."""
    return translation.source_lang, translation.source_text or translation.id


def _choose(ranked: Sequence[RankedSentence], number: int) -> list[RankedSentence]:
    """The first of a ranking without repetition, drawn from the modalities in turn, then sorted text before speech."""
    seen: set[tuple] = set()
    turns: dict[str, Iterator[RankedSentence]] = {}
    for modality in sorted({one.translation.modality for one in ranked}, key=lambda name: name != "text"):
        turns[modality] = _unseen([one for one in ranked if one.translation.modality == modality], seen)
    chosen = islice(filter(None, chain.from_iterable(zip_longest(*turns.values()))), number)
    return sorted(chosen, key=lambda one: list(turns).index(one.translation.modality))


def _unseen(ranked: Iterable[RankedSentence], seen: set[tuple]) -> Iterator[RankedSentence]:
    """Those of which neither the sentence nor a translation is in ``seen``, to which it adds those that it yields."""
    for one in ranked:
        modality = one.translation.modality
        identities = {sentence_of(one.translation), ("this", modality, one.translation.hypothesis)}
        if one.baseline is not None:
            identities.add(("baseline", modality, one.baseline.hypothesis))
        if seen.isdisjoint(identities):
            seen |= identities
            yield one


def _place(judged: RankedSentence) -> tuple[str, ...]:
    """The sorting key among sentences of equal chrF."""
    return judged.translation.id, *map(str, judged.translation.key)
