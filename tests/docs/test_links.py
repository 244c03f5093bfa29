"""Links of README.md and docs/ lead somewhere, in the repository and on the site."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.docs.pages import PAGES, ROOT, anchors_of, links_of
from tools.docs_site import api_page, as_markdown, public_names, rewritten


def dead_links(page: Path) -> list[str]:
    """The relative links of a page whose file or heading does not exist."""
    dead = []
    for link in links_of(page):
        path, _, anchor = unquote(link).partition("#")
        if "://" in link or link.startswith("mailto:"):
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors_of(target)):
            dead.append(link)
    return dead


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    assert dead_links(page) == []


def test_a_dead_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# Other\n\n## The `model` section\n\n```\n# no heading\n```\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n[a](other.md) [b](gone.md) [c](other.md#the-model-section) [`d`](other.md#no-heading) [e](#page)\n"
        "[f](#gone) [g](https://nowhere.invalid/x) `[h](code.md)` ![i](gone.svg)\n```\n[j](code.md)\n```\n"
    )
    assert dead_links(page) == ["gone.md", "other.md#no-heading", "#gone", "gone.svg"]


@pytest.mark.parametrize(
    ("origin", "here", "link", "on_site"),
    [
        ("docs/data.md", "data.md", "training.md#x", "training.md#x"),
        ("docs/how-to/errors.md", "how-to/errors.md", "../data.md", "../data.md"),
        ("docs/data.md", "data.md", "../conf/salm_t5.yaml", "files/conf/salm_t5.yaml.md"),
        ("docs/how-to/a.md", "how-to/a.md", "../../CONTRIBUTING.md#x", "../files/CONTRIBUTING.md.md#x"),
        ("CONTRIBUTING.md", "files/CONTRIBUTING.md.md", "docs/data.md#x", "../data.md#x"),
        ("docs/data.md", "data.md", "../benchmarks/results/loss.json", "files/benchmarks/results/loss.json"),
        ("docs/data.md", "data.md", "../README.md#x", "files/README.md.md#x"),
    ],
)
def test_links_to_files_of_the_repository_lead_to_their_copies(origin: str, here: str, link: str, on_site: str) -> None:
    assert rewritten(f"see [it]({link}).", origin, here) == f"see [it]({on_site})."


def test_other_links_stay_and_folders_become_text() -> None:
    same = "[a](https://x.org/y) [b](#here) `[c](../conf/x.yaml)`\n```\n[d](../conf/x.yaml)\n```\n"
    assert rewritten(same, "docs/data.md", "data.md") == same
    assert rewritten("[e](../examples)", "docs/data.md", "data.md") == "e (`examples/` in the repository)"


def test_roles_in_docstrings_become_links_or_code() -> None:
    roles = "See :class:`~nemo_emmett.callbacks.OOMptimizer` and :func:`nemo_emmett.config.check_keys`, as in::"
    assert as_markdown(f"{roles}\n\nExample:\n") == (
        "See [`OOMptimizer`][nemo_emmett.callbacks.OOMptimizer] and `nemo_emmett.config.check_keys`, as in:\n\n"
        "Examples:\n"
    )


def test_every_public_name_exists() -> None:
    names = public_names()
    assert {"nemo_emmett.callbacks", "nemo_emmett.data", "nemo_emmett.evaluation", "nemo_emmett.models"} <= names.keys()
    for package, public in names.items():
        module = importlib.import_module(package)
        assert sorted(module.__all__, key=str.lower) == public
        missing = [name for name in public if not hasattr(module, name)]
        assert missing == []
        places = re.findall(r"^::: (\S+)$", api_page(package, public), re.MULTILINE)
        assert [place.rpartition(".")[2] for place in places] == public
