"""Results of the experiment's parts, read from their runs and compared over seeds.

Scores are those of the checkpoint that is best on the development set. Two ways of training are compared twice: after
as many steps, by a paired bootstrap over seeds and test items; and after as many CPU seconds, by the best score on the
development set until then.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from statistics import fmean
from typing import Any

from experiment_results import markdown_table, mean_and_deviation, scores_of, training_scores
from experiment_seeds import TEACHER

from nemo_emmett.evaluation import Translation, from_json
from nemo_emmett.evaluation.significance import compare_over_seeds

__all__ = [
    "COMPARISON",
    "best_within",
    "collect_arms",
    "compared",
    "comparison_cells",
    "draw_means",
    "markdown_table",
    "mean_and_deviation",
    "mean_scores",
    "score_cells",
    "scores_in",
    "speech_into_others",
    "start_scores",
    "teacher_scores",
    "text",
    "training_results",
]

Curve = Sequence[Sequence[float]]
"""(step, CPU seconds, BLEU) of each validation."""

Chosen = Callable[[Translation], bool]


def start_scores(home: Path) -> dict[str, float | None]:
    """Text BLEU of a seed's language model before the training."""
    return scores_of(home / "t5")


def teacher_scores(home: Path) -> dict[str, Any]:
    """Text BLEU of a seed's teacher, and the seconds of its training."""
    return training_scores(home / TEACHER)


def training_results(folder: Path) -> dict[str, Any]:
    """Scores, curves and seconds of one training, and where its best checkpoint is."""
    found = training_scores(folder)
    step, seconds, _ = max(found["curve"], key=lambda point: point[2])  # of equal ones the first is kept
    return {**found, "best_step": step, "best_cpu_seconds": seconds}


