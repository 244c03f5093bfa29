"""FLEURS: sentences of FLORES read aloud in 102 languages (Conneau et al., 2022, arXiv:2205.12446).

As ``google/fleurs`` has it on Hugging Face:

    data/de_de/test.tsv             id, file name, sentence, its words, its characters, samples, gender; no header
    data/de_de/audio/test.tar.gz    test/1234567890.wav, 16 kHz; or unpacked in data/de_de/audio/test/

A sentence has the same id in all languages, by which recordings and translations are joined; rows may be in any order.
Translations are the sentences of the target languages in FLEURS or, with ``--flores``, in FLORES. Sentences are the
third column: cased and with punctuation, as published.

A sentence is read by one to three speakers, and every recording is an item of the test set, with the same translations,
as in SeamlessM4T: ``Speech2SpeechFleursDatasetBuilder`` in facebookresearch/seamless_communication looks up the
translation of each recording of the source language by its id. Recordings whose sentence has no translation are left
out there, and skipped and counted here.

**FLORES ids.** FLEURS has the sentences of FLORES dev and devtest with other ids: those of its test recordings in
English are between 1,660 and 2,009, those of one article not consecutive. Both can only be joined by text (Schmidt et
al., Fleurs-SLU, arXiv:2501.06117, ``scripts/align-flores-and-fleurs.py``). So the id of a sentence is looked up once,
by its English text, from which all others are translated, or by the text of another language where FLEURS' English is
missing or differs; all languages are then joined by the id. The text that a speaker was given can differ from FLORES,
in Cebuano in one sentence of sixteen (the same work): a recording whose own text differs gets no translation.

lhotse's ``prepare_fleurs`` reads what its own ``download_fleurs`` writes, not these archives.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import partial
from pathlib import Path, PurePath

from nemo_emmett.corpora.corpus import Corpus, Part, Recording, Selection, Sentence, Skipped
from nemo_emmett.corpora.normalisation import normalise
from nemo_emmett.corpora.readers.files import WRONG_COLUMNS, SourceFiles
from nemo_emmett.corpora.readers.flores import SPLITS as FLORES_SPLITS
from nemo_emmett.corpora.readers.flores import flores_sentences
from nemo_emmett.corpora.readers.languages import chosen, iso_code
from nemo_emmett.corpora.readers.pairs import need, need_folder, with_translations
from nemo_emmett.errors import DataError

_SPLITS = ("train", "dev", "test")
_COLUMNS = 7
_SAMPLES = 5  # the column of the number of samples
_NUMBER = re.compile(r"\d{1,18}")


_MOST_UNKNOWN = 0.1
"""Largest share of sentences that are not in FLORES; Cebuano, the worst language in Fleurs-SLU, has 6 %."""

_LEAST_SHARED_WORDS = 0.5
"""Share of the words that two texts of one sentence have in common. Corrections change few words; different sentences
share hardly more than articles."""


@dataclass(frozen=True, order=True)
class _Row:
    """A recording. The order is that of the sentences, then of the files, not that of the rows."""

    sentence: int
    file: str
    text: str


@dataclass(frozen=True)
class _Speech:
    """The recordings of one split in one language."""

    split: str  # "train", "dev" or "test"
    spoken: str  # their language
    targets: tuple[str, ...]  # languages to translate to
    folders: Mapping[str, Path]  # FLEURS' folder of each language that it has
    flores: Path | None  # folder or archive of FLORES, if translations are taken from it

    def sentences(self) -> Iterator[Sentence | Skipped]:
        """One for each recording."""
        translations = self.translations()
        audio = self.folders[self.spoken] / "audio"
        rows, skipped = self._rows(self.spoken)
        yield from skipped
        for row in rows:
            texts = {self.spoken: row.text} | {
                target: translations.get(row.sentence, {}).get(target, "") for target in self.targets
            }
            name = f"{row.sentence}-{PurePath(row.file).stem}"
            if (audio / self.split).is_dir():
                recording = Recording(audio / self.split / row.file)
            else:
                recording = Recording(audio / f"{self.split}.tar.gz", member=f"{self.split}/{row.file}")
            yield Sentence(name, with_translations(texts, self.spoken), recording)

    def translations(self) -> Mapping[int, Mapping[str, str]]:
        """The translations of each sentence, by language; raises DataError if FLORES has other sentences."""
        if self.flores is not None:
            texts = {}
            for language in ("en", self.spoken, *self.targets):
                if language in self.folders and (self.folders[language] / f"{self.split}.tsv").is_file():
                    texts[language] = self._texts(language)
            return translations_in_flores(texts, self.flores, self.spoken, self.targets, f"FLEURS {self.split}")
        found: dict[int, dict[str, str]] = {}
        for target in self.targets:
            for sentence, text in self._texts(target).items():
                found.setdefault(sentence, {})[target] = text
        return found

    def check(self) -> None:
        """Raise DataError if a file is missing, or FLORES has other sentences."""
        for language in {self.spoken, *(() if self.flores else self.targets)}:
            need(self.folders[language] / f"{self.split}.tsv", f"the sentences; {_DOWNLOAD}")
        audio = self.folders[self.spoken] / "audio"
        if not (audio / self.split).is_dir():
            need(audio / f"{self.split}.tar.gz", f"the recordings; {_DOWNLOAD}")
        if self.flores is not None:
            self.translations()

    def _texts(self, language: str) -> dict[int, str]:
        texts: dict[int, str] = {}
        for row in self._rows(language)[0]:
            texts.setdefault(row.sentence, row.text)
        return texts

    def _rows(self, language: str) -> tuple[list[_Row], list[Skipped]]:
        """The valid rows of a language, and the causes of the others."""
        path = self.folders[language] / f"{self.split}.tsv"
        rows = [_row(line) for line in SourceFiles(path.parent).lines(path.name)]
        good = sorted(row for row in rows if isinstance(row, _Row))
        return good, [row for row in rows if isinstance(row, Skipped)]


def read(source: Path, selection: Selection) -> Sequence[Part]:
    """The parts of FLEURS: a split of a spoken language, with its translations into the other languages.

    Args:
        source: the folder of the dataset, or its ``data``.
        selection: splits are called ``train``, ``dev``, ``test``; one language: its transcripts. With
            ``extra_sources["flores"]``, the folder or archive of FLORES-200 or FLORES+, there may be translations into
            languages that are not in ``source``.

    Raises:
        ConfigError: if a language or split is not there.
        DataError: if a file of the selection is missing, or FLORES has other sentences.
    """
    folders = _language_folders(source)
    flores = selection.extra_sources.get("flores")
    only_written = set(selection.languages or ()) - set(folders) if flores is not None else set()
    languages = chosen(selection.languages, (*folders, *sorted(only_written)), f"languages of {CORPUS.title}")
    there = [split for split in _SPLITS if any((folder / f"{split}.tsv").is_file() for folder in folders.values())]
    parts = []
    for split in chosen(selection.splits, there, f"splits of {CORPUS.title}"):
        for spoken in (language for language in languages if language in folders):
            targets = tuple(language for language in languages if language != spoken)
            speech = _Speech(split, spoken, targets, folders, flores)
            speech.check()
            parts.append(Part(split, (spoken, *targets), partial(_Speech.sentences, speech), spoken=spoken))
    return parts


def _language_folders(source: Path) -> dict[str, Path]:
    what = "the folders of FLEURS' languages (data/de_de/test.tsv)"
    data = need_folder(source, what) / "data"
    root = data if data.is_dir() else source
    folders = {iso_code(path.parent.name): path.parent for path in sorted(root.glob("*_*/*.tsv"))}
    if not folders:
        raise DataError(f"'{source}' does not hold {what}; {_DOWNLOAD}.")
    return folders


def _row(line: str) -> _Row | Skipped:
    fields = line.split("\t")
    if len(fields) != _COLUMNS:
        return Skipped(WRONG_COLUMNS)
    if not all(_NUMBER.fullmatch(field) for field in (fields[0], fields[_SAMPLES])):
        return Skipped("shifted columns")
    return _Row(int(fields[0]), fields[1], fields[2].strip())


def translations_in_flores(
    texts: Mapping[str, Mapping[int, str]], flores: Path, spoken: str, targets: Sequence[str], what: str
) -> dict[int, dict[str, str]]:
    """The translations that FLORES has of FLEURS' sentences.

    Args:
        texts: FLEURS' texts by language and id; ``spoken`` must be among the languages, and English should be.
        flores: folder or archive of FLORES-200 or FLORES+.
        spoken: the language whose recordings are translated.
        targets: the languages to translate to.
        what: names the recordings in messages.

    Returns:
        For each id in ``spoken`` that is in FLORES, its text in each target language.

    Raises:
        DataError: if more than a tenth of the sentences are not those of FLORES.
    """
    languages = tuple(dict.fromkeys([*texts, spoken, *targets]))
    sentences: dict[str, dict[str, str]] = {language: {} for language in languages}
    for split in FLORES_SPLITS:
        for language, of_language in flores_sentences(flores, split, languages).items():
            sentences[language].update(of_language)
    places = places_in_flores(texts, sentences)
    found = {
        number: {target: sentences[target].get(places[number], "") for target in targets}
        for number, text in texts[spoken].items()
        if number in places and _same_sentence(text, sentences[spoken].get(places[number], ""))
    }
    unknown = [number for number in texts[spoken] if number not in found]
    if len(unknown) > _MOST_UNKNOWN * len(texts[spoken]):
        raise DataError(
            f"{what} in '{spoken}': {len(unknown)} of {len(texts[spoken])} sentences are not those of '{flores}' (id "
            f"{unknown[0]} is the first); give FLORES-200 or FLORES+ as published, and put FLEURS' en_us next to it."
        )
    return found


def places_in_flores(
    texts: Mapping[str, Mapping[int, str]], sentences: Mapping[str, Mapping[str, str]]
) -> dict[int, str]:
    """FLORES' id of each id of FLEURS, found by the text in English, or else in the first language that has it.

    Texts are compared by their words. A text that FLORES has twice is not used.
    """
    places: dict[int, str] = {}
    for language in sorted(texts, key=lambda language: language != "en"):
        normalised = {place: normalise(text) for place, text in sentences[language].items()}
        times = Counter(normalised.values())
        of_text = {text: place for place, text in normalised.items() if times[text] == 1}
        for number, text in texts[language].items():
            if (place := of_text.get(normalise(text))) is not None:
                places.setdefault(number, place)
    return places


def _same_sentence(one: str, other: str) -> bool:
    words, others = normalise(one).split(), normalise(other).split()
    return words == others or SequenceMatcher(None, words, others, autojunk=False).ratio() >= _LEAST_SHARED_WORDS


_DOWNLOAD = "download data/{language}/{split}.tsv and data/{language}/audio/{split}.tar.gz of google/fleurs"

CORPUS = Corpus(
    name="fleurs",
    title="FLEURS",
    release="google/fleurs 2.0.0",
    licence="CC-BY-4.0 (translations of --flores: CC-BY-SA-4.0)",
    url="https://huggingface.co/datasets/google/fleurs",
    files="the folder with data/{language}/{split}.tsv and data/{language}/audio/{split}.tar.gz",
    read=read,
    extra_sources={"flores": "the folder or archive of FLORES-200 or FLORES+ to take the translations from"},
)
