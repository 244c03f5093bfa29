"""Curves come back from TensorBoard's files as they were logged."""

from __future__ import annotations

import pytest
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from nemo_emmett.errors import DataError
from nemo_emmett.evaluation.curves import read_curves


def log(folder, tag: str, points: dict[int, float], wall_time: float = 1.0) -> None:
    writer = EventFileWriter(str(folder), filename_suffix=f".{tag}")
    for step, value in points.items():
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
        writer.add_event(Event(wall_time=wall_time + step, step=step, summary=summary))
    writer.close()


def test_every_scalar_is_read_from_all_subfolders(tmp_path):
    log(tmp_path / "version_0", "loss_text", {0: 4.0, 10: 2.0, 20: 1.0})
    log(tmp_path / "version_0" / "deep", "val_bleu", {20: 50.0})
    curves = read_curves(tmp_path)
    assert (curves["loss_text"].steps, curves["loss_text"].values) == ([0, 10, 20], [4.0, 2.0, 1.0])
    assert (curves["val_bleu"].steps, curves["val_bleu"].values) == ([20], [50.0])


def test_long_runs_are_read_whole(tmp_path):
    log(tmp_path, "loss", dict.fromkeys(range(12_000), 1.0))
    assert len(read_curves(tmp_path)["loss"].steps) == 12_000


@pytest.mark.parametrize("resumed", ["version_1", "version_0"])
def test_a_resumed_run_replaces_the_steps_it_repeats(tmp_path, resumed):
    log(tmp_path / "version_0", "loss", {1: 9.0, 2: 8.0, 3: 7.0}, wall_time=100.0)
    log(tmp_path / resumed, "loss", {3: 6.0, 4: 5.0}, wall_time=200.0)
    curve = read_curves(tmp_path)["loss"]
    assert (curve.steps, curve.values) == ([1, 2, 3, 4], [9.0, 8.0, 6.0, 5.0])


def test_a_folder_without_logs_is_named(tmp_path):
    with pytest.raises(DataError, match="no TensorBoard event files"):
        read_curves(tmp_path)
    EventFileWriter(str(tmp_path)).close()
    with pytest.raises(DataError, match="hold no scalar"):
        read_curves(tmp_path)
