"""Test sentences in training data: the same, inside of a longer one, or with a few words changed.

The test sentences are indexed and the training data is streamed once, so that memory is bounded by the test sets.
Normalised sentences (:func:`~nemo_emmett.corpora.normalisation.normalise`) of the same language are compared, on either
side of a pair.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path

from nemo_emmett.corpora.normalisation import count_words, normalise
from nemo_emmett.corpora.readers.languages import iso_code
from nemo_emmett.corpora.sentence_files import PlacedSentence, find_sentence_files, read_sentences
from nemo_emmett.errors import DataError

SHORT = 3
"""A test sentence of fewer words ("Thank you.") occurs everywhere and is no leak: it is counted separately."""

LONG = 6
"""From this many words on test sentences are searched for inside of longer ones, and with changes. Shorter ones are
often a part of another sentence by chance; and from six words on, three consecutive words remain after a change of one
word in five, so that :class:`_Index` finds every match."""

WORDS_A_CHANGE = 5
"""A sentence is near another if at most one word in this many is inserted, deleted or replaced."""


class LeakKind(IntEnum):
    """How a test sentence occurs in a training sentence, the worst first."""

    SAME = 0  # after normalisation
    CONTAINED = 1  # as a part of it
    NEAR = 2  # as a whole or a part, with a few words changed


@dataclass(frozen=True)
class Leak:
    """A training sentence with a test sentence in it."""

    kind: LeakKind
    language: str  # code in the training data
    text: str  # of the training data
    test_text: str
    test_place: str  # test.de:17
    changes: int = 0  # words inserted, deleted or replaced
    file: Path | None = None  # of the training data; None where only texts were given
    line: int | None = None

    @property
    def words(self) -> int:
        """Of the test sentence."""
        return count_words(self.test_text)

    @property
    def is_short(self) -> bool:
        """Whether the test sentence has fewer than ``SHORT`` words, which occur everywhere."""
        return self.words < SHORT

    @property
    def is_certain(self) -> bool:
        """Whether a test sentence that is not short occurs unchanged: such sentences must be removed from training."""
        return self.kind is not LeakKind.NEAR and not self.is_short


class HeldOut:
    """Sentences that must not be in training data.

    Args:
        sentences: of the test sets, in all their languages.
        near: whether to search for those with a few words changed as well.

    Example:
        >>> test = PlacedSentence({"en": "Two dogs play in the snow."}, Path("test.en"), 1)
        >>> HeldOut([test]).match({"en": "TWO DOGS play -- in the snow", "de": "Zwei Hunde"}).kind.name
        'SAME'
    """

    def __init__(self, sentences: Iterable[PlacedSentence], near: bool = True) -> None:
        by_language: dict[str, dict[str, tuple[PlacedSentence, str]]] = defaultdict(dict)
        for sentence in sentences:
            for language, text in sentence.texts.items():
                if normal := normalise(text):
                    by_language[iso_code(language)].setdefault(normal, (sentence, text))
        self._originals = by_language
        self._indexes = {language: _Index(normals, near) for language, normals in by_language.items()}

    @classmethod
    def read(cls, sources: Iterable[str | Path], near: bool = True) -> HeldOut:
        """Read the sentences of files and prepared corpora, as :func:`find_sentence_files` takes them.

        Raises:
            DataError: if one is missing or damaged, or they hold no sentence.
        """
        sources = list(sources)
        held_out = cls((s for source in sources for f in find_sentence_files(source) for s in read_sentences(f)), near)
        if not held_out.languages:
            raise DataError(f"'{', '.join(map(str, sources))}': no sentence to hold out; give files that have some.")
        return held_out

    @property
    def languages(self) -> tuple[str, ...]:
        """ISO 639-1 codes."""
        return tuple(sorted(self._indexes))

    def __len__(self) -> int:
        """Number of different sentences, summed over the languages."""
        return sum(map(len, self._originals.values()))

    def match(self, texts: Mapping[str, str]) -> Leak | None:
        """The worst leak of a training sentence, or None.

        Args:
            texts: language code -> text.
        """
        leaks = []
        for language, text in texts.items():
            code = iso_code(language)
            index = self._indexes.get(code)
            if index is not None and (found := index.find(normalise(text))) is not None:
                kind, normal, changes = found
                sentence, test_text = self._originals[code][normal]
                leaks.append(Leak(kind, language, text, test_text, sentence.place, changes))
        return min(leaks, key=lambda leak: (leak.is_short, leak.kind, leak.changes), default=None)


def find_leaks(training: Iterable[PlacedSentence], held_out: HeldOut) -> Iterator[Leak]:
    """The leaks of training data in the order of the data, at most one for each sentence.

    Raises:
        DataError: at the end, if nothing was compared: no sentence was in a language of the held-out data.
    """
    languages: set[str] = set()
    for sentence in training:
        languages.update(sentence.texts)
        if (leak := held_out.match(sentence.texts)) is not None:
            yield replace(leak, file=sentence.file, line=sentence.line)
    if not languages:
        raise DataError("the training data holds no sentence; give files that have some.")
    if {iso_code(language) for language in languages}.isdisjoint(held_out.languages):
        raise DataError(
            f"the training data is in {', '.join(sorted(languages))}, the held-out data in "
            f"{', '.join(held_out.languages)}; give sentences of the same language."
        )


class _Index:
    """An index of the normalised test sentences of one language.

    A key is three consecutive words. A test sentence of n words has n - 2 keys, of which a change of one word destroys
    at most three; so one of any 3 k + 1 keys remains after k changes (the q-gram lemma: Jokinen and Ukkonen, 1991). The
    rarest 3 k + 1 keys are indexed; sentences that share one are compared word by word.
    """

    def __init__(self, normals: Collection[str], near: bool) -> None:
        self._normals = normals
        self._words: list[list[str]] = []
        self._by_key: dict[tuple[str, ...], list[int]] = defaultdict(list)
        self._near = near
        long = [normal.split() for normal in normals if count_words(normal) >= LONG]
        frequencies = Counter(key for words in long for key in _keys(words))
        for words in long:
            rarest = sorted(_keys(words), key=frequencies.__getitem__)[: 3 * self._most_changes(words) + 1]
            for key in set(rarest):
                self._by_key[key].append(len(self._words))
            self._words.append(words)

    def find(self, normal: str) -> tuple[LeakKind, str, int] | None:
        """The worst match of a normalised sentence: its kind, the test sentence, the words changed."""
        if normal in self._normals:
            return LeakKind.SAME, normal, 0
        words = normal.split()
        if self._by_key.keys().isdisjoint(_keys(words)):
            return None
        candidates = sorted({number for key in _keys(words) for number in self._by_key.get(key, ())})
        compared = ((self._changes(number, words), number) for number in candidates)
        changes, number = min(((c, n) for c, n in compared if c is not None), default=(0, None))
        if number is None:
            return None
        return (LeakKind.NEAR if changes else LeakKind.CONTAINED), " ".join(self._words[number]), changes

    def _changes(self, number: int, words: Sequence[str]) -> int | None:
        """Number of changed words of a test sentence in ``words``; None if it does not occur there."""
        test = self._words[number]
        most = self._most_changes(test)
        if len(set(test).difference(words)) > most:  # much faster than the alignment, and excludes most
            return None
        changes = changes_inside(test, words)
        return changes if changes <= most else None

    def _most_changes(self, test: Sequence[str]) -> int:
        return len(test) // WORDS_A_CHANGE if self._near else 0


def changes_inside(part: Sequence[str], whole: Sequence[str]) -> int:
    """The edit distance in words between ``part`` and the nearest part of ``whole`` (Sellers, 1980)."""
    distances = [0] * (len(whole) + 1)  # the match may begin anywhere
    for row, word in enumerate(part, start=1):
        previous, distances[0] = distances[0], row
        for column, other in enumerate(whole, start=1):
            replaced = previous + (word != other)
            previous = distances[column]
            distances[column] = min(replaced, previous + 1, distances[column - 1] + 1)
    return min(distances)  # and end anywhere


def _keys(words: Sequence[str]) -> list[tuple[str, ...]]:
    return list(zip(words, words[1:], words[2:], strict=False))
