"""``nemo-emmett blend``: what a dataset is made of, and how often a training will see each part of it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from nemo.collections.common.tokenizers import AutoTokenizer, SentencePieceTokenizer
from omegaconf import DictConfig, ListConfig
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nemo_emmett.data.blending.weights import Node, blend_of
from nemo_emmett.data.config.dataset_config import DatasetConfig, GroupConfig, leading_group, parse_dataset
from nemo_emmett.data.config.section import config_of, plain
from nemo_emmett.data.config.sources import Source
from nemo_emmett.data.io.files import is_local
from nemo_emmett.data.lengths.counting import Size, TokenCounter
from nemo_emmett.data.readers.registry import register_data_types
from nemo_emmett.planning.needed import find_dataset, look_up, no_tokenizer
from nemo_emmett.run_log import plain_console

DEFAULT_STEPS = 1_000
"""Looked ahead where neither the user nor the recipe says how long the training is."""

GAP = 2
"""Columns of the terminal between those of the table."""

SHORTEST_NAME = 16
"""Columns of the terminal; names are not cut shorter, even if lines then break."""

SPEECH, TEXT, OTHER = "speech", "text", "other"


@dataclass(frozen=True)
class Recipe:
    """A dataset, and what the recipe around it says of the training.

    Args:
        dataset: with its place in the recipe.
        steps: of the training; None where the recipe does not say.
        batches_per_step: how many batches all processes together take for one step of the optimizer.
        tokenizer: folder of the language model's tokenizer, if it is there.
    """

    dataset: DatasetConfig
    steps: int | None = None
    batches_per_step: int = 1
    tokenizer: str | None = None


def read_recipe(
    content: DictConfig | ListConfig, name: str, section: str | None = None, defaults: Mapping[str, Any] | None = None
) -> Recipe:
    """Find the dataset that a config describes.

    Args:
        content: a recipe, the config of a dataset, or the list of an ``input_cfg``.
        name: path or name that it was read by.
        section: the dataset's place in it; by default the data that the recipe trains on.
        defaults: keys that the dataset has unless it sets them, such as what the model defines.

    Raises:
        ConfigError: if there is no such section, it refers to what is missing, or a key is misspelt.
    """
    path = Path(name)
    defaults = dict(defaults or {})
    if isinstance(content, ListConfig):
        entries = plain(content, str(path), throw_on_missing=True)
        return Recipe(parse_dataset(config_of({**defaults, "input_cfg": entries}), path.stem))
    section, keys = find_dataset(content, section, path)
    devices, folder = look_up(content, "trainer.devices"), look_up(content, "model.pretrained_llm")
    processes = len(devices) if isinstance(devices, ListConfig) else _positive(devices) or 1
    processes *= _positive(look_up(content, "trainer.num_nodes")) or 1
    return Recipe(
        parse_dataset(config_of({**defaults, **keys}), section or path.stem),
        steps=_positive(look_up(content, "trainer.max_steps")),
        batches_per_step=processes * (_positive(look_up(content, "trainer.accumulate_grad_batches")) or 1),
        tokenizer=folder if isinstance(folder, str) and os.path.isdir(folder) else None,
    )


def _positive(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
    """A NeMo tokenizer from a SentencePiece ``.model`` or a folder of Hugging Face's.

    Raises:
        ConfigError: if there is none.
    """
    try:
        if not os.path.exists(path):  # it would be searched for in the network
            raise FileNotFoundError(path)
        if str(path).endswith(".model"):
            return SentencePieceTokenizer(str(path))
        return AutoTokenizer(str(path), use_fast=True)
    except Exception as error:  # each library raises its own kind
        raise no_tokenizer(path) from error


@dataclass(frozen=True)
class Stream:
    """Sources that share their batches: a dataset, or a group of a ``multi_config``.

    Args:
        name: of the group; empty for a dataset without groups.
        blend: its groups and sources.
        batches: that it gives to a step on each process, on average.
        examples: in a batch, on average; None where that is not known.
        batch: how that is known, in words.
    """

    name: str
    blend: Node
    batches: float
    examples: float | None
    batch: str

    @property
    def examples_per_step(self) -> float | None:
        """On each process; None where it is not known."""
        return None if self.examples is None else self.batches * self.examples


def streams_of(recipe: Recipe, tokenizer: Any = None, index_dir: str | None = None) -> list[Stream]:
    """The streams of a dataset, with all their sources counted.

    Raises:
        ConfigError: if a key has a value that cannot work.
        DataError: if a file cannot be read.
    """
    register_data_types()
    dataset = recipe.dataset
    weights, total = {group.name: 1.0 for group in dataset.groups}, 1.0  # a batch of each
    if len(weights) > 1 and dataset.sampler_fusion != "zip":
        if dataset.sampler_fusion == "randomized_round_robin" and dataset.sampler_weights:
            weights = {name: dataset.sampler_weights[name] for name in weights}
        total = sum(weights.values())
    else:
        weights = {group.name: 1 / group.every_n_steps for group in dataset.groups}
    streams = []
    for group in dataset.groups:
        blend = blend_of(group, tokenizer=tokenizer, index_dir=index_dir, count_all=True)
        streams.append(Stream(group.name, blend, weights[group.name] / total, *_examples_per_batch(group, blend)))
    return [_following(stream, group, streams, dataset) for stream, group in zip(streams, dataset.groups, strict=True)]


def _following(stream: Stream, group: GroupConfig, streams: Sequence[Stream], dataset: DatasetConfig) -> Stream:
    """A group with a ``batch_ratio`` with as many examples as follow from the group that it follows."""
    if group.batch_ratio is None:
        return stream
    leader = streams[dataset.groups.index(leading_group(dataset.groups))]
    if leader.examples is None:
        return replace(stream, examples=None, batch=f"{group.batch_ratio:g} examples for each of {leader.name}")
    examples = group.batch_ratio * leader.examples
    if stream.examples is not None and stream.examples < examples:
        return stream
    return replace(stream, examples=examples, batch=f"{_number(examples)} examples (batch_ratio {group.batch_ratio:g})")


def _examples_per_batch(group: GroupConfig, blend: Node) -> tuple[float | None, str]:
    """How many examples a batch holds on average, and how that is known."""
    if group.bucket_batch_size:
        mean, several = fmean(group.bucket_batch_size), len(group.bucket_batch_size) > 1
        how = "mean of bucket_batch_size, as if buckets were equally frequent" if several else "bucket_batch_size"
        return mean, f"{_number(mean)} examples ({how})"
    in_tokens = group.use_multimodal_sampling
    key, unit = ("batch_tokens", "tokens") if in_tokens else ("batch_duration", "s")
    size, limits = getattr(group, key), []
    if size and (mean := _mean_length(blend, in_tokens)):
        examples = size / mean
        limits.append((examples, f"about {_number(examples)} examples ({key} {size:g} at {mean:.3g} {unit} each)"))
    if group.packing:
        return None, f"{group.batch_size} packed rows of {group.row_tokens} positions (batch_size, row_tokens)"
    if group.batch_size:
        limits.append((group.batch_size, f"{group.batch_size} examples (batch_size)"))
    return min(limits, default=(None, "a number of examples that the config does not give (batch_size, ...)"))


def _mean_length(blend: Node, in_tokens: bool) -> float | None:
    """Length of the examples that are drawn, on average, in seconds or tokens; None where a source's is not known."""
    mean = 0.0
    for leaf in blend.leaves():
        size = leaf.size or Size()
        length = size.seconds
        if in_tokens:
            of_source = leaf.source.token_equivalent_duration
            length = size.tokens or (size.seconds / of_source if of_source else 0)
        if not length:
            return None
        mean += leaf.share * length / size.examples
    return mean


