"""A profile that NeMo's ``exp_manager`` has archived: found, and put back.

With ``resume_if_exists``, ``exp_manager`` moves every loose file of its log folder into ``run_0``, ``run_1``, ... at
each start, the profile among them. What it holds (sizes that guard lowered, a user's edits) is still the run's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from nemo.utils import logging
from nemo.utils.app_state import AppState

from nemo_emmett.errors import ConfigError
from nemo_emmett.oomptimizer.profile import Profile


def restore_archived(path: str | Path, check: Callable[[Profile], None]) -> Profile | None:
    """Move the newest archived profile that fits back to its path.

    Args:
        path: where the profile was; nothing is done if a file is there, or if exp_manager's log folder is another.
        check: raises a ConfigError for a profile that does not fit this run.

    Returns:
        The profile; None if none was archived, or none fits.

    Raises:
        ConfigError: if the file cannot be moved.
    """
    path, log_dir = Path(path), AppState().log_dir
    if path.exists() or log_dir is None or Path(log_dir).resolve() != path.parent.resolve():
        return None
    # `run_*` as exp_manager names its folders; a moved file keeps its time.
    archived = sorted(path.parent.glob("run_*/"), key=lambda folder: _time_of(folder / path.name), reverse=True)
    for candidate in (folder / path.name for folder in archived):
        if not candidate.is_file():
            continue
        try:
            profile = Profile.read(candidate)
            check(profile)
        except ConfigError as error:
            logging.warning(f"OOMptimizer: an archived profile, {candidate}, is not used: {error}")
            continue
        try:
            os.replace(candidate, path)
        except OSError as error:
            raise ConfigError(
                f"{candidate}: the archived profile cannot be moved back to {path}: {error.strerror}; move it yourself."
            ) from error
        logging.info(
            f"OOMptimizer: the profile of an earlier start was moved back from {candidate} to {path}; delete it to "
            "measure again."
        )
        return profile
    return None


def read_if_there(path: str | Path) -> Profile | None:
    """The profile in a file; None if there is none, or another rank's exp_manager archives it at this very moment.

    Raises:
        ConfigError: if it cannot be used.
    """
    try:
        return Profile.read(path)
    except ConfigError:
        if Path(path).exists():
            raise
        return None


def _time_of(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0
