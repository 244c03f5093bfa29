"""The layout of MuST-C and mTEDx: talks, and a line for each segment in parallel files.

    en-de/data/train/wav/ted_767.wav    a whole talk; of mTEDx .flac
    en-de/data/train/txt/train.yaml     - {duration: 3.5, offset: 16.08, speaker_id: spk.767, wav: ted_767.wav, ...}
    en-de/data/train/txt/train.en       the transcript of each segment
    en-de/data/train/txt/train.de       its translation

Text is read as it is. In mTEDx the YAML file says .wav as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import yaml

from nemo_emmett.corpora.corpus import Skipped
from nemo_emmett.corpora.readers.files import SourceFiles
from nemo_emmett.corpora.readers.pairs import Segment, need, need_folder
from nemo_emmett.errors import DataError


@dataclass(frozen=True)
class TalksOfPair:
    """One split of one language pair."""

    folder: Path  # en-de/data/train
    spoken: str  # the language of the talks
    target: str  # of the translations; the same as ``spoken`` where there are transcripts alone

    def check(self, where_from: str) -> None:
        """Raise DataError, naming ``where_from``, if one of its files is missing."""
        for path in (*map(self._file, ("yaml", self.spoken, self.target)), self.folder / "wav"):
            need(path, f"a part of {self.spoken}-{self.target}; get it from {where_from}")

    def rows(self) -> Iterator[tuple[Segment, dict[str, str]] | Skipped]:
        """The segments with their transcript and translation by language, or their cause, in the publisher's order.

        Raises:
            DataError: if a file cannot be read, or the parallel files are not equally long.
        """
        segments = self._read_segments()
        texts = {}
        for language in (self.spoken, self.target):
            path = self._file(language)
            texts[language] = [line.strip() for line in SourceFiles(path.parent).lines(path.name)]
            if len(texts[language]) != len(segments):
                raise DataError(
                    f"'{path}' has {len(texts[language])} lines, but '{self._file('yaml')}' has {len(segments)} "
                    "segments; unpack the archive of the pair again."
                )
        for number, segment in enumerate(segments):
            if isinstance(segment, Skipped):
                yield segment
            else:
                yield segment, {language: lines[number] for language, lines in texts.items()}

    def _file(self, ending: str) -> Path:
        return self.folder / "txt" / f"{self.folder.name}.{ending}"

    def _read_segments(self) -> list[Segment | Skipped]:
        path = self._file("yaml")
        try:
            entries = _yaml(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):  # of a bad line; each entry is one line
            lines = [line for line in SourceFiles(path.parent).lines(path.name) if line.strip()]
            entries = [_entry(line) for line in lines]
        if not isinstance(entries, list) or not any(isinstance(entry, dict) for entry in entries):
            raise DataError(f"'{path}' is no list of segments; unpack the archive of the pair again.")
        segments: list[Segment | Skipped] = []
        for entry in entries:
            try:
                end = entry["offset"] + entry["duration"]
                segments.append(Segment.of(PurePath(entry["wav"]).stem, entry["offset"], end))
            except (KeyError, TypeError):
                segments.append(Skipped("segment without its times"))
        return segments


def _yaml(text: str) -> Any:
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def _entry(line: str) -> Any:
    """The single entry of a list in one line; None if the line contains something else."""
    try:
        (entry,) = _yaml(line)
    except (yaml.YAMLError, ValueError, TypeError):
        return None
    return entry


def data_folders(source: Path) -> dict[tuple[str, str], Path]:
    """The data folder of each pair (spoken, target) below ``source``: ``en-de/data``.

    Raises:
        DataError: if there is none.
    """
    what = "the folders of language pairs (en-de/data/...)"
    folders = {
        tuple(folder.parent.name.split("-")): folder
        for folder in sorted(need_folder(source, what).glob("*-*/data"))
        if folder.parent.name.count("-") == 1
    }
    if not folders:
        raise DataError(f"'{source}' does not hold {what}; give the folder that the archives were unpacked in.")
    return folders
