"""CoVoST 2: translations of Common Voice (Wang et al., 2021), from 21 languages into English and from English into 15.

    SOURCE/covost_v2.en_de.tsv                 path, translation, split; or covost_v2.en_de.tsv.tar.gz as downloaded
    SOURCE/covost_v2.en_de.{split}.tsv         path, sentence, translation, client_id: what its ``get_covost_splits.py``
                                               makes of it; read where the former is not there
    --common-voice/en/validated.tsv, clips/    release 4 (cv-corpus-4-2019-12-10): the transcripts and recordings

Clips are joined by their names. The training split is CoVoST's, which extends that of Common Voice (``train`` and
``train_covost`` in the column). What is translated into several languages is one recording with all translations.

lhotse's ``prepare_commonvoice`` reads Common Voice's own splits, and decodes every clip for its duration.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from nemo_emmett.corpora.corpus import Corpus, Part, Recording, Selection, Sentence
from nemo_emmett.corpora.readers.files import SourceFiles
from nemo_emmett.corpora.readers.languages import chosen, iso_code
from nemo_emmett.corpora.readers.pairs import need, need_folder, wanted_pairs
from nemo_emmett.errors import ConfigError, DataError

_SPLITS = ("train", "dev", "test")
_IN_COLUMN = {"train": {"train", "train_covost"}, "dev": {"dev"}, "test": {"test"}}
_FILE = re.compile(r"covost_v2\.(?P<spoken>[\w-]+)_(?P<target>[\w-]+?)(\.(train|dev|test))?\.tsv(\.tar\.gz)?")
_LEAST_FOUND = 0.5
"""Share of the clips that must be in validated.tsv; later releases of Common Voice lack a few, other languages all."""


def read(source: Path, selection: Selection) -> Sequence[Part]:
    """The parts of CoVoST 2: a split of a spoken language, with its translations.

    Args:
        source: the folder of CoVoST's TSV files.
        selection: splits are called ``train``, ``dev``, ``test``; ``beside["common-voice"]`` is the folder of Common
            Voice's languages.

    Raises:
        ConfigError: if a language or split is not there, or Common Voice is not named.
        DataError: if a file of the selection is missing.
    """
    codes = _pairs(source)
    common_voice = selection.beside.get("common-voice")
    if common_voice is None:
        raise ConfigError(f"{CORPUS.title} needs --common-voice: {CORPUS.beside['common-voice']}.")
    pairs = wanted_pairs(codes, selection.languages, CORPUS.title)
    for split in chosen(selection.splits, _SPLITS, f"splits of {CORPUS.title}"):
        for spoken, targets in pairs.items():
            for target in targets:
                _translations_file(source, codes[spoken, target], split)
    return [
        _part(source, _clips(common_voice, codes[spoken, targets[0]][0]), split, spoken, targets, codes)
        for split in chosen(selection.splits, _SPLITS, f"splits of {CORPUS.title}")
        for spoken, targets in pairs.items()
    ]


def _part(
    source: Path,
    clips: Path,
    split: str,
    spoken: str,
    targets: Sequence[str],
    codes: Mapping[tuple[str, str], tuple[str, str]],
) -> Part:
    files = {target: _translations_file(source, codes[spoken, target], split) for target in targets}
    return Part(split, (spoken, *targets), partial(_sentences, files, clips, split, spoken), spoken=spoken)


def _pairs(source: Path) -> dict[tuple[str, str], tuple[str, str]]:
    """The pairs that are there, and how CoVoST writes them: ``("en", "zh")`` is en_zh-CN."""
    what = "covost_v2.{language}_{target}.tsv"
    names = (_FILE.fullmatch(path.name) for path in sorted(need_folder(source, what).iterdir()))
    written = {(name["spoken"], name["target"]) for name in names if name}
    if not written:
        raise DataError(f"'{source}' holds no {what}; download them from {CORPUS.url}.")
    return {(iso_code(spoken), iso_code(target)): (spoken, target) for spoken, target in sorted(written)}


def _translations_file(source: Path, codes: tuple[str, str], split: str) -> Path:
    stem = "covost_v2." + "_".join(codes)
    for name in (f"{stem}.tsv", f"{stem}.tsv.tar.gz", f"{stem}.{split}.tsv"):
        if (source / name).is_file():
            return source / name
    return need(source / f"{stem}.{split}.tsv", f"translations of the {split} split; get them from {CORPUS.url}")


def _clips(common_voice: Path, language: str) -> Path:
    """The folder of the clips; its ``validated.tsv`` is beside it."""
    what = f"Common Voice release 4 in '{language}', unpacked (https://commonvoice.mozilla.org/datasets)"
    need(common_voice / language / "validated.tsv", f"the transcripts of {what}")
    return need(common_voice / language / "clips", f"the recordings of {what}")


def _sentences(files: Mapping[str, Path], clips: Path, split: str, spoken: str) -> Iterator[Sentence]:
    texts: dict[str, dict[str, str]] = {}
    for target, file in files.items():
        for row in _rows(file, "path", "translation"):
            if "split" not in row or row["split"] in _IN_COLUMN[split]:
                texts.setdefault(row["path"], {})[target] = row["translation"].strip()
    transcripts = _transcripts(clips.parent / "validated.tsv", texts)
    for clip in sorted(transcripts):
        yield Sentence(Path(clip).stem, {spoken: transcripts[clip], **texts[clip]}, Recording(clips / clip))


def _transcripts(validated: Path, clips: Mapping[str, object]) -> dict[str, str]:
    rows = _rows(validated, "path", "sentence")
    found = {row["path"]: row["sentence"].strip() for row in rows if row["path"] in clips}
    if len(found) < _LEAST_FOUND * len(clips):
        raise DataError(
            f"'{validated}' has {len(found)} of the {len(clips)} clips that CoVoST 2 has translated; give release 4 of "
            "Common Voice (cv-corpus-4-2019-12-10)."
        )
    return found


def _rows(file: Path, *columns: str) -> Iterator[dict[str, str]]:
    """The rows of a TSV file as CoVoST's own script reads it: no quotes, a backslash before what it escapes."""
    files = SourceFiles(file) if file.name.endswith(".tar.gz") else SourceFiles(file.parent)
    name = file.name.removesuffix(".tar.gz")
    rows = csv.DictReader(files.lines(name), delimiter="\t", quoting=csv.QUOTE_NONE, escapechar="\\", restval="")
    try:
        for column in columns:
            if column not in (rows.fieldnames or ()):
                raise DataError(f"{files.where(name)} has no column '{column}'; download it again.")
        yield from rows
    except csv.Error as error:
        raise DataError(f"{files.where(name)}: row {rows.line_num} is none ({error}); download it again.") from error


CORPUS = Corpus(
    name="covost2",
    title="CoVoST 2",
    release="2, on Common Voice 4 (cv-corpus-4-2019-12-10)",
    licence="CC0-1.0",
    url="https://github.com/facebookresearch/covost",
    files="the folder with covost_v2.{language}_{target}.tsv or .tsv.tar.gz",
    read=read,
    beside={"common-voice": "the folder of Common Voice release 4, with {language}/validated.tsv and {language}/clips"},
)
