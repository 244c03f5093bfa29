"""Each corpus, cut off at random moments and begun again: the bytes of an undisturbed run."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from nemo_emmett.corpora import Selection, find_corpus, prepare_corpus
from nemo_emmett.corpora.registry import CORPORA
from tests.corpora import layouts, speech_layouts

LANGUAGES = ("en", "de", "es")


def fleurs(folder: Path) -> tuple[Path, dict[str, Path]]:
    speech_layouts.make_fleurs(folder / "fleurs", LANGUAGES)
    return folder / "fleurs", {"flores": speech_layouts.make_flores(folder / "flores")}


def covost2(folder: Path) -> tuple[Path, dict[str, Path]]:
    speech_layouts.make_covost2(folder / "covost", folder / "cv")
    return folder / "covost", {"common-voice": folder / "cv"}


def must_c(folder: Path) -> tuple[Path, dict[str, Path]]:
    speech_layouts.make_must_c(folder / "must_c")
    return folder / "must_c", {}


def mtedx(folder: Path) -> tuple[Path, dict[str, Path]]:
    speech_layouts.make_mtedx(folder / "mtedx")
    return folder / "mtedx", {}


SOURCES: dict[str, Callable[[Path], tuple[Path, dict[str, Path]]]] = {
    "flores": lambda folder: (layouts.flores200(folder / "flores"), {}),
    "fleurs": fleurs,
    "covost2": covost2,
    "europarl_st": lambda folder: (speech_layouts.make_europarl_st(folder), {}),
    "must_c": must_c,
    "mtedx": mtedx,
    "multi30k": lambda folder: (layouts.multi30k(folder / "multi30k"), {}),
    "opus": lambda folder: (layouts.opus_moses(folder / "opus"), {}),
    "tatoeba": lambda folder: (layouts.tatoeba_by_language(folder / "tatoeba"), {}),
}


class Interrupted(BaseException):
    """The process is interrupted; not an error that a program may handle."""


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_corpus_is_tested():
    assert SOURCES.keys() == CORPORA.keys()


@pytest.mark.parametrize("name", SOURCES)
def test_cut_off_at_random_moments_it_goes_on_to_the_same_bytes(name: str, tmp_path: Path, monkeypatch) -> None:
    source, extra_sources = SOURCES[name](tmp_path)
    corpus, out = find_corpus(name), tmp_path / "out"
    audio = {"audio": "tar", "shard_size": 4} if name in ("fleurs", "covost2", "europarl_st", "must_c", "mtedx") else {}

    def prepare() -> None:
        prepare_corpus(
            corpus,
            source,
            out,
            selection=Selection(extra_sources=extra_sources),
            num_jobs=1,
            show_progress=False,
            **audio,
        )

    replace, draw = os.replace, random.Random(name)
    writes_left = 0

    def stop_when_none_is_left(*names) -> None:
        nonlocal writes_left
        if writes_left == 0:
            raise Interrupted
        writes_left -= 1
        replace(*names)

    monkeypatch.setattr(os, "replace", stop_when_none_is_left)
    writes_left = enough = 10_000
    prepare()
    whole, writes = tree(out), enough - writes_left

    for _ in range(3):
        shutil.rmtree(out)
        for moment in (draw.randrange(writes), draw.randrange(writes)):
            writes_left = moment
            with suppress(Interrupted):  # the second time there may be enough
                prepare()
        writes_left = enough
        prepare()
        assert tree(out) == whole
