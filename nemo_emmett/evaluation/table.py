"""The table of results: its content, for the terminal and the page, and its layout in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from nemo_emmett.evaluation.results import MALFORMED, SIGNIFICANCE_LEVEL, Comparison, Evaluation, Key, Score
from nemo_emmett.evaluation.scoring import Average, Column, average, columns
from nemo_emmett.evaluation.significance import comparable_scores
from nemo_emmett.run_log import plain_console

MODALITY_NAMES = {"text": "text", "audio": "speech"}
"""Names of modalities in tables and on the page."""

SIGNIFICANT = "*"
"""Marks a significant difference."""


@dataclass(frozen=True)
class BaselineCell:
    """A baseline's BLEU in a cell, and the difference to it."""

    bleu: float
    difference: float  # BLEU of this model minus the baseline's
    p_value: float | None = None  # of the difference; None for an average, which has none

    @property
    def is_significant(self) -> bool:
        """Whether the difference is significant."""
        return self.p_value is not None and self.p_value < SIGNIFICANCE_LEVEL


@dataclass(frozen=True)
class Cell:
    """One direction, or the average, in one column: the scores, and those of each baseline."""

    metrics: dict[str, float]
    sentences: int
    interval: float | None = None  # BLEU plus or minus this; None for an average
    baselines: tuple[BaselineCell | None, ...] = ()  # None where one was not scored on this

    @property
    def bleu(self) -> float:
        """BLEU, from 0 to 100."""
        return self.metrics["BLEU"]


@dataclass(frozen=True)
class Heading:
    """The heading of a column."""

    modality: str
    test_set: str | None
    has_baseline: tuple[bool, ...]  # for each baseline, whether it has scores in this column

    @property
    def title(self) -> str:
        """The modality, with its test set if the table shows several of this modality."""
        name = MODALITY_NAMES.get(self.modality, self.modality)
        return name if self.test_set is None else f"{name}, {self.test_set}"


@dataclass(frozen=True)
class Row:
    """One line of the table: a cell per column, None where the column holds no such direction."""

    title: str
    cells: list[Cell | None]

    @property
    def sentences(self) -> str:
        """Number of test sentences; ``100/98`` where the columns differ."""
        counts = dict.fromkeys(f"{cell.sentences:,}" for cell in self.cells if cell is not None)
        return "/".join(counts)


@dataclass(frozen=True)
class ResultTable:
    """Rows of directions under columns of modalities, and the averages over directions."""

    metrics: tuple[str, ...]  # BLEU first
    baselines: tuple[str, ...]  # their names
    headings: list[Heading]
    rows: list[Row]
    averages: Row
    averaged_directions: int  # the largest number of directions that a column's average is over

    @property
    def average_of(self) -> str:
        """The averages in words."""
        if self.averaged_directions == 1:
            return "of the one direction between different languages"
        return f"mean over {self.averaged_directions} directions between different languages"

    @property
    def has_significance(self) -> bool:
        """Whether any difference is marked as significant."""
        cells = (cell for row in self.rows for cell in row.cells if cell is not None)
        return any(one is not None and one.is_significant for cell in cells for one in cell.baselines)


def result_table(evaluation: Evaluation, baselines: Sequence[Evaluation] = ()) -> ResultTable:
    """Lay out the scores of an evaluation and of its baselines.

    Raises:
        DataError: if a baseline has no direction in common with the evaluation, or scored one of them on other
            sentences or against other references.
    """
    before = [_Baseline(evaluation, baseline) for baseline in baselines]
    laid_out = columns(evaluation.scores)
    averages = [average(column) for column in laid_out]
    # Translation directions first, then same-language directions, which are in no average.
    directions = sorted(
        {one.direction for column in laid_out for one in column.scores}, key=lambda d: (d[0] == d[1], d)
    )
    headings = []
    for column in laid_out:
        has_baseline = tuple(any(one.key in earlier.scores for one in column.scores) for earlier in before)
        headings.append(Heading(column.modality, column.test_set, has_baseline))
    return ResultTable(
        metrics=tuple(evaluation.scores[0].metrics),
        baselines=tuple(baseline.name for baseline in baselines),
        headings=headings,
        rows=[
            Row(title=direction_title(*direction), cells=[_cell(column, direction, before) for column in laid_out])
            for direction in directions
        ],
        averages=Row(
            title="average",
            cells=[
                mean
                and Cell(mean.metrics, mean.sentences, None, tuple(one.average_cell(column, mean) for one in before))
                for column, mean in zip(laid_out, averages, strict=True)
            ],
        ),
        averaged_directions=max((mean.directions for mean in averages if mean is not None), default=0),
    )


