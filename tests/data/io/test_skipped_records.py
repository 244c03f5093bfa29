"""Counts of skipped records."""

from __future__ import annotations

import os
import pickle

import pytest

from nemo_emmett.data.io.skipped_records import SkippedRecords
from nemo_emmett.errors import TooManyBadRecords


def filled(bad: int, good: int) -> SkippedRecords:
    skipped = SkippedRecords()
    skipped.read("train.json", bad + good)
    for i in range(bad):
        skipped.add("train.json", f"line {i}", "not JSON")
    return skipped


def test_a_record_that_is_read_again_counts_once() -> None:
    skipped = filled(2, 8)
    skipped.read("train.json", 10)
    skipped.add("train.json", "line 0", "not JSON")
    skipped.add("train.json", "line 1", "not JSON")
    assert skipped.count() == 2
    assert skipped.counts == {("train.json", "not JSON"): 2}
    assert skipped.shares() == {"train.json": pytest.approx(4 / 20)}  # both times two of ten


def test_a_delta_is_drained_once() -> None:
    total, worker = SkippedRecords(), filled(2, 8)
    total.merge(worker.drain())
    total.merge(worker.drain())
    assert (total.count(), total.read_count) == (2, 10)


def test_another_process_starts_at_zero() -> None:
    skipped = filled(2, 8)
    assert pickle.loads(pickle.dumps(skipped)).count() == 0
    reader, writer = os.pipe()
    if os.fork() == 0:
        delta = skipped.drain()
        os.write(writer, str(len(delta.skipped)).encode())
        os._exit(0)
    assert os.read(reader, 8) == b"0"
    assert len(skipped.drain().skipped) == 2


def test_a_number_is_judged_at_once_and_the_first_ten_are_named() -> None:
    skipped = filled(12, 0)
    skipped.check(12)
    with pytest.raises(TooManyBadRecords) as stopped:
        skipped.check(11)
    assert str(stopped.value).count("train.json, line") == 10
    assert "train.json, line 9: not JSON" in str(stopped.value)
    assert "line 10" not in str(stopped.value)
    assert "12 bad records" in str(stopped.value)


def test_a_share_is_judged_after_a_thousand_records_or_at_the_end() -> None:
    skipped = filled(200, 799)
    skipped.check(0.1)
    with pytest.raises(TooManyBadRecords):
        skipped.check(0.1, at_end=True)
    skipped.read("train.json")
    with pytest.raises(TooManyBadRecords):
        skipped.check(0.1)
    skipped.check(0.2)
    skipped.check(None)


def test_the_table_has_a_line_per_source_and_cause() -> None:
    skipped = filled(2, 0)
    skipped.add("dev.de", "line 7", "empty text")
    assert skipped.table().splitlines() == [
        "skipped  cause       source",
        "      2  not JSON    train.json",
        "      1  empty text  dev.de",
    ]


def test_a_record_of_several_examples_is_bad_once_per_pass() -> None:
    skipped = SkippedRecords()
    for _ in range(2):
        skipped.read("train.json", 1000)
        for line in range(100):
            for language in ("de", "es", "fr"):
                where = ("train.json", f"line {line}")
                skipped.add(where[0], f"{where[1]} ({line}.wav)", "truncated audio", where, f"{line}-{language}")
        assert skipped.shares() == {"train.json": pytest.approx(0.1)}
    assert skipped.count() == 100
    assert skipped.causes() == {"truncated audio": 100}
    skipped.check(0.1)


def test_a_record_with_several_faults_is_one_record() -> None:
    skipped = SkippedRecords()
    skipped.read("train.json", 10)
    for language in ("de", "es"):
        skipped.add("train.json", "line 4", f"no translation to '{language}'")
    skipped.add("train.json", "line 4 (4.wav)", "truncated audio", record=("train.json", "line 4"))
    assert skipped.count() == 1
    assert skipped.shares() == {"train.json": 0.1}
    assert skipped.causes() == {"no translation to 'de'": 1, "no translation to 'es'": 1, "truncated audio": 1}
    skipped.check(1)


def test_each_source_is_judged_by_its_own_share() -> None:
    skipped = SkippedRecords(source_of={"speech_0.json": "speech", "speech_1.json": "speech"})
    skipped.read("train.de", 1_000_000)
    skipped.add("train.de", "line 1", "empty text")
    for shard in ("speech_0.json", "speech_1.json"):
        skipped.read(shard, 499)
        for line in range(200):
            skipped.add(shard, f"line {line}", "missing audio")
    assert skipped.shares() == {"train.de": pytest.approx(1e-6), "speech": pytest.approx(400 / 998)}
    skipped.check(0.25)  # of speech, less than a thousand records were read
    skipped.read("speech_0.json", 2)
    with pytest.raises(TooManyBadRecords) as stopped:
        skipped.check(0.25)
    sentence, *named = str(stopped.value).splitlines()
    assert "400 bad records were skipped in 1000 records of speech read, more than allowed (0.25 of" in sentence
    assert len(named) == 10
    assert not any("train.de" in line for line in named)
    skipped.check(401)
    with pytest.raises(TooManyBadRecords, match="401 bad records were skipped in 1001000 records read"):
        skipped.check(400)  # a number is of all sources together


def test_an_epoch_is_reported_by_itself_and_in_total() -> None:
    skipped = SkippedRecords(source_of={"speech_0.json": "speech", "speech_1.json": "speech"})
    for epoch in range(2):
        for shard in ("speech_0.json", "speech_1.json"):
            skipped.read(shard, 1000)
            for language in ("de", "es"):  # two examples of one record
                skipped.add(shard, "line 7 (a.wav)", "missing audio", (shard, "line 7"), f"a-{language}")
        skipped.read("train.de", 50)
        if epoch:
            skipped.add("train.de", "line 1", "empty text")
            skipped.add("train.de", "line 1", "not UTF-8")
            skipped.add("speech_0.json", "line 9", "not JSON")
        report = skipped.end_epoch()
    assert report.splitlines() == [
        "this epoch           in total",
        "      read  skipped      read  skipped  source",
        "     2,000        3     4,000        5  speech",
        "                  2                  4    missing audio",
        "                  1                  1    not JSON",
        "        50        1       100        1  train.de",
        "                  1                  1    empty text",
        "                  1                  1    not UTF-8",
    ]
    skipped.read("train.de", 50)
    assert skipped.end_epoch() == ""
    assert skipped.shares() == {"speech": pytest.approx(5 / 4000), "train.de": pytest.approx(1 / 150)}


def test_reports_stay_readable_with_long_paths() -> None:
    path = f"/data/{'corpora/' * 20}manifest_0.json"
    title = f"data.train_ds.input_cfg.0 ({path})"
    skipped = SkippedRecords(source_of={path: title})
    skipped.read(path, 2_000_000)
    skipped.add(path, "line 1", "several target languages, but no translations")
    for report in (skipped.table(), skipped.end_epoch()):
        assert max(map(len, report.splitlines())) <= 96
        assert "corpora/manifest_0.json" in report
        assert "0 (..." in report or "  ...rpora" in report  # the place is whole, and the path lacks its beginning
    skipped.add(path, "line 1", "several target languages, but no translations")
    assert "data.train_ds.input_cfg" in skipped.end_epoch()


def test_the_counts_of_several_workers_are_one_epoch() -> None:
    total = SkippedRecords()
    for _ in range(2):
        for worker in (filled(1, 99), filled(1, 99)):  # each has read all of the data
            total.merge(worker.drain())
        assert "       200        2" in total.end_epoch()
    assert total.count() == 1
