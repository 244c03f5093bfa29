"""Normalisation of sentences for comparison, and the length of a sentence in any script."""

from __future__ import annotations

import math
import re
import unicodedata

_SPACELESS = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f"  # Burmese
    "\u1780-\u17ff"  # Khmer
    "\u3040-\u30ff\u31f0-\u31ff"  # kana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese characters
)
"""Scripts that write no space between words (Unicode blocks, as ranges of a regular expression)."""

_SPACELESS_LETTER = re.compile(f"[{_SPACELESS}]")
_SPACELESS_RUN = re.compile(f"[{_SPACELESS}]+")

_COLUMNS_A_WORD = 4
"""Width of a word in these scripts: words of Chinese and Japanese have some two characters, each two columns wide;
those of Thai some four letters that take up a column."""

_THOUSANDS = re.compile(r"(?<!\d)\d{1,3}(?:([.,'’\s])\d{3})(?:\1\d{3})*(?!\d)")
"""A number in groups of three digits, with the same separator throughout."""


def normalise(text: str) -> str:
    """The words of a sentence, separated by spaces: sentences that differ only in orthography become equal.

    Removed are differences of case, Unicode form (composed, decomposed, full width, ligatures), punctuation, symbols,
    quotes, spacing, invisible characters, and the separators of thousands (1,000; 1.000; 1 000). Accents and the order
    of the words are kept. In scripts without spaces between words each letter is a word.

    Example:
        >>> normalise("“Ça  coûte 1,000 €!”") == normalise("ça coûte 1 000")
        True
        >>> normalise("我喜欢茶。")
        '我 喜 欢 茶'
    """
    # Case folding can undo the composition (ΐ), so the text is composed again.
    folded = text.casefold() if text.isascii() else _compose(_compose(text).casefold())
    if _THOUSANDS.search(folded):
        folded = _THOUSANDS.sub(lambda number: re.sub(r"\D", "", number[0]), folded)
    return " ".join(folded.translate(_WORD_CHARACTERS).split())


def count_words(text: str) -> int:
    """Number of words of a text; in scripts without spaces between words, four columns of its width count as one.

    Example:
        >>> count_words("Two dogs play."), count_words("两只狗在玩")
        (3, 3)
    """
    if not _SPACELESS_LETTER.search(text):
        return len(text.split())
    spaceless = "".join(_SPACELESS_RUN.findall(text))
    return len(_SPACELESS_RUN.sub(" ", text).split()) + math.ceil(display_width(spaceless) / _COLUMNS_A_WORD)


def display_width(text: str) -> int:
    """Columns that a text takes up in a terminal: two for a Chinese character, none for a combining accent.

    In this unit the lengths of translations are the most similar across scripts: in characters Chinese is a third as
    long as English, in bytes Russian and Thai are two and three times as long.
    """
    from rich.cells import cell_len

    return len(text) if text.isascii() else cell_len(text)


def _compose(text: str) -> str:
    return unicodedata.normalize("NFKC", text)


class _WordCharacters(dict):
    """The replacement of each character for ``str.translate``, computed at its first occurrence."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        category = unicodedata.category(character)
        if category == "Cf":  # soft hyphens, joiners, marks of direction
            self[code] = ""
        elif category[0] not in "LMN":
            self[code] = " "
        else:
            self[code] = f" {character} " if _SPACELESS_LETTER.match(character) else character
        return self[code]


_WORD_CHARACTERS = _WordCharacters()
