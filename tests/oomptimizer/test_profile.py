"""Profiles: what is read from them, and how mistakes in them are reported."""

from __future__ import annotations

import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from nemo_emmett.errors import ConfigError
from nemo_emmett.oomptimizer.profile import (
    ONLY_GROUP,
    Buckets,
    Event,
    Measure,
    MemoryLine,
    Profile,
    TimeLine,
    as_bins,
    shown,
)


def written(folder: Path, text: str) -> Path:
    path = folder / "profile.yaml"
    path.write_text(text)
    return path


def test_reads_one_dataset(tmp_path: Path) -> None:
    path = written(tmp_path, "train_ds:\n  bucket_duration_bins: [4, 8.5]\n  bucket_batch_size: [32, 14]\n")
    assert Profile.read(path).groups == {ONLY_GROUP: Buckets((4.0, 8.5), (32, 14))}


def test_reads_groups_of_one_and_of_two_dimensions(tmp_path: Path) -> None:
    text = """
train_ds:
  audio: {bucket_duration_bins: [4.0, 8.0], bucket_batch_size: [32, 14]}
  text: {bucket_duration_bins: [[16, 12], [16, 24], [48, 40]], bucket_batch_size: [96, 80, 24]}
"""
    groups = Profile.read(written(tmp_path, text)).groups
    assert groups["audio"] == Buckets((4.0, 8.0), (32, 14))
    assert groups["text"] == Buckets(((16.0, 12.0), (16.0, 24.0), (48.0, 40.0)), (96, 80, 24))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("train_ds: [", "is corrupt: while parsing"),
        ("- 1", "it has no mapping `train_ds`"),
        ("", "it has no mapping `train_ds`"),
        ("train_ds: {audio: 3}", "train_ds.audio: a mapping with bucket_duration_bins and bucket_batch_size is needed"),
        ("train_ds: {bucket_duration_bins: [1]}", "train_ds.bucket_batch_size: is missing"),
        ("train_ds: {bucket_batch_size: [1]}", "train_ds.bucket_duration_bins: is missing"),
        (
            "train_ds: {bucket_duration_bins: [1, 2], bucket_batch_size: [1]}",
            "train_ds: there are 2 bins, but 1 batch sizes",
        ),
        (
            "train_ds: {bucket_duration_bins: [1, 3, 2], bucket_batch_size: [1, 1, 1]}",
            "bins must rise, but number 3 (2) does not lie above the one before it (3)",
        ),
        ("train_ds: {bucket_duration_bins: [1, 1], bucket_batch_size: [1, 1]}", "bins must rise, but number 2 (1)"),
        (
            "train_ds: {bucket_duration_bins: [[2, 5], [2, 4]], bucket_batch_size: [1, 1]}",
            "number 2 ([2, 4]) does not lie above the one before it ([2, 5])",
        ),
        (
            "train_ds: {bucket_duration_bins: [1, [2, 4]], bucket_batch_size: [1, 1]}",
            "bins are all numbers or all pairs [input, output], not [1, [2, 4]]",
        ),
        ("train_ds: {bucket_duration_bins: [], bucket_batch_size: []}", "a list of bins is needed, not []"),
        (
            "train_ds: {bucket_duration_bins: [1], bucket_batch_size: [0]}",
            ".0: 0 cannot be used; give a whole number from 1.",
        ),
        ("train_ds: {bucket_duration_bins: [1], bucket_batch_size: [1.5]}", "bucket_batch_size.0: 1.5 cannot be used"),
        (
            "train_ds: {bucket_duration_bins: [1], bucket_batch_size: [true]}",
            ".0: True cannot be used",
        ),
    ],
)
def test_a_profile_that_cannot_be_used_is_reported_in_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        Profile.read(path)
    message = str(error.value)
    assert message.startswith(str(path))
    assert sentence in message
    assert "\n" not in message


def test_a_missing_profile_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.yaml: the profile cannot be read: No such file or directory"):
        Profile.read(tmp_path / "gone.yaml")


def test_bins_are_shown_as_one_writes_them() -> None:
    assert shown(as_bins([1, 2.5], "x")) == "[1, 2.5]"
    assert shown(as_bins([[1, 2], [3, 4.5]], "x")) == "[[1, 2], [3, 4.5]]"


