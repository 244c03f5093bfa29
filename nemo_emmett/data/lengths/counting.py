"""The size of examples: their number, seconds of speech, tokens of text."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

from lhotse.cut import Cut
from nemo.collections.common.data.lhotse.text_adapters import (
    AudioTurn,
    Formattable,
    NeMoMultimodalConversation,
    SourceTargetTextExample,
    TextExample,
)
from transformers import PreTrainedTokenizerFast

from nemo_emmett.prompts.encoding import encode_texts
from nemo_emmett.prompts.markup import Prompt

Example = Cut | Formattable

_BATCH = 1000
"""Number of examples whose texts are tokenised together."""

PROBE = "One two, 3.50 €! Schöne Grüße; ¿qué más? Où est l'été? 漢字 Привет <de> xyzzy."
"""Tokenizers of the same vocabulary that split differently (merges, scores, normalisation) differ here."""


@dataclass(frozen=True)
class Size:
    """What a source, or a part of it, holds.

    Each example counts: a recording that is translated into two languages makes two, as does a line of text.
    """

    examples: int = 0
    seconds: float = 0.0  # of speech
    tokens: int = 0  # of text without speech, source and target together; words where there is no tokenizer

    @property
    def hours(self) -> float:
        """Of speech."""
        return self.seconds / 3600

    def __add__(self, other: Size) -> Size:
        return Size(self.examples + other.examples, self.seconds + other.seconds, self.tokens + other.tokens)


class TokenCounter:
    """Counts the tokens of texts.

    Args:
        tokenizer: NeMo tokenizer; without one, words between blanks are counted.
    """

    def __init__(self, tokenizer: Any = None) -> None:
        self.tokenizer = tokenizer
        self.unit = "words" if tokenizer is None else "tokens"
        self._fast = _fast_tokenizer(tokenizer)

    def count(self, texts: Sequence[str]) -> list[int]:
        """Number of tokens of each text."""
        if not texts:
            return []
        if self.tokenizer is None:
            return [len(text.split()) for text in texts]
        return [len(ids) for ids in encode_texts(self.tokenizer, [Prompt([text]) for text in texts])]

    @cached_property
    def fingerprint(self) -> str:
        """The same for tokenizers that split text alike; tokens that were added to the vocabulary do not matter."""
        if self.tokenizer is None:
            return "words"
        if self._fast is not None:
            added = self._fast.get_added_vocab()
            vocabulary = sorted(token for token in self._fast.get_vocab() if token not in added)
        else:
            vocabulary = list(map(str, getattr(self.tokenizer, "vocab", ())))
        probe = self.count(PROBE.split()), list(map(int, self.tokenizer.text_to_ids(PROBE)))
        return hashlib.sha256(json.dumps([vocabulary, probe]).encode()).hexdigest()[:16]


def _fast_tokenizer(tokenizer: Any) -> PreTrainedTokenizerFast | None:
    """The tokenizer inside NeMo's that takes many texts at once, if it has one that gives the same tokens."""
    inner = getattr(tokenizer, "tokenizer", None)
    if isinstance(inner, PreTrainedTokenizerFast) and not getattr(tokenizer, "include_special_tokens", False):
        return inner
    return None


def size_of(examples: Iterable[Example], counter: TokenCounter) -> Size:
    """The size of examples as a source's reader yields them."""
    size, examples = Size(), iter(examples)
    while batch := list(islice(examples, _BATCH)):
        cuts = [cut for example in batch for cut in _cuts_of(example)]
        texts = Counter(text for example in batch for text in _texts_of(example))
        lengths = zip(counter.count(list(texts)), texts.values(), strict=True)
        tokens = sum(length * times for length, times in lengths)
        size += Size(len(batch), sum(float(cut.duration) for cut in cuts), tokens)
    return size


def _cuts_of(example: Example) -> list[Cut]:
    if isinstance(example, NeMoMultimodalConversation):
        return [turn.cut for turn in example.turns if isinstance(turn, AudioTurn)]
    return [example] if isinstance(example, Cut) else []


def _texts_of(example: Example) -> list[str]:
    """The source and target texts of a text example, without instructions."""
    if isinstance(example, SourceTargetTextExample):
        texts = [example.source.text, example.target.text]
    elif isinstance(example, TextExample):
        texts = [example.text]
    elif isinstance(example, NeMoMultimodalConversation) and not _cuts_of(example):
        texts = [turn.value for turn in example.turns[-2:]]
    else:
        return []
    return [text.strip() for text in texts]
