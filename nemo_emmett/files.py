"""Files and folders that appear whole or not at all, whoever reads them and whenever the work is cut off; whether a
folder can be written to, and the lock by which one process has it to itself."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import socket
import stat
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from nemo_emmett.errors import ConfigError

LOCK_FOLDER = ".lock"
"""Made in a folder that a process has to itself; a folder, since NeMo's exp_manager moves loose files away."""

_HELD: dict[Path, IO[str]] = {}
"""The lock files of this process, by the folder."""

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""What file systems say that have no locks."""

_logger = logging.getLogger(__name__)


@contextmanager
def whole_file(path: str | os.PathLike[str], folder: str | os.PathLike[str] | None = None) -> Iterator[Path]:
    """A new file to write to that becomes ``path`` when the block ends without an error, and is removed if it does not.

    Args:
        path: its folder is made if it is not there; a file that is there is replaced.
        folder: where the unfinished file is made, on the same file system; by default beside ``path``. What a killed
            process leaves, it leaves there.

    Example:
        >>> with whole_file("scores.txt") as unfinished:  # doctest: +SKIP
        ...     unfinished.write_text("31.4")
    """
    path = Path(path)
    folder = path.parent if folder is None else Path(folder)
    for needed in {path.parent, folder}:
        needed.mkdir(parents=True, exist_ok=True)
    # The ending stays, for libraries that tell the format by it.
    unfinished = folder / f".{uuid.uuid4().hex}{path.suffix}"
    unfinished.touch(exist_ok=False)  # for all whom the umask admits, other than tempfile's
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str, folder: str | os.PathLike[str] | None = None) -> None:
    """Write a UTF-8 file, whole or not at all; the arguments are those of :func:`whole_file`."""
    with whole_file(path, folder) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


@contextmanager
def whole_folder(folder: str | os.PathLike[str], last: str) -> Iterator[Path]:
    """A new folder to write to whose files become those of ``folder`` when the block ends without an error.

    Files of other names stay in ``folder``. All get the mode that the umask gives, whatever wrote them.

    Args:
        folder: is made if it is not there; this process has it to itself meanwhile.
        last: name of the file without which a reader does not take the folder for whole: it is the first to go and the
            last to come.

    Raises:
        ConfigError: if another process is writing to ``folder``.
    """
    folder = Path(folder)
    with hold_folder(folder):
        for abandoned in folder.glob(".unfinished-*"):
            shutil.rmtree(abandoned, ignore_errors=True)
        unfinished = folder / f".unfinished-{uuid.uuid4().hex}"
        unfinished.mkdir(parents=True)
        try:
            yield unfinished
            files = [path for path in unfinished.rglob("*") if path.is_file()]
            files.sort(key=lambda path: path.name == last)
            for path in files:
                _finish(path, mode=stat.S_IMODE(unfinished.stat().st_mode) & 0o666)
            (folder / last).unlink(missing_ok=True)
            for path in files:
                target = folder / path.relative_to(unfinished)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def _finish(path: Path, mode: int) -> None:
    """Bring a file to the disk: only then some file systems say that there is no room for it."""
    with open(path, "rb") as file:
        os.fchmod(file.fileno(), mode)
        os.fsync(file.fileno())


def check_writable(folder: str | os.PathLike[str], key: str, needed: int = 0) -> None:
    """See that a folder can be made, if it is not there, and written to.

    Args:
        folder: the folder.
        key: of the recipe, for messages.
        needed: bytes that must be free.

    Raises:
        ConfigError: if it is a file, cannot be made or written to, or the disk is too full.
    """
    folder = Path(folder).absolute()
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    probe = place / f".{uuid.uuid4().hex}"
    try:
        try:
            probe.mkdir()
            (probe / "probe").write_bytes(bytes(4096))
        finally:
            shutil.rmtree(probe, ignore_errors=True)
    except OSError as error:
        raise ConfigError(f"{key}: '{folder}' cannot be written to ({error.strerror}); give another folder.") from error
    if (free := shutil.disk_usage(place).free) < needed:
        raise ConfigError(
            f"{key}: '{folder}' has {shown(free)} free, and {shown(needed)} are needed; make room, or give a folder on "
            "another disk."
        )


def shown(bytes_: float) -> str:
    """Bytes as one reads them.

    Example:
        >>> shown(13207024435)
        '12.3 GiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(bytes_) < 1024:
            return f"{bytes_:.0f} B" if unit == "B" else f"{bytes_:.1f} {unit}"
        bytes_ /= 1024
    return f"{bytes_:.1f} TiB"


def new_folder_elsewhere(name: str, places: Sequence[str | os.PathLike[str]] = ()) -> Iterator[Path]:
    """New folders for what cannot be written where it should be, for the caller to try one after another: in
    ``places``, and then in the folder for temporary files."""
    for place in (*places, tempfile.gettempdir()):
        folder = Path(place, f"{name}-{uuid.uuid4().hex[:8]}")
        with suppress(OSError):
            folder.mkdir(parents=True)
            yield folder


@contextmanager
def hold_folder(folder: str | os.PathLike[str], key: str = "output") -> Iterator[None]:
    """Keep other processes from a folder; however this process ends, they may have it then.

    The lock is the kernel's (``flock``), so that a killed process leaves none behind, and processes that are forked
    from this one do not hold it. Where a file system has no locks, which is logged, nobody is kept away.

    Args:
        folder: is made if it is not there.
        key: of the recipe, for messages.

    Raises:
        ConfigError: if another process has the folder.
        OSError: if it cannot be made or written to.
    """
    folder = Path(folder).resolve()
    if folder in _HELD:
        yield
        return
    made = not folder.exists()
    _HELD[folder] = _locked(folder / LOCK_FOLDER / "holder", key)
    try:
        yield
    finally:
        with suppress(OSError):
            (folder / LOCK_FOLDER / "holder").unlink()
            (folder / LOCK_FOLDER).rmdir()
            if made:
                folder.rmdir()  # if nothing was written
        _HELD.pop(folder).close()


def _locked(path: Path, key: str) -> IO[str]:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
        except FileNotFoundError:
            continue  # who held it has just removed it
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_ino != path.stat().st_ino:
                raise FileNotFoundError
        except BlockingIOError:
            file.seek(0)
            holder = file.read() or "another process"
            file.close()
            raise ConfigError(
                f"{key}: '{path.parents[1]}' is in use by {holder}; let it finish, or give another folder."
            ) from None
        except FileNotFoundError:
            file.close()
            continue
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                file.close()
                raise
            _logger.warning("'%s' is on a file system without locks: nobody else may write there.", path.parents[1])
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        return file


def _let_go_of_locks() -> None:
    """In a forked process: a data loader's worker that outlives a killed training must not hold its folder."""
    for file in _HELD.values():
        file.close()


os.register_at_fork(after_in_child=_let_go_of_locks)
