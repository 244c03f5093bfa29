"""The bins of a dataset: its examples measured as NeMo measures them, and the bins of least padding for them.

``bucket_duration_bins: auto`` takes them at start-up; ``nemo-emmett bins`` prints and draws them.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
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
from tqdm import tqdm

from nemo_emmett.data.bucketing.bins import optimal_bins, optimal_bins_2d
from nemo_emmett.data.bucketing.padding import within_deviations
from nemo_emmett.data.config.dataset_config import GroupConfig
from nemo_emmett.data.config.nemo_config import sampler_config
from nemo_emmett.data.config.sources import SourceGroup
from nemo_emmett.data.io.commands import commands_allowed
from nemo_emmett.data.io.skipped_records import SkippedRecords
from nemo_emmett.data.readers.examples import ExampleKind
from nemo_emmett.data.readers.registry import ReaderContext, injected_examples, reader_context, register_data_types
from nemo_emmett.data.sampling.tolerance import SKIPPED, build_tolerant_sampler, guarded
from nemo_emmett.errors import ConfigError, DataError
from nemo_emmett.prompts.translation import register_prompt_formats

OUTLIERS = "outliers"
"""What a report calls the examples that were left out for their ratio of output to input."""

_PROBE = {
    "metadata_only": True,
    "force_map_dataset": False,
    "force_iterable_dataset": False,
    "max_open_streams": None,
    "noise_path": None,
    "rir_enabled": False,
    # The chain of maps and filters is wanted, no batches.
    "use_bucketing": False,
    "bucket_duration_bins": None,
    "bucket_batch_size": None,
    "batch_duration": None,
    "batch_tokens": None,
    "batch_size": 1,
}
"""Keys of a config that is only measured: no audio is read, no batch is made."""


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
    sample: Iterable | None = None,
) -> Lengths:
    """Read the examples of a group, without their audio, through NeMo's own maps and filters, and measure them.

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
    _check_measurable(group, tokenizer, two_dimensional)
    register_data_types()
    register_prompt_formats()
    finite = limit is None or not _has_weights(group.root)
    config = sampler_config(group, **_PROBE, force_finite=finite)
    buckets = [(0.0, 0.0)] if two_dimensional else [0.0]  # only their dimension matters for measuring
    if config.use_multimodal_sampling:
        constraint = MultimodalFixedBucketBatchSizeConstraint2D(
            buckets,
            [1],
            token_equivalent_duration=config.token_equivalent_duration,
            measure_total_length=config.measure_total_length,
        )
    else:
        constraint = FixedBucketBatchSizeConstraint2D(buckets, [1])
    lengths: list = []
    dropped: Counter[str] = Counter()
    fed = nullcontext(config.input_cfg) if sample is None else injected_examples(sample)
    skipped_records = SkippedRecords()
    with (
        logging.temp_verbosity(logging.ERROR),
        reader_context(ReaderContext(skipped_records, kind)),
        commands_allowed(group.allow_commands),
        fed as input_cfg,
    ):
        config.input_cfg = input_cfg
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
        raise DataError(
            f"{group.place}: no example is left to make bins of, of {skipped_records.read_count} records "
            f"({listed({**skipped_records.causes(), **dropped}) or 'there are none'}); mend the data or relax "
            "its filters."
        )
    sides = np.asarray(lengths, dtype=float)
    unit = "tokens" if group.use_multimodal_sampling else "seconds"
    if two_dimensional:
        return Lengths(sides[:, 0], sides[:, 1], dropped, unit)
    return Lengths(sides, None, dropped, unit)


def _check_measurable(group: GroupConfig, tokenizer: Any, two_dimensional: bool) -> None:
    if tokenizer is None and (group.use_multimodal_sampling or two_dimensional):
        raise ConfigError(f"{group.place}: its lengths are counted in tokens, and there is no tokenizer; name one.")
    if not group.use_multimodal_sampling:
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
    """NeMo's chain before its closing filters, and those, in their order; so what they drop can be counted."""
    filters = []
    stage = cuts
    while True:
        if isinstance(stage, CutSet):
            stage = stage.data
        if not isinstance(stage, LazyFilter):
            return stage, filters[::-1]
        filters.append(stage.predicate)
        stage = stage.iterator


def listed(counts: Mapping[str, int]) -> str:
    """Causes and how often each occurred, in words."""
    return ", ".join(f"{count} x {cause}" for cause, count in counts.items() if count)


def solve(lengths: Lengths, num_buckets: int, num_sub_buckets: int | None = None) -> list:
    """The bins of least padding: caps, or pairs of caps where there are sub-buckets."""
    if num_sub_buckets is None:
        return optimal_bins(lengths.inputs, num_buckets)
    return optimal_bins_2d(*lengths.sides, num_buckets, num_sub_buckets)


def auto_bins(group: GroupConfig, tokenizer: Any, kind: ExampleKind, sample: Iterable | None = None) -> list:
    """What ``bucket_duration_bins: auto`` is replaced by; it is logged, to be pasted into the recipe.

    Args:
        group: with ``num_buckets``, ``num_sub_buckets`` (then in two dimensions), ``num_cuts_for_bins_estimate`` (how
            many examples are measured).
        tokenizer: NeMo tokenizer.
        kind: what the dataset takes.
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
    bins, num_examples = _solved(group, tokenizer, kind, sample)
    if sizes is None:
        bins = bins[:-1]
    elif len(sizes) != len(bins):
        raise ConfigError(
            f"{group.place}.bucket_batch_size: has {len(sizes)} sizes for {len(bins)} buckets; give one for each of "
            f"{as_nemo_writes(bins)}."
        )
    _announce(bins, num_examples, group.place)
    return bins


def bins_awaiting_sizes(group: GroupConfig, tokenizer: Any, kind: ExampleKind) -> list:
    """What ``bucket_duration_bins: auto`` is replaced by where the batch sizes are still to be found.

    Every bin has a cap, as batch sizes need it, in one dimension too; ``bucket_batch_size`` is not looked at.
    Arguments and errors are those of :func:`auto_bins`.
    """
    bins, num_examples = _solved(group, tokenizer, kind)
    _announce(bins, num_examples, group.place)
    return bins


def _solved(group: GroupConfig, tokenizer: Any, kind: ExampleKind, sample: Iterable | None = None) -> tuple[list, int]:
    """The bins of a group, each with a cap, and the number of examples that they were found by."""
    two_dimensional, limit = group.num_sub_buckets is not None, group.num_cuts_for_bins_estimate
    lengths = measure(group, tokenizer, kind, two_dimensional=two_dimensional, limit=limit, sample=sample)
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
