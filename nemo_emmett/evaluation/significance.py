"""Significance of the difference between two models: paired bootstrap resampling over the same sentences.

Sacrebleu does the resampling (Koehn, 2004, "Statistical Significance Tests for Machine Translation Evaluation"): 1000
resamples, the seed from ``SACREBLEU_SEED`` or 12345. Two evaluations are paired sentence by sentence, by test set,
modality, direction and id, never by position. Where both were trained with several seeds, the seeds are resampled too
(:func:`compare_over_seeds`).
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from statistics import fmean

import numpy as np
import sacrebleu
from sacrebleu.metrics.base import Metric
from sacrebleu.significance import PairedTest, Result

from nemo_emmett.errors import DataError
from nemo_emmett.evaluation.metrics import is_sacrebleus
from nemo_emmett.evaluation.results import Comparison, Evaluation, Key, Score, Translation, one_line
from nemo_emmett.modules.metrics import sacrebleu_metric

RESAMPLES = 1000
"""Bootstrap resamples: sacrebleu's default."""


def compare(evaluation: Evaluation, baseline: Evaluation) -> list[Comparison]:
    """Each metric of each direction that both have, with the p-value of the difference.

    The baseline's translations are scored again, so that both scores have the same tokeniser and version.

    Raises:
        DataError: as :func:`comparable_scores`.
    """
    shared = comparable_scores(evaluation, baseline)
    ours, theirs = by_key(evaluation.translations), by_key(baseline.translations)
    return [
        _compare(key, name, ours[key], theirs[key], baseline)
        for one in evaluation.scores
        if (key := one.key) in shared
        for name in filter(is_sacrebleus, one.metrics)
    ]


def _compare(
    key: Key, name: str, ours: Sequence[Translation], theirs: Sequence[Translation], baseline: Evaluation
) -> Comparison:
    hypotheses, earlier = ([one_line(one.hypothesis) for one in of_each] for of_each in (ours, theirs))
    references = [one_line(one.reference) for one in ours]
    before, now = _resampled(sacrebleu_metric(name, key[-1]), {"baseline": earlier, "model": hypotheses}, references)
    # For equal scores sacrebleu gives p = 0.001: no resample differs from a difference of zero.
    p_value = 1.0 if now.score == before.score else now.p_value
    return Comparison(baseline.name, *key, name, now.score, before.score, float(p_value))


