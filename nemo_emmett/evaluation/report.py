"""The report: one self-contained HTML page with tables, charts, translations and recordings; it makes no requests."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from nemo_emmett.evaluation.breakdown import breakdowns
from nemo_emmett.evaluation.changes import RankedSentence, most_changed, worst
from nemo_emmett.evaluation.charts import NUM_COLOURS, bins_chart, charts
from nemo_emmett.evaluation.curves import Curve
from nemo_emmett.evaluation.examples import Example, choose_examples, example
from nemo_emmett.evaluation.recordings import Recordings
from nemo_emmett.evaluation.results import SIGNIFICANCE_LEVEL, Evaluation, Score
from nemo_emmett.evaluation.scoring import columns
from nemo_emmett.evaluation.table import MODALITY_NAMES, result_table, skipped_lines, throughput_lines, transcript_lines
from nemo_emmett.files import write_text

TEMPLATE = "report.html.j2"


@dataclass(frozen=True)
class Gallery:
    """A section of translations to read."""

    id: str  # in the page
    title: str
    note: str  # how the examples were chosen
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
        evaluation: what to report.
        path: the HTML file; it appears whole or not at all.
        curves: of the training (:func:`~nemo_emmett.evaluation.read_curves`), by tag.
        examples: how many translations to show of each kind: the worst, those that gained and that lost most against
            the first baseline, and some drawn at random; 0 shows none.
        baselines: evaluations of other models, whose BLEU is shown next to this one's.

    Raises:
        DataError: if a baseline cannot be compared, or if the recording of an example cannot be read.
    """
    environment = Environment(
        loader=PackageLoader("nemo_emmett.evaluation", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # a model's name with places where a narrow column may break it
    environment.filters["breakable"] = lambda name: Markup("<wbr>").join(re.findall(r"[^/_-]*[/_-]|[^/_-]+", name))
    table = result_table(evaluation, baselines)
    names = [evaluation.name, *table.baselines]
    recordings = Recordings()
    by_length = [(one, bins_chart(one, names)) for one in breakdowns(evaluation, baselines)]
    page = environment.get_template(TEMPLATE).render(
        evaluation=evaluation,
        baselines=baselines,
        names=names,
        table=table,
        modality_names=MODALITY_NAMES,
        has_intervals=any(score.interval is not None for score in evaluation.scores),
        significance_level=SIGNIFICANCE_LEVEL,
        throughput=[*transcript_lines(evaluation), *throughput_lines(evaluation)],
        skipped=skipped_lines(evaluation),
        test_sets=_test_sets(evaluation),
        # Markup: our own SVG, in which all texts are escaped already
        breakdowns=[(one, chart, Markup(chart.svg)) for one, chart in by_length],
        charts=[(chart, Markup(chart.svg)) for chart in charts(curves or {})],
        num_colours=NUM_COLOURS,
        galleries=_galleries(evaluation, baselines, examples, recordings),
        recordings=recordings,
    )
    write_text(path, page)


def _galleries(
    evaluation: Evaluation, baselines: Sequence[Evaluation], number: int, recordings: Recordings
) -> list[Gallery]:
    if number < 1:
        return []

    def gallery(id_: str, title: str, note: str, chosen: Iterable[RankedSentence], names: Sequence[str]) -> Gallery:
        return Gallery(id_, title, note, [example(one, recordings, names) for one in chosen])

    translations, names = evaluation.translations, [evaluation.name]
    note = "The lowest chrF of single sentences; a translation given several times is shown once."
    if empty := sum(not translation.hypothesis.strip() for translation in translations):
        note += f" {empty:,} of {len(translations):,} translations are empty."
    galleries = [gallery("worst", "Worst sentences", note, worst(translations, number), names)]
    for baseline in baselines[:1]:
        changes = most_changed(translations, baseline.translations, number)
        differing = f"{changes.differing:,} of {changes.compared:,} translations differ from those of {baseline.name}."
        for name, chosen in (("gained", changes.gained), ("lost", changes.lost)):
            note = f"The sentences that {name} most chrF." if chosen else f"No sentence {name} chrF."
            title = f"{name.capitalize()} against {baseline.name}"
            galleries.append(gallery(name, title, f"{note} {differing}", chosen, [*names, baseline.name]))
    drawn = [RankedSentence(translation) for translation in choose_examples(translations, number)]
    return [*galleries, gallery("random", "Examples drawn at random", "", drawn, names)]


def _test_sets(evaluation: Evaluation) -> list[str]:
    """Each test set in words: ``flores (text, 12 directions, 1,200 sentences)``."""
    grouped: dict[tuple[str, str], list[Score]] = defaultdict(list)
    for column in columns(evaluation.scores):
        for score in column.scores:
            grouped[score.test_set, score.modality].append(score)
    described = []
    for (test_set, modality), scores in grouped.items():
        directions = "1 direction" if len(scores) == 1 else f"{len(scores)} directions"
        sentences, name = sum(score.sentences for score in scores), MODALITY_NAMES.get(modality, modality)
        described.append(f"{test_set} ({name}, {directions}, {sentences:,} sentences)")
    return described