class Row(NamedTuple):
    """One line of the table."""

    source: str  # or group, behind the lines of the tree
    speech: str
    text: str
    examples: str
    weight: str
    share: str
    epochs: str


def print_blend(
    recipe: Recipe,
    *,
    steps: int | None = None,
    tokenizer: Any = None,
    index_dir: str | None = None,
    console: Console | None = None,
) -> None:
    """Print the groups and sources of a dataset: what they hold, weigh, and give to a training of so many steps.

    Args:
        recipe: with the dataset.
        steps: of the optimizer; by default those of the recipe, or 1,000.
        tokenizer: NeMo tokenizer by which text is measured; without one, words are counted.
        index_dir: folder for counts that cannot be written next to the data.
        console: where to print; the terminal unless given.

    Raises:
        ConfigError: if a key has a value that cannot work.
        DataError: if a file cannot be read.
    """
    console = console or plain_console()
    steps = steps or recipe.steps or DEFAULT_STEPS
    streams = streams_of(recipe, tokenizer, index_dir)
    sources = [leaf.source for stream in streams for leaf in stream.blend.leaves()]
    folder = common_folder(sources)
    console.print(_table(list(_rows(recipe, streams, steps, folder)), TokenCounter(tokenizer).unit, console.width))
    for line in _remarks(recipe, streams, steps):
        console.print(line, highlight=False)
    if folder not in ("", "."):
        console.print(f"Files are in {folder}.", highlight=False)
    if tokenizer is None and any(source.is_text for source in sources):
        console.print("Text is measured in words, since there is no tokenizer; name one by --tokenizer.")


