"""Atomic writes of files and folders, checks that a folder can be written to, and the lock on a folder."""

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
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import fsspec

from nemo_emmett.errors import ConfigError, Help

LOCK_FOLDER = ".lock"
"""Holds the lock file of a folder; a folder itself, since NeMo's exp_manager moves loose files away."""

_HELD: dict[Path, IO[str]] = {}
"""The lock files of this process, by the locked folder."""

_logger = logging.getLogger(__name__)


@contextmanager
def atomic_file(
    path: str | os.PathLike[str], folder: str | os.PathLike[str] | None = None, durable: bool = False
) -> Iterator[Path]:
    """Yield a temporary file that replaces ``path`` when the block ends without an error, and is removed otherwise.

    Readers, and other writers of ``path``, see the old file or the new one. The new one has the mode that the umask
    gives. If ``path`` is a symbolic link, the file that it refers to is replaced.

    Args:
        path: missing folders are created.
        folder: where the temporary file is created, on the same file system; None: next to ``path``. A killed process
            leaves it there.
        durable: write the content to the disk first. Then a power failure leaves no empty file either, and file
            systems that delay their writes (NFS) report a full disk here.

    Example:
        >>> with atomic_file("scores.txt") as temporary:  # doctest: +SKIP
        ...     temporary.write_text("31.4")
    """
    target = Path(os.path.realpath(path))
    folder = Path(folder) if folder is not None and not os.path.islink(path) else target.parent
    for needed in {target.parent, folder}:
        needed.mkdir(parents=True, exist_ok=True)
    # The suffix stays, for libraries that choose the format by it.
    temporary = folder / f".{uuid.uuid4().hex}{Path(path).suffix}"
    temporary.touch(exist_ok=False)  # tempfile would create a file that only its owner can read
    try:
        yield temporary
        if durable:
            _fsync(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str, folder: str | os.PathLike[str] | None = None) -> None:
    """Write a UTF-8 file atomically and durably; the arguments are those of :func:`atomic_file`."""
    with atomic_file(path, folder, durable=True) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def atomic_folder(folder: str | os.PathLike[str], last: str, stale: Collection[str] = ()) -> Iterator[Path]:
    """Yield a temporary folder whose files are moved to ``folder`` when the block ends without an error.

    Files of other names stay in ``folder``. All files get the mode that the umask gives, whatever wrote them.

    Args:
        folder: is created if it is missing; it is locked meanwhile.
        last: name of the file without which readers do not accept the folder: it is removed first and moved last.
        stale: paths in ``folder`` of files that are removed unless new ones replace them.

    Raises:
        ConfigError: if another process is writing to ``folder``.
    """
    folder = Path(folder)
    with hold_folder(folder):
        for abandoned in folder.glob(".unfinished-*"):
            shutil.rmtree(abandoned, ignore_errors=True)
        temporary = folder / f".unfinished-{uuid.uuid4().hex}"
        temporary.mkdir(parents=True)
        try:
            yield temporary
            files = [path for path in temporary.rglob("*") if path.is_file()]
            files.sort(key=lambda path: path.name == last)
            for path in files:
                path.chmod(stat.S_IMODE(temporary.stat().st_mode) & 0o666)
                _fsync(path)
            for name in (last, *stale):
                (folder / name).unlink(missing_ok=True)
            for path in files:
                target = folder / path.relative_to(temporary)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _fsync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def check_writable(folder: str | os.PathLike[str], key: str, needed: int = 0) -> None:
    """Check that a folder can be written to, or created if it is missing.

    Args:
        folder: the folder.
        key: of the recipe, for messages.
        needed: bytes that must be free.

    Raises:
        ConfigError: if it is a file, cannot be created or written to, or the disk is too full.
    """
    folder = Path(folder).absolute()
    place = existing_folder(folder)
    probe = place / f".{uuid.uuid4().hex}"
    try:
        probe.mkdir()
        (probe / "probe").write_bytes(bytes(4096))
    except OSError as error:
        raise ConfigError(f"{key}: '{folder}' cannot be written to ({error.strerror}); give another folder.") from error
    finally:
        shutil.rmtree(probe, ignore_errors=True)
    if (free := shutil.disk_usage(place).free) < needed:
        raise ConfigError(
            f"{key}: '{folder}' has {shown(free)} free, and {shown(needed)} are needed; make room, or give a folder on "
            "another disk.",
            page=Help.DISK_FULL,
        )


def existing_folder(folder: Path) -> Path:
    """The folder, or the nearest folder above it that exists."""
    return next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())


def shown(bytes_: float) -> str:
    """A number of bytes with its unit.

    Example:
        >>> shown(13207024435)
        '12.3 GiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(bytes_) < 1024:
            return f"{bytes_:.0f} B" if unit == "B" else f"{bytes_:.1f} {unit}"
        bytes_ /= 1024
    return f"{bytes_:.1f} TiB"


def end_failed_transaction() -> None:
    """After a checkpoint could not be written: let this process write files again.

    Lightning writes a checkpoint in a transaction of fsspec's. If its commit fails, as on a full disk, the transaction
    stays open, and no file that is written through fsspec from then on, such as a logger's, ever gets its name.
    """
    local = fsspec.filesystem("file")
    if local._intrans:
        local.transaction.complete(commit=False)


def new_folder_elsewhere(name: str, places: Sequence[str | os.PathLike[str]] = ()) -> Iterator[Path]:
    """Create alternatives for a folder that cannot be written to, for the caller to try one after another: in
    ``places``, then in the folder for temporary files."""
    for place in (*places, tempfile.gettempdir()):
        folder = Path(place, f"{name}-{uuid.uuid4().hex[:8]}")
        with suppress(OSError):
            folder.mkdir(parents=True)
            yield folder


@contextmanager
def hold_folder(folder: str | os.PathLike[str], key: str = "output") -> Iterator[None]:
    """Lock a folder against other processes until the block ends.

    The kernel releases the lock (``flock``) when this process ends in any way. Processes that are forked from this one
    do not hold it. A file system without locks is used unlocked, with a warning.

    Args:
        folder: is created if it is missing.
        key: of the recipe, for messages.

    Raises:
        ConfigError: if another process holds the lock.
        OSError: if the folder cannot be created or written to.
    """
    folder = Path(folder).resolve()
    if folder in _HELD:
        yield
        return
    is_new = not folder.exists()
    _HELD[folder] = _locked(folder / LOCK_FOLDER / "holder", key)
    try:
        yield
    finally:
        with suppress(OSError):
            (folder / LOCK_FOLDER / "holder").unlink()
            (folder / LOCK_FOLDER).rmdir()
            if is_new:
                folder.rmdir()  # fails if something was written
        _HELD.pop(folder).close()


def _locked(path: Path, key: str) -> IO[str]:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
        except FileNotFoundError:
            continue  # the process that held the lock has just removed the folder
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_ino != path.stat().st_ino:
                raise FileNotFoundError  # locked is a file that its last holder has removed meanwhile
        except BlockingIOError:
            file.seek(0)
            holder = file.read() or "another process"
            file.close()
            raise ConfigError(
                f"{key}: '{path.parents[1]}' is in use by {holder}; let it finish, or give another folder.",
                page=Help.FOLDER_IN_USE,
            ) from None
        except FileNotFoundError:
            file.close()
            continue
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                file.close()
                raise
            _logger.warning("'%s' is on a file system without locks; use it in one process.", path.parents[1])
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        return file


def _close_locks() -> None:
    """In a forked process: a data worker that outlives a killed training must not hold the training's folder."""
    for file in _HELD.values():
        file.close()


os.register_at_fork(after_in_child=_close_locks)
