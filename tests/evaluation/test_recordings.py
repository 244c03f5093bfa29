"""Recordings on the page: as many as its budget has room for, and a reason for each that is left out."""

from __future__ import annotations

import base64
import io
from dataclasses import replace

import numpy as np
import pytest
import soundfile

from nemo_emmett.errors import DataError
from nemo_emmett.evaluation.recordings import Recordings, is_playable
from nemo_emmett.evaluation.results import Translation

from .samples import SAMPLING_RATE, tone


def spoken(path, duration: float | None = 0.1, modality: str = "audio") -> Translation:
    audio_path = None if path is None else str(path)
    return Translation("test", "1", modality, "en", "de", "a", "b", "c", audio_path=audio_path, duration=duration)


def test_a_recording_is_on_the_page_sample_by_sample(tmp_path):
    path = tone(tmp_path / "a.wav", hertz=300)
    kind, content = Recordings().recording(spoken(path)).uri.split(";base64,")
    samples, sampling_rate = soundfile.read(io.BytesIO(base64.b64decode(content)), dtype="int16")
    assert (kind, sampling_rate) == ("data:audio/flac", SAMPLING_RATE)
    assert np.array_equal(samples, soundfile.read(path, dtype="int16")[0])


def test_text_has_no_recording(tmp_path):
    assert Recordings().recording(spoken(None, None, modality="text")) is None


def test_what_the_budget_has_no_room_for_is_left_out_and_counted(tmp_path):
    long, short = tone(tmp_path / "long.wav", 300, seconds=1.0), tone(tmp_path / "short.wav", 300)
    sizes = [len(Recordings().recording(spoken(path, None)).uri) for path in (long, short)]
    assert sizes[0] > sizes[1]
    recordings = Recordings(budget=sum(sizes))
    assert recordings.recording(spoken(long, None)).uri is not None
    left_out = recordings.recording(spoken(long, None))
    assert left_out.uri is None
    assert "MB of recordings already" in left_out.missing
    assert recordings.recording(spoken(short, None)).uri is not None
    assert recordings.left_out == 1


@pytest.mark.parametrize(
    ("duration", "reason"), [(31.0, "longer than 30 s"), (0.4, "somewhere in a longer file"), (None, None), (0.9, None)]
)
def test_a_recording_that_is_long_or_only_a_part_of_its_file_is_not_played(tmp_path, duration, reason):
    one = spoken(tone(tmp_path / "a.wav", 300, seconds=1.0), duration)
    assert is_playable(one) == (reason is None)
    recording = Recordings().recording(one)
    assert (recording.uri is None) == (reason is not None)
    assert reason is None or reason in recording.missing


def test_a_recording_that_is_not_at_hand_says_so(tmp_path):
    assert "is not there" in Recordings().recording(spoken(tmp_path / "gone.wav")).missing
    assert "no file" in Recordings().recording(spoken(None)).missing
    assert not is_playable(spoken(None))


def test_a_file_that_is_no_recording_is_named(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"not audio")
    with pytest.raises(DataError, match=r"recording .*a\.wav of the test set cannot be read"):
        Recordings().recording(spoken(tmp_path / "a.wav"))


def test_a_segment_of_a_talk_is_played_from_where_it_begins(tmp_path):
    path = tmp_path / "talk.wav"
    soundfile.write(path, np.arange(48_000, dtype=np.int16), 16_000)  # a sample is its own number
    segment = replace(spoken(path, 0.5), audio_start=1.25)
    assert is_playable(segment)
    samples, rate = soundfile.read(
        io.BytesIO(base64.b64decode(Recordings().recording(segment).uri.partition(",")[2])), dtype="int16"
    )
    assert rate == 16_000
    assert samples.tolist() == np.arange(20_000, 28_000, dtype=np.int16).tolist()
