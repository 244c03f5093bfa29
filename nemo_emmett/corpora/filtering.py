"""Filters for training sentences: length, length ratio, language, held-out test data, duplicates.

Language identification is py3langid's, lengths are measured by rich. OpusFilter has filters of the same kind; it is not
used, since its length ratio, in characters or in words between spaces, does not suit Chinese and Japanese, the language
identification of its release 3.3.1 does not run with py3langid 0.4.0, and it depends on fourteen more packages.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import annotated_types

from nemo_emmett.corpora.extras import require
from nemo_emmett.corpora.leaks import HeldOut
from nemo_emmett.corpora.normalisation import count_words, display_width
from nemo_emmett.errors import ConfigError
from nemo_emmett.prompts.language_codes import normalized
from nemo_emmett.prompts.languages import language_name
from nemo_emmett.typed_config import Number, PositiveWhole, Switch, parse_fields

_HASH_BYTES = 16
"""With 10^9 sentences the chance that any two different ones share a hash is 10^-21."""


Ratio = Annotated[Number, annotated_types.Ge(1)]
"""A number from 1."""


@dataclass(frozen=True)
class FilterConfig:
    """Which sentences to filter out; by default none.

    Raises:
        ConfigError: if a field has a value that cannot work.
    """

    max_length_ratio: Ratio | None = None  # of the longest to the shortest text of a sentence, in columns
    min_words: PositiveWhole | None = None  # of each text; without spaces between words, four columns are one
    max_words: PositiveWhole | None = None
    language_id: Switch = False  # filter out texts in another language than they should be
    deduplicate: Switch = False  # keep the first of sentences that are equal in all languages
    held_out: tuple[str | Path, ...] = ()  # files or prepared corpora whose sentences must not be in training

    def __post_init__(self) -> None:
        held_out = (self.held_out,) if isinstance(self.held_out, str | Path) else tuple(self.held_out)
        object.__setattr__(self, "held_out", held_out)
        parse_fields(self, "filters")
        if None not in (self.min_words, self.max_words) and self.min_words > self.max_words:
            raise ConfigError(f"filters.min_words: {self.min_words} is above max_words, {self.max_words}; swap them")

    def described(self) -> dict[str, Any]:
        """The fields as plain JSON values; existing files by absolute paths."""
        held_out = (Path(path).absolute() if Path(path).exists() else path for path in self.held_out)
        return {**asdict(self), "held_out": [str(path) for path in held_out]}


class SentenceFilter:
    """Filters sentences one after the other; with ``deduplicate`` it remembers those that it kept.

    Duplicates are found by hashes of 16 bytes, which take up to 100 bytes of memory a sentence with Python's overhead.
    Only texts are compared: do not use ``deduplicate`` for speech, where several speakers may read a sentence.

    Args:
        config: what to filter out.
        languages: those of the sentences, ISO 639-1.

    Raises:
        ConfigError: if a language cannot be identified.
        DataError: if a held-out file is missing or damaged.
        EmmettError: if languages are to be identified and py3langid is not installed.

    Example:
        >>> filter_ = SentenceFilter(FilterConfig(max_length_ratio=3, deduplicate=True), ["en", "de"])
        >>> filter_.cause({"en": "Yes.", "de": "Das kann man so sagen."})
        'length ratio above 3'
    """

    def __init__(self, config: FilterConfig, languages: Sequence[str]) -> None:
        self._config = config
        self._identifier = LanguageIdentifier(languages) if config.language_id else None
        # Near matches are not filtered out: captions and phrasebooks are full of them.
        self._held_out = HeldOut.read(config.held_out, near=False) if config.held_out else None
        self._seen: set[bytes] = set()

    def cause(self, texts: Mapping[str, str]) -> str | None:
        """The cause for which a sentence is filtered out, as it is counted; None if it is kept.

        Args:
            texts: language code -> text; none is empty.
        """
        config = self._config
        if config.min_words is not None or config.max_words is not None:
            words = [count_words(text) for text in texts.values()]
            if config.min_words is not None and min(words) < config.min_words:
                return f"fewer than {config.min_words} words"
            if config.max_words is not None and max(words) > config.max_words:
                return f"more than {config.max_words} words"
        if (limit := config.max_length_ratio) is not None:
            widths = [max(display_width(text.strip()), 1) for text in texts.values()]
            if max(widths) > limit * min(widths):
                return f"length ratio above {limit:g}"
        if self._identifier is not None:
            for language, text in texts.items():
                if not self._identifier.may_be(text, language):
                    return f"not in {language_name(language)}"
        if self._held_out is not None:
            leak = self._held_out.match(texts)
            if leak is not None and leak.is_certain:
                return "occurs in held-out data"
        if not config.deduplicate:
            return None
        # Last: a sentence that is filtered out makes no later one a duplicate.
        hashed = hashlib.blake2b(digest_size=_HASH_BYTES)
        for language, text in sorted(texts.items()):
            same = " ".join(unicodedata.normalize("NFC", text).split())
            hashed.update(f"{language}\n{same}\n".encode())
        key = hashed.digest()
        if key in self._seen:
            return "duplicate"
        self._seen.add(key)
        return None


class LanguageIdentifier:
    """Checks by py3langid (140 languages) whether a text is in the language that it should be in.

    A text is rejected if another language is ``ODDS`` times as probable, so that texts which are too short to identify,
    or in a language close to their own, are kept. On the validation set of Multi30k (English, German, French and Czech;
    4,056 captions; first words of them as short sentences), one core:

        words               wrongly rejected    rejected in the wrong language
        all (11 in median)  0.0 %               99.9 %
        5                   0.02 %              97 %
        3                   0.2 %               82 %
        2                   0.3 %               57 %

    The most probable language alone, whatever its odds, is wrong for 0.3, 2.6, 13 and 36 %. py3langid classifies 20,000
    captions a second; lingua 2.1, among its 75 languages, 670 at its most accurate (0.4 % wrong, 1.4 GB of memory) and
    3,700 at its fastest (3.5 % wrong).

    Args:
        languages: those that texts should be in.

    Raises:
        ConfigError: if py3langid does not support one.
        EmmettError: if py3langid is not installed.
    """

    ODDS = 20

    def __init__(self, languages: Sequence[str]) -> None:
        langid = require("py3langid.langid", "langid", "Language identification")
        self._model = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
        labels = frozenset(self._model.labels)
        for language in languages:
            if _label(language) not in labels:
                raise ConfigError(
                    f"filters.language_id: '{language}' is not among the {len(labels)} languages that py3langid "
                    "identifies; leave it out of the languages, or turn language_id off."
                )

    def may_be(self, text: str, language: str) -> bool:
        """Whether ``text`` may be in ``language``."""
        if self._model.classify(text)[0] == _label(language):  # the common case, in half the time
            return True
        probabilities = dict(self._model.rank(text))
        return max(probabilities.values()) <= self.ODDS * probabilities[_label(language)]


_LABELS = {"nb": "no", "gn": "gug", "ki": "kik", "ff": "fuv"}
"""py3langid's codes of languages that have another code in ISO 639-1."""


def _label(language: str) -> str:
    code = normalized(language).split("-")[0]
    return _LABELS.get(code, code)