def collect_arms(
    arms: Sequence[str],
    seeds: Sequence[int],
    folder_of: Callable[[str, int], Path],
    references: Mapping[str, str],
    chosen: Chosen,
    *,
    metrics: Sequence[str] = ("BLEU",),
    item_of: Callable[[Translation], Hashable] = attrgetter("id"),
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The results of all trainings, and the comparisons of arms with others.

    Args:
        arms: their names.
        seeds: of each arm.
        folder_of: the folder of an arm's run with a seed.
        references: arm -> the arm that it is compared with; one that is not there is compared with none.
        chosen: which translations count in the comparisons.
        metrics: of the comparisons.
        item_of: as for ``compare_over_seeds``.
    """
    trainings = [{"arm": arm, "seed": seed, **training_results(folder_of(arm, seed))} for arm in arms for seed in seeds]
    comparisons = []
    for arm in arms:
        if arm in references:
            ours, theirs = ([folder_of(one, seed) for seed in seeds] for one in (arm, references[arm]))
            for metric in metrics:
                found = compared(ours, theirs, chosen, metric, item_of)
                comparisons.append({"arm": arm, "reference": references[arm], **found})
    return trainings, comparisons


def compared(
    ours: Sequence[Path],
    theirs: Sequence[Path],
    chosen: Chosen,
    metric: str = "BLEU",
    item_of: Callable[[Translation], Hashable] = attrgetter("id"),
) -> dict[str, Any]:
    """The difference between two ways of training.

    Args:
        ours: the runs' folders, one for each seed.
        theirs: those of the other, of the same seeds in the same order.
        chosen: which translations count.
        metric: of the test set.
        item_of: as for ``compare_over_seeds``.

    Returns:
        ``differences`` of the seeds, ``difference``, ``low``, ``high`` and ``p`` after as many steps, on the test set;
        ``dev_at_equal_seconds``: differences of the seeds, speech BLEU on the development set.
    """
    found = compare_over_seeds(
        [_translations(folder, chosen) for folder in ours],
        [_translations(folder, chosen) for folder in theirs],
        metric,
        item_of,
    )
    at_equal_seconds = []
    for mine, other in zip(ours, theirs, strict=True):
        curves = [training_scores(folder)["curve"] for folder in (mine, other)]
        budget = min(curve[-1][1] for curve in curves)
        our_best, their_best = (best_within(curve, budget) for curve in curves)
        at_equal_seconds.append(our_best - their_best)
    return {
        "metric": metric,
        "differences": list(found.differences),
        "difference": found.difference,
        "low": found.low,
        "high": found.high,
        "p": found.p_value,
        "dev_at_equal_seconds": at_equal_seconds,
    }


def best_within(curve: Curve, seconds: float) -> float:
    """The best score that a training has reached after so many CPU seconds, between validations interpolated.

    Args:
        curve: of the training; before its first validation it begins at a score of 0.
        seconds: the budget.

    Example:
        >>> best_within([(10, 100.0, 20.0), (20, 200.0, 40.0)], 150.0)
        30.0
    """
    best, before = 0.0, (0.0, 0.0, 0.0)
    for point in curve:
        if point[1] > seconds:
            share = (seconds - before[1]) / (point[1] - before[1])
            return max(best, before[2] + share * (point[2] - before[2]))
        best, before = max(best, point[2]), tuple(point)
    return best


def speech_into_others(one: Translation) -> bool:
    """Speech that is translated, not transcribed."""
    return one.modality == "audio" and one.source_lang != one.target_lang


def text(one: Translation) -> bool:
    """Text that is translated."""
    return one.modality == "text" and one.source_lang != one.target_lang


def mean_scores(
    folder: Path, modality: str, group_of: Callable[[str, str], str | None], metric: str = "BLEU"
) -> dict[str, float]:
    """Mean scores of groups of directions, from the evaluation in a run's folder.

    Args:
        folder: of the run.
        modality: ``audio`` or ``text``.
        group_of: source and target language -> the group's name; None leaves the direction out.
        metric: one of the evaluation's.
    """
    groups = defaultdict(list)
    for one in from_json(folder / "evaluation" / "evaluation.json").scores:
        if one.modality == modality and (group := group_of(*one.direction)) is not None:
            groups[group].append(one.metrics[metric])
    return {group: fmean(scores) for group, scores in groups.items()}


def scores_in(folder: Path, modality: str, metric: str) -> float:
    """The mean of one metric over all directions of a modality."""
    return mean_scores(folder, modality, lambda *_: "all", metric)["all"]


COMPARISON = "equal steps, test", "95 % interval", "p", "equal CPU seconds, dev"
"""The columns of :func:`comparison_cells`."""


def comparison_cells(one: Mapping) -> list[str]:
    """A comparison as cells of a table."""
    return [
        mean_and_deviation(one["differences"], "+.1f"),
        f"{one['low']:+.1f} to {one['high']:+.1f}",
        f"{one['p']:.3f}",
        mean_and_deviation(one["dev_at_equal_seconds"], "+.1f"),
    ]


def score_cells(runs: Sequence[Mapping], keys: Sequence[str]) -> list[str]:
    """Means over the seeds, of scores and, under ``cpu_seconds``, of whole seconds."""
    return [mean_and_deviation((one[key] for one in runs), ".0f" if key == "cpu_seconds" else ".1f") for key in keys]


def draw_means(
    axes: Any, points: Iterable[tuple[float, float]], colour: str, label: str, *, line: bool = True, marker: str = "o"
) -> None:
    """A point for each seed, and the means over seeds, joined by a line."""
    by_place = defaultdict(list)
    for x, y in points:
        by_place[x].append(y)
        axes.plot(x, y, marker=".", color=colour, alpha=0.4, markersize=4)
    means = [(x, fmean(by_place[x])) for x in sorted(by_place)]
    if means:
        axes.plot(*zip(*means, strict=True), marker=marker, color=colour, linestyle="-" if line else "", label=label)


def _translations(folder: Path, chosen: Chosen) -> list[Translation]:
    return [one for one in from_json(folder / "evaluation" / "evaluation.json").translations if chosen(one)]