class _Baseline:
    """A baseline's scores of the directions that both scored, and the p-values of the differences in BLEU."""

    def __init__(self, evaluation: Evaluation, baseline: Evaluation) -> None:
        self.scores: dict[Key, Score] = comparable_scores(evaluation, baseline)
        self._comparisons: dict[Key, Comparison] = {
            one.key: one for one in evaluation.comparisons if one.baseline == baseline.name and one.metric == "BLEU"
        }

    def cell(self, score: Score) -> BaselineCell | None:
        """The baseline's cell for a score; None if the baseline was not scored on this."""
        if score.key not in self.scores:
            return None
        compared = self._comparisons.get(score.key)
        if compared is not None:
            return BaselineCell(compared.baseline_score, compared.difference, compared.p_value)
        earlier = self.scores[score.key].bleu
        return BaselineCell(earlier, score.bleu - earlier)

    def average_cell(self, column: Column, mean: Average) -> BaselineCell | None:
        """The baseline's average, if it is over the same directions."""
        scores = tuple(self.scores[one.key] for one in column.scores if one.key in self.scores)
        before = average(Column(column.modality, column.test_set, scores))
        if before is None or before.directions != mean.directions:
            return None
        return BaselineCell(before.bleu, mean.bleu - before.bleu)


def direction_title(source_lang: str, target_lang: str) -> str:
    """How a direction is written: ``en → de``."""
    return f"{source_lang} → {target_lang}"


def print_table(evaluation: Evaluation, console: Console | None = None, baselines: Sequence[Evaluation] = ()) -> None:
    """Print the scores, their signatures and the speed to the terminal.

    Raises:
        DataError: if a baseline cannot be compared.
    """
    console = console or plain_console()
    results = result_table(evaluation, baselines)
    for table in _terminal_tables(results, console):
        console.print(table)
    console.print(f"average: {results.average_of}")
    if results.has_significance:
        console.print(f"{SIGNIFICANT}: p < {SIGNIFICANCE_LEVEL} by paired bootstrap", highlight=False)
    for metric, signature in evaluation.signatures.items():
        console.print(f"{metric}: {signature}", highlight=False, style="dim", soft_wrap=True)
    for line in [*transcript_lines(evaluation), *throughput_lines(evaluation)]:
        console.print(line, highlight=False, soft_wrap=True)
    for line in skipped_lines(evaluation):
        console.print(line, highlight=False, style="bold red", soft_wrap=True)


def scores_in_markdown(evaluation: Evaluation) -> str:
    """The scores as a table in Markdown with their signatures, for a model card."""
    metrics = list(dict.fromkeys(metric for score in evaluation.scores for metric in score.metrics))
    rows = [["test set", "input", "direction", "sentences", *metrics]]
    rows.append(["---"] * 3 + ["---:"] * (len(metrics) + 1))
    for score in evaluation.scores:
        direction = f"{score.source_lang} → {score.target_lang}"
        values = [f"{score.metrics[metric]:.1f}" if metric in score.metrics else "" for metric in metrics]
        modality = MODALITY_NAMES.get(score.modality, score.modality)
        rows.append([score.test_set, modality, direction, f"{score.sentences:,}", *values])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    beams = evaluation.decoding.get("num_beams")
    signatures = "\n".join(f"- {metric}: `{signature}`" for metric, signature in evaluation.signatures.items())
    return f"Evaluated on {evaluation.date[:10]}, beams: {beams}.\n\n{table}\n\n{signatures}"


def scores_as_metadata(evaluation: Evaluation) -> list[dict[str, Any]]:
    """The scores as the results of Hugging Face's ``model-index``, one for each direction of a test set."""
    return [
        {
            "task": {"type": "translation", "name": f"translation of {MODALITY_NAMES.get(one.modality, one.modality)}"},
            "dataset": {"type": one.test_set, "name": one.test_set, "config": f"{one.source_lang}-{one.target_lang}"},
            "metrics": [
                {"type": name.lower(), "name": name, "value": round(value, 2)} for name, value in one.metrics.items()
            ],
        }
        for one in evaluation.scores
    ]


