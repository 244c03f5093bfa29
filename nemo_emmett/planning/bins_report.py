"""``nemo-emmett bins``: the bins of a dataset, what they save, and a picture of both."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nemo.collections.common.tokenizers import AutoTokenizer
from rich.console import Console
from rich.table import Table
from tokenizers import AddedToken

from nemo_emmett.data.bucketing.length_stats import Lengths, as_nemo_writes, listed, measure, solve
from nemo_emmett.data.bucketing.padding import Padding, equal_mass_bins, equal_mass_bins_2d, largest_ratios, padding_of
from nemo_emmett.data.config.dataset_config import DatasetConfig, GroupConfig
from nemo_emmett.data.readers.examples import ExampleKind
from nemo_emmett.errors import ConfigError
from nemo_emmett.planning.blend_report import Recipe, load_tokenizer
from nemo_emmett.planning.picture import new_figure, save_figure
from nemo_emmett.run_log import plain_console


def tokenizer_of(recipe: Recipe, tokenizer: str | None = None, of_model: Any = None) -> Any:
    """The tokenizer of a recipe, with the token that marks speech; None if none is named.

    Args:
        recipe: what :func:`~nemo_emmett.planning.blend_report.read_recipe` found.
        tokenizer: folder of a tokenizer, or SentencePiece model; by default the model's, or that of the recipe's
            language model.
        of_model: NeMo tokenizer of the recipe's model, if it is known.

    Raises:
        ConfigError: if there is no such tokenizer.
    """
    name = tokenizer or (None if of_model is not None else recipe.tokenizer)
    if name is None:
        return of_model
    loaded = load_tokenizer(name)
    locators = {group.audio_locator_tag for group in recipe.dataset.groups} - {None}
    if locators and isinstance(loaded, AutoTokenizer):  # the model adds it as well
        tokens = [AddedToken(locator, special=True, normalized=False) for locator in sorted(locators)]
        loaded.tokenizer.add_tokens(tokens, special_tokens=True)
    return loaded


@dataclass(frozen=True)
class BinsOfGroup:
    """The bins of one sampler's examples, and what they save.

    Args:
        place: of the group in the recipe.
        lengths: of its examples, those that are kept.
        bins: of least padding.
        padding: that they leave.
        padding_before: for each of the others (NeMo's rule; the recipe's own bins, if it has any), what they leave.
        max_ratio: the key and the values of NeMo's limit on the ratio of output to input; None if outliers are kept.
    """

    place: str
    lengths: Lengths
    bins: list
    padding: Padding
    padding_before: Mapping[str, Padding]
    max_ratio: tuple[str, list[float]] | None = None


def bins_of_dataset(
    dataset: DatasetConfig,
    tokenizer: Any = None,
    kind: ExampleKind | None = None,
    *,
    num_buckets: int | None = None,
    num_sub_buckets: int | None = None,
    limit: int | None = None,
    outliers: float | None = None,
) -> list[BinsOfGroup]:
    """Solve for the bins of a dataset; of each of its groups, if it is a ``multi_config``.

    Args:
        dataset: to be measured.
        tokenizer: NeMo tokenizer; not needed for speech in seconds without sub-buckets.
        kind: what the dataset takes; by default translations where there is a prompt format, else what NeMo reads.
        num_buckets: instead of the recipe's.
        num_sub_buckets: instead of the recipe's; without either, bins are one-dimensional.
        limit: examples to measure of each group; by default all.
        outliers: leave out examples whose output is longer for their input than the mean of those of like inputs by
            more than so many standard deviations; needs sub-buckets.

    Raises:
        ConfigError: if a group lacks what measuring needs.
        DataError: if there is nothing to measure.
    """
    found = []
    for group in dataset.groups:
        group_kind = kind or (ExampleKind.TRANSLATION if group.prompt_format else ExampleKind.AS_READ)
        sub_buckets = num_sub_buckets or group.num_sub_buckets
        if outliers is not None and sub_buckets is None:
            raise ConfigError(f"{group.place}: outliers are found by their outputs; give --num-sub-buckets as well.")
        lengths = measure(group, tokenizer, group_kind, two_dimensional=sub_buckets is not None, limit=limit)
        found.append(_bins_of_group(group, lengths, num_buckets or group.num_buckets, sub_buckets, outliers))
    return found


def _bins_of_group(
    group: GroupConfig, lengths: Lengths, num_buckets: int, num_sub_buckets: int | None, outliers: float | None
) -> BinsOfGroup:
    if outliers is not None:
        lengths = lengths.without_outliers(outliers, num_buckets)
    bins = solve(lengths, num_buckets, num_sub_buckets)
    if num_sub_buckets is None:
        others = {"NeMo's rule (equal mass)": equal_mass_bins(lengths.inputs, num_buckets)}
    else:
        others = {"NeMo's rule (equal mass)": equal_mass_bins_2d(*lengths.sides, num_buckets, num_sub_buckets)}
    own = group.bucket_duration_bins
    if own and not group.has_auto_bins and np.ndim(own) == len(lengths.sides):
        others["as configured"] = own
    key = "max_tpt" if group.use_multimodal_sampling else "max_tps"
    max_ratio = None if outliers is None else (key, largest_ratios(bins, *lengths.sides))
    before = {name: padding_of(theirs, *lengths.sides) for name, theirs in others.items()}
    return BinsOfGroup(group.place, lengths, bins, padding_of(bins, *lengths.sides), before, max_ratio)


def print_bins(groups: Sequence[BinsOfGroup], console: Console | None = None) -> None:
    """Print the bins to be pasted, what was left out, and the padding before and after."""
    console = console or plain_console()
    for group in groups:
        dropped = listed(group.lengths.dropped)
        kept = f"{len(group.lengths.inputs):,} examples, {100 * group.lengths.share_kept:.2f} % of those measured"
        title = f"{group.place}: {kept}{f' (left out: {dropped})' if dropped else ''}"
        console.print(title, highlight=False, style="bold")
        console.print(_table(group))
        # Lines to be pasted must not be broken.
        console.print(f"bucket_duration_bins: {as_nemo_writes(group.bins)}", highlight=False, soft_wrap=True)
        if group.max_ratio is not None:
            key, ratios = group.max_ratio
            console.print(f"{key}: {as_nemo_writes(ratios)}", highlight=False, soft_wrap=True)
        console.print()


def _table(group: BinsOfGroup) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("padding, share of a batch")
    sides = ("input", "output")[: len(group.lengths.sides)]
    for title in (*sides, "both", "amount", "examples placed"):
        table.add_column(title, justify="right", no_wrap=True)
    reference = next(iter(group.padding_before.values()))
    for name, padding in {**group.padding_before, "least padding": group.padding}.items():
        shares = [f"{100 * share:.2f} %" for share in (*padding.share_of_sides, padding.share)]
        ratio = padding.amount / reference.amount if reference.amount else 1.0
        placed = f"{100 * padding.kept / len(group.lengths.inputs):.2f} %"
        table.add_row(name, *shares, f"x {ratio:.2f}", placed)
    return table


# The picture


def draw_bins(groups: Sequence[BinsOfGroup], path: str | Path) -> None:
    """Draw the distribution of lengths with the bins on it, a panel for each group.

    Raises:
        EmmettError: if matplotlib is not installed.
        DataError: if the picture cannot be written.
    """
    figure = new_figure(7.2 * len(groups), 6.0)
    for axes, group in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
        if group.lengths.outputs is None:
            axes.hist(group.lengths.inputs, bins=_edges(group.lengths.inputs), color="#9ecae1")
            for cap in group.bins:
                axes.axvline(cap, color=_LINE, linewidth=0.9)
            axes.set_ylabel("examples")
            axes.set_xlim(0, None)
        else:
            _draw_2d(figure, axes, group)
        name, before = next(iter(group.padding_before.items()))
        title = (
            f"{group.place}\n{len(group.lengths.inputs):,} examples in {len(group.bins)} buckets, padding "
            f"{100 * group.padding.share:.1f} % of a batch\n({name}: {100 * before.share:.1f} %)"
        )
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel(f"input length ({group.lengths.unit})")
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


_LINE = "#d1495b"  # differs from all shades of the histogram
_MARGIN = 1.02  # leaves the last cap's line inside the picture


def _draw_2d(figure: Any, axes: Any, group: BinsOfGroup) -> None:
    from matplotlib.colors import LogNorm

    inputs, outputs = group.lengths.sides
    edges = _edges(inputs), _edges(outputs)
    counts, *_ = np.histogram2d(inputs, outputs, bins=edges)
    # The shades begin a power of ten below the first: a single example must be seen.
    norm = LogNorm(vmin=0.1, vmax=max(counts.max(), 10))
    shades = axes.pcolormesh(*edges, np.ma.masked_equal(counts.T, 0), cmap="Blues", norm=norm)
    scale = figure.colorbar(shades, ax=axes, label="examples", pad=0.02, format="{x:g}")
    scale.ax.set_ylim(1, None)
    bottom, left = 0.0, 0.0
    for cap, strip in itertools.groupby(group.bins, key=lambda pair: pair[0]):
        sub_caps = [sub_cap for _, sub_cap in strip]
        axes.vlines([left, cap], bottom, sub_caps[-1], color=_LINE, linewidth=0.9)
        axes.hlines(sub_caps, left, cap, color=_LINE, linewidth=0.9)
        left = cap
    axes.set_ylabel("output length (tokens)")
    axes.set_xlim(0, _MARGIN * inputs.max())
    axes.set_ylim(0, _MARGIN * outputs.max())


_MOST_CELLS = 160
"""Of the histogram, along one side: more are finer than the picture."""

_JUST_ABOVE = 1e-6
"""How far an edge is from its length, which then is in the cell below, as in a bucket."""


def _edges(lengths: np.ndarray) -> np.ndarray:
    """Edges of the histogram's cells, each open below and closed above like a bucket."""
    longest = max(float(lengths.max()), 1.0)
    if (lengths == lengths.round()).all():
        width = max(1, int(np.ceil(longest / _MOST_CELLS)))
        return np.arange(-width, longest + width, width) + _JUST_ABOVE
    return np.linspace(0, longest, _MOST_CELLS + 1) + _JUST_ABOVE
