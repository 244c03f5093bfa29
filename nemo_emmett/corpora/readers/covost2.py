"""CoVoST 2: translations of Common Voice (Wang et al., 2021), from 21 languages into English and from English into 15.

    SOURCE/covost_v2.en_de.tsv                 path, translation, split; or covost_v2.en_de.tsv.tar.gz as downloaded
    SOURCE/covost_v2.en_de.{split}.tsv         path, sentence, translation, client_id: what its ``get_covost_splits.py``
                                               makes of it; read where the former is not there
    --common-voice/en/validated.tsv, clips/    release 4 (cv-corpus-4-2019-12-10): the transcripts and recordings

Clips are joined by their names; rows whose columns are not those of the header, clips without a transcript, and the
like are skipped and counted. The training split is CoVoST's, which extends that of Common Voice (``train`` and
``train_covost`` in the column). What is translated into several languages is one recording with all translations.

lhotse's ``prepare_commonvoice`` reads Common Voice's own splits, and decodes every clip for its duration.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from nemo_emmett.corpora.corpus import Corpus, Part, Recording, Selection, Sentence, Skipped
from nemo_emmett.corpora.readers.files import WRONG_COLUMNS, SourceFiles
from nemo_emmett.corpora.readers.languages import chosen, iso_code
from nemo_emmett.corpora.readers.pairs import need, need_folder, wanted_pairs
from nemo_emmett.data.io.rows import split_row
from nemo_emmett.errors import ConfigError, DataError

_SPLITS = ("train", "dev", "test")
_IN_COLUMN = {"train": {"train", "train_covost"}, "dev": {"dev"}, "test": {"test"}}
_FILE = re.compile(r"covost_v2\.(?P<spoken>[\w-]+)_(?P<target>[\w-]+?)(\.(train|dev|test))?\.tsv(\.tar\.gz)?")
_LEAST_FOUND = 0.5
"""Smallest share of the clips in validated.tsv; later releases of Common Voice lack a few, other languages all."""


def read(source: Path, selection: Selection) -> Sequence[Part]:
    """The parts of CoVoST 2: a split of a spoken language, with its translations.

    Args:
        source: the folder of CoVoST's TSV files.
        selection: splits are called ``train``, ``dev``, ``test``; ``extra_sources["common-voice"]`` is the
            folder of Common Voice's languages.

    Raises:
        ConfigError: if a language or split is not there, or Common Voice is not named.
        DataError: if a file of the selection is missing.
    """
    codes = _pairs(source)
    common_voice = selection.extra_sources.get("common-voice")
    if common_voice is None:
        raise ConfigError(f"{CORPUS.title} needs --common-voice: {CORPUS.extra_sources['common-voice']}.")
    pairs = wanted_pairs(codes, selection.languages, CORPUS.title)
    parts = []
    for split in chosen(selection.splits, _SPLITS, f"splits of {CORPUS.title}"):
        for spoken, targets in pairs.items():
            files = {target: _translations_file(source, codes[spoken, target], split) for target in targets}
            language = codes[spoken, targets[0]][0]
            what = f"Common Voice release 4 in '{language}', unpacked (https://commonvoice.mozilla.org/datasets)"
            need(common_voice / language / "validated.tsv", f"the transcripts of {what}")
            clips = need(common_voice / language / "clips", f"the recordings of {what}")
            sentences = partial(_sentences, files, clips, split, spoken)
            parts.append(Part(split, (spoken, *targets), sentences, spoken=spoken))
    return parts


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


def _sentences(files: Mapping[str, Path], clips: Path, split: str, spoken: str) -> Iterator[Sentence | Skipped]:
    texts: dict[str, dict[str, str]] = {}
    for target, file in files.items():
        for _, row in _rows(file, "path", "translation"):
            cause = WRONG_COLUMNS if row is None else _fault(row, split)
            if cause is None and target in texts.setdefault(row["path"], {}):
                cause = "clip occurs twice"
            if cause is None:
                texts[row["path"]][target] = row["translation"].strip()
            elif cause != _OF_ANOTHER_SPLIT:
                yield Skipped(cause)
    transcripts = _transcripts(clips.parent / "validated.tsv", texts)
    for clip in sorted(texts):
        if (transcript := transcripts.get(clip)) is not None:
            yield Sentence(Path(clip).stem, {spoken: transcript, **texts[clip]}, Recording(clips / clip))
        else:
            yield Skipped(f"transcript: {WRONG_COLUMNS}" if clip in transcripts else "clip without a transcript")


_OF_ANOTHER_SPLIT = "of another split"


def _fault(row: Mapping[str, str], split: str) -> str | None:
    """The cause for which a row of CoVoST is not in a split."""
    if not row["path"]:
        return "row without a clip"
    if "split" not in row or row["split"] in _IN_COLUMN[split]:
        return None
    of = row["split"].removesuffix("_covost")
    if of not in _SPLITS:
        return "unknown split"
    return "not in CoVoST's own split" if of == split else _OF_ANOTHER_SPLIT


def _transcripts(validated: Path, clips: Mapping[str, object]) -> dict[str, str | None]:
    """The transcripts of clips; None if the row has too many or too few columns, so that the text may be incomplete."""
    found: dict[str, str | None] = {}
    for cells, row in _rows(validated, "path", "sentence"):
        if row is None or not all(row.get(votes, "").isdecimal() or not row.get(votes) for votes in _VOTES):
            for clip in clips.keys() & set(cells):
                found.setdefault(clip, None)
        elif row["path"] in clips and found.get(row["path"]) is None:
            found[row["path"]] = row["sentence"].strip()
    if len(found) < _LEAST_FOUND * len(clips):
        raise DataError(
            f"'{validated}' has {len(found)} of the {len(clips)} clips that CoVoST 2 has translated; give release 4 of "
            "Common Voice (cv-corpus-4-2019-12-10)."
        )
    return found


_VOTES = ("up_votes", "down_votes")
"""Columns of numbers after the sentence: other values show that columns are shifted."""


def _rows(file: Path, *columns: str) -> Iterator[tuple[list[str], dict[str, str] | None]]:
    """The cells of each row of a TSV file, and its values by column; None where their number is not the header's."""
    files = SourceFiles(file) if file.name.endswith(".tar.gz") else SourceFiles(file.parent)
    name = file.name.removesuffix(".tar.gz")
    lines = files.lines(name)
    header = next(lines, "").split("\t")
    for column in columns:
        if column not in header:
            raise DataError(f"{files.where(name)} has no column '{column}'; download it again.")
    for line in lines:
        cells = split_row(line, len(header))
        yield cells, dict(zip(header, cells, strict=True)) if len(cells) == len(header) else None


CORPUS = Corpus(
    name="covost2",
    title="CoVoST 2",
    release="2, on Common Voice 4 (cv-corpus-4-2019-12-10)",
    licence="CC0-1.0",
    url="https://github.com/facebookresearch/covost",
    files="the folder with covost_v2.{language}_{target}.tsv or .tsv.tar.gz",
    read=read,
    extra_sources={
        "common-voice": "the folder of Common Voice release 4, with {language}/validated.tsv and {language}/clips"
    },
)
