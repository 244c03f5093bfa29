"""The report: one HTML page that holds its tables, charts, translations and recordings; it asks the network nothing."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from nemo_emmett.evaluation.breakdown import breakdowns
from nemo_emmett.evaluation.changes import Judged, most_changed, worst
from nemo_emmett.evaluation.charts import NUM_COLOURS, bins_chart, charts
from nemo_emmett.evaluation.curves import Curve
from nemo_emmett.evaluation.examples import Example, choose_examples, example
from nemo_emmett.evaluation.recordings import Recordings
from nemo_emmett.evaluation.results import SIGNIFICANCE_LEVEL, Evaluation, Score
from nemo_emmett.evaluation.scoring import columns
from nemo_emmett.evaluation.table import MODALITY_NAMES, result_table, skipped_lines, throughput_lines
from nemo_emmett.files import write_text

TEMPLATE = "report.html.j2"


@dataclass(frozen=True)
class Gallery:
    """A section of translations to read."""

    id: str  # in the page
    title: str
    note: str  # how they were chosen
    examples: list[Example]


def write_report(
    evaluation: Evaluation,
    path: str | os.PathLike[str],
    *,
    curves: Mapping[str, Curve] | None = None,
    examples: int = 10,
    baselines: Sequence[Evaluation] = (),
) -> None:
    """Write the page.

    Args:
        evaluation: what the page is about.
        path: the HTML file; it appears whole or not at all.
        curves: those of the training (:func:`~nemo_emmett.evaluation.read_curves`), by tag.
        examples: how many translations to show of each kind: the worst, those that gained and that lost most against
            the first baseline, and some drawn at random; 0 shows none.
        baselines: evaluations of other models, whose BLEU stands beside this one's.

    Raises:
        DataError: if a baseline cannot be compared, or if the recording of an example cannot be read.
    """
    table = result_table(evaluation, baselines)
    names = [evaluation.name, *table.baselines]
    recordings = Recordings()
    galleries = _galleries(evaluation, baselines, examples, recordings)
    by_length = breakdowns(evaluation, baselines)
    page = (
        _environment()
        .get_template(TEMPLATE)
        .render(
            evaluation=evaluation,
            baselines=baselines,
            names=names,
            table=table,
            modality_names=MODALITY_NAMES,
            has_intervals=any(score.interval is not None for score in evaluation.scores),
            significance_level=SIGNIFICANCE_LEVEL,
            throughput=throughput_lines(evaluation),
            skipped=skipped_lines(evaluation),
            test_sets=_test_sets(evaluation),
            # Our own SVG, its texts escaped where it is drawn.
            breakdowns=[(one, chart, Markup(chart.svg)) for one in by_length for chart in [bins_chart(one, names)]],
            charts=[(chart, Markup(chart.svg)) for chart in charts(curves or {})],
            num_colours=NUM_COLOURS,
            galleries=galleries,
            recordings=recordings,
        )
    )
    write_text(path, page)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("nemo_emmett.evaluation", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = _breakable
    return environment


def _breakable(name: str) -> Markup:
    """A model's name that a narrow column may break where its parts join."""
    return Markup("<wbr>").join(re.findall(r"[^/_-]*[/_-]|[^/_-]+", name))


def _galleries(
    evaluation: Evaluation, baselines: Sequence[Evaluation], number: int, recordings: Recordings
) -> list[Gallery]:
    if number < 1:
        return []
    galleries = [_worst(evaluation, number, recordings)]
    if baselines:
        galleries += _changed(evaluation, baselines[0], number, recordings)
    drawn = [Judged(translation) for translation in choose_examples(evaluation.translations, number)]
    at_random = _cards(drawn, recordings, [evaluation.name])
    return [*galleries, Gallery("random", "Examples drawn at random", "", at_random)]


def _worst(evaluation: Evaluation, number: int, recordings: Recordings) -> Gallery:
    note = "The lowest chrF of single sentences; a translation given several times is shown once."
    if empty := sum(not translation.hypothesis.strip() for translation in evaluation.translations):
        note += f" {empty:,} of {len(evaluation.translations):,} translations are empty."
    cards = _cards(worst(evaluation.translations, number), recordings, [evaluation.name])
    return Gallery("worst", "Worst sentences", note, cards)


def _changed(evaluation: Evaluation, baseline: Evaluation, number: int, recordings: Recordings) -> list[Gallery]:
    names = [evaluation.name, baseline.name]
    changes = most_changed(evaluation.translations, baseline.translations, number)
    differing = f"{changes.differing:,} of {changes.compared:,} translations differ from those of {baseline.name}."
    found = []
    for name, chosen in (("gained", changes.gained), ("lost", changes.lost)):
        note = f"The sentences that {name} most chrF." if chosen else f"No sentence {name} chrF."
        cards = _cards(chosen, recordings, names)
        found.append(Gallery(name, f"{name.capitalize()} against {baseline.name}", f"{note} {differing}", cards))
    return found


def _cards(judged: Iterable[Judged], recordings: Recordings, names: Sequence[str]) -> list[Example]:
    return [example(one, recordings, names) for one in judged]


def _test_sets(evaluation: Evaluation) -> list[str]:
    """Each test set in words: ``flores (text, 12 directions, 1,200 sentences)``."""
    grouped: dict[tuple[str, str], list[Score]] = defaultdict(list)
    for column in columns(evaluation.scores):
        for score in column.scores:
            grouped[score.test_set, score.modality].append(score)
    described = []
    for (test_set, modality), scores in grouped.items():
        directions = "1 direction" if len(scores) == 1 else f"{len(scores)} directions"
        sentences = sum(score.sentences for score in scores)
        described.append(
            f"{test_set} ({MODALITY_NAMES.get(modality, modality)}, {directions}, {sentences:,} sentences)"
        )
    return described
