"""The layout of MuST-C, which mTEDx took over: talks, and a line for each segment in parallel files.

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

import yaml
from lhotse.serialization import load_yaml

from nemo_emmett.corpora.corpus import is_time
from nemo_emmett.corpora.readers.files import SourceFiles
from nemo_emmett.corpora.readers.pairs import Segment, need, need_folder
from nemo_emmett.errors import DataError


@dataclass(frozen=True)
class TalksOfPair:
    """One split of one language pair.

    Args:
        folder: ``en-de/data/train``.
        spoken: the language of the talks.
        target: of the translations; the same as ``spoken`` where there are transcripts alone.
    """

    folder: Path
    spoken: str
    target: str

    def check(self, where_from: str) -> None:
        """Raise DataError, naming ``where_from``, if one of its files is missing."""
        for path in (self._segments, self._text(self.spoken), self._text(self.target), self.folder / "wav"):
            need(path, f"a part of {self.spoken}-{self.target}; get it from {where_from}")

    def rows(self) -> Iterator[tuple[Segment, dict[str, str]]]:
        """Its segments, with transcript and translation by language, in the publisher's order.

        Raises:
            DataError: if a file cannot be read, or the parallel files are not equally long.
        """
        segments = self._read_segments()
        texts = {language: self._read_text(language) for language in (self.spoken, self.target)}
        for language, lines in texts.items():
            if len(lines) != len(segments):
                raise DataError(
                    f"'{self._text(language)}' has {len(lines)} lines, but '{self._segments}' has {len(segments)} "
                    "segments; unpack the archive of the pair again."
                )
        for number, segment in enumerate(segments):
            yield segment, {language: lines[number] for language, lines in texts.items()}

    @property
    def _segments(self) -> Path:
        return self.folder / "txt" / f"{self.folder.name}.yaml"

    def _text(self, language: str) -> Path:
        return self.folder / "txt" / f"{self.folder.name}.{language}"

    def _read_text(self, language: str) -> list[str]:
        path = self._text(language)
        return [line.strip() for line in SourceFiles(path.parent).lines(path.name)]

    def _read_segments(self) -> list[Segment]:
        try:
            return [
                Segment(PurePath(entry["wav"]).stem, entry["offset"], _end(entry["offset"], entry["duration"]))
                for entry in load_yaml(self._segments)
            ]
        except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else "is no list of segments"
            raise DataError(f"'{self._segments}' {what}; unpack the archive of the pair again.") from error


def _end(offset: object, duration: object) -> float | None:
    """Where a segment ends, in seconds; None if it is not said in numbers."""
    return offset + duration if is_time(offset) and is_time(duration) else None


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
