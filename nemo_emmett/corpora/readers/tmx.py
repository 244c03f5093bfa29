"""TMX (Translation Memory eXchange), unit by unit: the files are larger than memory, and not all are well-formed.

An XML parser stops at the first character that XML forbids, of which crawled text has many. Hence the text between
``<tu>`` and ``</tu>`` is cut out first and parsed by itself: a unit that is not well-formed costs no other.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator
from typing import BinaryIO
from xml.etree import ElementTree

from nemo_emmett.corpora.corpus import Skipped

_CHARACTERS = 1 << 20
"""Read at once."""

_START = re.compile(r"<tu(?=[\s/>])|<!--")
_END = re.compile(r"</tu\s*>|<tu(?=[\s/>])")
_DECLARED = re.compile(rb"""^\s*<\?xml[^>]*?encoding\s*=\s*["']([\w.-]+)""")


def read_units(stream: BinaryIO) -> Iterator[ElementTree.Element | Skipped]:
    """The ``<tu>`` elements of a TMX file, and the causes of those that cannot be parsed, in the order of the file.

    Raises:
        LookupError: if the file declares an encoding that does not exist.
        UnicodeDecodeError: if it is in UTF-16, and damaged.
    """
    for unit in _cut_out(_as_text(stream)):
        if unit is None:
            yield Skipped("unit without its end")
            continue
        try:
            yield ElementTree.fromstring(unit)
        except UnicodeEncodeError:  # bytes that could not be decoded
            yield Skipped("not UTF-8")
        except ElementTree.ParseError:
            yield Skipped("not well-formed XML")


def _as_text(stream: BinaryIO) -> io.TextIOWrapper:
    buffered = io.BufferedReader(stream)  # type: ignore[arg-type]
    head = buffered.peek(1024)[:1024]
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return io.TextIOWrapper(buffered, encoding="utf-16", newline="")
    declared = _DECLARED.match(head)
    encoding = "utf-8" if declared is None else declared[1].decode()
    return io.TextIOWrapper(buffered, encoding=encoding, errors="surrogateescape", newline="")


def _cut_out(text: io.TextIOWrapper) -> Iterator[str | None]:
    """The units as they stand in the text; None for one that ends with the file or where the next begins."""
    buffer, place = "", 0

    def fill() -> bool:
        nonlocal buffer, place
        more = text.read(_CHARACTERS)
        buffer, place = buffer[place:] + more, 0
        return bool(more)

    while True:
        start = _START.search(buffer, place)
        if start is None:
            place = max(place, len(buffer) - len("<!--"))  # which may be cut in two
            if not fill():
                return
            continue
        place = start.start()
        if start[0] == "<!--":
            while (end := buffer.find("-->", place)) < 0:
                if not fill():
                    return
            place = end + len("-->")
            continue
        while (end := _end_of_unit(buffer, place)) is None:
            if not fill():
                yield None
                return
        is_whole, place_after = end
        yield buffer[place:place_after] if is_whole else None
        place = place_after


def _end_of_unit(buffer: str, start: int) -> tuple[bool, int] | None:
    """Whether the unit that begins at ``start`` has an end, and where to go on; None if the buffer ends before."""
    tag_end = buffer.find(">", start)
    if tag_end > 0 and buffer[tag_end - 1] == "/":
        return True, tag_end + 1
    end = _END.search(buffer, start + 1)
    if end is None:
        return None
    return (True, end.end()) if end[0].startswith("</") else (False, end.start())
