"""BLEU by length of the sentences and recordings.

The sentences of a modality are put into bins of about equal size, bounded by quantiles of their lengths, and each bin
is scored as one corpus over all directions between different languages: a mean of sentence BLEU would be another
quantity, and one direction alone seldom has enough long sentences. Compare the numbers with one another, not with the
table's averages.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from sacrebleu.metrics import BLEU

from nemo_emmett.evaluation.results import Evaluation, Translation
from nemo_emmett.evaluation.significance import by_key
from nemo_emmett.evaluation.words import split_words
from nemo_emmett.modules.metrics import tokenizer_of

MAX_BINS = 5
"""As many as can be labelled in the width of a phone."""
MIN_SENTENCES = 20
"""In each bin: corpus BLEU of fewer sentences is mostly noise."""

Tokenized = list[tuple[str, str]]
"""Hypotheses and references, tokens separated by spaces."""


@dataclass(frozen=True)
class Bin:
    """Translations of similar length, and the corpus BLEU of each model on them."""

    label: str  # the range of lengths, both ends included: "7–12"
    sentences: int
    bleu: tuple[float, ...]  # in the order of the breakdown's models


@dataclass(frozen=True)
class Breakdown:
    """BLEU of one modality along one measure of length."""

    modality: str
    measure: str  # "source words", "reference words" or "seconds of speech"
    models: tuple[int, ...]  # 0: the evaluation, 1: its first baseline, ...; only those with all of these sentences
    bins: tuple[Bin, ...]


def breakdowns(evaluation: Evaluation, baselines: Sequence[Evaluation] = ()) -> list[Breakdown]:
    """BLEU by words of each modality, and by seconds of speech if all durations are known.

    A baseline that lacks some of a modality's directions is left out there: its BLEU would be over other sentences.

    Args:
        evaluation: its sentences are put into bins.
        baselines: with the same sentences wherever they have a test set, modality and direction at all
            (:func:`~nemo_emmett.evaluation.significance.comparable_scores`).
    """
    by_modality: dict[str, list[Translation]] = defaultdict(list)
    for translation in evaluation.translations:
        if translation.source_lang != translation.target_lang:
            by_modality[translation.modality].append(translation)
    found = []
    for modality in sorted(by_modality, key=lambda name: name != "text"):
        ours = by_key(by_modality[modality])
        systems = {0: [translation for group in ours.values() for translation in group]}
        for number, baseline in enumerate(baselines, start=1):
            theirs = by_key(baseline.translations)
            if ours.keys() <= theirs.keys():
                systems[number] = [translation for key in ours for translation in theirs[key]]
        tokenized = [_tokenized(system) for system in systems.values()]
        for measure, lengths, unit in _measures(systems[0]):
            if len(bins := _bins(np.array(lengths), unit, tokenized)) > 1:
                found.append(Breakdown(modality, measure, tuple(systems), tuple(bins)))
    return found


def _measures(translations: list[Translation]) -> list[tuple[str, list[int], float]]:
    """(name of a measure, length of each translation as an integer, unit of these integers)."""
    of_source = all(translation.source_text for translation in translations)
    texts = [translation.source_text if of_source else translation.reference for translation in translations]
    lengths = [len(split_words(text or "")) for text in texts]
    measures: list[tuple[str, list[int], float]] = [("source words" if of_source else "reference words", lengths, 1)]
    durations = [translation.duration for translation in translations if translation.duration is not None]
    if len(durations) == len(translations):
        measures.append(("seconds of speech", [round(10 * seconds) for seconds in durations], 0.1))
    return measures


def _bins(lengths: np.ndarray, unit: float, systems: Iterable[Tokenized]) -> list[Bin]:
    bins = []
    low = int(lengths.min())
    for high in upper_bounds(lengths):
        inside = np.flatnonzero((lengths >= low) & (lengths <= high))
        scores = []
        for system in systems:
            hypotheses, references = zip(*(system[index] for index in inside), strict=True)
            # Over target languages with different tokenisers: BLEU counts n-grams of tokens, whatever made them.
            bleu = BLEU(tokenize="none", force=True)  # force: no warning that the text is tokenised already
            scores.append(bleu.corpus_score(hypotheses, [references]).score)
        label = "–".join(f"{bound * unit:.{int(unit < 1)}f}" for bound in dict.fromkeys((low, high)))
        bins.append(Bin(label, len(inside), tuple(scores)))
        low = high + 1
    return bins


def upper_bounds(lengths: np.ndarray) -> list[int]:
    """The highest length of each bin, from quantiles; a bin with too few sentences is merged with a neighbour.

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
    tokenizer = cache(lambda language: BLEU(tokenize=tokenizer_of(language)).tokenizer)
    pairs = []
    for one in translations:
        tokenize = tokenizer(one.target_lang)
        pairs.append((tokenize(one.hypothesis.rstrip()), tokenize((one.reference or "").rstrip())))
    return pairs
