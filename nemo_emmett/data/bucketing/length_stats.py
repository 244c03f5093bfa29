"""The bins of a dataset: its examples measured as NeMo measures them, and the bins of least padding for them.

``bucket_duration_bins: auto`` takes them at start-up; ``nemo-emmett bins`` prints and draws them.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from lhotse import CutSet
from lhotse.lazy import LazyFilter
from nemo.collections.common.data.lhotse.sampling import (
    FixedBucketBatchSizeConstraint2D,
    MultimodalFixedBucketBatchSizeConstraint2D,
)
from nemo.utils import logging
from omegaconf import DictConfig
from tqdm import tqdm

from nemo_emmett.data.blending.weights import blend_of
from nemo_emmett.data.bucketing.bins import optimal_bins, optimal_bins_2d
from nemo_emmett.data.bucketing.padding import within_deviations
from nemo_emmett.data.config.dataset_config import GroupConfig
from nemo_emmett.data.config.nemo_config import WITHOUT_BATCHES, sampler_config
from nemo_emmett.data.config.sources import SourceGroup
from nemo_emmett.data.io.commands import commands_allowed
from nemo_emmett.data.io.skipped_records import SkippedRecords
from nemo_emmett.data.lengths.building import open_length_indexes
from nemo_emmett.data.lengths.identity import maps_config
from nemo_emmett.data.lengths.index import LengthIndex
from nemo_emmett.data.lengths.measures import Measures
from nemo_emmett.data.lengths.selection import Selection, filter_of_text
from nemo_emmett.data.readers.examples import ExampleKind, lengths_in_tokens
from nemo_emmett.data.readers.registry import ReaderContext, injected_examples, reader_context, register_data_types
from nemo_emmett.data.sampling.global_batches import GroupOrder, GroupSchedule, ends_with
from nemo_emmett.data.sampling.shuffle import SHUFFLE_BLOCK_SIZE
from nemo_emmett.data.sampling.source_order import SourceOrder, joined
from nemo_emmett.data.sampling.tolerance import KEYS_OF_FUNCTION, SKIPPED, build_tolerant_sampler, guarded
from nemo_emmett.data.sampling.transforms import FILTERS_OF_LENGTHS
from nemo_emmett.errors import ConfigError, DataError, Help
from nemo_emmett.prompts.families import forbidden_text
from nemo_emmett.prompts.translation import register_prompt_formats

OUTLIERS = "outliers"
"""What a report calls the examples that were left out for their ratio of output to input."""

_PROBE = {
    "metadata_only": True,
    "force_map_dataset": False,
    "force_iterable_dataset": True,  # speech and text may be mixed
    **WITHOUT_BATCHES,
}
"""Keys of a config that is only measured: no audio is read, no batch is made."""

_SEED = 0
"""Of the order in which examples are measured if not all are."""

_BLOCKS_AT_A_TIME = 4096
"""Of a length index, some million records."""


@dataclass(frozen=True)
class Lengths:
    """The lengths of a dataset's examples, as NeMo measures them to choose a bucket.

    Args:
        inputs: (N,) lengths of the examples that are kept.
        outputs: (N,) the same; None in one dimension.
        dropped: examples left out, by what left them out.
        unit: of the inputs, ``tokens`` or ``seconds``; outputs are in tokens.
    """

    inputs: np.ndarray
    outputs: np.ndarray | None
    dropped: Mapping[str, int]
    unit: str

    @property
    def sides(self) -> tuple[np.ndarray, ...]:
        """Inputs, and outputs if there are any."""
        return (self.inputs,) if self.outputs is None else (self.inputs, self.outputs)

    @property
    def share_kept(self) -> float:
        """Of all examples, from 0 to 1."""
        return len(self.inputs) / (len(self.inputs) + sum(self.dropped.values()))

    def without_outliers(self, num_deviations: float, num_strips: int) -> Lengths:
        """Without the examples that :func:`~nemo_emmett.data.bucketing.padding.within_deviations` finds unusual."""
        usual = within_deviations(self.inputs, self.outputs, num_deviations, num_strips)
        dropped = {**self.dropped, OUTLIERS: int((~usual).sum())}
        return replace(self, inputs=self.inputs[usual], outputs=self.outputs[usual], dropped=dropped)


def measure(
    group: GroupConfig,
    tokenizer: Any,
    kind: ExampleKind,
    *,
    two_dimensional: bool,
    limit: int | None = None,
    indexes: Mapping[str, LengthIndex | None] | None = None,
) -> Lengths:
    """Measure the examples of a group: by length indexes or, if a source has none, by reading it without its audio.

    NeMo's own maps and filters are applied, apart from the filter of examples that fit into no bucket.

    Args:
        group: with the sources.
        tokenizer: NeMo tokenizer; None measures seconds only.
        kind: what the dataset takes.
        two_dimensional: measure outputs, too.
        limit: measure so many examples, in the order of training; by default each example once.
        indexes: of the sources, by place. By default they are opened, and built if there is no ``limit``: reading all
            records takes as long.

    Raises:
        ConfigError: if the group lacks what measuring needs.
        DataError: if no example is left to measure.
    """
    _check_measurable(group, tokenizer, kind, two_dimensional)
    if indexes is None:
        with commands_allowed(group.allow_commands):
            indexes = open_length_indexes([group], tokenizer, kind, group.index_dir, build=limit is None)
    of_group = [indexes.get(source.place) for source in group.sources]
    if None not in of_group and filter_of_text(group, kind) is None:
        return _measure_by_indexes(group, of_group, tokenizer, kind, two_dimensional, limit)
    return measure_stream(group, tokenizer, kind, two_dimensional=two_dimensional, limit=limit)


def _measure_by_indexes(
    group: GroupConfig,
    indexes: Sequence[LengthIndex],
    tokenizer: Any,
    kind: ExampleKind,
    two_dimensional: bool,
    limit: int | None,
) -> Lengths:
    config = sampler_config(group, **_PROBE)
    constraint = _constraint(config, two_dimensional)
    has_tokenizer = tokenizer is not None
    selection = Selection(config, constraint, None, has_tokenizer=has_tokenizer)
    left_out: Counter[str] = Counter()
    if limit is None:
        parts = _all_measures(indexes)
        for index in indexes:
            left_out += index.filtered
    else:
        every = Selection(maps_config(group, tokenizer), constraint, None, has_tokenizer=has_tokenizer)
        shares = [leaf.share for leaf in blend_of(group, tokenizer=tokenizer, kind=kind).leaves()]
        parts = _first_measures(group, indexes, every, shares, limit)
    kept = [selection.lengths(part[selection.buckets(part, left_out) >= 0]) for part in parts]
    sides = np.concatenate([np.empty((0, 2) if two_dimensional else 0), *kept])
    dropped = {name: left_out.pop(key) for name, key in KEYS_OF_FUNCTION.items() if left_out[key]}
    if len(sides):
        return _lengths_of(sides, dropped, group)
    skipped_records = SkippedRecords()
    for index in indexes:
        index.report(skipped_records)
    raise _nothing_left(group, skipped_records.read_count, {**skipped_records.causes(), **left_out, **dropped})


def _all_measures(indexes: Sequence[LengthIndex]) -> Iterator[Measures]:
    """Each example once."""
    for index in indexes:
        blocks = np.arange(len(index.block_shards))
        for first in range(0, len(blocks), _BLOCKS_AT_A_TIME):
            yield index.read_blocks(blocks[first : first + _BLOCKS_AT_A_TIME])[1]


def _first_measures(
    group: GroupConfig, indexes: Sequence[LengthIndex], selection: Selection, shares: Sequence[float], limit: int
) -> Iterator[Measures]:
    """The first examples in the order of training, by the shares of the blend, before the filters on lengths.

    Sources start over when they end, so that the shares hold, unless training reads each example once or there is only
    one source. The seed is not that of training: bins do not depend on it, and are the same on all ranks.
    """
    config = sampler_config(group)
    group_size = max(SHUFFLE_BLOCK_SIZE, config.shuffle_buffer_size or 0)
    sources = [
        SourceOrder(index, selection, source.name, config.shuffle, [_SEED, number], group_size)
        for number, (source, index) in enumerate(zip(group.sources, indexes, strict=True))
    ]
    names = [source.name for source in group.sources]
    order = GroupOrder(group.name, sources, names, list(shares), [limit], False, ends_with=ends_with(group.sources))
    is_once = config.force_finite or (len(sources) == 1 and not _has_weights(group.root))
    schedule = GroupSchedule(order, world_size=1, only_pass=0 if is_once else None)
    steps: list[np.ndarray] = []
    with suppress(StopIteration):
        while sum(map(len, steps)) < limit:
            steps.append(schedule.next_step().examples)
    examples = joined(steps)[:limit]
    for number, index in enumerate(indexes):
        entries = examples["entry"][examples["source"] == number]
        numbers, measures = index.read_blocks(np.unique(index.blocks_of(entries)))
        yield measures[np.searchsorted(numbers, entries)]


def measure_stream(
    group: GroupConfig,
    tokenizer: Any,
    kind: ExampleKind,
    *,
    two_dimensional: bool,
    limit: int | None = None,
    sample: Iterable | None = None,
) -> Lengths:
    """The same as :func:`measure`, by reading examples through NeMo's own maps and filters, without their audio.

    Args:
        group: with the sources.
        tokenizer: NeMo tokenizer; None measures seconds only.
        kind: what the dataset takes.
        two_dimensional: measure outputs, too.
        limit: stop after so many; where sources have weights, they are then mixed by them, and start over when they
            end. By default each example counts once.
        sample: examples that have been read already; the sources are not opened then.

    Raises:
        ConfigError: if the group lacks what measuring needs.
        DataError: if no example is left to measure.
    """
    _check_measurable(group, tokenizer, kind, two_dimensional)
    register_data_types()
    register_prompt_formats()
    finite = limit is None or not _has_weights(group.root)
    config = sampler_config(group, **_PROBE, force_finite=finite)
    constraint = _constraint(config, two_dimensional)
    lengths: list = []
    dropped: Counter[str] = Counter()
    fed = nullcontext(config.input_cfg) if sample is None else injected_examples(sample)
    skipped_records = SkippedRecords()
    forbidden = None if tokenizer is None else forbidden_text(group.prompt_format, tokenizer)
    with (
        logging.temp_verbosity(logging.ERROR),
        reader_context(ReaderContext(skipped_records, kind, forbidden=forbidden)),
        commands_allowed(group.allow_commands),
        fed as input_cfg,
    ):
        config.input_cfg = input_cfg
        if sample is not None:
            config.reweight_temperature = None  # of the sources, which are not opened
        sampler, _ = build_tolerant_sampler(config, 0, 1, tokenizer, skipped_records)
        examples, filters = _without_filters(sampler.cuts[0])
        title = f"Measuring {group.place}"
        for example in tqdm(itertools.islice(examples, limit), desc=title, unit=" examples", delay=5, disable=None):
            verdicts = ((keeps, guarded(keeps, skipped_records)(example)) for keeps in filters)
            out_by, verdict = next(((f, kept) for f, kept in verdicts if kept is SKIPPED or not kept), (None, True))
            if out_by is None:
                lengths.append(constraint.measure_length(example))
            elif verdict is not SKIPPED:
                dropped[type(out_by).__name__] += 1
    if not lengths:
        raise _nothing_left(group, skipped_records.read_count, {**skipped_records.causes(), **dropped})
    return _lengths_of(np.asarray(lengths, dtype=float), dropped, group)


def _constraint(structured: DictConfig, two_dimensional: bool) -> FixedBucketBatchSizeConstraint2D:
    """NeMo's measure of examples, with one bucket that all fit into."""
    buckets = [(math.inf, math.inf)] if two_dimensional else [math.inf]
    if not structured.use_multimodal_sampling:
        return FixedBucketBatchSizeConstraint2D(buckets, [1])
    return MultimodalFixedBucketBatchSizeConstraint2D(
        buckets,
        [1],
        token_equivalent_duration=structured.token_equivalent_duration,
        measure_total_length=structured.measure_total_length,
    )


