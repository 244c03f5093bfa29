"""The rows of tab-separated files, split as the scripts of the field write them.

There are no quoted cells: a quotation mark is text. The scripts of CoVoST 2 and fairseq write a backslash before tabs,
quotation marks and backslashes; Common Voice writes all of them as they are.
"""

from __future__ import annotations

import re

KNOWN_COLUMNS = {
    "audio": ("audio", "path", "audio_filepath", "audio_path", "file_name", "file", "wav"),
    "source": ("source", "sentence", "src_text", "transcript", "transcription"),
    "target": ("target", "translation", "tgt_text"),
    "id": ("id",),
    "duration": ("duration",),
    "offset": ("offset",),
    "source_lang": ("source_lang", "src_lang"),
    "target_lang": ("target_lang", "tgt_lang"),
}
"""Names that the field's TSV files have for each of them (CoVoST 2, Common Voice, fairseq, NeMo)."""

_TAB = re.compile(r"(?<!\\)\t")
_ESCAPED = re.compile(r'\\([\\"\t])')


def split_row(line: str, width: int | None) -> list[str]:
    r"""The cells of a row, without escapes.

    Args:
        line: without its line end.
        width: number of columns, where it is known. A row that has another number is split again at the tabs that have
            no backslash before them, and may still have another number.

    Example:
        >>> split_row("a\\\tb\tc \\\"d\\\"", 2)
        ['a\tb', 'c "d"']
    """
    cells = line.split("\t")
    if width is not None and len(cells) != width:
        cells = _TAB.split(line)
    return [_ESCAPED.sub(r"\1", cell) if "\\" in cell else cell for cell in cells]
