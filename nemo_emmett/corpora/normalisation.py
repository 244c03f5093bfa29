"""What of a sentence counts when two are compared, and how long a sentence is in any script."""

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
    """The words of a sentence, a space between them: two sentences that differ in writing only become the same.

    Of no account are case, Unicode form (composed, decomposed, full width, ligatures), punctuation, symbols and quotes,
    spacing, invisible characters, and the separators of thousands (1,000; 1.000; 1 000). Accents and the order of the
    words count. In scripts without spaces between words each letter is a word.

    Example:
        >>> normalise("“Ça  coûte 1,000 €!”") == normalise("ça coûte 1 000")
        True
        >>> normalise("我喜欢茶。")
        '我 喜 欢 茶'
    """
    # Folding case can undo the composition (ΐ), so that it is composed once more.
    folded = text.casefold() if text.isascii() else _compose(_compose(text).casefold())
    if _THOUSANDS.search(folded):
        folded = _THOUSANDS.sub(lambda number: re.sub(r"\D", "", number[0]), folded)
    return " ".join(folded.translate(_WORD_CHARACTERS).split())


def count_words(text: str) -> int:
    """Words of a text; where a script writes no spaces between them, four columns of its width are taken for one.

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

    It is the unit in which the lengths of translations compare best across scripts: in characters Chinese is a third
    as long as English, in bytes Russian and Thai are twice and three times as long.
    """
    from rich.cells import cell_len

    return len(text) if text.isascii() else cell_len(text)


def _compose(text: str) -> str:
    return unicodedata.normalize("NFKC", text)


class _WordCharacters(dict):
    """What each character becomes, for ``str.translate``; filled as characters are met."""

    def __missing__(self, code: int) -> str:
        self[code] = self._becomes(chr(code))
        return self[code]

    @staticmethod
    def _becomes(character: str) -> str:
        category = unicodedata.category(character)
        if category == "Cf":  # soft hyphens, joiners, marks of direction
            return ""
        if category[0] not in "LMN":
            return " "
        return f" {character} " if _SPACELESS_LETTER.match(character) else character


_WORD_CHARACTERS = _WordCharacters()
