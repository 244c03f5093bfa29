"""Captions: which fall into which split, which are spoken, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import soundfile

from nemo_emmett.corpora import captions
from nemo_emmett.corpora.captions import CaptionsConfig, prepare_captions
from nemo_emmett.errors import ConfigError, DataError

TRAIN = {
    "en": ["A dog runs.", "Two men sit.", "A very long caption of many words.", "A cat sleeps.", "", "Four birds fly."],
    "de": ["Ein Hund rennt.", "Zwei Männer sitzen.", "Lang.", "Eine Katze schläft.", "Leer.", "Vier Vögel fliegen."],
}
VAL = {
    "en": ["A man walks.", "A cat sleeps.", "Three girls play."],
    "de": ["Ein Mann geht.", "Ein Kater schläft.", "Drei Mädchen spielen."],
}
SPLITS = ("train", "dev", "test")
CONFIG = CaptionsConfig(languages=("en", "de"), max_words=5, spoken_train_captions=2, dev_captions=1)


def write_source(folder: Path, train: dict[str, list[str]] = TRAIN, val: dict[str, list[str]] = VAL) -> Path:
    folder.mkdir()
    for split, sides in {"train": train, "val": val}.items():
        for language, lines in sides.items():
            (folder / f"{split}.{language}").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_source(tmp_path_factory.mktemp("captions") / "source")


@pytest.fixture(scope="module")
def out(source) -> Path:
    folder = source.with_name("out")
    prepare_captions(source, folder, CONFIG, num_jobs=1, show_progress=False)
    return folder


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_validation_set_becomes_dev_and_test(out):
    assert lines_of(out / "text" / "dev.en") == ["A man walks."]
    assert lines_of(out / "text" / "test.en") == ["A cat sleeps.", "Three girls play."]
    assert lines_of(out / "text" / "test.de") == ["Ein Kater schläft.", "Drei Mädchen spielen."]


def test_train_captions_that_are_long_empty_or_held_out_are_left_out_in_every_language(out):
    # The third is long in English alone, the fourth reads in English as one of the validation set, the fifth is empty.
    assert lines_of(out / "text" / "train.en") == ["A dog runs.", "Two men sit.", "Four birds fly."]
    assert lines_of(out / "text" / "train.de") == ["Ein Hund rennt.", "Zwei Männer sitzen.", "Vier Vögel fliegen."]


def test_no_train_caption_is_a_leak(tmp_path):
    train = {
        "en": ["a man, walks", "Three old girls play in the wide park, and a dog barks.", "A dog runs."],
        "de": ["Es geht wer.", "Drei Mädchen spielen, und ein Hund bellt.", "Ein Hund rennt."],
    }
    val = {"en": ["A man walks.", "Three old girls play in the wide park."], "de": ["Ein Mann geht.", "Drei Mädchen."]}
    source = write_source(tmp_path / "source", train, val)
    config = dataclasses.replace(CONFIG, max_words=None)
    prepare_captions(source, tmp_path / "out", config, num_jobs=1, show_progress=False)
    assert lines_of(tmp_path / "out" / "text" / "train.en") == ["A dog runs."]


def test_as_many_train_captions_are_spoken_as_asked_and_all_that_are_held_out(out):
    assert {path.name for path in (out / "speech").iterdir()} == {"train.en.jsonl", "dev.en.jsonl", "test.en.jsonl"}
    spoken = {split: [json.loads(line) for line in lines_of(out / "speech" / f"{split}.en.jsonl")] for split in SPLITS}
    assert [entry["text"] for entry in spoken["train"]] == ["A dog runs.", "Two men sit."]
    assert [(entry["id"], entry["line"]) for entry in spoken["test"]] == [("test-en-00002", 2), ("test-en-00003", 3)]
    assert spoken["dev"][0]["translations"] == {"de": "Ein Mann geht."}
    for entry in (entry for entries in spoken.values() for entry in entries):
        samples, rate = soundfile.read(out / "speech" / entry["audio_filepath"])
        assert (rate, len(samples) / rate) == (16_000, entry["duration"])
        assert abs(samples).max() > 0.03  # something is heard


def test_the_same_source_gives_the_same_bytes_on_two_processes(source, out, tmp_path):
    prepare_captions(source, tmp_path / "again", CONFIG, num_jobs=2, show_progress=False)
    assert bytes_of(tmp_path / "again") == bytes_of(out)


def test_finished_captions_are_left_alone(source, out):
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert not prepare_captions(source, out, CONFIG, show_progress=False).made_now
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == times


def test_captions_of_another_source_or_configuration_are_refused(out, tmp_path):
    other = write_source(tmp_path / "other", train={**TRAIN, "en": [*TRAIN["en"][:-1], "Five birds fly."]})
    with pytest.raises(DataError, match=r"holds a captions corpus that differs in source \(sha256:\w{16} there, "):
        prepare_captions(other, out, CONFIG)
    config = dataclasses.replace(CONFIG, seed=1, spoken_train_captions=1)
    source = out.with_name("source")
    with pytest.raises(DataError, match=r"differs in spoken_train_captions \(2 there, 1 asked\), seed \(0 there, 1 a"):
        prepare_captions(source, out, config)


def test_a_missing_file_is_named(source, tmp_path):
    config = dataclasses.replace(CONFIG, languages=("en", "de", "fr"))
    with pytest.raises(DataError, match=r"train\.fr' does not exist; give the folder of Multi30k's raw text"):
        prepare_captions(source, tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


def test_other_line_ends_and_a_byte_order_mark_are_no_part_of_a_caption(source, out, tmp_path):
    windows = write_source(tmp_path / "windows")
    for path in windows.iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert (
        captions._read_lines(windows, "train", ("en", "de"))
        == captions._read_lines(source, "train", ("en", "de"))
        == TRAIN
    )


def test_what_is_not_utf_8_is_named(tmp_path):
    source = write_source(tmp_path / "source")
    (source / "train.de").write_bytes("Zwei Männer".encode("latin-1"))
    with pytest.raises(DataError, match=r"train\.de': line 1 is not UTF-8"):
        prepare_captions(source, tmp_path / "out", CONFIG)


def test_files_of_unequal_length_are_named_with_their_lengths(tmp_path):
    source = write_source(tmp_path / "source", val={**VAL, "de": VAL["de"][:2]})
    with pytest.raises(DataError, match=r"val\.de' has 2 lines and val\.en 3; captions must be line-aligned"):
        prepare_captions(source, tmp_path / "out", CONFIG)


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("dev_captions", 3, r"captions\.dev_captions: 3 are asked for and 2 can be had; lower it or raise max_words"),
        ("train_captions", 4, r"captions\.train_captions: 4 are asked for and 3 can be had"),
        ("variants", ("anika1",), r"captions\.variants: eSpeak NG has no voice variant 'anika1'"),
    ],
)
def test_what_the_source_or_the_library_does_not_have_is_refused(field, value, sentence, source, tmp_path):
    with pytest.raises(ConfigError, match=sentence):
        prepare_captions(source, tmp_path / "out", dataclasses.replace(CONFIG, **{field: value}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        (
            "spoken_languages",
            ["pl"],
            r"captions\.spoken_languages: there is no 'pl' in the captions; choose among en, ",
        ),
        ("spoken_languages", ["es"], r"captions\.spoken_languages: 'es' is not among languages; add it there"),
        ("max_words", 0, r"captions\.max_words: 0 cannot be used; give a whole number from 1"),
        ("speed", (190, 140), r"captions\.speed: 140 cannot be used; give a whole number from 190 to 450"),
    ],
)
def test_impossible_configurations_are_refused(field, value, sentence):
    with pytest.raises(ConfigError, match=sentence):
        CaptionsConfig(**{field: value})
