"""The table of results: what stands in it (for the terminal and for the page alike), and how a terminal prints it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from nemo_emmett.errors import DataError
from nemo_emmett.evaluation.results import Evaluation, Score
from nemo_emmett.evaluation.scoring import Average, Column, average, columns

MODALITY_NAMES = {"text": "text", "audio": "speech"}
"""What a reader calls a modality."""


@dataclass(frozen=True)
class Cell:
    """One direction, or the average, in one column: the scores, and the BLEU of the baseline where it has one."""

    bleu: float
    chrf: float
    sentences: int
    baseline_bleu: float | None = None

    @property
    def difference(self) -> float | None:
        """BLEU gained (positive) or lost against the baseline."""
        return None if self.baseline_bleu is None else self.bleu - self.baseline_bleu


@dataclass(frozen=True)
class Heading:
    """What stands over a column's scores."""

    modality: str
    test_set: str | None
    has_baseline: bool

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

    headings: list[Heading]
    rows: list[Row]
    averages: Row
    averaged_directions: int  # the most directions that a column's average is over


def result_table(evaluation: Evaluation, baseline: Evaluation | None = None) -> ResultTable:
    """Lay out an evaluation, beside a baseline if one is given.

    Raises:
        DataError: if the baseline has no direction in common with the evaluation, or scored one of them against
            other references.
    """
    before = {} if baseline is None else comparable_scores(evaluation, baseline)
    laid_out = columns(evaluation.scores)
    averages = [average(column) for column in laid_out]
    return ResultTable(
        headings=[_heading(column, before) for column in laid_out],
        rows=[
            Row(title=direction_title(*direction), cells=[_cell(column, direction, before) for column in laid_out])
            for direction in _directions(laid_out)
        ],
        averages=Row(
            title="average",
            cells=[_average_cell(*pair, before) for pair in zip(laid_out, averages, strict=True)],
        ),
        averaged_directions=max((mean.directions for mean in averages if mean is not None), default=0),
    )


def comparable_scores(evaluation: Evaluation, baseline: Evaluation) -> dict[tuple, Score]:
    """The baseline's scores of what the evaluation scored too, by :func:`_identity`.

    Raises:
        DataError: if there are none, or if one was scored against other references.
    """
    ours = {_identity(one) for one in evaluation.scores}
    shared = {_identity(one): one for one in baseline.scores if _identity(one) in ours}
    if not shared:
        raise DataError(
            f"The baseline '{baseline.model}' was tested on {_names(baseline.scores)}, this model on "
            f"{_names(evaluation.scores)}, in no common direction: evaluate both with the same test_ds."
        )
    references, baseline_references = _references(evaluation), _references(baseline)
    for identity in shared:
        if references[identity] != baseline_references[identity]:
            test_set, modality, *direction = identity
            raise DataError(
                f"The baseline '{baseline.model}' was scored against other references than this model in "
                f"{modality} {direction_title(*direction)} of test set '{test_set}': evaluate both on the same data."
            )
    return shared


def direction_title(source_lang: str, target_lang: str) -> str:
    """How a direction is written: ``en → de``."""
    return f"{source_lang} → {target_lang}"


def print_table(evaluation: Evaluation, console: Console | None = None, baseline: Evaluation | None = None) -> None:
    """Print the scores, their signatures and the speed to the terminal.

    Raises:
        DataError: if the baseline cannot be compared.
    """
    console = console or Console()
    results = result_table(evaluation, baseline)
    console.print(_terminal_table(results))
    console.print(f"average: mean over {results.averaged_directions} directions between different languages")
    for metric, signature in evaluation.signatures.items():
        console.print(f"{metric}: {signature}", highlight=False, style="dim")
    for line in throughput_lines(evaluation):
        console.print(line, highlight=False)
    for line in skipped_lines(evaluation):
        console.print(line, highlight=False, style="bold red")


