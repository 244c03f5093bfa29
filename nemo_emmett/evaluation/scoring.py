"""Scores of translations: each metric per direction, and their averages over directions.

A direction is scored per test set and never pooled across test sets. For averages and tables the scores are laid out in
**columns**: all test sets of a modality share one column unless two of them hold the same direction; then each test set
has its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import fmean

from nemo_emmett.errors import DataError
from nemo_emmett.evaluation.comet import CometConfig, comet_scores
from nemo_emmett.evaluation.metrics import DEFAULT_METRICS, error_rate, is_sacrebleus
from nemo_emmett.evaluation.results import MALFORMED, Key, Score, Translation, one_line
from nemo_emmett.evaluation.significance import interval
from nemo_emmett.modules.metrics import sacrebleu_metric

MODALITY_ORDER = ("text", "audio")
"""Text first, as in published tables; further modalities follow by name."""


@dataclass(frozen=True)
class Column:
    """The scores of one modality, of one test set if ``test_set`` is not None, each direction at most once."""

    modality: str
    test_set: str | None
    scores: tuple[Score, ...]

    @property
    def key(self) -> tuple[str, str | None]:
        """Identifies the column in its table."""
        return self.modality, self.test_set


@dataclass(frozen=True)
class Average:
    """Mean scores of a column over its directions between different languages, each with the same weight."""

    modality: str
    test_set: str | None
    directions: int
    sentences: int  # of all these directions
    metrics: dict[str, float]

    @property
    def bleu(self) -> float:
        """Mean BLEU."""
        return self.metrics["BLEU"]


def score(
    translations: Iterable[Translation], metrics: Sequence[str] = DEFAULT_METRICS, comet: CometConfig | None = None
) -> list[Score]:
    """Score each direction of each test set and modality.

    Args:
        translations: of any number of test sets.
        metrics: names of :data:`~nemo_emmett.evaluation.metrics.METRICS`, including BLEU.
        comet: required for COMET.

    Raises:
        DataError: if a translation lacks a reference or a language, or if there is none at all.
    """
    groups: dict[Key, list[Translation]] = defaultdict(list)
    for translation in translations:
        for what in ("reference", "source_lang", "target_lang"):
            if getattr(translation, what) is None:
                raise DataError(
                    f"'{translation.id}' of test set '{translation.test_set}' has no "
                    f"{what.replace('_lang', ' language')}: a test set needs source language, target language and "
                    "reference text for every example."
                )
        groups[translation.key].append(translation)
    if not groups:
        raise DataError("There is no translation to score: the test sets gave no sentence; check test_ds.datasets.")
    by_key = dict(sorted(groups.items()))
    comet_means: dict[Key, float] = {}
    if "COMET" in metrics:  # of all groups in one call: the model is large and slow to start
        scores = iter(comet_scores([one for group in by_key.values() for one in group], comet))
        comet_means = {key: fmean(islice(scores, len(group))) for key, group in by_key.items()}
    return [_score_group(key, group, metrics, comet_means.get(key)) for key, group in by_key.items()]


def columns(scores: Iterable[Score]) -> list[Column]:
    """Lay scores out in columns, text before speech."""
    by_modality: dict[str, list[Score]] = defaultdict(list)
    for one in scores:
        by_modality[one.modality].append(one)
    ordered = [name for name in MODALITY_ORDER if name in by_modality] + sorted(by_modality.keys() - {*MODALITY_ORDER})
    found = []
    for modality in ordered:
        group = by_modality[modality]
        if len({one.direction for one in group}) == len(group):
            found.append(Column(modality, None, tuple(group)))
            continue
        for test_set in sorted({one.test_set for one in group}):
            found.append(Column(modality, test_set, tuple(one for one in group if one.test_set == test_set)))
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
        metrics={name: fmean(one.metrics[name] for one in scores) for name in scores[0].metrics},
    )


def _score_group(key: Key, translations: Sequence[Translation], metrics: Sequence[str], comet: float | None) -> Score:
    hypotheses = [one_line(translation.hypothesis) for translation in translations]
    references = [one_line(translation.reference) for translation in translations]
    _, _, _, target_lang = key
    found = {"COMET": comet}
    for name in filter(is_sacrebleus, metrics):
        found[name] = sacrebleu_metric(name, target_lang).corpus_score(hypotheses, [references]).score
    return Score(
        *key,
        sentences=len(translations),
        metrics={name: found[name] for name in metrics},
        interval=interval(sacrebleu_metric("BLEU", target_lang), hypotheses, references),
        transcripts=_transcripts(translations),
    )


def _transcripts(translations: Sequence[Translation]) -> dict[str, float]:
    """The error rate of the transcripts of answers in two steps, in percent; an answer without one counts as empty."""
    in_steps = [one for one in translations if one.transcript is not None or one.is_malformed]
    if not in_steps:
        return {}
    known = [one for one in in_steps if one.source_text]
    found: dict[str, float] = {}
    if known:
        hypotheses, references = zip(*((one.transcript or "", one.source_text) for one in known), strict=True)
        name, found_rate = error_rate(hypotheses, references, known[0].source_lang)
        found[name] = found_rate
    return found | {MALFORMED: sum(one.is_malformed for one in in_steps)}