def _lengths_of(sides: np.ndarray, dropped: Mapping[str, int], group: GroupConfig) -> Lengths:
    inputs, outputs = (sides, None) if sides.ndim == 1 else (sides[:, 0], sides[:, 1])
    most_first = dict(sorted(dropped.items(), key=lambda item: (-item[1], item[0])))
    return Lengths(inputs, outputs, most_first, "tokens" if group.use_multimodal_sampling else "seconds")


def _nothing_left(group: GroupConfig, num_records: int, causes: Mapping[str, int]) -> DataError:
    return DataError(
        f"{group.place}: no example is left to make bins of, of {num_records} records "
        f"({listed({cause: count for cause, count in causes.items() if cause}) or 'there are none'}); mend the data or "
        "relax its filters.",
        page=Help.NOTHING_LEFT,
    )


def _check_measurable(group: GroupConfig, tokenizer: Any, kind: ExampleKind, two_dimensional: bool) -> None:
    if tokenizer is None and (group.use_multimodal_sampling or two_dimensional):
        raise ConfigError(f"{group.place}: its lengths are counted in tokens, and there is no tokenizer; name one.")
    if not group.use_multimodal_sampling:
        if (reason := lengths_in_tokens(group.sources, kind)) is not None:
            raise ConfigError(
                f"{group.place}.use_multimodal_sampling: is false, so bins measure seconds of speech, but {reason}; "
                "set use_multimodal_sampling: true to measure in tokens."
            )
        return
    if any(not source.is_text and source.token_equivalent_duration is None for source in group.sources):
        raise ConfigError(
            f"{group.place}.token_equivalent_duration: missing; give the seconds of speech that one frame of the "
            "encoder covers (0.08 for FastConformer), so that speech can be measured in tokens."
        )


