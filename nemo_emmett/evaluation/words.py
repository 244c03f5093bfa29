"""Words of a sentence, as the report counts and compares them."""

from __future__ import annotations

import difflib
import re

_IDEOGRAPHS = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = rf"[{_IDEOGRAPHS}]|[^\s{_IDEOGRAPHS}]+"
"""A word is a run of characters without spaces; in Chinese and Japanese, which write no spaces, every character."""
_WORD_WITH_SPACE = re.compile(rf"(?:{_WORD})\s*|\s+")


def split_words(text: str) -> list[str]:
    """The words of a sentence, with the punctuation attached to them.

    Example:
        >>> split_words("the black cat, 黒猫")
        ['the', 'black', 'cat,', '黒', '猫']
    """
    return re.findall(_WORD, text)


def compare_words(hypothesis: str, reference: str) -> list[tuple[str, bool]]:
    """The words of a hypothesis, with their spaces, and whether each differs from the reference.

    Example:
        >>> compare_words("the red cat", "the black cat")
        [('the ', False), ('red ', True), ('cat', False)]
    """
    pieces = _WORD_WITH_SPACE.findall(hypothesis)
    words = [piece.strip() for piece in pieces]
    matcher = difflib.SequenceMatcher(None, words, split_words(reference), autojunk=False)
    kept = {block.a + offset for block in matcher.get_matching_blocks() for offset in range(block.size)}
    return [(piece, bool(words[index]) and index not in kept) for index, piece in enumerate(pieces)]