def _rows(recipe: Recipe, streams: Sequence[Stream], steps: int, folder: str) -> Iterator[Row]:
    are_groups = len(streams) > 1 or streams[0].name != ""
    if are_groups:
        sizes = [stream.blend.size for stream in streams]
        yield _row(recipe.dataset.place, None if None in sizes else sum(sizes, Size()), 1.0)
    for number, (stream, share) in enumerate(zip(streams, _shares_of_streams(streams), strict=True)):
        draws = None
        if stream.examples_per_step is not None:
            draws = steps * recipe.batches_per_step * stream.examples_per_step
        lead = _branches(is_last=number == len(streams) - 1) if are_groups else ("", "")
        yield _row(lead[0] + (stream.name or recipe.dataset.place), stream.blend.size, share)
        yield from _rows_below(stream.blend, lead[1], share, draws, folder)


def _shares_of_streams(streams: Sequence[Stream]) -> list[float]:
    """Of the examples; of the batches where it is not known how many examples they hold."""
    weights = [stream.examples_per_step for stream in streams]
    if None in weights:
        weights = [stream.batches for stream in streams]
    return [weight / sum(weights) for weight in weights]


def _rows_below(node: Node, lead: str, share: float, draws: float | None, folder: str) -> Iterator[Row]:
    """The rows of all that is in a group.

    Args:
        node: the group.
        lead: the lines of the tree that run through these rows.
        share: of the stream among all streams.
        draws: examples of the stream that the training takes.
        folder: left out of file names.
    """
    for number, child in enumerate(node.children):
        own, below = _branches(is_last=number == len(node.children) - 1)
        weight = _number(child.weight) if len(node.children) > 1 else ""
        if child.source is None:
            first, last = child.children[0].source, child.children[-1].source
            is_pair = last is not None and last.is_transcription
            name = short_name(first, folder) if is_pair else child.name
            yield _row(lead + own + name, child.size, share * child.share, weight)
            yield from _rows_below(child, lead + below, share, draws, folder)
            continue
        known = draws is not None and child.size is not None and child.size.examples
        epochs = draws * child.share / child.size.examples if known else None
        shown = "?" if epochs is None else f"{epochs:,.0f}" if epochs >= 100 else f"{epochs:.2f}"
        yield _row(lead + own + short_name(child.source, folder), child.size, share * child.share, weight, shown)


def _row(name: str, size: Size | None, share: float, weight: str = "", epochs: str = "") -> Row:
    shown = f"{100 * share:.1f} %"
    if size is None:
        return Row(name, "?", "?", "?", weight, shown, epochs)
    speech = _duration(size.seconds) if size.seconds else ""
    text = _number(size.tokens) if size.tokens else ""
    return Row(name, speech, text, _number(size.examples), weight, shown, epochs)


def _branches(is_last: bool) -> tuple[str, str]:
    return ("└─ ", "   ") if is_last else ("├─ ", "│  ")


def common_folder(sources: Sequence[Source]) -> str:
    """The folder that holds all files of all sources; empty if there is none."""
    folders = [os.path.dirname(path) for source in sources for _, path in source.files()]
    try:
        return os.path.commonpath(folders) if all(map(is_local, folders)) else ""
    except ValueError:  # absolute and relative paths, or none at all
        return ""


def short_name(source: Source, folder: str) -> str:
    """The files of a source, relative to the folder of all; of parallel ones, what they share and where they differ."""
    keys = ("manifest_filepath", "cuts_path", "shar_path", "source_paths", "target_paths", "paths", "data_dir")
    paths = [path for key in keys for path in _paths(getattr(source, key))]
    names = [os.path.relpath(path, folder) if folder and is_local(path) else path for path in paths]
    if not names:
        return source.type
    if source.is_transcription:
        return "transcription"
    # In runs of equal letters, and not of folders: `train.en` and `train.de` share `train.`
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    stem = "".join(letters[0] for letters in alike)
    if len(names) == 1 or stem.endswith("/") or not stem:
        return ", ".join(names)
    return f"{stem}{{{','.join(name.removeprefix(stem) for name in names)}}}"


