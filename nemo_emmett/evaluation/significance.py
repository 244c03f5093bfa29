"""Significance of the difference between two models: paired bootstrap resampling over the same sentences.

Sacrebleu does the resampling (Koehn, 2004, "Statistical Significance Tests for Machine Translation Evaluation"): 1000
resamples, the seed from ``SACREBLEU_SEED`` or 12345. Two evaluations are paired sentence by sentence, by test set,
modality, direction and id, never by position.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

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
