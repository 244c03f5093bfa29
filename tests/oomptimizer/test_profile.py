"""Profiles: what is read from them, and how mistakes in them are told."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_emmett.errors import ConfigError
from nemo_emmett.oomptimizer.profile import ONLY_GROUP, Buckets, Profile, as_bins, shown


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
        ("train_ds: {bucket_duration_bins: [1], bucket_batch_size: [0]}", "positive whole numbers is needed, not [0]"),
        ("train_ds: {bucket_duration_bins: [1], bucket_batch_size: [1.5]}", "whole numbers is needed, not [1.5]"),
        ("train_ds: {bucket_duration_bins: [1], bucket_batch_size: [true]}", "whole numbers is needed, not [True]"),
    ],
)
def test_a_profile_that_cannot_be_used_is_told_in_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        Profile.read(path)
    message = str(error.value)
    assert message.startswith(str(path))
    assert sentence in message
    assert "\n" not in message


def test_a_missing_profile_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.yaml: the profile cannot be read: No such file or directory"):
        Profile.read(tmp_path / "gone.yaml")


def test_bins_are_shown_as_one_writes_them() -> None:
    assert shown(as_bins([1, 2.5], "x")) == "[1, 2.5]"
    assert shown(as_bins([[1, 2], [3, 4.5]], "x")) == "[[1, 2], [3, 4.5]]"