def throughput_lines(evaluation: Evaluation) -> list[str]:
    """One line per modality: sentences, seconds, and their ratios; for speech also the real-time factor."""
    lines = []
    for modality, speed in evaluation.throughput.items():
        line = f"{MODALITY_NAMES.get(modality, modality)}: {speed.sentences:,} sentences in {speed.seconds:.1f} s"
        if speed.processes > 1:
            line += f" by {speed.processes} processes"
        if speed.sentences_per_second is not None:
            line += f", {speed.sentences_per_second:.1f} sentences/s"
        if speed.tokens_per_second:
            line += f", {speed.tokens_per_second:.1f} tokens/s"
        if speed.real_time_factor is not None:
            line += f", real-time factor {speed.real_time_factor:.3f}"
        lines.append(line)
    return lines


def transcript_lines(evaluation: Evaluation) -> list[str]:
    """One line for each direction whose answers have two steps: the error rate of the transcripts, and how many
    answers have none."""
    lines = []
    for score in evaluation.scores:
        if not score.transcripts:
            continue
        rates = [f"{name} {rate:.1f}" for name, rate in score.transcripts.items() if name != MALFORMED]
        malformed = f"{int(score.transcripts[MALFORMED]):,} of {score.sentences:,} answers without a transcript"
        where = f"{score.test_set}, {direction_title(*score.direction)}"
        lines.append(f"transcripts of {where}: {', '.join([*rates, malformed])}")
    return lines


def skipped_lines(evaluation: Evaluation) -> list[str]:
    """One line for each test set with records that could not be read: its scores are over the others."""
    return [
        f"{test_set}: {records:,} records could not be read and are not scored"
        for test_set, records in evaluation.skipped.items()
    ]


def _cell(column: Column, direction: tuple[str, str], before: Iterable[_Baseline]) -> Cell | None:
    for one in column.scores:
        if one.direction == direction:
            return Cell(one.metrics, one.sentences, one.interval, tuple(earlier.cell(one) for earlier in before))
    return None


def _terminal_tables(results: ResultTable, console: Console) -> list[Table]:
    """One table with all columns, or a table for each column where the terminal is too narrow."""
    whole = _terminal_table(results)
    if Measurement.get(console, console.options.update(width=sys.maxsize), whole).maximum <= console.width:
        return [whole]
    tables = []
    for place, heading in enumerate(results.headings):
        rows = [replace(row, cells=[row.cells[place]]) for row in results.rows if row.cells[place] is not None]
        averages = replace(results.averages, cells=[results.averages.cells[place]])
        tables.append(_terminal_table(replace(results, headings=[heading], rows=rows, averages=averages)))
    return tables


def _terminal_table(results: ResultTable) -> Table:
    table = Table()
    table.add_column("direction", no_wrap=True)
    table.add_column("n", justify="right")
    for heading in results.headings:
        for place, metric in enumerate(results.metrics):
            title = heading.title if place == 0 else ""
            table.add_column(f"{title}\n{metric}", justify="right", style="bold" if place == 0 else "")
        for baseline in _shown(results.baselines, heading):
            table.add_column(f"{baseline}\nBLEU", justify="right")
            table.add_column("\n±", justify="right")
    for row in results.rows:
        table.add_row(*_terminal_row(row, results))
    table.add_section()
    table.add_row(*_terminal_row(results.averages, results))
    return table


def _terminal_row(row: Row, results: ResultTable) -> list[str]:
    texts = [row.title, row.sentences]
    for heading, cell in zip(results.headings, row.cells, strict=True):
        if cell is None:
            texts += ["–"] * (len(results.metrics) + 2 * sum(heading.has_baseline))
            continue
        texts += [f"{cell.metrics[metric]:.1f}" for metric in results.metrics]
        for baseline in _shown(cell.baselines, heading):
            if baseline is None:
                texts += ["–", "–"]
            else:
                mark = SIGNIFICANT if baseline.is_significant else ""
                texts += [f"{baseline.bleu:.1f}", f"{baseline.difference:+.1f}{mark}"]
    return texts


def _shown(items: Sequence, heading: Heading) -> list:
    """The items of those baselines that have scores in this column."""
    return [one for one, has_baseline in zip(items, heading.has_baseline, strict=True) if has_baseline]
