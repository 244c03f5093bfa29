"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from nemo_emmett.errors import ConfigError
from nemo_emmett.files import (
    check_writable,
    hold_folder,
    new_folder_elsewhere,
    shown,
    whole_file,
    whole_folder,
    write_text,
)

from .conftest import fill


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


# Folders


def test_a_folder_is_replaced_as_a_whole(umask: int, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    for text in ("old", "new"):
        with whole_folder(folder, last="config.json") as unfinished:
            (unfinished / "part").mkdir()
            for name in ("config.json", "part/config.json", "weights"):
                (unfinished / name).write_text(text)
            (unfinished / "weights").chmod(0o600)  # as a library does that writes to a temporary file
            assert text == "old" or (folder / "weights").read_text() == "old"
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    assert sorted(files) == ["config.json", "part/config.json", "weights"]
    assert {path.read_text() for path in files.values()} == {"new"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files.values()} == {0o666 & ~umask}


@pytest.mark.parametrize("failure", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_folder(failure: type[BaseException], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("old")
    (tmp_path / ".unfinished-by-a-killed-process").mkdir()
    with suppress(failure), whole_folder(tmp_path, last="config.json") as unfinished:
        (unfinished / "config.json").write_text("new")
        raise failure
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == "old"


def test_a_folder_cut_off_while_it_is_replaced_is_not_taken_for_whole(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "config.json").write_text("old")
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: replace(a, b) if "weights" in str(a) else sys.exit("killed"))
    with suppress(SystemExit), whole_folder(tmp_path, last="config.json") as unfinished:
        for name in ("config.json", "weights"):
            (unfinished / name).write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


def test_what_cannot_be_written_to_is_refused(tmp_path: Path, small_disk) -> None:
    (tmp_path / "file").touch()
    check_writable(tmp_path / "new" / "folder", "key", needed=1)
    assert not (tmp_path / "new").exists()
    for folder in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(ConfigError, match=rf"key: '{folder}' cannot be written to \(Not a directory\)"):
            check_writable(folder, "key")
    with pytest.raises(ConfigError, match=rf"'{tmp_path}' has .* free, and 1024\.0 TiB are needed"):
        check_writable(tmp_path, "key", needed=2**50)
    disk = small_disk("256k")
    check_writable(disk, "key", needed=200_000)
    fill(disk)
    with pytest.raises(ConfigError, match="No space left on device"):
        check_writable(disk / "folder", "key")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(ConfigError, match="Read-only file system"):
        check_writable(disk / "folder", "key")


def test_a_folder_elsewhere_is_tried_where_the_first_is_full(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "file").touch()
    (folder,) = new_folder_elsewhere("export", [tmp_path / "file"])
    assert folder.parent == tmp_path
    assert folder.is_dir()
    assert [shown(size) for size in (1023, 1536, 2**41)] == ["1023 B", "1.5 KiB", "2.0 TiB"]


HOLDER = """
import os, sys, time
from nemo_emmett.files import hold_folder
with hold_folder(sys.argv[1]):
    worker = os.fork()  # as a data loader's, which outlives a killed process for seconds
    if worker:
        print(worker, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """A process with a worker that has the folder ``held`` to itself."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "held")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        worker = int(process.stdout.readline())
        try:
            yield process
        finally:
            process.kill()
            os.kill(worker, signal.SIGKILL)


def test_a_folder_is_one_processs_alone_until_it_is_killed(holder: subprocess.Popen, tmp_path: Path) -> None:
    folder = tmp_path / "held"
    with pytest.raises(ConfigError, match=rf"export_dir: '{folder}' is in use by process {holder.pid} on \w+"):
        hold_folder(folder, "export_dir").__enter__()
    with pytest.raises(ConfigError, match="is in use by"), whole_folder(folder, last="config.json"):
        pass
    with hold_folder(tmp_path / "other"):
        holder.kill()
        holder.wait()
        with hold_folder(folder), hold_folder(folder):  # at once, though the worker lives
            (folder / "result").touch()
    assert [path.name for path in folder.iterdir()] == ["result"]
    assert not (tmp_path / "other").exists()  # nothing was written there
