"""What MkDocs needs to know of this repository, a hook of mkdocs.yml and an extension of griffe.

- ``nav`` may hold patterns, and pages that do not exist are left out of it.
- A link of a page to a file of the repository outside docs/ leads to that file, which becomes a part of the site.
- The pages of the API hold the public names of each package, which are read from its ``__init__.pyi``.
- In docstrings, roles of Sphinx become links or code.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]

SHOWN = {".md": "", ".py": "python", ".sh": "bash", ".toml": "toml", ".txt": "text", ".yaml": "yaml", ".yml": "yaml"}
"""Files that become a page of the site, with the language of their code; others are copied."""

LINK = re.compile(r"(?P<before>!?\[(?P<text>[^\]]*)\]\()(?P<target>[^)\s#:]+)(?P<anchor>#[^)\s]*)?\)")
FENCE = re.compile(r"^```.*?^```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)

MEMBERS = {
    "nemo_emmett.models": [
        *("translate", "generate", "translate_batch", "save_pretrained", "from_pretrained", "load_from_checkpoint")
    ],
}
"""Members of a package's classes that are for users, where the others are for Lightning and for other rooms."""

ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`(?P<short>~)?(?P<name>[\w.]+)`")


# The public names.


def public_names() -> dict[str, list[str]]:
    """The public names of each package of nemo_emmett, and of its errors, in alphabetical order."""
    listed = {".".join(path.parent.relative_to(ROOT).parts): path for path in ROOT.glob("nemo_emmett/**/__init__.pyi")}
    listed["nemo_emmett.errors"] = ROOT / "nemo_emmett" / "errors.py"
    return {package: sorted(_all_of(listed[package]), key=str.lower) for package in sorted(listed)}


def _all_of(path: Path) -> list[str]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__":
            return ast.literal_eval(node.value)
    raise ValueError(f"{path} has no __all__")


def _place_of(package: str, name: str) -> str:
    """Where a public name is found: ``nemo_emmett.models.load`` is also a module, which holds the function."""
    hidden = (ROOT / package.replace(".", "/") / f"{name}.py").exists()
    return f"{package}.{name}.{name}" if hidden else f"{package}.{name}"


def api_page(package: str, names: list[str]) -> str:
    """The page of a package: what its docstring begins with, and each public name as mkdocstrings renders it."""
    folder = ROOT / package.replace(".", "/")
    module = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    docstring = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8")))
    summary = without_roles((docstring or "").partition("\n\n")[0])
    members = "".join(f"        - {name}\n" for name in MEMBERS.get(package, ()))
    options = f"    options:\n      members:\n{members}" if members else ""
    blocks = [f"::: {_place_of(package, name)}\n{options}" for name in names]
    title = f"---\ntitle: {package.removeprefix('nemo_emmett.')}\n---\n"
    return "\n".join([title, f"# {package}\n", f"{summary}\n", *blocks])


# Pages and links.


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the API and the files that pages link to, and expand the patterns of ``nav``."""
    for package, names in public_names().items():
        content = api_page(package, names)
        files.append(File.generated(config, f"reference/api/{package}.md", content=content))
    waiting = [(f"docs/{file.src_uri}", file.content_string) for file in files.documentation_pages() if _is_text(file)]
    while waiting:
        origin, markdown = waiting.pop()
        for path in _outside(origin, markdown):
            name = f"files/{path}.md" if path.suffix in SHOWN else f"files/{path}"
            if files.get_file_from_path(name) is not None:
                continue
            if path.suffix not in SHOWN:
                files.append(File.generated(config, name, abs_src_path=str(ROOT / path)))
                continue
            text = (ROOT / path).read_text(encoding="utf-8")
            if path.suffix == ".md":
                waiting.append((str(path), text))
            else:
                text = f"# {path}\n\n````{SHOWN[path.suffix]}\n{text}\n````\n"
            files.append(File.generated(config, name, content=text))
    pages = [file.src_uri for file in files.documentation_pages()]
    config.nav = [entry for entry in (_expanded(entry, pages) for entry in config.nav) if entry]
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Rewrite links to files outside docs/."""
    here = page.file.src_uri
    origin = here.removesuffix(".md").removeprefix("files/") if here.startswith("files/") else f"docs/{here}"
    if here.startswith("files/") and not origin.endswith(".md"):
        return markdown  # code
    return rewritten(markdown, origin, here)