def interval(metric: Metric, hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Half the width of the interval around a corpus score that holds 95 % of its bootstrap resamples."""
    [result] = _resampled(metric, {"model": hypotheses}, references)
    return float(result.ci)


def resampling_signature() -> str:
    """How intervals and p-values are computed, in the format of sacrebleu's signatures."""
    return f"bs:{RESAMPLES}|seed:{os.environ.get('SACREBLEU_SEED', '12345').lower()}|version:{sacrebleu.__version__}"


def _resampled(metric: Metric, systems: Mapping[str, Sequence[str]], references: Sequence[str]) -> list[Result]:
    """The results of sacrebleu's paired bootstrap test for each system, the first being the baseline."""
    logging.getLogger("sacrebleu").setLevel(logging.WARNING)  # it logs each step of each test
    test = PairedTest(
        [(name, list(hypotheses)) for name, hypotheses in systems.items()],
        {"metric": metric},
        [list(references)],
        test_type="bs",
        n_samples=RESAMPLES,
    )
    _, results = test()
    del results["System"]  # the systems' names; the only other key is the metric's
    [of_each_system] = results.values()
    return of_each_system


def comparable_scores(evaluation: Evaluation, baseline: Evaluation) -> dict[Key, Score]:
    """The baseline's scores of the directions that the evaluation scored too.

    Raises:
        DataError: if there are none, or if one was scored on other sentences or against other references.
    """
    scored = {one.key for one in evaluation.scores}
    shared = {one.key: one for one in baseline.scores if one.key in scored}
    if not shared:
        raise DataError(
            f"The baseline '{baseline.model}' was tested on {_names(baseline.scores)}, this model on "
            f"{_names(evaluation.scores)}, in no common direction: evaluate both with the same test_ds."
        )
    of_ours, of_baseline = by_key(evaluation.translations), by_key(baseline.translations)
    for key in shared:
        ours, theirs = of_ours[key], of_baseline[key]
        test_set, modality, source_lang, target_lang = key
        where = f"{modality} {source_lang} → {target_lang} of test set '{test_set}'"
        if [one.id for one in ours] != [one.id for one in theirs]:
            raise DataError(
                f"The baseline '{baseline.model}' was scored on other sentences than this model in {where} "
                f"({len(theirs)}, not {len(ours)}, or of other ids): evaluate both on the same data."
            )
        if [one.reference for one in ours] != [one.reference for one in theirs]:
            raise DataError(
                f"The baseline '{baseline.model}' was scored against other references than this model in {where}: "
                "evaluate both on the same data."
            )
    return shared


def by_key(translations: Iterable[Translation]) -> dict[Key, list[Translation]]:
    """The translations behind each score, in an order that two evaluations of the same data share.

    Several recordings may have the same id, for example of several speakers of a sentence: those are sorted by their
    texts, and then by their recording.
    """
    groups: dict[Key, list[Translation]] = defaultdict(list)
    for one in translations:
        groups[one.key].append(one)
    return {
        key: sorted(group, key=lambda one: (one.id, one.reference or "", one.source_text or "", one.audio_path or ""))
        for key, group in groups.items()
    }


def _names(scores: Iterable[Score]) -> str:
    return ", ".join(sorted({f"'{one.test_set}' ({one.modality})" for one in scores}))


@dataclass(frozen=True)
class SeedComparison:
    """A metric of two ways of training, each with several seeds, and whether the difference is chance.

    Scores are means over seeds and directions.
    """

    metric: str
    score: float
    baseline_score: float
    differences: tuple[float, ...]  # of each seed
    low: float  # 95 % of the resampled differences lie between low and high
    high: float
    p_value: float  # of a difference of zero, two-sided

    @property
    def difference(self) -> float:
        """The score minus the baseline's."""
        return self.score - self.baseline_score


def compare_over_seeds(
    ours: Sequence[Sequence[Translation]],
    theirs: Sequence[Sequence[Translation]],
    metric: str = "BLEU",
    item_of: Callable[[Translation], Hashable] = attrgetter("id"),
    resamples: int = RESAMPLES,
) -> SeedComparison:
    """The difference between two ways of training by a paired bootstrap over seeds and test items.

    A resample draws seeds with replacement, and test items with replacement, the same for both ways and for all seeds
    and directions; of each drawn seed and each direction the corpus score of the drawn items is computed, and their
    mean is the resample's score. So a difference is significant if neither another test set of the kind nor other
    seeds would probably reverse it (two levels of a hierarchical bootstrap; Koehn, 2004, has that of the items). p is
    twice the share of the resamples on the other side of zero, those at zero included, each count plus one.

    Args:
        ours: the translations of each seed, of one or several directions.
        theirs: the baseline's, of the same seeds in the same order.
        metric: one of sacreBLEU's.
        item_of: what is drawn: translations with the same value are drawn together, such as those of one sentence into
            several languages.
        resamples: number of resamples.

    Raises:
        DataError: if there is no seed or no translation, if there are not as many seeds on both sides, or if
            translations are not of the same sentences.
    """
    if not ours or len(ours) != len(theirs) or not all(ours):
        raise DataError(
            f"{len(ours)} seeds cannot be compared with {len(theirs)}: give the translations of the same seeds."
        )
    pairs = [_scorers(one, metric, item_of) for one in (*ours, *theirs)]
    _, first = pairs[0]
    for _, sentences in pairs[1:]:
        if sentences != first:
            raise DataError("The seeds were tested on different sentences or against different references.")
    items = {item: number for number, item in enumerate(dict.fromkeys(item for _, item, _ in first))}
    places = {key: np.array([items[item] for one, item, _ in first if one == key]) for key in pairs[0][0]}
    seeds = len(ours)
    draw = np.random.default_rng(int(os.environ.get("SACREBLEU_SEED", "12345")))

    def differences(counts_I: np.ndarray) -> np.ndarray:
        """Of each seed, with each item so many times."""
        scores = np.array([fmean(one.of(counts_I[places[key]]) for key, one in way.items()) for way, _ in pairs])
        return scores[:seeds] - scores[seeds:]

    once = np.ones(len(items), dtype=np.int64)
    scores = [fmean(one.of(once[places[key]]) for key, one in way.items()) for way, _ in pairs]
    resampled = np.array(
        [
            differences(np.bincount(draw.integers(len(items), size=len(items)), minlength=len(items)))[
                draw.integers(seeds, size=seeds)
            ].mean()
            for _ in range(resamples)
        ]
    )
    sides = min(np.count_nonzero(resampled <= 0), np.count_nonzero(resampled >= 0))
    low, high = np.quantile(resampled, [0.025, 0.975])
    return SeedComparison(
        metric,
        fmean(scores[:seeds]),
        fmean(scores[seeds:]),
        tuple(mine - other for mine, other in zip(scores[:seeds], scores[seeds:], strict=True)),
        float(low),
        float(high),
        min(1.0, 2 * (int(sides) + 1) / (resamples + 1)),
    )


class _Scorer:
    """Corpus scores of one direction from the statistics of its N sentences."""

    def __init__(self, metric: Metric, translations: Sequence[Translation]) -> None:
        self._metric = metric
        hypotheses, references = ([one_line(text) for text in texts] for texts in _texts(translations))
        # Private functions of sacrebleu, which has no public ones for this; its own bootstrap is built on the same two.
        self._statistics_NS = np.array(metric._extract_corpus_statistics(hypotheses, [references]))

    def of(self, counts_N: np.ndarray) -> float:
        """The score of the corpus that has each sentence so many times."""
        return float(self._metric._compute_score_from_stats((counts_N @ self._statistics_NS).tolist()).score)


def _texts(translations: Sequence[Translation]) -> tuple[list[str], list[str]]:
    return [one.hypothesis for one in translations], [one.reference or "" for one in translations]


def _scorers(
    translations: Sequence[Translation], metric: str, item_of: Callable[[Translation], Hashable]
) -> tuple[dict[Key, _Scorer], list[tuple[Key, Hashable, str | None]]]:
    """The scorer of each direction, and all sentences: direction, item, reference."""
    groups = dict(sorted(by_key(translations).items()))
    scorers = {key: _Scorer(sacrebleu_metric(metric, key[-1]), group) for key, group in groups.items()}
    return scorers, [(key, item_of(one), one.reference) for key, group in groups.items() for one in group]
