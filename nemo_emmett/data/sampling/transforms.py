"""NeMo's own maps and filters, applied to a few examples at a time, so that none of them has a state to save."""

from __future__ import annotations

import random
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import lhotse.utils
from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.cut.set import LazyCutMixer
from lhotse.dataset.sampling.base import CutSampler, SamplingConstraint
from lhotse.lazy import LazyFilter, LazyFlattener, LazyMapper
from nemo.collections.common.data.lhotse.dataloader import tokenize_with_prompt
from nemo.collections.common.prompts import PromptFormatter
from omegaconf import DictConfig

from nemo_emmett.data.io.skipped_records import SkippedRecords
from nemo_emmett.data.readers.registry import ReaderContext, injected_examples, reader_context
from nemo_emmett.data.sampling.tolerance import KEYS_OF_FUNCTION, SKIPPED, build_tolerant_sampler, guarded, stages_of
from nemo_emmett.errors import ConfigError
from nemo_emmett.prompts.formatting import format_many, format_one

Step = Callable[[list], list]
"""One stage of the pipeline: maps a list of examples to a list. Can be pickled, for workers that are spawned."""

_DETERMINISTIC = {
    f"{tokenize_with_prompt.__module__}.{name}"
    for name in (
        "_select_channel",
        "resample",
        "_flatten_alt_text",
        "_cut_text_into_windows",
        "tokenize_with_prompt",
        "tokenize",
    )
}
"""The functions that draw nothing. Any other counts as random: lhotse gives new cuts random ids, as truncation does."""

FILTERS_OF_LENGTHS = {
    "DurationFilter",
    "TokenCountFilter",
    "TokenPerSecondFilter",
    "TokenPerTokenFilter",
    "BucketingFilter",
}
"""NeMo's filters that need nothing but the lengths of an example."""


class _Input:
    """What NeMo's lazy chain reads from: the examples of the current call."""

    def __init__(self, examples: Iterable) -> None:
        self.examples = examples

    def __iter__(self) -> Iterator:
        return iter(self.examples)


