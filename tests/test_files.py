"""Atomic writes, and locks on folders."""

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
    atomic_file,
    atomic_folder,
    check_writable,
    hold_folder,
    new_folder_elsewhere,
    shown,
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


def test_the_old_file_stays_until_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.suffix == ".txt"
    assert path.read_text() == "new"


@pytest.mark.parametrize("failure", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_nothing_else(failure: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with suppress(failure), atomic_file(path) as temporary:
        temporary.write_text("half of the n")
        raise failure
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_of_one_file_do_not_disturb_one_another(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with atomic_file(path) as one, atomic_file(path) as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"  # whose block ended last


def test_the_temporary_file_can_be_in_another_folder(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "out" / "a.wav", tmp_path / "aside") as temporary:
        assert temporary.parent == tmp_path / "aside"
        temporary.write_bytes(b"RIFF")
    assert (tmp_path / "out" / "a.wav").read_bytes() == b"RIFF"
    assert not list((tmp_path / "aside").iterdir())


def test_a_new_file_has_the_mode_that_the_umask_gives(umask: int, tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "a")
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o666 & ~umask


def test_the_target_of_a_link_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    target, link = tmp_path / "disk" / "a.txt", tmp_path / "b.txt"
    target.write_text("old")
    link.symlink_to(target)
    for folder in (None, tmp_path / "aside"):  # the folder may be on another file system than the link's target
        write_text(link, f"new {folder}", folder)
        assert link.is_symlink()
        assert target.read_text() == f"new {folder}"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.txt", "b.txt", "disk"]


@pytest.mark.parametrize("durable", [False, True])
def test_a_disk_that_refuses_the_content_leaves_the_old_file(durable: bool, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with suppress(OSError), atomic_file(path, durable=durable) as temporary:
        temporary.write_text("new")
    assert path.read_text() == ("old" if durable else "new")
    assert list(tmp_path.iterdir()) == [path]


def test_it_imports_no_torch() -> None:
    code = "import sys, nemo_emmett.files; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# Folders


def test_a_folder_is_replaced_as_a_whole(umask: int, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    for text in ("old", "new"):
        with atomic_folder(folder, last="config.json") as temporary:
            (temporary / "part").mkdir()
            for name in ("config.json", "part/config.json", "weights"):
                (temporary / name).write_text(text)
            (temporary / "weights").chmod(0o600)  # as a library does that writes to a temporary file
            assert text == "old" or (folder / "weights").read_text() == "old"
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    assert sorted(files) == ["config.json", "part/config.json", "weights"]
    assert {path.read_text() for path in files.values()} == {"new"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files.values()} == {0o666 & ~umask}


@pytest.mark.parametrize("failure", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_folder(failure: type[BaseException], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("old")
    (tmp_path / ".unfinished-by-a-killed-process").mkdir()
    with suppress(failure), atomic_folder(tmp_path, last="config.json") as temporary:
        (temporary / "config.json").write_text("new")
        raise failure
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == "old"


def test_a_folder_whose_replacement_was_interrupted_lacks_its_last_file(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "config.json").write_text("old")
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: replace(a, b) if "weights" in str(a) else sys.exit("killed"))
    with suppress(SystemExit), atomic_folder(tmp_path, last="config.json") as temporary:
        for name in ("config.json", "weights"):
            (temporary / name).write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path, small_disk) -> None:
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


def test_the_next_folder_is_tried_if_one_cannot_be_created(tmp_path: Path, monkeypatch) -> None:
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
    if not os.fork():  # a worker, as a data loader's, which outlives a killed process for seconds
        print(os.getpid(), flush=True)
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


def test_a_folder_is_locked_until_its_process_is_killed(holder: subprocess.Popen, tmp_path: Path) -> None:
    folder = tmp_path / "held"
    with pytest.raises(ConfigError, match=rf"export_dir: '{folder}' is in use by process {holder.pid} on \w+"):
        hold_folder(folder, "export_dir").__enter__()
    with pytest.raises(ConfigError, match="is in use by"), atomic_folder(folder, last="config.json"):
        pass
    with hold_folder(tmp_path / "other"):
        holder.kill()
        holder.wait()
        with hold_folder(folder), hold_folder(folder):  # at once, though the worker lives
            (folder / "result").touch()
    assert [path.name for path in folder.iterdir()] == ["result"]
    assert not (tmp_path / "other").exists()  # nothing was written there
