"""What reaches the console, and what the log file alone."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import nemo.utils
import pytest

import nemo_emmett
from nemo_emmett import run_log
from nemo_emmett.errors import ConfigError
from nemo_emmett.run_log import (
    TO_LOG_FILE,
    goes_to_console,
    is_rank_zero,
    plain_console,
    quiet_console,
    write_log_file,
)

OURS = str(Path(nemo_emmett.__file__).with_name("training.py"))
NEMOS = str(Path(nemo.utils.__file__))
PRETOKENIZE = "You are using a non-tarred dataset and requested tokenization during data sampling (pretokenize=True)."
OTHER_DATA = (
    "If you intend to do validation, please call the ModelPT.setup_validation_data() or "
    "ModelPT.setup_multiple_validation_data() method"
)


@pytest.fixture(autouse=True)
def rank_zero(monkeypatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "NODE_RANK", "GROUP_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def library() -> Iterator[logging.Logger]:
    """Lightning's logger, with a handler for the console as it is without a test's own."""
    logger = logging.getLogger("lightning")
    handler = logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)
    yield logger
    logger.removeHandler(handler)


def record(logger: str, level: int, message: str, path: str = NEMOS) -> logging.LogRecord:
    return logging.LogRecord(logger, level, path, 1, message, None, None)


@pytest.mark.parametrize(
    ("logger", "level", "message", "path", "expected"),
    [
        ("nemo_logger", logging.INFO, "ExpManager schema", NEMOS, False),
        ("nemo_logger", logging.INFO, "The embedding table was resized", OURS, True),
        ("nemo_logger", logging.DEBUG, "details", OURS, False),
        ("nemo_logger", logging.WARNING, "a file is missing", NEMOS, True),
        ("nemo_logger", logging.WARNING, PRETOKENIZE, NEMOS, False),
        ("nemo_logger", logging.ERROR, PRETOKENIZE, NEMOS, True),
        ("nemo_logger", logging.WARNING, OTHER_DATA, NEMOS, False),
        ("lightning.pytorch", logging.WARNING, PRETOKENIZE, NEMOS, True),  # a filter is by logger, too
        ("nv_one_logger.api.config", logging.WARNING, "OneLogger: Setting error_handling_strategy", NEMOS, False),
        ("nv_one_logger.api.config", logging.ERROR, "OneLogger failed", NEMOS, True),
        ("nv_one_logger_of_another", logging.WARNING, "anything", NEMOS, True),
        ("nemo_emmett.files", logging.INFO, "anything", NEMOS, True),
    ],
)
def test_what_a_user_sees(logger: str, level: int, message: str, path: str, expected: bool) -> None:
    assert goes_to_console(record(logger, level, message, path)) is expected


def test_every_filter_has_its_reason() -> None:
    assert all(routed.logger and routed.why for routed in TO_LOG_FILE)


def test_all_records_are_in_the_file_those_before_it_too(tmp_path, capfd, library) -> None:
    with quiet_console("Importing ..."):
        library.info("Seed set to 0")
        nemo.utils.logging.info("from a library")
        nemo.utils.logging.warning(PRETOKENIZE)
        path = write_log_file(tmp_path)
        nemo.utils.logging.warning("a.py:7: FutureWarning: an old name")
        logging.getLogger("nemo_emmett").info("of ours")
        library.warning("GPU available but not used")
    printed = capfd.readouterr()
    assert printed.out.splitlines() == ["Importing ...", "of ours"]
    assert printed.err.splitlines() == ["Warning: GPU available but not used"]
    logged = path.read_text()
    assert path == tmp_path / "train.log"
    for text in ("Seed set to 0", "from a library", PRETOKENIZE, "an old name", "of ours", "GPU available"):
        assert logged.count(text) == 1


def test_afterwards_everything_is_as_before(tmp_path, capfd, library) -> None:
    names = ("", "nemo_logger", "lightning", "lightning.pytorch")
    before = [(list(logger.handlers), logger.level, logger.propagate) for logger in map(logging.getLogger, names)]
    showwarning = warnings.showwarning
    with quiet_console(), quiet_console():
        assert library.handlers == []
    after = [(list(logger.handlers), logger.level, logger.propagate) for logger in map(logging.getLogger, names)]
    assert [(set(one[0]), *one[1:]) for one in after] == [(set(one[0]), *one[1:]) for one in before]
    assert warnings.showwarning is showwarning
    assert write_log_file(tmp_path) is None
    library.info("as it was")
    assert "as it was" in capfd.readouterr().err


def end_by(error: Exception, folder: Path | None = None) -> None:
    with quiet_console():
        logging.getLogger("lightning").info("what came before")
        if folder is not None:
            write_log_file(folder)
        raise error


def test_an_unexpected_end_prints_what_was_held_back_unless_there_is_a_file(tmp_path, capfd, library) -> None:
    with pytest.raises(ZeroDivisionError):
        end_by(ZeroDivisionError("division by zero"))
    assert "what came before" in capfd.readouterr().err
    with pytest.raises(ZeroDivisionError):
        end_by(ZeroDivisionError("division by zero"), tmp_path)
    assert "what came before" not in capfd.readouterr().err
    logged = (tmp_path / "train.log").read_text()
    assert "what came before" in logged
    assert "Traceback" in logged
    assert "test_run_log.py" in logged


def test_a_full_disk_costs_one_sentence(tmp_path, capfd, library) -> None:
    (tmp_path / "train.log").symlink_to("/dev/full")
    with quiet_console():
        library.info("held back")
        path = write_log_file(tmp_path)
        for number in range(3):
            library.warning(f"warning {number}")
    sentence, *others = capfd.readouterr().err.splitlines()
    assert sentence == f"Warning: '{path}' is incomplete: No space left on device."
    assert others == ["Warning: warning 0", "Warning: warning 1", "Warning: warning 2"]


def test_a_users_mistake_prints_nothing_else(tmp_path, capfd, library) -> None:
    with pytest.raises(ConfigError):
        end_by(ConfigError("one sentence"))
    assert capfd.readouterr() == ("", "")  # the sentence is printed by mistakes_as_sentences
    with pytest.raises(ConfigError):
        end_by(ConfigError("one sentence"), tmp_path)
    logged = (tmp_path / "train.log").read_text()
    assert "one sentence" in logged
    assert "Traceback" not in logged


@pytest.mark.parametrize("variables", [{"RANK": "1"}, {"SLURM_PROCID": "7"}, {"LOCAL_RANK": "1"}, {"NODE_RANK": "1"}])
def test_other_ranks_print_errors_alone_and_write_files_of_their_own(
    variables, tmp_path, capfd, library, monkeypatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert not is_rank_zero()
    with quiet_console("Importing ..."):
        library.warning("a warning")
        nemo.utils.logging.info("information")
        library.error("an error")
        path = write_log_file(tmp_path, rank=3)
    assert capfd.readouterr() == ("", "Error: an error\n")
    assert path == tmp_path / "train.rank3.log"
    assert all(text in path.read_text() for text in ("a warning", "information", "an error"))


def test_everything_is_printed_where_asked_for(tmp_path, capfd, library, monkeypatch) -> None:
    monkeypatch.setenv(run_log.VERBOSE_VARIABLE, "1")
    with quiet_console():
        library.info("Seed set to 0")
        assert write_log_file(tmp_path) is None
    assert "Seed set to 0" in capfd.readouterr().err


def test_a_notebook_gets_plain_text(monkeypatch, capsys) -> None:
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    plain_console().print("[bold]Batch sizes[/bold]", "for 80 GiB")
    assert capsys.readouterr().out == "Batch sizes for 80 GiB\n"
