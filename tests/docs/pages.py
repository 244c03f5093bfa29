"""The pages of README.md and docs/, and what is in them: headings, links and blocks of code."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown.extensions.toc import slugify

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
GENERATED = ROOT / "docs" / "reference"
"""Written by tools/reference.py, whose test compares it with the code."""

_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL
)
_MARKER = re.compile(r"<!-- (?P<extent>not run|run in part): (?P<reason>[^\n]+?) -->\s*\Z")
_HEADING = re.compile(r"^(#+) (.+?)#*$", re.MULTILINE)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A block of code.

    Args:
        page: that it is on.
        line: its first line there, from 1.
        language: behind the fence; empty if there is none.
        text: the code.
        reason: why it is not run, or not all of it, if a comment before it says so.
        in_part: whether what can be run is run.
        output_of: the line of the block right before it, which is nothing but white space away.
    """

    page: Path
    line: int
    language: str
    text: str
    reason: str | None
    in_part: bool
    output_of: int | None

    @property
    def name(self) -> str:
        """For the test's name."""
        return f"{os.path.relpath(self.page, ROOT)}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    """All blocks of code of a page."""
    content = page.read_text(encoding="utf-8")
    end, last = 0, None
    for match in _FENCE.finditer(content):
        between = content[end : match.start()]
        marker = _MARKER.search(between)
        indent = len(match["indent"])
        text = "".join(line[indent:] for line in match["text"].splitlines(keepends=True))
        line = content.count("\n", 0, match.start()) + 2
        reason, in_part = (marker["reason"], marker["extent"] != "not run") if marker else (None, False)
        output_of = None if between.strip() else last
        yield Block(page, line, match["language"], text, reason, in_part, output_of)
        end, last = match.end(), line


def without_code(page: Path) -> str:
    """A page's text without its blocks of code and its code in lines."""
    content = _FENCE.sub("", page.read_text(encoding="utf-8"))
    return re.sub(r"`[^`\n]*`(?!\])", "", content)


def anchors_of(page: Path, levels: tuple[int, ...] = (1, 2, 3, 4, 5, 6)) -> set[str]:
    """The anchors of a page's headings."""
    content = _FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = [match[2] for match in _HEADING.finditer(content) if len(match[1]) in levels]
    return {slugify(re.sub(r"[`*]|\]\([^)]*\)|\[", "", heading).strip(), "-") for heading in headings}


def links_of(page: Path) -> list[str]:
    """The targets of a page's links and pictures."""
    return _LINK.findall(without_code(page)) + re.findall(r'(?:src|href)="([^"]+)"', without_code(page))
