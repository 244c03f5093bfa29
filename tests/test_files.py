"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from nemo_emmett.files import whole_file, write_text


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


def test_a_text_is_written_with_its_folders(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b.txt", "zwei\nZeilen ü\n")
    assert (tmp_path / "a" / "b.txt").read_bytes() == "zwei\nZeilen ü\n".encode()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.txt"]


def test_until_the_block_ends_the_old_file_stands(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with whole_file(path) as unfinished:
        unfinished.write_text("new")
        assert path.read_text() == "old"
        assert unfinished.suffix == ".txt"
    assert path.read_text() == "new"


@pytest.mark.parametrize("failure", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_nothing_else(failure: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with suppress(failure), whole_file(path) as unfinished:
        unfinished.write_text("half of the n")
        raise failure
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_who_write_one_file_do_not_write_into_one_another(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with whole_file(path) as one, whole_file(path) as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"  # whose block ended last


def test_the_unfinished_file_lies_where_it_is_told_to(tmp_path: Path) -> None:
    with whole_file(tmp_path / "out" / "a.wav", tmp_path / "aside") as unfinished:
        assert unfinished.parent == tmp_path / "aside"
        unfinished.write_bytes(b"RIFF")
    assert (tmp_path / "out" / "a.wav").read_bytes() == b"RIFF"
    assert not list((tmp_path / "aside").iterdir())


def test_a_file_is_for_all_whom_the_umask_admits(umask: int, tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "a")
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o666 & ~umask


def test_it_imports_no_torch() -> None:
    code = "import sys, nemo_emmett.files; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