class TransformPipeline:
    """What NeMo does to an example between reading and batching it: resampling, tokens, augmentation, filters.

    NeMo builds its lazy chain, and all that concerns batches, from the config, as for its own samplers; the sampler
    itself is not used. The chain is taken apart into functions of lists. Random stages draw from generators that are
    seeded for each call, or each example (:meth:`transform_each`).

    Args:
        structured: NeMo's config of one sampler; its ``input_cfg`` is replaced.
        tokenizer: NeMo tokenizer.
        sample: examples by which NeMo estimates the bins of buckets if the config has none.
        skipped_records: counts the examples on which a stage raises.
    """

    def __init__(
        self,
        structured: DictConfig,
        tokenizer: Any,
        sample: Iterable = (),
        skipped_records: SkippedRecords | None = None,
    ) -> None:
        self._input = _Input(sample)
        self.skipped_records = SkippedRecords() if skipped_records is None else skipped_records
        # Noise is read here, not by the workers, so noise that is skipped is logged here.
        with injected_examples(self._input) as input_cfg, reader_context(ReaderContext(SkippedRecords(announce=True))):
            structured = structured.copy()
            structured.input_cfg = input_cfg
            sampler = build_tolerant_sampler(structured, 0, 1, tokenizer, self.skipped_records)[0]
        self._sampler: CutSampler = sampler
        self._rng = random.Random()
        self.constraint: SamplingConstraint = sampler.constraint
        self.duration_bins: list | None = getattr(sampler, "duration_bins", None)
        self.drop_last: bool = sampler.drop_last
        self.filtered: Counter[str] = Counter()  # examples left out, by the keys of the filter; "" for those kept
        self._is_random = False  # whether any stage draws
        self._lazy_stages, self._steps = self._take_apart(sampler.cuts[0])
        self._input.examples = ()

    def run(self, examples: Sequence, seed: Sequence[int]) -> list:
        """The transformed examples; one may give none or several."""
        kept = self._apply(self._steps, examples, seed)
        self.filtered[""] += len(kept)
        return kept

    def transform_each(self, examples: Sequence, seeds: Sequence[Sequence[int]]) -> list[list]:
        """What each example becomes, independently of the others and without the filters on lengths.

        Args:
            examples: not transformed.
            seeds: of the random stages, one for each example; of no effect if no stage is random.
        """
        steps = [step for step in self._steps if not self._filters_lengths(step)]
        if self._is_random:
            return [self._apply(steps, [example], seed) for example, seed in zip(examples, seeds, strict=True)]
        made = [[example] for example in examples]
        for step in steps:
            # These return the objects that they are given, and are faster with all at once.
            if isinstance(step, partial) and step.func in (self._apply_prompt, self._apply_filter):
                kept = set(map(id, step(list(chain.from_iterable(made)))))
                made = [[one for one in of_example if id(one) in kept] for of_example in made]
            else:
                made = [step(of_example) for of_example in made]
        return made

    def _apply(self, steps: Sequence[Step], examples: Sequence, seed: Sequence[int]) -> list:
        self._rng.seed(repr(list(seed)))
        self._input.examples = examples
        with _lhotse_draws_from(self._rng):
            made = list(self._lazy_stages)
            for step in steps:
                made = step(made)
        self._input.examples = ()
        return made

    def run_each(self, examples: Sequence, seed: Sequence[int]) -> list[list]:
        """What each example becomes, as :meth:`run` makes it of this example alone; but texts are tokenised together.

        ``filtered`` counts only what is left out.
        """
        self._rng.seed(repr(list(seed)))
        made = []
        with _lhotse_draws_from(self._rng):
            for example in examples:
                self._input.examples = (example,)
                made.append(list(self._lazy_stages))
            for step in self._steps:
                if isinstance(step, partial) and step.func in (self._apply_filter, self._apply_prompt):
                    every = list(chain.from_iterable(made))
                    passed = step(every)  # some of the examples themselves
                    if len(passed) < len(every):
                        kept = set(map(id, passed))
                        made = [[one for one in of_example if id(one) in kept] for of_example in made]
                else:
                    made = [step(of_example) for of_example in made]
        self._input.examples = ()
        return made

    def transform_batch(self, batch: CutSet, seed: Sequence[int]) -> CutSet:
        """A batch after NeMo's transforms of whole batches (concatenation, reverberation, codecs, ...)."""
        transforms = self._sampler._transforms
        if not transforms or not any(isinstance(example, Cut) for example in batch):
            return batch
        rng = random.Random(repr(list(seed)))
        for transform in transforms:
            for attribute in ("rng", "random"):  # lhotse's names for a transform's generator
                if hasattr(transform.transform, attribute):
                    setattr(transform.transform, attribute, rng)
            batch = transform(batch)
        return batch

    def _take_apart(self, cuts: Any) -> tuple[Iterable, list[Step]]:
        """NeMo's chain as functions of lists, which are much faster than lhotse's nested generators.

        From the end of the chain to its beginning, up to the first stage that is neither a map nor a filter: it and the
        stages before it stay lazy.
        """
        steps: list[Step] = []
        stage = cuts
        while True:
            if isinstance(stage, CutSet):
                stage = stage.data
                continue
            if isinstance(stage, LazyMapper):
                steps.insert(0, self._map_step(stage))
            elif isinstance(stage, LazyFilter):
                steps.insert(0, partial(self._apply_filter, stage.predicate))
            elif isinstance(stage, LazyFlattener):
                steps.insert(0, _flatten)
            else:
                break
            stage = stage.iterator
        self._is_random |= stage is not self._input
        # Each call iterates over the lazy stages from their start, which must neither repeat their random draws nor
        # their preparations.
        for lazy in stages_of(stage):
            if isinstance(lazy, LazyCutMixer):
                lazy.seed = self._rng
                if lazy.mix_in_cuts.is_lazy:
                    lazy.mix_in_cuts = lazy.mix_in_cuts.to_eager()
            if isinstance(lazy, LazyMapper) and _is_prompting(lazy):
                lazy.fn = partial(lazy.fn, prompt_format=_formatter_of(lazy))
        return stage, steps

    def _apply_filter(self, predicate: Callable, examples: list) -> list:
        passes = [(example, guarded(predicate, self.skipped_records)(example)) for example in examples]
        kept = [example for example, passed in passes if passed is not SKIPPED and passed]
        left_out = sum(passed is not SKIPPED and not passed for _, passed in passes)
        if left_out:
            name = type(predicate).__name__
            self.filtered[KEYS_OF_FUNCTION.get(name, name)] += left_out
        return kept

    def _filters_lengths(self, step: Step) -> bool:
        is_filter = isinstance(step, partial) and step.func == self._apply_filter
        return is_filter and type(step.args[0]).__name__ in FILTERS_OF_LENGTHS

    def _map_step(self, stage: LazyMapper) -> Step:
        function = stage.fn.func if isinstance(stage.fn, partial) else stage.fn
        name = f"{getattr(function, '__module__', '')}.{getattr(function, '__name__', '')}"
        self._is_random |= name not in _DETERMINISTIC
        if _is_prompting(stage) and stage.apply_fn is None:
            return partial(self._apply_prompt, _formatter_of(stage))
        return partial(_apply_map, guarded(stage.fn, self.skipped_records), stage.apply_fn)

    def _apply_prompt(self, formatter: PromptFormatter, examples: list) -> list:
        try:
            format_many(examples, formatter)  # tokenises all of them at once
        except ConfigError:
            raise
        except Exception:  # one by one, to find those that cannot be prompted
            prompt = guarded(partial(format_one, prompt_format=formatter), self.skipped_records)
            return _apply_map(prompt, None, examples)
        return examples


@contextmanager
def _lhotse_draws_from(rng: random.Random) -> Iterator[None]:
    """Some stages of lhotse draw from Python's global generator; stages that make new cuts draw random ids."""
    state, ids = random.getstate(), lhotse.utils._lhotse_uuid
    random.seed(rng.random())
    lhotse.utils._lhotse_uuid = lambda: uuid.UUID(int=rng.getrandbits(128))
    try:
        yield
    finally:
        random.setstate(state)
        lhotse.utils._lhotse_uuid = ids


def _apply_map(function: Callable, applies: Callable | None, examples: list) -> list:
    made = (function(example) if applies is None or applies(example) else example for example in examples)
    return [example for example in made if example is not SKIPPED]


def _flatten(examples: list) -> list:
    return list(chain.from_iterable(examples))


def prompt_with_transcripts(sampler: CutSampler) -> None:
    """Have a sampler of NeMo's prompt the transcripts of speech as well."""
    for stage in (stage for cuts in sampler.cuts for stage in stages_of(cuts)):
        if isinstance(stage, LazyMapper) and _is_prompting(stage):
            stage.fn = partial(format_one, prompt_format=_formatter_of(stage))


def _is_prompting(stage: LazyMapper) -> bool:
    return isinstance(stage.fn, partial) and stage.fn.func is tokenize_with_prompt


def _formatter_of(stage: LazyMapper) -> PromptFormatter:
    """Built once; NeMo's chain builds one for each example."""
    name = stage.fn.keywords["prompt_format"]
    return PromptFormatter.resolve(name)(stage.fn.keywords["tokenizer"]) if isinstance(name, str) else name
