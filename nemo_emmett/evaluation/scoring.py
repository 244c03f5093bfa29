"""Scores of translations: BLEU and chrF per direction, and their averages over directions.

A direction is scored per test set and never pooled across test sets. For averages and tables the scores are laid out in
**columns**: all test sets of a modality share one column unless two of them hold the same direction; then each test set
has its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sacrebleu.metrics import CHRF

from nemo_emmett.errors import DataError
from nemo_emmett.evaluation.results import Score, Translation
from nemo_emmett.modules.bleu import check_parallel, corpus_bleu
from nemo_emmett.modules.bleu import signature as bleu_signature

MODALITY_ORDER = ("text", "audio")
"""Text first, as the field prints it; further modalities follow by name."""


@dataclass(frozen=True)
class Column:
    """The scores of one modality, of one test set if ``test_set`` is not None, each direction at most once."""

    modality: str
    test_set: str | None
    scores: tuple[Score, ...]

    @property
    def key(self) -> tuple[str, str | None]:
        """What tells a column from the others of its table."""
        return self.modality, self.test_set


@dataclass(frozen=True)
class Average:
    """Mean scores of a column over its directions between different languages, each direction counting the same."""

    modality: str
    test_set: str | None
    directions: int
    sentences: int  # of all these directions together
    bleu: float
    chrf: float


def score(translations: Iterable[Translation]) -> list[Score]:
    """Score each direction of each test set and modality.

    Raises:
        DataError: if a translation lacks a reference or a language, or if there is none at all.
    """
    groups: dict[tuple[str, str, str, str], list[Translation]] = defaultdict(list)
    for translation in translations:
        _check_scorable(translation)
        key = (translation.test_set, translation.modality, translation.source_lang, translation.target_lang)
        groups[key].append(translation)
    if not groups:
        raise DataError("There is no translation to score: the test sets gave no sentence; check test_ds.datasets.")
    return [_score_group(*key, group) for key, group in sorted(groups.items())]


def signatures() -> dict[str, str]:
    """sacreBLEU's signature of each metric."""
    return {"BLEU": bleu_signature(), "chrF": str(CHRF(references=[[""]]).get_signature())}


def corpus_chrf(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """The chrF2 of a whole corpus, from 0 to 100, as ``sacrebleu -m chrf`` computes it (Popović, 2015).

    Raises:
        DataError: if there is no sentence, or if there are not as many references as hypotheses.
    """
    check_parallel(hypotheses, references)
    return CHRF().corpus_score(list(hypotheses), [list(references)]).score


def columns(scores: Iterable[Score]) -> list[Column]:
    """Lay scores out in columns, text before speech."""
    by_modality: dict[str, list[Score]] = defaultdict(list)
    for one in scores:
        by_modality[one.modality].append(one)
    found = []
    for modality in sorted(by_modality, key=_modality_rank):
        found += _columns_of(modality, by_modality[modality])
    return found


def average(column: Column) -> Average | None:
    """The mean over the directions between different languages; None if the column holds no such direction."""
    scores = [one for one in column.scores if one.source_lang != one.target_lang]
    if not scores:
        return None
    return Average(
        modality=column.modality,
        test_set=column.test_set,
        directions=len(scores),
        sentences=sum(one.sentences for one in scores),
        bleu=sum(one.bleu for one in scores) / len(scores),
        chrf=sum(one.chrf for one in scores) / len(scores),
    )


def _check_scorable(translation: Translation) -> None:
    for what in ("reference", "source_lang", "target_lang"):
        if getattr(translation, what) is None:
            raise DataError(
                f"'{translation.id}' of test set '{translation.test_set}' has no {what.replace('_lang', ' language')}: "
                "a test set needs source language, target language and reference text for every example."
            )


def _score_group(
    test_set: str, modality: str, source_lang: str, target_lang: str, translations: list[Translation]
) -> Score:
    hypotheses = [translation.hypothesis for translation in translations]
    references = [translation.reference for translation in translations]
    return Score(
        test_set=test_set,
        modality=modality,
        source_lang=source_lang,
        target_lang=target_lang,
        sentences=len(translations),
        bleu=corpus_bleu(hypotheses, references),
        chrf=corpus_chrf(hypotheses, references),
    )


def _columns_of(modality: str, scores: list[Score]) -> list[Column]:
    directions = [one.direction for one in scores]
    if len(set(directions)) == len(directions):
        return [Column(modality, None, tuple(scores))]
    by_test_set: dict[str, list[Score]] = defaultdict(list)
    for one in scores:
        by_test_set[one.test_set].append(one)
    return [Column(modality, name, tuple(group)) for name, group in sorted(by_test_set.items())]


def _modality_rank(modality: str) -> tuple[int, str]:
    known = MODALITY_ORDER.index(modality) if modality in MODALITY_ORDER else len(MODALITY_ORDER)
    return known, modality
