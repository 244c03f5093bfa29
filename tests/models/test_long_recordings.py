"""Recordings that are too long to be translated at once: their parts, and `translate`."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile

from nemo_emmett import audio_file
from nemo_emmett.errors import ConfigError, DataError
from nemo_emmett.models import SALMT5
from nemo_emmett.models.exported import chunk_seconds_of
from nemo_emmett.models.inputs import Segment, Waveform, load_recordings, split_recording
from nemo_emmett.prompts.answers import Answer

from .backbones import model_config
from .test_generation import batches_of, livelier

RATE = 16000
PAUSES = (0.7, 1.5, 2.6, 3.3, 4.4)
"""Middles of pauses of 0.3 s, in seconds."""


def write_speech(path: Path, rate: int = RATE, channels: int = 1, seconds: float = 5.0) -> Path:
    """Noise of changing pitch with pauses."""
    samples = np.random.default_rng(0).normal(scale=0.1, size=(int(seconds * rate), channels))
    for number, pause in enumerate(PAUSES):
        samples[int((pause - 0.15) * rate) : int((pause + 0.15) * rate)] = 0
        samples[int((pause + 0.15) * rate) :] *= 1 + number % 2
    soundfile.write(path, samples.clip(-1, 1), rate)
    return path


@pytest.fixture(scope="module")
def salm_t5(folder, tiny_asr) -> SALMT5:
    return livelier(SALMT5(model_config("t5", folder, tiny_asr, max_new_tokens=6)).eval())


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> Path:
    return write_speech(tmp_path_factory.mktemp("long") / "long.wav")


@pytest.mark.parametrize(("rate", "channels", "kind"), [(16000, 1, "wav"), (44100, 2, "flac"), (11025, 1, "wav")])
def test_parts_are_the_recording_cut_in_its_pauses(tmp_path, rate, channels, kind) -> None:
    path = write_speech(tmp_path / f"a.{kind}", rate, channels)
    parts = split_recording(path, 1.5)
    assert parts[0].start == 0.0
    assert all(part.duration <= 1.5 and part.path == path for part in parts)
    ends = [round((part.start + part.duration) * rate) for part in parts]
    assert [round(part.start * rate) for part in parts] == [0, *ends[:-1]]
    assert ends[-1] == 5 * rate
    for end in ends[:-1]:
        assert min(abs(end / rate - pause) for pause in PAUSES) <= 0.06
    samples = [load_recordings([part], rate)[0][0].numpy() for part in parts]
    whole = soundfile.read(path, dtype="float32", always_2d=True)[0].mean(1)
    np.testing.assert_allclose(np.concatenate(samples), whole, atol=1e-6)


def test_parts_of_a_segment_are_within_it(recording) -> None:
    parts = split_recording(Segment(recording, 1.0, 2.0), 1.5)
    assert parts[0].start == 1.0
    assert parts[-1].start + parts[-1].duration == pytest.approx(3.0)
    assert all(first.start + first.duration == pytest.approx(second.start) for first, second in pairwise(parts))
    assert len(parts) == 2


def test_parts_of_a_waveform_are_those_of_its_file(recording) -> None:
    waveform = Waveform(soundfile.read(recording, dtype="float32")[0], RATE)
    parts = split_recording(waveform, 1.5)
    assert [part.seconds for part in parts] == pytest.approx(
        [part.duration for part in split_recording(recording, 1.5)]
    )
    np.testing.assert_array_equal(np.concatenate([part.samples for part in parts]), waveform.samples)
    assert split_recording(waveform, 5.0)[0].seconds == 5.0


def test_what_is_short_enough_is_not_read(recording, monkeypatch) -> None:
    monkeypatch.setattr(audio_file, "load_samples", None)
    assert split_recording(recording, 5.0) == [recording]
    assert split_recording(Segment(recording, 4.0), 1.0) == [Segment(recording, 4.0)]


def test_a_long_recording_is_never_read_as_a_whole(tmp_path, monkeypatch) -> None:
    path = write_speech(tmp_path / "a.wav", rate=1000, seconds=200.0)
    lengths, original = [], audio_file.load_samples

    def spy(*args, **window):
        samples = original(*args, **window)
        lengths.append(samples.shape[1] / 1000)
        return samples

    monkeypatch.setattr(audio_file, "load_samples", spy)
    assert len(split_recording(path, 30.0)) >= 7
    assert sum(lengths) == 200.0
    assert max(lengths) == 60.0


def test_a_long_recording_is_translated_as_its_parts(salm_t5, recording, tmp_path, monkeypatch) -> None:
    def heard(self, batch, *_) -> list[Answer]:
        """What was heard, as text."""
        if "audios" not in batch:
            return [Answer("a text")] * len(batch["context_ids"])
        rows = zip(batch["audios"].double(), batch["audio_lens"].tolist(), strict=True)
        return [Answer(f"{length}:{row[:length].square().sum():.6f}") for row, length in rows]

    monkeypatch.setattr(SALMT5, "answer_batch", heard)
    parts = split_recording(recording, 1.5)
    samples = soundfile.read(recording, dtype="int16")[0]
    files = []
    for number, part in enumerate(parts):
        files.append(tmp_path / f"{number}.wav")
        end = round((part.start + part.duration) * RATE)
        soundfile.write(files[-1], samples[round(part.start * RATE) : end], RATE)
    of_files = salm_t5.translate(files, "en", "de")
    assert len(set(of_files)) == len(parts) > 3
    given, targets = ["six", recording, files[0], recording], ["de", "de", "de", "ja"]
    found = salm_t5.translate(given, "en", targets, chunk_seconds=1.5)
    assert found == ["a text", " ".join(of_files), of_files[0], "".join(of_files)]
    (whole,) = salm_t5.translate([recording], "en", "de")
    assert whole.startswith(f"{5 * RATE}:")
    assert salm_t5.translate([recording], "en", "de", chunk_seconds=float("inf")) == [whole]


def test_the_longest_part_is_that_of_the_training(salm_t5, recording, monkeypatch) -> None:
    seen = batches_of(salm_t5, monkeypatch)
    monkeypatch.setattr(salm_t5, "cfg", {**salm_t5.cfg, "training": {"max_duration": 1.5}})
    salm_t5.translate([recording], "en", "de")
    lens = [length for batch in seen for length in batch["audio_lens"].tolist()]
    assert sum(lens) == 5 * RATE
    assert max(lens) <= 1.5 * RATE


@pytest.mark.parametrize(
    ("training", "seconds"),
    [({"max_duration": 20}, 20.0), ({"max_duration": 0.5}, 1.0), ({}, 30.0), (None, 30.0)]
    + [({"max_duration": value}, 30.0) for value in (float("nan"), float("inf"), -1.0, True, "20", None)],
)
def test_chunk_seconds_of_a_config(training, seconds) -> None:
    assert chunk_seconds_of({"training": training}) == seconds


def test_long_recordings_that_cannot_be_read_are_named(salm_t5, tmp_path) -> None:
    samples = np.zeros(5 * RATE, np.float32)
    samples[-1] = np.nan
    soundfile.write(tmp_path / "nan.wav", samples, RATE, subtype="FLOAT")
    with pytest.raises(DataError, match=r"nan\.wav' holds values that are not numbers"):
        salm_t5.translate([tmp_path / "nan.wav"], "en", "de", chunk_seconds=2.0)
    cut_off = write_speech(tmp_path / "short.wav")
    cut_off.write_bytes(cut_off.read_bytes()[:100_000])
    with pytest.raises(DataError, match=r"short\.wav' breaks off"):
        salm_t5.translate([cut_off], "en", "de", chunk_seconds=2.0)
    with pytest.raises(ConfigError, match=r"chunk_seconds: 0\.5 is too short"):
        salm_t5.translate(["six"], "en", "de", chunk_seconds=0.5)