def throughput_lines(evaluation: Evaluation) -> list[str]:
    """One line per modality: sentences, seconds, sentences per second and, for speech, the real-time factor."""
    lines = []
    for modality, speed in evaluation.throughput.items():
        line = f"{MODALITY_NAMES.get(modality, modality)}: {speed.sentences:,} sentences in {speed.seconds:.1f} s"
        if speed.sentences_per_second is not None:
            line += f", {speed.sentences_per_second:.1f} sentences/s"
        if speed.real_time_factor is not None:
            line += f", real-time factor {speed.real_time_factor:.3f}"
        lines.append(line)
    return lines


def skipped_lines(evaluation: Evaluation) -> list[str]:
    """One line for each test set of which records could not be read: its scores are over what is left."""
    return [
        f"{test_set}: {records:,} records could not be read and are not scored"
        for test_set, records in evaluation.skipped.items()
    ]


def _identity(one: Score) -> tuple[str, str, str, str]:
    return one.test_set, one.modality, one.source_lang, one.target_lang


def _references(evaluation: Evaluation) -> dict[tuple, list[str]]:
    """The references behind each score, in an order that does not depend on batching."""
    found: dict[tuple, list[str]] = {}
    for one in evaluation.translations:
        identity = (one.test_set, one.modality, one.source_lang, one.target_lang)
        found.setdefault(identity, []).append(one.reference)
    return {identity: sorted(references) for identity, references in found.items()}


def _names(scores: Iterable[Score]) -> str:
    return ", ".join(sorted({f"'{one.test_set}' ({one.modality})" for one in scores}))


def _directions(laid_out: list[Column]) -> list[tuple[str, str]]:
    """Translations first, then same-language directions, which no average contains."""
    found = {one.direction for column in laid_out for one in column.scores}
    return sorted(found, key=lambda direction: (direction[0] == direction[1], direction))


def _heading(column: Column, before: dict[tuple, Score]) -> Heading:
    return Heading(column.modality, column.test_set, any(_identity(one) in before for one in column.scores))


def _cell(column: Column, direction: tuple[str, str], before: dict[tuple, Score]) -> Cell | None:
    for one in column.scores:
        if one.direction == direction:
            earlier = before.get(_identity(one))
            return Cell(one.bleu, one.chrf, one.sentences, None if earlier is None else earlier.bleu)
    return None


def _average_cell(column: Column, mean: Average | None, before: dict[tuple, Score]) -> Cell | None:
    """The average of a column; beside it the baseline's, if that is over the very same directions."""
    if mean is None:
        return None
    earlier = tuple(before[_identity(one)] for one in column.scores if _identity(one) in before)
    baseline_mean = average(Column(column.modality, column.test_set, earlier))
    comparable = baseline_mean is not None and baseline_mean.directions == mean.directions
    return Cell(mean.bleu, mean.chrf, mean.sentences, baseline_mean.bleu if comparable else None)


def _terminal_table(results: ResultTable) -> Table:
    table = Table()
    table.add_column("direction", no_wrap=True)
    table.add_column("n", justify="right")
    for heading in results.headings:
        table.add_column(f"{heading.title}\nBLEU", justify="right", style="bold")
        table.add_column("\nchrF", justify="right")
        if heading.has_baseline:
            table.add_column("BLEU\nbefore", justify="right")
            table.add_column("\n±", justify="right")
    for row in results.rows:
        table.add_row(*_terminal_row(row, results))
    table.add_section()
    table.add_row(*_terminal_row(results.averages, results))
    return table


def _terminal_row(row: Row, results: ResultTable) -> list[str]:
    texts = [row.title, row.sentences]
    for heading, cell in zip(results.headings, row.cells, strict=True):
        texts += ["–", "–"] if cell is None else [f"{cell.bleu:.1f}", f"{cell.chrf:.1f}"]
        if heading.has_baseline:
            earlier = None if cell is None else cell.baseline_bleu
            texts += ["–", "–"] if earlier is None else [f"{earlier:.1f}", f"{cell.difference:+.1f}"]
    return texts
