"""Records that were read and skipped while an index was built, kept so that they can be reported again."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence

from nemo_emmett.data.io.skipped_records import SkippedRecords

_FILE, _NAME = "\x01", "\x02"
"""Stand for the number of a file of the shard between two of them, and for the name of the source."""


class Recorder(SkippedRecords):
    """Keeps the calls that readers make, instead of counting them."""

    def __init__(self) -> None:
        super().__init__()
        self.clear()

    def __reduce__(self) -> tuple:
        return Recorder, ()

    def clear(self) -> None:
        """Forget all."""
        self.reads: Counter[str] = Counter()
        self.skips: list[tuple[str, str, str, str, str, str]] = []

    def read(self, source: str, records: int = 1) -> None:
        """See :meth:`SkippedRecords.read`."""
        self.reads[str(source)] += records

    def add(
        self, source: str, place: str, cause: str, record: tuple[str, str] | None = None, example: str = ""
    ) -> None:
        """See :meth:`SkippedRecords.add`."""
        source, place = str(source), str(place)
        of_record = (source, place) if record is None else tuple(map(str, record))
        self.skips.append((source, place, str(cause), *of_record, str(example)))


class Names:
    """Writes texts that contain the names of a shard's files, or of its source, so that data can be moved.

    Args:
        files: of the shard.
        source: name of the source.
    """

    def __init__(self, files: Sequence[str], source: str) -> None:
        self.codes = {path: f"{_FILE}{number}{_FILE}" for number, path in enumerate(files)}
        self.codes.setdefault(source, _NAME)

    def encode(self, text: str) -> str | list[str]:
        """A text with codes for names; in a list if it has none, since it contains codes itself."""
        if _FILE in text or _NAME in text:
            return [text]
        for name, code in self.codes.items():
            text = text.replace(name, code)
        return text

    def decode(self, text: str | list[str]) -> str:
        """The text that was encoded."""
        if isinstance(text, list):
            return text[0]
        if _FILE in text or _NAME in text:
            for name, code in self.codes.items():
                text = text.replace(code, name)
        return text


def encode_skips(skips: Sequence[Sequence[str]], names: Names) -> bytes:
    """Skipped records as lines of JSON; what repeats in a line is left out."""
    lines = []
    for source, place, cause, of_source, of_place, example in skips:
        of_record = [] if (source, place) == (of_source, of_place) and not example else [of_source, of_place, example]
        fields = [names.encode(text) for text in (source, place, cause, *of_record)]
        lines.append(json.dumps(fields, separators=(",", ":")) + "\n")
    return "".join(lines).encode()


def decode_skips(lines: bytes, names: Names) -> Iterator[list[str]]:
    """The arguments of :meth:`Recorder.add` for each skipped record, without the defaults; in the order of reading."""
    for line in lines.splitlines():
        yield [names.decode(text) for text in json.loads(line)]