def _has_weights(group: SourceGroup) -> bool:
    return any(
        member.weight is not None or (isinstance(member, SourceGroup) and _has_weights(member))
        for member in group.members
    )


def _without_filters(cuts: CutSet) -> tuple[Iterable, list]:
    """NeMo's chain before its closing filters, and those; so what they drop can be counted."""
    filters = []
    stage = cuts
    while True:
        if isinstance(stage, CutSet):
            stage = stage.data
        if not isinstance(stage, LazyFilter):
            # A length index has no example that a filter of quality leaves out: those come first here as well.
            return stage, sorted(filters, key=lambda keeps: type(keeps).__name__ in FILTERS_OF_LENGTHS)
        filters.insert(0, stage.predicate)
        stage = stage.iterator


def listed(counts: Mapping[str, int]) -> str:
    """Causes and how often each occurred, in words."""
    return ", ".join(f"{count} x {cause}" for cause, count in counts.items() if count)


def solve(lengths: Lengths, num_buckets: int, num_sub_buckets: int | None = None) -> list:
    """The bins of least padding: caps, or pairs of caps where there are sub-buckets."""
    if num_sub_buckets is None:
        return optimal_bins(lengths.inputs, num_buckets)
    return optimal_bins_2d(*lengths.sides, num_buckets, num_sub_buckets)


