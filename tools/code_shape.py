"""Prints the shape of a Python package: sizes of functions and modules, comments, and counts of words to avoid.

    python tools/code_shape.py                                  # nemo_emmett/, README.md and docs/ of this checkout
    python tools/code_shape.py OTHER/nemo_emmett [more ...]     # one column for each package
    python tools/code_shape.py --words ledger anew              # these words alone

A word with ``*`` counts as a prefix. Words are counted in the package (Python, YAML, templates) and in the README and
docs next to it.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import statistics
import tokenize
from collections import Counter
from pathlib import Path

MAX_MODULE_LINES = 500

SHORT_FUNCTION_LINES = 6
"""A private function of up to so many lines that is used once is a candidate for inlining."""

WORDS = (
    *("ledger", "anew", "stand", "stands", "tell", "tells", "told", "beside", "stranger*", "farewell", "departure"),
    *("silence*", "silent word*", "promise*", "meets", "homeless", "hears", "heard", "ears", "knows", "speaks"),
    *("without a word", "leaves word", "in one word", "in its own words", "handed on", "hand on", "lies", "lends"),
    *("claims", "holder", "put back", "stand-in", "stretch*", "touchstone", "goes by", "is asked for", "nobody"),
    *("somebody", "for want of", "what is there", "there already"),
)
"""Metaphors and phrases for which the field has a term."""


def main() -> None:
    """Print a table with one column for each package."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = [Path(__file__).parents[1] / "nemo_emmett"]
    parser.add_argument("packages", nargs="*", type=Path, default=default, help="folders of packages")
    parser.add_argument("--words", nargs="+", default=WORDS, help="words to count; word* counts as a prefix")
    options = parser.parse_args()
    columns = [shape(folder) | word_counts(folder, options.words) for folder in options.packages]
    width = max(len(row) for row in columns[0])
    for row in columns[0]:
        print(f"{row:<{width}}", *(f"{column[row]:>10}" for column in columns))  # noqa: T201


def shape(folder: Path) -> dict[str, str]:
    """Counts over all modules of a package."""
    lines: Counter[str] = Counter()
    lengths, used_once, long_modules = [], [], []
    for path in sorted(folder.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
        names = Counter(token.string for token in tokens if token.type == tokenize.NAME)
        lines["all"] += text.count("\n")
        lines["non-blank"] += sum(bool(line.strip()) for line in text.splitlines())
        lines["comment"] += sum(t.type == tokenize.COMMENT and not t.line[: t.start[1]].strip() for t in tokens)
        lines["trailing comment"] += sum(
            t.type == tokenize.COMMENT and bool(t.line[: t.start[1]].strip()) for t in tokens
        )
        if text.count("\n") > MAX_MODULE_LINES:
            long_modules.append(path.relative_to(folder))
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = node.end_lineno - node.lineno + 1
                lengths.append(length)
                private = node.name.startswith("_") and not node.name.endswith("__")
                if private and names[node.name] == 2:  # its definition and one use
                    used_once.append(length)
    return {
        "lines": f"{lines['all']:,}",
        "non-blank lines": f"{lines['non-blank']:,}",
        "functions": f"{len(lengths):,}",
        "functions per 1,000 lines": f"{1000 * len(lengths) / lines['all']:.1f}",
        "mean lines of a function": f"{statistics.fmean(lengths):.1f}",
        "median lines of a function": f"{statistics.median(lengths):.0f}",
        "private functions used once": f"{len(used_once):,}",
        f"... of up to {SHORT_FUNCTION_LINES} lines": f"{sum(n <= SHORT_FUNCTION_LINES for n in used_once):,}",
        "comment lines, % of lines": f"{100 * lines['comment'] / lines['all']:.2f}",
        "with trailing comments, %": f"{100 * (lines['comment'] + lines['trailing comment']) / lines['all']:.2f}",
        f"modules over {MAX_MODULE_LINES} lines": f"{len(long_modules)}",
    }


def word_counts(folder: Path, words: tuple[str, ...] | list[str]) -> dict[str, str]:
    """How often each word occurs in the package, and in the README and docs next to it."""
    files = [path for path in folder.rglob("*") if path.suffix in (".py", ".pyi", ".yaml", ".j2")]
    files += [folder.parent / "README.md", *(folder.parent / "docs").glob("*.md")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(files) if path.is_file()).lower()
    patterns = {word: re.escape(word).replace(r"\*", r"\w*").replace(r"\ ", r"\s+") for word in words}
    found = {f"'{word}'": len(re.findall(rf"(?<![\w-]){pattern}(?![\w-])", text)) for word, pattern in patterns.items()}
    return {"all words below": str(sum(found.values())), **{word: str(count) for word, count in found.items()}}


if __name__ == "__main__":
    main()