def _paths(value: Any) -> Iterator[str]:
    """The paths in a value, sharded ones as they are written."""
    if isinstance(value, (str, Path)):
        yield str(value)
    elif isinstance(value, (Mapping, Sequence)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _paths(item)


def _table(rows: Sequence[Row], unit: str, width: int) -> Table:
    """Columns that say nothing of any row are left out; names get what room is left."""
    titles = Row("source", "speech", unit, "examples", "weight", "share", "epochs")
    weights = {row.weight for row in rows}
    shown = [n for n in range(1, len(titles)) if any(row[n] not in ("", "?") for row in rows)]
    shown = [n for n in shown if titles[n] != "weight" or weights - {"", "1"}]
    taken = sum(GAP + max(cell_len(row[n]) for row in (titles, *rows)) for n in shown)
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0))
    table.add_column(titles.source, no_wrap=True)
    for number in shown:
        table.add_column(titles[number], justify="right", no_wrap=True)
    for row in rows:
        name = Text(row.source if not row.epochs else _shortened(row.source, max(width - taken, SHORTEST_NAME)))
        name.truncate(max(width - taken, SHORTEST_NAME), overflow="ellipsis")
        table.add_row(name, *(row[number] for number in shown), style=None if row.epochs else "bold")
    return table


def _shortened(name: str, width: int) -> str:
    """The name of a source that fits: of files, the end says more than the beginning."""
    if cell_len(name) <= width:
        return name
    bare = name.lstrip("│├└─ ")
    lines = name[: len(name) - len(bare)]
    return f"{lines}…{bare[-max(width - len(lines) - 1, 1) :]}"


def _remarks(recipe: Recipe, streams: Sequence[Stream], steps: int) -> Iterator[str]:
    """What the table does not say, one sentence a line."""
    yield ""
    yield f"Expected share of the examples: {_modalities(streams)}."
    fusion = recipe.dataset.sampler_fusion
    if len(streams) > 1 and fusion == "zip":
        rare = [f", of {g.name} once in {g.every_n_steps} steps" for g in recipe.dataset.groups if g.every_n_steps > 1]
        yield f"A step takes one batch of each group (sampler_fusion: zip){''.join(rare)}."
    elif len(streams) > 1:
        listed = ", ".join(f"{stream.name} {100 * stream.batches:.1f} %" for stream in streams)
        yield f"A step takes one batch of one group (sampler_fusion: {fusion}): {listed}."
    else:
        yield "A step takes one batch."
    for stream in streams:
        yield f"A batch{f' of {stream.name}' if stream.name else ''} holds {stream.batch}."
    if recipe.batches_per_step > 1:
        yield f"So does each process at each accumulated batch: {recipe.batches_per_step} times a step of the trainer."
    if any(stream.examples is not None for stream in streams):
        yield f"Epochs are passes over a source in {steps:,} steps."


def _modalities(streams: Sequence[Stream]) -> str:
    shares: Counter[str] = Counter()
    for stream, of_stream in zip(streams, _shares_of_streams(streams), strict=True):
        for leaf in stream.blend.leaves():
            source = leaf.source
            is_speech = source.type.startswith(("nemo", "lhotse", "speech")) or source.type.endswith("_as_conversation")
            shares[TEXT if source.is_text else SPEECH if is_speech else OTHER] += of_stream * leaf.share
    listed = ", ".join(f"{modality} {100 * share:.1f} %" for modality, share in shares.most_common())
    if any(stream.examples is None for stream in streams) and len(streams) > 1:
        listed += " (as if all batches were of one size)"
    return listed


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{_number(seconds / 3600)} h"


def _number(value: float) -> str:
    """Whole numbers below 100,000 as they are, others to three digits."""
    for limit, suffix in ((1e9, " G"), (1e6, " M"), (1e5, " k")):
        if value >= limit:
            return f"{value / (1e3 if suffix == ' k' else limit):.3g}{suffix}"
    return f"{value:,.0f}" if value == int(value) or value >= 1000 else f"{value:.3g}"