# Profiles that were measured

GIB = 2**30
MEASURED = Profile(
    groups={
        "audio": Buckets((4.0, 8.5), (32, 14)),
        "text": Buckets(((16.0, 12.0), (16.0, 24.0)), (96, 80)),
    },
    settings={"mode": "calibrate", "memory_budget": 70 * GIB, "safety_margin": 1e-7},
    fingerprint={"model": {"class": "nemo_emmett.models.SALMT5"}, "optimizers": [{"class": "AdamW"}], "world_size": 2},
    measures={
        "audio": (
            Measure(
                bin=4.0,
                batch_size=32,
                predicted_peak=69 * GIB,
                confirmed_peak=69 * GIB + 1,
                reserved=70 * GIB,
                seconds=0.25,
                memory=MemoryLine(5.0 * GIB, 3.0 * GIB, 2.0 * GIB),
                time=TimeLine(0.05, 0.00625),
            ),
            Measure(bin=8.5, batch_size=14, predicted_peak=68 * GIB),
        ),
        "text": tuple(Measure(bin=item, batch_size=9, predicted_peak=GIB) for item in ((16.0, 12.0), (16.0, 24.0))),
    },
    epoch_seconds=1234.5,
    events=(Event("2030-01-02T03:04:05+00:00", 17, "audio: bucket 2 [8.5]", "out of memory in backward", 15, 14),),
)


@pytest.mark.parametrize("group", [None, "audio", "text"], ids=["groups", "one group", "one group in two dimensions"])
def test_what_is_written_is_read(tmp_path: Path, group: str | None) -> None:
    profile = MEASURED
    if group is not None:
        measures = {ONLY_GROUP: MEASURED.measures[group]}
        profile = replace(MEASURED, groups={ONLY_GROUP: MEASURED.groups[group]}, measures=measures)
    path = tmp_path / "new" / "folder" / "profile.yaml"
    profile.write(path)
    assert Profile.read(path) == profile
    assert [file.name for file in path.parent.iterdir()] == ["profile.yaml"]


def test_the_first_block_can_be_pasted_into_a_recipe(tmp_path: Path) -> None:
    MEASURED.write(tmp_path / "profile.yaml")
    text = (tmp_path / "profile.yaml").read_text()
    block = text[text.index("train_ds:") : text.index("settings:")]
    assert block.strip() == MEASURED.block().strip()
    assert "    bucket_duration_bins: [[16, 12], [16, 24]]\n    bucket_batch_size: [96, 80]\n" in block
    recipe = OmegaConf.create("data:\n" + textwrap.indent(block, "  ") + "  validation_ds: {batch_size: 1}\n")
    assert recipe.data.train_ds.audio == {"bucket_duration_bins": [4, 8.5], "bucket_batch_size": [32, 14]}
    assert recipe.data.validation_ds.batch_size == 1


def test_sizes_have_readable_comments(tmp_path: Path) -> None:
    MEASURED.write(tmp_path / "profile.yaml")
    lines = (tmp_path / "profile.yaml").read_text().splitlines()
    assert lines[0].startswith("# ")
    assert f"  memory_budget: {70 * GIB}  # 70.0 GiB" in lines
    assert f"    confirmed_peak: {69 * GIB + 1}  # 69.0 GiB" in lines


def test_a_writer_that_dies_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "profile.yaml"
    MEASURED.write(path)
    before = path.read_text()

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(ConfigError, match=r"profile\.yaml: the file cannot be written: No space left on device"):
        MEASURED.with_batch_sizes({"audio": [1, 1]}).write(path)
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["profile.yaml"]


def test_batch_sizes_are_lowered_with_the_reason() -> None:
    event = Event("2030-01-02T03:04:05+00:00", 18, "text: bucket 1 [16, 12]", "above the watermark", 96, 90)
    lowered = MEASURED.with_batch_sizes({"text": [90, 80]}, event)
    assert lowered.groups["text"].bucket_batch_size == (90, 80)
    assert lowered.groups["audio"] is MEASURED.groups["audio"]
    assert lowered.events == (*MEASURED.events, event)
    assert lowered.measures == MEASURED.measures
    with pytest.raises(ValueError, match="'text' has 2 bins, not 1"):
        MEASURED.with_batch_sizes({"text": [90]})