def auto_bins(
    group: GroupConfig,
    tokenizer: Any,
    kind: ExampleKind,
    *,
    indexes: Mapping[str, LengthIndex | None] | None = None,
    sample: Iterable | None = None,
) -> list:
    """What ``bucket_duration_bins: auto`` is replaced by; it is logged, to be pasted into the recipe.

    Args:
        group: with ``num_buckets``, ``num_sub_buckets`` (then in two dimensions), ``num_cuts_for_bins_estimate`` (how
            many examples are measured).
        tokenizer: NeMo tokenizer.
        kind: what the dataset takes.
        indexes: of the sources, by place; None: examples are read.
        sample: examples to measure, such as a shuffled stream of them; by default the first of each source.

    Returns:
        Bins for ``bucket_duration_bins``: a cap for each ``bucket_batch_size``; without ``bucket_batch_size`` the last
        bucket is open. With it, examples longer than any measured fit into no bucket, and NeMo leaves them out.

    Raises:
        ConfigError: if the group lacks what is needed, or ``bucket_batch_size`` does not go with the bins.
        DataError: if no example is left to measure.
    """
    sizes = group.bucket_batch_size
    if group.num_sub_buckets is not None and sizes is None:
        raise ConfigError(
            f"{group.place}.bucket_batch_size: missing; with num_sub_buckets each of the {group.num_buckets} x "
            f"{group.num_sub_buckets} buckets needs its batch size."
        )
    bins, num_examples = _solved(group, tokenizer, kind, indexes, sample)
    if sizes is None:
        bins = bins[:-1]
    elif len(sizes) != len(bins):
        raise ConfigError(
            f"{group.place}.bucket_batch_size: has {len(sizes)} sizes for {len(bins)} buckets; give one for each of "
            f"{as_nemo_writes(bins)}."
        )
    _announce(bins, num_examples, group.place)
    return bins


def bins_awaiting_sizes(
    group: GroupConfig, tokenizer: Any, kind: ExampleKind, indexes: Mapping[str, LengthIndex | None] | None = None
) -> list:
    """What ``bucket_duration_bins: auto`` is replaced by where the batch sizes are still to be found.

    Every bin has a cap, as batch sizes need it, in one dimension too; ``bucket_batch_size`` is not looked at.
    Arguments and errors are those of :func:`auto_bins`.
    """
    bins, num_examples = _solved(group, tokenizer, kind, indexes)
    _announce(bins, num_examples, group.place)
    return bins


def _solved(
    group: GroupConfig,
    tokenizer: Any,
    kind: ExampleKind,
    indexes: Mapping[str, LengthIndex | None] | None,
    sample: Iterable | None = None,
) -> tuple[list, int]:
    """The bins of a group, each with a cap, and the number of examples that they were found by."""
    keys = {"two_dimensional": group.num_sub_buckets is not None, "limit": group.num_cuts_for_bins_estimate}
    if indexes is None:
        lengths = measure_stream(group, tokenizer, kind, sample=sample, **keys)
    else:
        lengths = measure(group, tokenizer, kind, indexes=indexes, **keys)
    return solve(lengths, group.num_buckets, group.num_sub_buckets), len(lengths.inputs)


def _announce(bins: list, num_examples: int, place: str) -> None:
    logging.info(
        f"{place}: of {num_examples} examples, the bins of least padding are\n"
        f"bucket_duration_bins: {as_nemo_writes(bins)}"
    )


def as_nemo_writes(bins: Sequence) -> str:
    """Bins to be pasted into a recipe: ``[[12,5],[12,9]]``, whole numbers without a fraction."""
    return "[" + ",".join(as_nemo_writes(b) if isinstance(b, Sequence) else _number(b) for b in bins) + "]"


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(float(value))