def rewritten(markdown: str, origin: str, here: str) -> str:
    """A page's text with its links to files of the repository as the site has them.

    Args:
        markdown: of the page.
        origin: its path in the repository.
        here: its path among the site's sources.
    """
    folder = str(PurePosixPath(here).parent)

    def link(match: re.Match) -> str:
        target = normpath(f"{PurePosixPath(origin).parent}/{match['target']}")
        if target.startswith("docs/"):
            there = target.removeprefix("docs/")
        elif (ROOT / target).is_dir():
            return f"{match['text']} (`{target}/` in the repository)"
        else:
            there = f"files/{target}.md" if PurePosixPath(target).suffix in SHOWN else f"files/{target}"
        return f"{match['before']}{relpath(there, folder)}{match['anchor'] or ''})"

    return _outside_code(markdown, lambda text: LINK.sub(link, text))


def _is_text(file: File) -> bool:
    return file.src_uri.endswith(".md")


def _outside(origin: str, markdown: str) -> Iterator[PurePosixPath]:
    """Files of the repository outside docs/ that a page links to; one that does not exist is left to MkDocs to find."""
    for match in LINK.finditer(FENCE.sub("", markdown)):
        target = normpath(f"{PurePosixPath(origin).parent}/{match['target']}")
        if not target.startswith(("docs/", "..")) and (ROOT / target).is_file():
            yield PurePosixPath(target)


def _outside_code(markdown: str, change: Any) -> str:
    """A text with what is not code changed."""
    parts, end = [], 0
    for code in FENCE.finditer(markdown):
        parts += [change(markdown[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, change(markdown[end:])])


def _expanded(entry: Any, pages: list[str]) -> Any:
    """An entry of ``nav`` with its patterns expanded, or None if no page is left."""
    if isinstance(entry, dict):
        ((title, members),) = entry.items()
        members = [page for member in members for page in _matching(member, pages)]
        return {title: members} if members else None
    return entry


def _matching(member: Any, pages: list[str]) -> list[Any]:
    if isinstance(member, dict):
        return [inner] if (inner := _expanded(member, pages)) else []
    return sorted(
        (page for page in pages if PurePosixPath(page).match(member)), key=lambda page: page.rpartition(".")[0]
    )


# Docstrings.


class Docstrings(griffe.Extension):
    """Docstrings in the Markdown that mkdocstrings renders."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite an object's docstring."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(docstring: str) -> str:
    """A docstring whose examples are a section of their own, and whose roles of Sphinx are code or links.

    Example:
        >>> as_markdown("In :func:`~nemo_emmett.config.check_keys`::")
        'In `check_keys`:'
    """
    docstring = re.sub(r"^(\s*)Example:$", r"\1Examples:", docstring, flags=re.MULTILINE)
    return without_roles(re.sub(r"::$", ":", docstring, flags=re.MULTILINE))


_PUBLIC = {f"{package}.{name}": _place_of(package, name) for package, names in public_names().items() for name in names}
"""The target of a link to each public name."""


def without_roles(text: str) -> str:
    """A text with the roles of Sphinx as code, or as links where the site has the name."""

    def code(match: re.Match) -> str:
        shown = match["name"].rpartition(".")[2] if match["short"] else match["name"]
        target = _PUBLIC.get(match["name"])
        return f"`{shown}`" if target is None else f"[`{shown}`][{target}]"

    return ROLE.sub(code, text)