def test_lines_give_peaks_and_times() -> None:
    line = MemoryLine(floor=100.0, intercept=10.0, slope=20.0)
    assert [line.peak(n) for n in (1, 4, 5)] == [100.0, 100.0, 110.0]
    assert TimeLine(0.5, 0.25).seconds(4) == 1.5


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"finger_print": {}}, ": profile.finger_print: there is no such key; did you mean 'fingerprint'?"),
        ({"settings": [1]}, "settings: [1] cannot be used; give a mapping, or null."),
        ({"epoch_seconds": "long"}, "epoch_seconds: 'long' cannot be used; give a number, or null."),
        ({"events": {}}, "events: {} cannot be used; give a list, or null."),
        ({"events": [{"from": 4, "to": 3}]}, "events.0.step: None cannot be used"),
        ({"events": [{"step": None}]}, "events.0.from: None cannot be used; give a whole number from 0."),
        ({"measures": [1]}, "measures of each group of train_ds are needed"),
        ({"measures": {"audio": [], "text": 1}}, "measures.audio: the measures are of other bins"),
        ({"measures": {"audio": [3], "text": []}}, "measures.audio.0: 3 cannot be used; give a mapping."),
        (
            {"measures": {"audio": [{"bin": 4}], "text": []}},
            "audio.0.batch_size: None cannot be used",
        ),
        (
            {"measures": {"audio": [{"bin": 4, "batch_size": 1, "predicted_peak": 1, "time": {}}], "text": []}},
            "measures.audio.0.time.overhead: None cannot be used; give a number.",
        ),
    ],
)
def test_a_damaged_part_is_reported_in_one_sentence(tmp_path: Path, changed: dict, sentence: str) -> None:
    path = tmp_path / "profile.yaml"
    MEASURED.write(path)
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changed))
    with pytest.raises(ConfigError) as error:
        Profile.read(path)
    assert str(error.value).startswith(str(path))
    assert sentence in str(error.value)


def test_a_group_of_one_batch_size_is_written_as_the_recipe_has_it(tmp_path: Path) -> None:
    groups = {"audio": Buckets((20.0,), (16,), "max_duration"), "text": Buckets((4.0, 8.0), (9, 5))}
    Profile(groups).write(tmp_path / "p.yaml")
    assert Profile.read(tmp_path / "p.yaml").groups == groups
    train_ds = yaml.safe_load((tmp_path / "p.yaml").read_text())["train_ds"]
    assert train_ds["audio"] == {"max_duration": 20, "batch_size": 16}
    packed = {"a": Buckets((512.0,), (64,), "row_tokens"), "b": Buckets(((512.0, 128.0),), (8,), "row_tokens")}
    Profile(packed).write(tmp_path / "packed.yaml")
    assert Profile.read(tmp_path / "packed.yaml").groups == packed
    train_ds = yaml.safe_load((tmp_path / "packed.yaml").read_text())["train_ds"]
    assert train_ds["a"] == {"packing": True, "row_tokens": 512, "batch_size": 64}
    assert train_ds["b"] == {"packing": True, "row_tokens": [512, 128], "batch_size": 8}
    alone = {"": Buckets((512.0,), (64,), "max_tokens")}
    Profile(alone).write(tmp_path / "alone.yaml")
    assert Profile.read(tmp_path / "alone.yaml").groups == alone


@pytest.mark.parametrize(
    ("group", "sentence"),
    [
        ("batch_size: 4", "batch_size: is for examples of any length up to a bound"),
        ("batch_size: 4\n  max_duration: -1", "give one positive number as max_duration or max_tokens"),
        ("batch_size: 4\n  row_tokens: -1", "row_tokens: -1 cannot be used"),
        ("row_tokens: 64", "batch_size: None cannot be used"),
        ("batch_size: 0\n  max_tokens: 9", "batch_size: 0 cannot be used; give a whole number from 1."),
    ],
)
def test_one_batch_size_that_cannot_be(tmp_path: Path, group: str, sentence: str) -> None:
    (tmp_path / "p.yaml").write_text(f"train_ds:\n  {group}\n")
    with pytest.raises(ConfigError) as error:
        Profile.read(tmp_path / "p.yaml")
    assert sentence in str(error.value)
