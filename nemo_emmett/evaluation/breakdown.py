"""BLEU by length: where along the lengths of sentences and recordings a model wins and loses.

The sentences of a modality are put into bins of about equal size, bounded by quantiles of their lengths, and each bin
is scored as one corpus over all directions between different languages: a mean of sentence BLEU would be another
quantity, and one direction alone seldom has enough long sentences. The numbers are therefore to be compared with one
another, not with the table's averages.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from sacrebleu.metrics import BLEU

from nemo_emmett.evaluation.results import Evaluation, Translation
from nemo_emmett.evaluation.significance import by_key
from nemo_emmett.evaluation.words import split_words
from nemo_emmett.modules.metrics import tokenizer_of

MAX_BINS = 5
"""As many as a phone's column has room to label."""
MIN_SENTENCES = 20
"""In each bin: corpus BLEU of fewer is mostly chance."""

Tokenized = list[tuple[str, str]]
"""Hypotheses and references, tokens separated by spaces."""


@dataclass(frozen=True)
class Bin:
    """Translations of about one length, and the corpus BLEU of each model on them."""

    label: str  # the lengths, both ends within: "7–12"
    sentences: int
    bleu: tuple[float, ...]  # in the order of the breakdown's models


@dataclass(frozen=True)
class Breakdown:
    """BLEU of one modality along one measure of length."""

    modality: str
    measure: str  # "source words", "reference words" or "seconds of speech"
    models: tuple[int, ...]  # 0 is the evaluation, 1 its first baseline; those with all of these sentences
    bins: tuple[Bin, ...]


def breakdowns(evaluation: Evaluation, baselines: Sequence[Evaluation] = ()) -> list[Breakdown]:
    """Every breakdown that an evaluation's sentences allow: by words, and by seconds where all recordings have them.

    A baseline that lacks some of a modality's directions is left out there: its BLEU would be over other sentences.

    Args:
        evaluation: whose sentences are put into bins.
        baselines: with the same sentences wherever they have a test set, modality and direction at all
            (:func:`~nemo_emmett.evaluation.significance.comparable_scores`).
    """
    by_modality: dict[str, list[Translation]] = defaultdict(list)
    for translation in evaluation.translations:
        if translation.source_lang != translation.target_lang:
            by_modality[translation.modality].append(translation)
    found = []
    for modality in sorted(by_modality, key=lambda name: name != "text"):
        systems = _systems(by_modality[modality], baselines)
        tokenized = [_tokenized(system) for system in systems.values()]
        for measure, lengths, label in _measures(systems[0]):
            if len(bins := _bins(np.array(lengths), label, tokenized)) > 1:
                found.append(Breakdown(modality, measure, tuple(systems), tuple(bins)))
    return found


def _systems(translations: list[Translation], baselines: Sequence[Evaluation]) -> dict[int, list[Translation]]:
    """The translations of each model that has them all, in one order: 0 is the evaluation, 1 its first baseline."""
    ours = by_key(translations)
    systems = {0: [translation for group in ours.values() for translation in group]}
    for number, baseline in enumerate(baselines, start=1):
        theirs = by_key(baseline.translations)
        if ours.keys() <= theirs.keys():
            systems[number] = [translation for key in ours for translation in theirs[key]]
    return systems


def _measures(translations: list[Translation]) -> list[tuple[str, list[int], Callable[[int, int], str]]]:
    """(name, length of each translation as an integer, how a bin's lowest and highest are written)."""
    of_source = all(translation.source_text for translation in translations)
    texts = [translation.source_text if of_source else translation.reference for translation in translations]
    lengths = [len(split_words(text or "")) for text in texts]
    measures = [("source words" if of_source else "reference words", lengths, _word_range)]
    durations = [translation.duration for translation in translations if translation.duration is not None]
    if len(durations) == len(translations):
        measures.append(("seconds of speech", [round(10 * seconds) for seconds in durations], _second_range))
    return measures


def _word_range(low: int, high: int) -> str:
    return f"{low}" if low == high else f"{low}–{high}"


def _second_range(low: int, high: int) -> str:
    """Of tenths of seconds."""
    return f"{low / 10:.1f}" if low == high else f"{low / 10:.1f}–{high / 10:.1f}"


def _bins(lengths: np.ndarray, label: Callable[[int, int], str], systems: Iterable[Tokenized]) -> list[Bin]:
    bins = []
    low = int(lengths.min())
    for high in upper_bounds(lengths):
        inside = np.flatnonzero((lengths >= low) & (lengths <= high))
        scores = tuple(_corpus_bleu([system[index] for index in inside]) for system in systems)
        bins.append(Bin(label(low, high), len(inside), scores))
        low = high + 1
    return bins


def upper_bounds(lengths: np.ndarray) -> list[int]:
    """The highest length of each bin, from quantiles; a bin that would hold too few is joined with a neighbour.

    Args:
        lengths: (N,) integers.
    """
    quantiles = np.quantile(lengths, np.arange(1, MAX_BINS + 1) / MAX_BINS, method="inverted_cdf")
    bounds: list[int] = []
    below = 0
    for bound in np.unique(quantiles).tolist():
        up_to_here = int(np.count_nonzero(lengths <= bound))
        if up_to_here - below >= MIN_SENTENCES:
            bounds.append(int(bound))
            below = up_to_here
    return [*bounds[:-1], int(lengths.max())]


def _tokenized(translations: Iterable[Translation]) -> Tokenized:
    """Hypothesis and reference of each translation, tokenised as its target language is scored."""
    tokenizers: dict[str | None, Callable[[str], str]] = {}
    pairs = []
    for one in translations:
        if one.target_lang not in tokenizers:
            tokenizers[one.target_lang] = BLEU(tokenize=tokenizer_of(one.target_lang)).tokenizer
        tokenize = tokenizers[one.target_lang]
        pairs.append((tokenize(one.hypothesis.rstrip()), tokenize((one.reference or "").rstrip())))
    return pairs


def _corpus_bleu(tokenized: Tokenized) -> float:
    """BLEU over target languages with tokenisers of their own: it counts n-grams whichever tokeniser made them."""
    hypotheses, references = zip(*tokenized, strict=True)
    # force: sacrebleu warns of tokenised text.
    return BLEU(tokenize="none", force=True).corpus_score(hypotheses, [references]).score
