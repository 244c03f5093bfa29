"""``nemo-emmett index``: the length indexes of a dataset, built ahead of its training."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from nemo_emmett.data.blending.weights import suggested_kind
from nemo_emmett.data.checks import check_files
from nemo_emmett.data.config.dataset_config import DatasetConfig
from nemo_emmett.data.io.commands import commands_allowed
from nemo_emmett.data.io.skipped_records import SkippedRecords
from nemo_emmett.data.lengths.building import open_length_indexes
from nemo_emmett.data.lengths.counting import TokenCounter
from nemo_emmett.data.lengths.index import LengthIndex
from nemo_emmett.planning.blend_report import common_folder, short_name
from nemo_emmett.run_log import plain_console

_PLACES = 3
"""Of skipped records that are named."""

_COLUMNS = ("records", "examples", "hours", "index", "built at")


def print_index(
    dataset: DatasetConfig, *, tokenizer: Any = None, index_dir: str | None = None, console: Console | None = None
) -> None:
    """Build the length indexes that are missing, and print what the sources hold and what was skipped of them.

    Args:
        dataset: with the sources.
        tokenizer: NeMo tokenizer of the model.
        index_dir: folder for indexes that cannot be written next to the data; by default the dataset's.
        console: where to print; the terminal unless given.

    Raises:
        ConfigError: if a key has a value that cannot work.
        DataError: if a file is missing or cannot be read.
    """
    check_files(dataset.sources)
    console = console or plain_console()
    indexes: dict[str, LengthIndex | None] = {}
    with commands_allowed(dataset.allow_commands):
        for kind in dict.fromkeys(map(suggested_kind, dataset.groups)):
            groups = [group for group in dataset.groups if suggested_kind(group) is kind]
            indexes |= open_length_indexes(groups, tokenizer, kind, index_dir or dataset.index_dir)
    table = Table(box=None, pad_edge=False)
    table.add_column("source", overflow="fold")
    for column in (*_COLUMNS[:3], TokenCounter(tokenizer).unit, *_COLUMNS[3:]):
        table.add_column(column, justify="right", no_wrap=True)
    folder = common_folder(dataset.sources)
    for source in dataset.sources:
        for row in _rows(short_name(source, folder), indexes[source.place]):
            table.add_row(*row)
    console.print(table, highlight=False)
    if folder not in ("", "."):
        console.print(f"Files are in {folder}.", highlight=False)


def skipped_of(index: LengthIndex) -> Iterator[tuple[str, int]]:
    """Each cause for which records of a source were skipped, with where the first of them are, and their number."""
    skipped = SkippedRecords()
    index.report(skipped)
    has_one_file = len(index.files) == 1
    for cause, count in Counter(skipped.causes()).most_common():
        records = [record for record in skipped.first if record.cause == cause][:_PLACES]
        places = [r.place if has_one_file else f"{os.path.basename(r.source)} {r.place}" for r in records]
        yield f"{cause} ({', '.join([*places, '...'] if len(places) < count else places)})", count


def _rows(name: str, index: LengthIndex | None) -> Iterator[tuple[str, ...]]:
    """A row for a source, and one for each cause for which records of it were skipped, or key that left some out."""
    if index is None:
        yield name, *[""] * 4, "none", "it is streamed"
        return
    size, (measured, seconds) = index.size, index.measured
    in_file = sum(os.path.getsize(place) for place in index.sidecar.places if os.path.exists(place))
    rate = f"{measured / max(seconds, 1e-9):,.0f} records/s" if measured else "there already"
    counts = (index.num_records, size.examples)
    hours = f"{size.hours:,.2f}" if size.seconds else ""
    tokens = f"{size.tokens:,}" if size.tokens else ""
    yield name, *(f"{count:,}" for count in counts), hours, tokens, _in_bytes(in_file), rate
    for what, count in skipped_of(index):
        yield f"  skipped: {what}", f"{count:,}"
    for key, count in index.filtered.most_common():
        yield f"  left out by {key}", "", f"{count:,}"


def _in_bytes(size: int) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} GB"
