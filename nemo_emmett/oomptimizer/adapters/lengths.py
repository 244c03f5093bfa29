"""The lengths of the parts of a bucket's longest examples, by the kind of model.

As NeMo's samplers do, the loader counts a recording in tokens, ``ceil(seconds / token_equivalent_duration)``, and

- of a cut all tokens of prompt and answer, the recording's locator among them;
- of a conversation the same but for the locators, in whose place the recordings are.

One-dimensional bins bound the sum of both (or the input alone: of a cut the recording, of a conversation all that comes
before the answer), two-dimensional ones the recording and all tokens of a cut, input and answer of a conversation. In
seconds they bound the recording and, in the second dimension, all tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nemo_emmett.oomptimizer.adapters.prompts import PromptTokens
from nemo_emmett.oomptimizer.buckets import Shape

PROMPT_TOKENS = 16
"""Tokens of the prompt without the recording, if the bins do not bound them; translation prompts have 5 to 15."""


@dataclass(frozen=True)
class Lengths:
    """One example.

    Args:
        seconds: of its recording; 0 for text.
        context: tokens before the answer, without the recording's locator.
        answer: tokens of the answer.
    """

    seconds: float
    context: int
    answer: int


@dataclass(frozen=True)
class LongestExamples:
    """The examples of a bucket's worst batch, which is padded to the longest of each part.

    Args:
        first: with the longest recording, or context.
        others: with the longest answer.
    """

    first: Lengths
    others: Lengths

    def rows(self, size: int, shares_sequence: bool) -> list[Lengths]:
        """The examples of a batch.

        Args:
            size: their number.
            shares_sequence: all parts of an example are in one sequence. Otherwise a single example is as long in each
                part as the longest: what an example takes in a larger batch, which is padded to them.
        """
        rows = [self.first, *[self.others] * (size - 1)]
        return rows if size > 1 or shares_sequence else [widest([self.first, self.others])]


def encoder_decoder_lengths(shape: Shape, prompt: int = PROMPT_TOKENS) -> Lengths:
    """Of models without a prompt format: a bound of the sum of input and output is taken for each of them.

    Args:
        shape: of a bucket.
        prompt: tokens of the prompt, if the bins do not bound them.
    """
    unbounded = shape.modality == "audio" and (shape.total or not shape.input_tokens)
    return Lengths(shape.seconds, prompt if unbounded else max(1, shape.input_tokens), max(1, shape.output_tokens))


def longest_speech(
    shape: Shape,
    *,
    cuts: PromptTokens | None = None,
    conversations: PromptTokens | None = None,
    prompt: int = PROMPT_TOKENS,
) -> LongestExamples | None:
    """The examples of a bucket of speech that take the most memory.

    Each part is as long as the bin allows while the others are as short as possible. In a bin that bounds the whole
    example, speech takes an encoder's memory, and answers may take that of their logits; so one example has the longest
    recording, all others the longest answer, and the batch is padded to both.

    Args:
        shape: of the bucket.
        cuts: the fewest tokens of a cut without its speech; None: the model trains on no cuts.
        conversations: the same of a conversation; None: on no conversations.
        prompt: tokens of the prompt, if the bin does not bound them.

    Returns:
        The examples; None if the bin is too small for the shortest prompt and answer with any speech.
    """
    kinds = [tokens for tokens in (cuts, conversations) if tokens is not None]
    shortest = min(kinds, key=lambda tokens: tokens.total)
    if not shape.contents.seconds_per_token and not shape.total:
        return _same(Lengths(shape.seconds, *_tokens_of(shape, cuts, prompt)))
    per_token = _seconds_per_token(shape)
    bound = shape.input_tokens if shape.total else math.floor(shape.seconds / per_token + 1e-6)
    if shape.total:
        frames = max(
            -1 if cuts is None else bound - cuts.total,
            -1 if conversations is None else bound + 1 - conversations.total,
        )
        if frames < 1:
            return None
        # A cut's locator is counted, as well as its speech: text in the same bins has one position more.
        extra = int(shape.contents.text and conversations is None)
        context = shortest.context - 1 + extra
        first = Lengths(frames * per_token, context, shortest.answer)
        return LongestExamples(first, Lengths(per_token, context, shortest.answer + frames - 1))
    frames = max(0 if cuts is None else bound, 0 if conversations is None else bound + 1 - conversations.context)
    context, answer = _tokens_of(shape, cuts if conversations is None else None, prompt)
    if conversations is not None:
        context = conversations.context - 1
    return None if frames < 1 else _same(Lengths(frames * per_token, context, answer))


def shortest_speech(shape: Shape, tokens: PromptTokens) -> Lengths:
    """The shortest example of speech, for a bin that none fits into.

    Args:
        shape: of the bucket.
        tokens: the fewest tokens without the speech.
    """
    return Lengths(_seconds_per_token(shape), tokens.context - 1, tokens.answer)


def longest_text(shape: Shape, tokens: PromptTokens, *, shares_sequence: bool) -> LongestExamples:
    """The examples of a bucket of text that take the most memory.

    Args:
        shape: of the bucket.
        tokens: of the shortest prompt and answer.
        shares_sequence: input and output are one sequence.
    """
    if not shape.total:
        return _same(Lengths(0.0, max(1, shape.input_tokens), max(1, shape.output_tokens)))
    positions = max(2, shape.input_tokens)
    context = min(tokens.context, positions - 1)
    # Every position takes the same memory, and those of the answer may take that of their logits as well.
    longest_answer = Lengths(0.0, context, positions - context)
    if shares_sequence:
        return _same(longest_answer)
    answer = min(tokens.answer, positions - 1)
    return LongestExamples(Lengths(0.0, positions - answer, answer), longest_answer)


def widest(rows: Sequence[Lengths]) -> Lengths:
    """The lengths that a batch is padded to."""
    return Lengths(max(r.seconds for r in rows), max(r.context for r in rows), max(r.answer for r in rows))


def _seconds_per_token(shape: Shape) -> float:
    return shape.contents.seconds_per_token or shape.seconds / max(1, shape.input_tokens)


def _same(lengths: Lengths) -> LongestExamples:
    return LongestExamples(lengths, lengths)


def _tokens_of(shape: Shape, cuts: PromptTokens | None, prompt: int) -> tuple[int, int]:
    """Tokens of context and answer, if the bin bounds the recording separately."""
    if shape.contents.two_dimensional and cuts is not None:
        return cuts.context - 1, max(cuts.answer, shape.output_tokens - cuts.context)
    return shape.input_tokens or prompt, max(1, shape.output_tokens)
