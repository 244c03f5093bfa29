"""Which sentences of a corpus are fit to train on.

Language identification is py3langid's, lengths are measured by rich. OpusFilter has filters of the same kind; it is not
used, since its length ratio, in characters or in words between spaces, is unfair to Chinese and Japanese, the language
identification of its release 3.3.1 does not run with py3langid 0.4.0, and it brings fourteen other packages along.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from nemo_emmett.corpora.leaks import HeldOut
from nemo_emmett.corpora.normalisation import count_words, display_width
from nemo_emmett.errors import ConfigError, EmmettError
from nemo_emmett.prompts.languages import language_name
from nemo_emmett.typed_config import is_number

_HASH_BYTES = 16
"""With 10^9 sentences the chance that any two different ones share a hash is 10^-21."""


@dataclass(frozen=True)
class HygieneConfig:
    """What to leave out; by default nothing.

    Raises:
        ConfigError: if a field has a value that cannot work.
    """

    max_length_ratio: float | None = None  # of the longest to the shortest text of a sentence, in columns
    min_words: int | None = None  # of each text; without spaces between words, four columns are one
    max_words: int | None = None
    language_id: bool = False  # leave out what is in another language than it should be
    deduplicate: bool = False  # keep the first of sentences that are equal in all languages
    held_out: tuple[str | Path, ...] = ()  # files or prepared corpora whose sentences must not stand in training

    def __post_init__(self) -> None:
        if isinstance(self.held_out, str | Path):
            object.__setattr__(self, "held_out", (self.held_out,))
        object.__setattr__(self, "held_out", tuple(self.held_out))
        ratio = self.max_length_ratio
        if ratio is not None and not (is_number(ratio) and 1 <= ratio < math.inf):
            raise ConfigError(f"hygiene.max_length_ratio: {ratio!r} must be a number of 1 or more, as in 3")
        for name in ("min_words", "max_words"):
            words = getattr(self, name)
            if words is not None and not (isinstance(words, int) and is_number(words) and words >= 1):
                raise ConfigError(f"hygiene.{name}: {words!r} must be a whole number of 1 or more")
        if None not in (self.min_words, self.max_words) and self.min_words > self.max_words:
            raise ConfigError(f"hygiene.min_words: {self.min_words} is above max_words, {self.max_words}; swap them")

    def described(self) -> dict[str, Any]:
        """The fields as plain JSON values; files by paths that mean the same wherever one stands."""
        held_out = (Path(path).absolute() if Path(path).exists() else path for path in self.held_out)
        return {**asdict(self), "held_out": [str(path) for path in held_out]}


class Hygiene:
    """Judges sentences one after the other, and remembers those that it let pass if duplicates are to go.

    Duplicates are found by hashes of 16 bytes, up to 100 bytes of memory a sentence with Python's own. They are told by
    the texts, so that a second speaker of a sentence is one: leave ``deduplicate`` off for speech.

    Args:
        config: what to leave out.
        languages: those of the sentences, ISO 639-1.

    Raises:
        ConfigError: if a language cannot be identified.
        DataError: if a held-out file is missing or damaged.
        EmmettError: if languages are to be identified and py3langid is not installed.

    Example:
        >>> hygiene = Hygiene(HygieneConfig(max_length_ratio=3, deduplicate=True), ["en", "de"])
        >>> hygiene.cause({"en": "Yes.", "de": "Das kann man so sagen."})
        'length ratio above 3'
    """

    def __init__(self, config: HygieneConfig, languages: Sequence[str]) -> None:
        self._config = config
        self._identifier = LanguageIdentifier(languages) if config.language_id else None
        # Near matches are for people to judge: captions and phrasebooks are full of them.
        self._held_out = HeldOut.read(config.held_out, near=False) if config.held_out else None
        self._seen: set[bytes] = set()

    def cause(self, texts: Mapping[str, str]) -> str | None:
        """Why a sentence is left out, in words that are fit for a table; None if it is kept.

        Args:
            texts: language code -> text; none is empty.
        """
        # Duplicates last: what is left out for another reason is not remembered.
        return (
            self._words_cause(texts)
            or self._ratio_cause(texts)
            or self._language_cause(texts)
            or self._held_out_cause(texts)
            or self._duplicate_cause(texts)
        )

    def _words_cause(self, texts: Mapping[str, str]) -> str | None:
        fewest, most = self._config.min_words, self._config.max_words
        if fewest is None and most is None:
            return None
        words = [count_words(text) for text in texts.values()]
        if fewest is not None and min(words) < fewest:
            return f"fewer than {fewest} words"
        return f"more than {most} words" if most is not None and max(words) > most else None

    def _ratio_cause(self, texts: Mapping[str, str]) -> str | None:
        limit = self._config.max_length_ratio
        if limit is None:
            return None
        lengths = [max(display_width(text.strip()), 1) for text in texts.values()]
        return f"length ratio above {limit:g}" if max(lengths) > limit * min(lengths) else None

    def _language_cause(self, texts: Mapping[str, str]) -> str | None:
        if self._identifier is None:
            return None
        wrong = next((lang for lang, text in texts.items() if not self._identifier.may_be(text, lang)), None)
        return f"not in {language_name(wrong)}" if wrong is not None else None

    def _held_out_cause(self, texts: Mapping[str, str]) -> str | None:
        if self._held_out is None or (leak := self._held_out.match(texts)) is None or not leak.is_certain:
            return None
        return "stands in held-out data"

    def _duplicate_cause(self, texts: Mapping[str, str]) -> str | None:
        if not self._config.deduplicate:
            return None
        key = _hash(texts)
        if key in self._seen:
            return "duplicate"
        self._seen.add(key)
        return None


class LanguageIdentifier:
    """Tells whether a text is in the language that it should be in, by py3langid (140 languages).

    A text is not in its language where another is ``ODDS`` times as probable, so that one which is too short to tell,
    or in a language close to its own, stays. On the validation set of Multi30k (English, German, French and Czech;
    4,056 captions; first words of them as short sentences), one core:

        words               wrongly left out    found in the wrong language
        all (11 in median)  0.0 %               99.9 %
        5                   0.02 %              97 %
        3                   0.2 %               82 %
        2                   0.3 %               57 %

    The most probable language alone, whatever its odds, is wrong for 0.3, 2.6, 13 and 36 %. py3langid judges 20,000
    captions a second; lingua 2.1, among its 75 languages, 670 at its most accurate (0.4 % wrong, 1.4 GB of memory) and
    3,700 at its fastest (3.5 % wrong).

    Args:
        languages: those that texts should be in.

    Raises:
        ConfigError: if py3langid does not know one.
        EmmettError: if py3langid is not installed.
    """

    ODDS = 20

    def __init__(self, languages: Sequence[str]) -> None:
        langid = _require_py3langid()
        self._model = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
        for language in languages:
            if _label(language) not in self._labels:
                raise ConfigError(
                    f"hygiene.language_id: '{language}' is not among the {len(self._labels)} languages that py3langid "
                    "tells apart; leave it out of the languages, or turn language_id off."
                )

    def may_be(self, text: str, language: str) -> bool:
        """Whether ``text`` may be in ``language``."""
        if self._model.classify(text)[0] == _label(language):  # takes half the time
            return True
        probabilities = dict(self._model.rank(text))
        return max(probabilities.values()) <= self.ODDS * probabilities[_label(language)]

    @cached_property
    def _labels(self) -> frozenset[str]:
        return frozenset(self._model.labels)


_LABELS = {"nb": "no", "gn": "gug", "ki": "kik", "ff": "fuv"}
"""What py3langid calls languages that have another ISO 639-1 code."""


def _label(language: str) -> str:
    code = re.split("[-_]", language)[0]
    return _LABELS.get(code, code)


def _hash(texts: Mapping[str, str]) -> bytes:
    hashed = hashlib.blake2b(digest_size=_HASH_BYTES)
    for language, text in sorted(texts.items()):
        same = " ".join(unicodedata.normalize("NFC", text).split())
        hashed.update(f"{language}\n{same}\n".encode())
    return hashed.digest()


def _require_py3langid() -> ModuleType:
    try:
        return importlib.import_module("py3langid.langid")
    except ModuleNotFoundError as error:
        raise EmmettError(
            "Language identification needs 'py3langid', which is not installed; run: pip install 'nemo_emmett[hygiene]'"
        ) from error
