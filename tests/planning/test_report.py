"""Tables and pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from nemo_emmett.errors import DataError
from nemo_emmett.oomptimizer.buckets import Bucket, Shape
from nemo_emmett.oomptimizer.meter import Reading
from nemo_emmett.oomptimizer.profile import Buckets, Measure, MemoryLine, Profile
from nemo_emmett.oomptimizer.search import Result
from nemo_emmett.planning.bins_and_sizes import BinPlan
from nemo_emmett.planning.picture import draw_profile
from nemo_emmett.planning.report import LiveTable, comparison, duration

GIB = 2**30


def result(index: int, size: int, peak: int, probes: int = 2, group: str = "audio") -> Result:
    bucket = Bucket(group, index, float(4 + index), Shape("audio", 4.0 + index, 0, 10))
    reading = Reading(peak=peak, resident=0, held=0, seconds=0.25)
    return Result(bucket, size, float(peak), reading, MemoryLine(0, 0, 1.0), probes)


def rows(drawn) -> list[list[str]]:
    console = Console(record=True, width=160, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(drawn)
    return [line.split() for line in console.export_text().splitlines() if line.strip()]


def test_results_are_in_the_order_of_the_buckets_in_whatever_order_they_are_found() -> None:
    table = LiveTable("title", lambda: 8.0 * GIB, Console(quiet=True))
    with table.shown():
        for one in (result(1, 5, 6 * GIB), result(0, 9, 4 * GIB), result(0, 2, GIB, group="a")):
            table.add(one)
    heading, *lines = rows(table.table())
    assert heading == ["bucket", "batch", "size", "memory", "share", "steps", "seconds"]
    names = [" ".join(line[:4]) for line in lines]
    assert names == ["a: bucket 1 4", "audio: bucket 1 4", "audio: bucket 2 5"]
    assert lines[2][4:7] == ["5", "6.0", "GiB"]
    assert lines[2][-4:] == ["75.0", "%", "2", "0.250"]


def test_a_result_that_is_lowered_later_takes_the_place_of_the_first() -> None:
    table = LiveTable("title", lambda: 8.0 * GIB, Console(quiet=True), is_timed=False)
    table.add(result(0, 9, 8 * GIB))
    table.add(result(0, 7, 7 * GIB, probes=3))
    (line,) = rows(table.table())[1:]
    assert line[4] == "7"
    assert line[-1] == "3"


def test_plans_side_by_side() -> None:
    plans = {
        "least padding": BinPlan([[4, 4], [9, 9]], (30, 10), 1000, 0.125, 200.0),
        "shortest epoch": BinPlan([[5, 4], [9, 9]], (28, 10), 1000, 0.15, 160.0),
    }
    lines = rows(comparison(plans, "data.train_ds"))
    assert lines[-2][2:] == ["2", "12.50", "%", "10", "to", "30", "5.0", "200.0", "s", "x", "1.000"]
    assert lines[-1][2:] == ["2", "15.00", "%", "10", "to", "28", "6.2", "160.0", "s", "x", "0.800"]


def test_durations() -> None:
    assert [duration(s) for s in (0.01254, 12.34, 3723, 200_000)] == ["0.013 s", "12.3 s", "1:02:03", "2 days, 7:33:20"]


class TestPicture:
    PROFILE = Profile(
        groups={"a": Buckets((1.0, 2.0), (8, 4)), "b": Buckets(((1.0, 1.0), (2.0, 2.0)), (8, 4))},
        measures={
            "a": (Measure(1.0, 8, GIB, GIB, 2 * GIB), Measure(2.0, 4, GIB, GIB, 2 * GIB)),
            "b": (Measure((1.0, 1.0), 8, GIB), Measure((2.0, 2.0), 4, GIB)),
        },
    )

    def test_is_written(self, tmp_path: Path) -> None:
        draw_profile(self.PROFILE, 1.5 * GIB, tmp_path / "p.png")
        assert (tmp_path / "p.png").stat().st_size > 10_000

    def test_a_folder_that_is_not_there_is_reported(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"--output: '.*p\.png' cannot be written"):
            draw_profile(self.PROFILE, GIB, tmp_path / "gone" / "p.png")
