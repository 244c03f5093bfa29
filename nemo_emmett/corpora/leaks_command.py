"""``nemo-emmett prepare leaks``: a table of the test sentences in training data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from nemo_emmett.corpora.leaks import LONG, SHORT, HeldOut, Leak, LeakKind, find_leaks
from nemo_emmett.corpora.sentence_files import PlacedSentence, find_sentence_files, read_sentences
from nemo_emmett.run_log import plain_console

_IN_WORDS = {
    LeakKind.SAME: "the same",
    LeakKind.CONTAINED: "inside of a longer one",
    LeakKind.NEAR: "with a few words changed",
}


def print_leaks(
    training: Sequence[str | Path],
    held_out: Sequence[str | Path],
    *,
    examples: int = 10,
    near: bool = True,
    console: Console | None = None,
) -> bool:
    """Print which test sentences are in training data.

    Args:
        training: files and prepared corpora, as ``sentence_files.find_sentence_files`` takes them.
        held_out: the same of the test data.
        examples: leaks shown of each kind, at most.
        near: whether to search for test sentences with a few words changed as well.
        console: where to print; the terminal unless given.

    Returns:
        Whether there is a leak: a test sentence of three words or more, the same or inside of a longer one. Shorter
        ones and near ones are shown but do not count.

    Raises:
        DataError: if a file is missing or damaged, or no training data is in a language of the test data.
    """
    console = console or plain_console()
    test = HeldOut.read(held_out, near)
    files = [file for source in training for file in find_sentence_files(source)]
    report = _Report(examples)
    # rich, not tqdm: it wraps files so that every way of reading counts, and shares the table's console.
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("Reading training data", total=sum(file.path.stat().st_size for file in files))

        def opened(path: Path) -> BinaryIO:
            return progress.wrap_file(open(path, "rb"), task_id=task)

        sentences = chain.from_iterable(read_sentences(file, opened) for file in files)
        for leak in find_leaks(report.counted(sentences), test):
            report.add(leak)
    report.show(console, len(test))
    return report.leaks > 0


class _Report:
    """Counts leaks, and keeps the first ones of each kind."""

    def __init__(self, examples: int) -> None:
        self._most = examples
        self._sentences = 0
        self._counts: Counter[tuple[bool, LeakKind]] = Counter()
        self._test_places: dict[tuple[bool, LeakKind], set[str]] = {}
        self._examples: list[Leak] = []
        self.leaks = 0  # training sentences that contain a test sentence

    def counted(self, sentences: Iterator[PlacedSentence]) -> Iterator[PlacedSentence]:
        for sentence in sentences:
            self._sentences += 1
            yield sentence

    def add(self, leak: Leak) -> None:
        row = (leak.is_short, leak.kind)
        self.leaks += leak.is_certain
        if self._counts[row] < self._most:
            self._examples.append(leak)
        self._counts[row] += 1
        self._test_places.setdefault(row, set()).add(leak.test_place)

    def show(self, console: Console, held_out: int) -> None:
        compared = f"{_numbered(self._sentences, 'training sentence')}, {_numbered(held_out, 'test sentence')}"
        if not self._counts:
            console.print(f"{compared}: no test sentence is in the training data.")
            return
        for leak in sorted(self._examples, key=lambda leak: (leak.is_short, leak.kind)):
            console.print(f"[bold]{_IN_WORDS[leak.kind]}[/bold], {_numbered(leak.words, 'word')}", highlight=False)
            for place, text in ((f"{leak.file}:{leak.line}", leak.text), (leak.test_place, leak.test_text)):
                console.print(f"  {escape(place)}  {escape(text)}", highlight=False, soft_wrap=True)
        table = Table(box=None, pad_edge=False)
        table.add_column("test sentence in training data")
        table.add_column("training sentences", justify="right")
        table.add_column("test sentences", justify="right")
        for row in sorted(self._counts):
            is_short, kind = row
            name = _IN_WORDS[kind] + (f", fewer than {SHORT} words" if is_short else "")
            table.add_row(name, f"{self._counts[row]:,}", f"{len(self._test_places[row]):,}")
        console.print(table)
        verdict = f"{_numbered(self.leaks, 'leak')}." if self.leaks else "no leak."
        excluded = f"Test sentences of fewer than {SHORT} words and changed ones do not count"
        console.print(f"{compared}: {verdict} {excluded}; those of {LONG} and more are also found in longer ones.")


def _numbered(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
