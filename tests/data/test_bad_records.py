"""The ledger of what was skipped."""

from __future__ import annotations

import os
import pickle

import pytest

from nemo_emmett.data.bad_records import BadRecords
from nemo_emmett.errors import TooManyBadRecords


def filled(bad: int, good: int) -> BadRecords:
    ledger = BadRecords()
    ledger.read(bad + good)
    for i in range(bad):
        ledger.add("train.json", f"line {i}", "not JSON")
    return ledger


def test_a_record_met_again_counts_once() -> None:
    ledger = filled(2, 8)
    ledger.read(10)
    ledger.add("train.json", "line 0", "not JSON")
    ledger.add("train.json", "line 1", "not JSON")
    assert ledger.count() == 2
    assert ledger.counts == {("train.json", "not JSON"): 2}
    assert ledger.share() == pytest.approx(4 / 20)  # both times two of ten


def test_notes_travel_once() -> None:
    total, worker = BadRecords(), filled(2, 8)
    total.merge(worker.drain())
    total.merge(worker.drain())
    assert (total.count(), total.read_count) == (2, 10)


def test_another_process_starts_afresh() -> None:
    ledger = filled(2, 8)
    assert pickle.loads(pickle.dumps(ledger)).count() == 0
    reader, writer = os.pipe()
    if os.fork() == 0:
        notes = ledger.drain()
        os.write(writer, str(len(notes.skipped)).encode())
        os._exit(0)
    assert os.read(reader, 8) == b"0"
    assert len(ledger.drain().skipped) == 2


def test_a_number_is_judged_at_once_and_the_first_ten_are_named() -> None:
    ledger = filled(12, 0)
    ledger.check(12)
    with pytest.raises(TooManyBadRecords) as stopped:
        ledger.check(11)
    assert str(stopped.value).count("train.json, line") == 10
    assert "train.json, line 9: not JSON" in str(stopped.value)
    assert "line 10" not in str(stopped.value)
    assert "12 bad records" in str(stopped.value)


def test_a_share_is_judged_after_a_thousand_records_or_at_the_end() -> None:
    ledger = filled(200, 799)
    ledger.check(0.1)
    with pytest.raises(TooManyBadRecords):
        ledger.check(0.1, at_end=True)
    ledger.read()
    with pytest.raises(TooManyBadRecords):
        ledger.check(0.1)
    ledger.check(0.2)
    ledger.check(None)


def test_the_table_has_a_line_per_source_and_cause() -> None:
    ledger = filled(2, 0)
    ledger.add("dev.de", "line 7", "empty text")
    assert ledger.table().splitlines() == [
        "skipped  cause       source",
        "      2  not JSON    train.json",
        "      1  empty text  dev.de",
    ]
