"""How long the parts of a bucket's longest example are, by the kind of model that reads it."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_emmett.oomptimizer.buckets import Shape

PROMPT_TOKENS = 16
"""Tokens of the prompt beside a recording, where the bins do not bound them; translation prompts have 5 to 15."""


@dataclass(frozen=True)
class Lengths:
    """One example.

    Args:
        seconds: of its recording; 0 for text.
        context: tokens before the answer, the recording's place not counted.
        answer: tokens of the answer.
    """

    seconds: float
    context: int
    answer: int


def encoder_decoder_lengths(shape: Shape, prompt: int = PROMPT_TOKENS) -> Lengths:
    """Input and output stand in different sequences; what bounds their sum lets either be as long.

    Args:
        shape: of a bucket.
        prompt: tokens beside a recording, where the bins do not bound them.
    """
    return Lengths(shape.seconds, _context(shape, prompt), max(1, shape.output_tokens))


def decoder_only_lengths(shape: Shape, prompt: int = PROMPT_TOKENS) -> Lengths:
    """Input and output share one sequence, which a bin may bound as a whole; arguments as above."""
    if not shape.total:
        return Lengths(shape.seconds, _context(shape, prompt), max(1, shape.output_tokens))
    positions = max(2, shape.input_tokens)
    if shape.modality == "text":
        answer = positions // 2  # every position costs the same, whichever part it belongs to
        return Lengths(0.0, positions - answer, answer)
    # A position of speech costs the most, so only one token before the recording and one after it are not speech.
    speech = max(1, positions - 2)
    return Lengths(shape.seconds * speech / positions, 1, 1)


def speech_apart_lengths(shape: Shape, prompt: int = PROMPT_TOKENS) -> Lengths:
    """Context and answer share one sequence, in which speech has no place; arguments as above."""
    if shape.modality == "audio" and shape.total:
        # A position of speech may cost more than one of text or less: either may be as long as both.
        return Lengths(shape.seconds, prompt, max(1, shape.output_tokens - prompt))
    return decoder_only_lengths(shape, prompt)


def _context(shape: Shape, prompt: int) -> int:
    if shape.modality == "audio" and (shape.total or not shape.input_tokens):
        return prompt
    return max(1, shape.input_tokens)
