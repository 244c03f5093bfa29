"""NeMo's and lhotse's functions of examples, made to skip an example on which they raise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import lhotse.cut.set
import lhotse.lazy
from lhotse import CutSet
from lhotse.cut.set import LazyCutMixer
from lhotse.dataset.sampling.base import CutSampler
from lhotse.lazy import LazyFilter, LazyMapper
from nemo.collections.common.data.lhotse.dataloader import get_lhotse_sampler_from_config
from omegaconf import DictConfig

from nemo_emmett.audio_file import fault_in
from nemo_emmett.data.io.skipped_records import InvalidRecord, SkippedRecords
from nemo_emmett.data.readers.examples import note_example
from nemo_emmett.errors import ConfigError, DataError

SKIPPED = object()
"""What a guarded function returns for an example on which it raised."""

_LONGEST_CAUSE = 60

KEYS_OF_FUNCTION = {
    "tokenize_with_prompt": "prompt_format",
    "format_one": "prompt_format",
    "tokenize": "tokenizer",
    "resample": "sample_rate",
    "_flatten_alt_text": "alt_text",
    "_cut_text_into_windows": "cut_text_into_windows_tokens",
    "DurationFilter": "min_duration, max_duration",
    "TokenCountFilter": "min_tokens, max_tokens",
    "TokenPerSecondFilter": "min_tps, max_tps",
    "TokenPerTokenFilter": "min_tpt, max_tpt",
    "CERFilter": "max_cer",
    "ContextSpeakerSimilarityFilter": "min_context_speaker_similarity",
    "ValidationStatusFilter": "keep",
    "BucketingFilter": "bucket_duration_bins",
    "ReverbWithImpulseResponse": "rir_path",
}
"""The recipe keys that configure NeMo's functions."""


def guarded(function: Callable[[Any], Any], skipped_records: SkippedRecords) -> Callable[[Any], Any]:
    """A function of an example that returns :data:`SKIPPED` where ``function`` raises, and counts the cause.

    A :class:`ConfigError` is raised, since it is the recipe's fault.
    """
    return partial(_guarded_call, function, skipped_records)  # unlike a closure, it can be pickled


def _guarded_call(function: Callable[[Any], Any], skipped_records: SkippedRecords, example: Any) -> Any:
    try:
        return function(example)
    except ConfigError:
        raise
    except Exception as error:  # NeMo and lhotse raise many kinds for invalid values
        note_example(skipped_records, example, cause_of(function, example, error))
        return SKIPPED


def cause_of(function: Callable, example: Any, error: Exception) -> str:
    """Why a function could not be applied to an example; the same text for all examples with one fault."""
    while isinstance(function, partial):
        function = function.func
    if (reason := error if isinstance(error, InvalidRecord) else fault_in(error)) is not None:
        return str(reason)
    if isinstance(error, DataError):  # one sentence: "example <id>: <cause>; <remedy>"
        sentence = str(error).removeprefix(f"example {getattr(example, 'id', None)}: ")
        return sentence.split(";")[0][:_LONGEST_CAUSE]
    name = getattr(function, "__name__", type(function).__name__)
    return f"{KEYS_OF_FUNCTION.get(name, name)}: {type(error).__name__}"


class TolerantMapper(LazyMapper):
    """lhotse's map without the examples on which its function raises."""

    def __init__(
        self, iterator: Any, fn: Callable, apply_fn: Callable | None = None, *, skipped_records: SkippedRecords
    ):
        super().__init__(iterator, fn, apply_fn)
        self.skipped_records = skipped_records

    def __iter__(self) -> Iterator:
        function = guarded(self.fn, self.skipped_records)
        for example in self.iterator:
            applies = self.apply_fn is None or self.apply_fn(example)
            if (made := function(example) if applies else example) is not SKIPPED:
                yield made


class TolerantFilter(LazyFilter):
    """lhotse's filter without the examples on which its predicate raises."""

    def __init__(self, iterator: Any, predicate: Callable, *, skipped_records: SkippedRecords):
        super().__init__(iterator, predicate)
        self.skipped_records = skipped_records

    def __iter__(self) -> Iterator:
        predicate = guarded(self.predicate, self.skipped_records)
        for example in self.iterator:
            if (keep := predicate(example)) is not SKIPPED and keep:
                yield example


@contextmanager
def tolerating(skipped_records: SkippedRecords) -> Iterator[None]:
    """Inside this context, ``CutSet.map`` and ``CutSet.filter`` make tolerant maps and filters.

    The chain is built inside NeMo's factory, which also reads from it to estimate bins, so it cannot be changed later.
    """
    mapper, filter_ = (
        partial(TolerantMapper, skipped_records=skipped_records),
        partial(TolerantFilter, skipped_records=skipped_records),
    )
    with patch.object(lhotse.cut.set, "LazyMapper", mapper), patch.object(lhotse.lazy, "LazyFilter", filter_):
        yield


class TolerantTransform:
    """A transform of a whole batch; where it raises, it is applied to each example separately.

    Args:
        transform: NeMo's or lhotse's, which takes a CutSet.
        skipped_records: counts the examples on which it raises.
    """

    def __init__(self, transform: Callable[[CutSet], CutSet], skipped_records: SkippedRecords) -> None:
        self.transform = transform
        self.skipped_records = skipped_records

    def __call__(self, batch: CutSet) -> CutSet:
        """The batch, transformed, without the examples on which the transform raises."""
        try:
            return self.transform(batch)
        except Exception:  # lhotse raises many kinds for invalid values
            function = guarded(self._transform_one, self.skipped_records)
            made = (function(example) for example in batch)
            return CutSet([example for examples in made if examples is not SKIPPED for example in examples])

    def _transform_one(self, example: Any) -> list:
        try:
            return list(self.transform(CutSet([example])))
        except Exception as error:
            raise InvalidRecord(cause_of(self.transform, example, error)) from error


def stages_of(last: Any) -> Iterator[Any]:
    """All lazy objects of a chain, from its end to its beginning."""
    stack = [last]
    while stack:
        stage = stack.pop()
        if isinstance(stage, CutSet):
            stage = stage.data
        if isinstance(stage, (list, tuple)):
            stack.extend(stage)
        elif stage is not None:
            yield stage
            stack += [getattr(stage, attribute, None) for attribute in ("iterator", "iterators", "source")]


def build_tolerant_sampler(
    structured: DictConfig, global_rank: int, world_size: int, tokenizer: Any, skipped_records: SkippedRecords
) -> tuple[CutSampler, bool]:
    """NeMo's sampler of a config, with tolerant maps, filters and transforms of batches.

    Returns:
        The sampler, and whether it runs in the workers.

    Raises:
        DataError: if no recording of the noise can be used.
    """
    with tolerating(skipped_records):
        sampler, in_workers = get_lhotse_sampler_from_config(structured, global_rank, world_size, tokenizer)
    for cuts in sampler.cuts:
        for stage in stages_of(cuts):
            # Our reader skips, and counts, noise that cannot be used.
            if isinstance(stage, LazyCutMixer) and next(iter(stage.mix_in_cuts), None) is None:
                raise DataError("noise_path: none of its recordings can be used; correct the path, or leave it out.")
    sampler._transforms = [TolerantTransform(transform, skipped_records) for transform in sampler._transforms]
    return sampler, in_workers
