"""Multi30k: 31,014 captions of Flickr's photos in English, German, French and Czech.

Read from task 1 of github.com/multi30k/dataset: ``data/task1/raw/{split}.{language}.gz`` with the splits train (29,000
sentences), val (1014), test_2016_flickr, test_2017_flickr, test_2017_mscoco and test_2018_flickr, or the same files
unpacked. A split has the languages that it was translated to: test_2017_* do not exist in Czech.

A sentence's id is the number of its line, from 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from nemo_emmett.corpora.corpus import Corpus, Part, Selection, Sentence
from nemo_emmett.corpora.readers.files import SourceFiles, zipped_lines
from nemo_emmett.corpora.readers.languages import chosen
from nemo_emmett.errors import DataError

SPLITS = ("train", "val", "test_2016_flickr", "test_2017_flickr", "test_2017_mscoco", "test_2018_flickr")
LANGUAGES = ("en", "de", "fr", "cs")

_FILE = re.compile(rf"(?P<split>{'|'.join(SPLITS)})\.(?P<language>{'|'.join(LANGUAGES)})(\.gz)?")


def read(path: Path, selection: Selection) -> list[Part]:
    """A part for each split, in those of the selected languages that it has."""
    # Not train.*: the repository also has image_splits/train.txt.
    source = SourceFiles(path).rooted(*(f"{split}.??{packed}" for split in SPLITS for packed in ("", ".gz")))
    files: dict[str, dict[str, str]] = {}
    for name in source.names:
        if (found := _FILE.fullmatch(name)) is not None:
            files.setdefault(found["split"], {})[found["language"]] = name
    if not files:
        raise DataError(f"There is no Multi30k in '{path}'; what is needed: {CORPUS.files}")
    found_languages = [lang for lang in LANGUAGES if any(lang in names for names in files.values())]
    languages = chosen(selection.languages, found_languages, "languages")
    splits = chosen(selection.splits, [split for split in SPLITS if split in files], "splits of Multi30k")
    parts = []
    for split in splits:
        names = {language: files[split][language] for language in languages if language in files[split]}
        if len(names) > 1:
            parts.append(Part(split, tuple(names), partial(_sentences, source, names)))
    if not parts:
        raise DataError(f"No split in '{path}' is there in two of the languages {', '.join(languages)}.")
    return parts


def _sentences(source: SourceFiles, names: dict[str, str]) -> Iterator[Sentence]:
    for number, lines in enumerate(zipped_lines([(source, name) for name in names.values()]), start=1):
        yield Sentence(str(number), dict(zip(names, lines, strict=True)))


CORPUS = Corpus(
    name="multi30k",
    title="Multi30k",
    release="task 1, raw, with the test sets of 2016 to 2018",
    licence="LicenseRef-Flickr-terms",
    url="https://github.com/multi30k/dataset",
    files="the repository, or its folder data/task1/raw with train.en.gz, train.de.gz, val.en.gz, ..., packed or not.",
    read=read,
)
