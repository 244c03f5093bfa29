"""FLEURS: sentences of FLORES read aloud in 102 languages (Conneau et al., 2022, arXiv:2205.12446).

As ``google/fleurs`` has it on Hugging Face:

    data/de_de/test.tsv             id, file name, sentence, its words, its characters, samples, gender; no header
    data/de_de/audio/test.tar.gz    test/1234567890.wav, 16 kHz; or unpacked in data/de_de/audio/test/

A sentence has the same id in all languages, by which recordings and translations are joined; rows may stand in any
order. Translations are the sentences of the target languages in FLEURS or, with ``--flores``, in FLORES
(``flores_of_fleurs.py``). Sentences are the third column: cased and with punctuation, as published.

A sentence is read by one to three speakers, of whom each counts: every recording is an item of the test set, with the
same translations. So does SeamlessM4T: ``Speech2SpeechFleursDatasetBuilder`` in facebookresearch/seamless_communication
goes through the recordings of the source language and looks up the translation of each by its id. Recordings whose
sentence has no translation are left out there, and skipped and counted here.

lhotse's ``prepare_fleurs`` reads what its own ``download_fleurs`` writes, not these archives.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath

from nemo_emmett.corpora.corpus import Corpus, Part, Recording, Selection, Sentence, Skipped
from nemo_emmett.corpora.readers.files import WRONG_COLUMNS, SourceFiles
from nemo_emmett.corpora.readers.flores_of_fleurs import translations_in_flores
from nemo_emmett.corpora.readers.languages import chosen, iso_code
from nemo_emmett.corpora.readers.pairs import need, need_folder, with_translations
from nemo_emmett.errors import DataError

_SPLITS = ("train", "dev", "test")
_COLUMNS = 7
_SAMPLES = 5  # the column of the number of samples
_NUMBER = re.compile(r"\d{1,18}")


@dataclass(frozen=True, order=True)
class _Row:
    """A recording. The order is that of the sentences, then of the files, wherever the row stands."""

    sentence: int
    file: str
    text: str


@dataclass(frozen=True)
class _Speech:
    """The recordings of one split in one language.

    Args:
        split: ``train``, ``dev`` or ``test``.
        spoken: their language.
        targets: languages to translate to.
        folders: FLEURS' folder of each language that it has.
        flores: where FLORES is, if translations are taken from it.
    """

    split: str
    spoken: str
    targets: tuple[str, ...]
    folders: Mapping[str, Path]
    flores: Path | None

    def sentences(self) -> Iterator[Sentence | Skipped]:
        """One for each recording."""
        translations = self.translations()
        rows, skipped = self._rows(self.spoken)
        yield from skipped
        for row in rows:
            texts = {self.spoken: row.text} | {
                target: translations.get(row.sentence, {}).get(target, "") for target in self.targets
            }
            name = f"{row.sentence}-{PurePath(row.file).stem}"
            yield Sentence(name, with_translations(texts, self.spoken), self._recording(row.file))

    def translations(self) -> Mapping[int, Mapping[str, str]]:
        """The translations of each sentence, by language.

        Raises:
            DataError: if FLORES has other sentences, or a file is damaged.
        """
        if self.flores is not None:
            at_hand = ["en", self.spoken, *self.targets]
            texts = {language: self._texts(language) for language in at_hand if self._tsv(language) is not None}
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

    def _tsv(self, language: str) -> Path | None:
        path = self.folders.get(language, Path()) / f"{self.split}.tsv"
        return path if path.is_file() else None

    def _texts(self, language: str) -> dict[int, str]:
        texts: dict[int, str] = {}
        for row in self._rows(language)[0]:
            texts.setdefault(row.sentence, row.text)
        return texts

    def _rows(self, language: str) -> tuple[list[_Row], list[Skipped]]:
        """The rows of a language, and why others are none."""
        path = self.folders[language] / f"{self.split}.tsv"
        rows = [_row(line) for line in SourceFiles(path.parent).lines(path.name)]
        good = sorted(row for row in rows if isinstance(row, _Row))
        return good, [row for row in rows if isinstance(row, Skipped)]

    def _recording(self, file: str) -> Recording:
        audio = self.folders[self.spoken] / "audio"
        if (audio / self.split).is_dir():
            return Recording(audio / self.split / file)
        return Recording(audio / f"{self.split}.tar.gz", member=f"{self.split}/{file}")


def read(source: Path, selection: Selection) -> Sequence[Part]:
    """The parts of FLEURS: a split of a spoken language, with its translations into the other languages.

    Args:
        source: the folder of the dataset, or its ``data``.
        selection: splits are called ``train``, ``dev``, ``test``; one language: its transcripts. With
            ``beside["flores"]``, the folder or archive of FLORES-200 or FLORES+, languages that are not in ``source``
            may be translated to.

    Raises:
        ConfigError: if a language or split is not there.
        DataError: if a file of the selection is missing, or FLORES has other sentences.
    """
    folders = _language_folders(source)
    flores = selection.beside.get("flores")
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


_DOWNLOAD = "download data/{language}/{split}.tsv and data/{language}/audio/{split}.tar.gz of google/fleurs"

CORPUS = Corpus(
    name="fleurs",
    title="FLEURS",
    release="google/fleurs 2.0.0",
    licence="CC-BY-4.0 (translations of --flores: CC-BY-SA-4.0)",
    url="https://huggingface.co/datasets/google/fleurs",
    files="the folder with data/{language}/{split}.tsv and data/{language}/audio/{split}.tar.gz",
    read=read,
    beside={"flores": "the folder or archive of FLORES-200 or FLORES+ to take the translations from"},
)
