"""NeMo's own chain of maps and filters, applied to a few examples at a time, so that no stage of it has a state."""

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
from nemo_emmett.prompts.formatting import format_many

Step = Callable[[list], list]
"""One stage of the chain: what becomes of a list of examples."""


class Feed:
    """What NeMo's chain reads from: the examples that were last put in."""

    def __init__(self, examples: Iterable) -> None:
        self.examples = examples

    def __iter__(self) -> Iterator:
        return iter(self.examples)


class TransformPipeline:
    """What NeMo does to an example between reading and batching it: resampling, tokens, augmentation, filters.

    NeMo builds the chain and everything about batches from the config, as it does for its own samplers; the samplers
    themselves are not used. Random stages draw from generators that are seeded for each call.

    Args:
        structured: NeMo's config of one sampler; its ``input_cfg`` is replaced.
        tokenizer: NeMo tokenizer.
        sample: examples by which NeMo estimates the bins of buckets where the config names none.
        skipped_records: ledger for the examples that a stage of the chain raises upon.
    """

    def __init__(
        self,
        structured: DictConfig,
        tokenizer: Any,
        sample: Iterable = (),
        skipped_records: SkippedRecords | None = None,
    ) -> None:
        self._feed = Feed(sample)
        self.skipped_records = SkippedRecords() if skipped_records is None else skipped_records
        # Noise is read here and not by the workers, so what is left out of it is logged here.
        with injected_examples(self._feed) as input_cfg, reader_context(ReaderContext(SkippedRecords(announce=True))):
            structured = structured.copy()
            structured.input_cfg = input_cfg
            sampler = build_tolerant_sampler(structured, 0, 1, tokenizer, self.skipped_records)[0]
        self._sampler: CutSampler = sampler
        self._rng = random.Random()
        self.constraint: SamplingConstraint = sampler.constraint
        self.duration_bins: list | None = getattr(sampler, "duration_bins", None)
        self.drop_last: bool = sampler.drop_last
        self.filtered: Counter[str] = Counter()  # examples left out, by the keys of the filter; "" for those kept
        self._head, self._steps = self._taken_apart(sampler.cuts[0])

    def run(self, examples: Sequence, seed: Sequence[int]) -> list:
        """The examples as they come out of the chain; one may give none or several."""
        self._rng.seed(repr(list(seed)))
        self._feed.examples = examples
        with _lhotse_draws_from(self._rng):
            kept = list(self._head)
            for step in self._steps:
                kept = step(kept)
        self._feed.examples = ()
        self.filtered[""] += len(kept)
        return kept

    def finish(self, batch: CutSet, seed: Sequence[int]) -> CutSet:
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

    def _taken_apart(self, cuts: Any) -> tuple[Iterable, list[Step]]:
        """The chain as plain functions of lists, which are much quicker than lhotse's nested generators.

        Where a stage is neither a map nor a filter, it and what comes before it stay as they are.
        """
        steps: list[Step] = []
        stage = cuts
        while True:
            if isinstance(stage, CutSet):
                stage = stage.data
            elif isinstance(stage, LazyMapper):
                steps.insert(0, self._mapping(stage))
                stage = stage.iterator
            elif isinstance(stage, LazyFilter):
                steps.insert(0, partial(self._kept_by, stage.predicate))
                stage = stage.iterator
            elif isinstance(stage, LazyFlattener):
                steps.insert(0, _flattened)
                stage = stage.iterator
            else:
                break
        for other in stages_of(stage):
            self._make_repeatable(other)
        return stage, steps

    def _kept_by(self, predicate: Callable, examples: list) -> list:
        passes = [(example, guarded(predicate, self.skipped_records)(example)) for example in examples]
        kept = [example for example, passed in passes if passed is not SKIPPED and passed]
        left_out = sum(passed is not SKIPPED and not passed for _, passed in passes)
        if left_out:
            name = type(predicate).__name__
            self.filtered[KEYS_OF_FUNCTION.get(name, name)] += left_out
        return kept

    def _mapping(self, stage: LazyMapper) -> Step:
        if _prompts(stage) and stage.apply_fn is None:
            return partial(self._prompted, _formatter_of(stage))
        return partial(_mapped, guarded(stage.fn, self.skipped_records), stage.apply_fn)

    def _prompted(self, formatter: PromptFormatter, examples: list) -> list:
        try:
            format_many(examples, formatter)
        except ConfigError:
            raise
        except Exception:  # one by one, to find those that cannot be prompted
            prompt = guarded(
                partial(tokenize_with_prompt, tokenizer=None, prompt_format=formatter), self.skipped_records
            )
            return _mapped(prompt, None, examples)
        return examples

    def _make_repeatable(self, stage: Any) -> None:
        """Each call starts the stage anew: what it draws or prepares must not begin anew with it."""
        if isinstance(stage, LazyCutMixer):
            stage.seed = self._rng
            if stage.mix_in_cuts.is_lazy:
                stage.mix_in_cuts = stage.mix_in_cuts.to_eager()
        if isinstance(stage, LazyMapper) and _prompts(stage):
            stage.fn = partial(stage.fn, prompt_format=_formatter_of(stage))


@contextmanager
def _lhotse_draws_from(rng: random.Random) -> Iterator[None]:
    """Some of lhotse's stages draw from Python's global generator, and those that make new cuts draw their ids."""
    state, ids = random.getstate(), lhotse.utils._lhotse_uuid
    random.seed(rng.random())
    lhotse.utils._lhotse_uuid = lambda: uuid.UUID(int=rng.getrandbits(128))
    try:
        yield
    finally:
        random.setstate(state)
        lhotse.utils._lhotse_uuid = ids


def _mapped(function: Callable, applies: Callable | None, examples: list) -> list:
    made = (function(example) if applies is None or applies(example) else example for example in examples)
    return [example for example in made if example is not SKIPPED]


def _flattened(examples: list) -> list:
    return list(chain.from_iterable(examples))


def _prompts(stage: LazyMapper) -> bool:
    return isinstance(stage.fn, partial) and stage.fn.func is tokenize_with_prompt


def _formatter_of(stage: LazyMapper) -> PromptFormatter:
    """Made once: NeMo's chain makes one for each example."""
    name = stage.fn.keywords["prompt_format"]
    return PromptFormatter.resolve(name)(stage.fn.keywords["tokenizer"]) if isinstance(name, str) else name
