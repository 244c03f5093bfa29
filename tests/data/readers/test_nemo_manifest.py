"""NeMo manifests: the cuts are NeMo's, and one bad record costs one record."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from nemo.collections.common.data.lhotse.nemo_adapters import LazyNeMoIterator

from nemo_emmett.data.io.skipped_records import SkippedRecords
from nemo_emmett.data.readers.nemo_manifest import NeMoManifest

from .comparing import comparable


def cut_in_half(path: Path) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


@pytest.mark.parametrize("sampling_rate", [16000, None])
def test_cuts_equal_those_of_nemo(speech, sampling_rate) -> None:
    manifest = str(speech(4, sampling_rate=sampling_rate))
    ours = [comparable(cut) for cut in NeMoManifest(manifest, SkippedRecords())]
    assert ours == [comparable(cut) for cut in LazyNeMoIterator(manifest)]
    assert len(ours) == 4


def test_segments_of_a_recording_equal_those_of_nemo(write_tone, write_manifest) -> None:
    record = {"audio_filepath": str(write_tone("long.wav", seconds=3)), "text": "one"}
    segments = [{**record, "offset": 0.5, "duration": 1.0}, {**record, "offset": 2.0, "duration": 1.0}]
    manifest = str(write_manifest("m.json", segments))
    ours = list(NeMoManifest(manifest, SkippedRecords()))
    assert [comparable(c) for c in ours] == [comparable(c) for c in LazyNeMoIterator(manifest)]
    assert [(c.start, c.duration) for c in ours] == [(0.5, 1.0), (2.0, 1.0)]


@pytest.mark.parametrize("offset", [0.0, 1.5, 2.0])
def test_segments_keep_their_audio_where_the_manifest_tells_the_sampling_rate(
    write_tone, write_manifest, offset
) -> None:
    record = {"audio_filepath": str(write_tone("long.wav", seconds=3)), "duration": 1.0, "offset": offset, "text": "1"}
    (with_rate,) = NeMoManifest(str(write_manifest("a.json", [{**record, "sampling_rate": 16000}])), SkippedRecords())
    (opened,) = NeMoManifest(str(write_manifest("b.json", [record])), SkippedRecords())
    assert (with_rate.start, with_rate.duration) == (opened.start, opened.duration) == (offset, 1.0)
    assert np.array_equal(with_rate.load_audio(), opened.load_audio())


def test_a_relative_path_is_relative_to_the_manifest(write_tone, write_manifest) -> None:
    path = write_tone("a.wav")
    manifest = write_manifest("m.json", [{"audio_filepath": "a.wav", "duration": 1.0, "sampling_rate": 16000}])
    (cut,) = NeMoManifest(str(manifest), SkippedRecords())
    assert cut.recording.sources[0].source == str(path)


def test_bad_manifest_records(write_tone, write_manifest) -> None:
    good = {"audio_filepath": str(write_tone("a.wav")), "duration": 1.0, "text": "one", "sampling_rate": 16000}
    manifest = write_manifest(
        "m.json",
        [
            good,
            "{not json",
            "[1]",
            {"audio_filepath": "a.wav"},
            {"duration": 1.0},
            {**good, "duration": -1},
            {**good, "duration": "1 s"},
            {**good, "offset": -2},
            good,
        ],
    )
    with manifest.open("ab") as file:
        file.write(b'{"audio_filepath": "\xff"}\n\n')
    skipped = SkippedRecords()
    assert len(list(NeMoManifest(str(manifest), skipped))) == 2
    assert skipped.read_count == 10  # the blank line is none
    assert [(r.place, r.cause) for r in skipped.first] == [
        ("line 2", "not JSON"),
        ("line 3", "not a JSON object"),
        ("line 4", "no duration"),
        ("line 5", "no audio_filepath"),
        ("line 6", "invalid duration"),
        ("line 7", "invalid duration"),
        ("line 8", "invalid offset"),
        ("line 10", "not UTF-8"),
    ]


def test_audio_opened_for_its_sampling_rate_is_judged_there(write_tone, write_manifest, tmp_path) -> None:
    (tmp_path / "empty.wav").touch()
    (tmp_path / "noise.wav").write_bytes(b"no audio at all " * 100)
    cut_in_half(write_tone("cut.wav"))
    names = ["good", "missing", "empty", "noise", "cut", "short"]
    write_tone("good.wav")
    write_tone("short.wav", seconds=0.5)
    manifest = write_manifest("m.json", [{"audio_filepath": f"{n}.wav", "duration": 1.0} for n in names])
    skipped = SkippedRecords()
    assert [Path(c.id).name for c in NeMoManifest(str(manifest), skipped)] == ["good"]
    assert [(r.place, r.cause) for r in skipped.first] == [
        ("line 2", "missing audio"),
        ("line 3", "empty audio"),
        ("line 4", "unreadable audio"),
        ("line 5", "truncated audio"),
        ("line 6", "truncated audio"),
    ]


def test_a_skipped_record_takes_its_extra_field_with_it(write_tone, write_manifest, write_lines) -> None:
    good = {"audio_filepath": str(write_tone("a.wav")), "duration": 1.0, "sampling_rate": 16000}
    manifest = write_manifest("m.json", [good, {**good, "duration": None}, good])
    extra = [{"type": "text_iter", "name": "question", "path": str(write_lines("q.txt", ["first", "second", "third"]))}]
    cuts = list(NeMoManifest(str(manifest), SkippedRecords(), extra_fields=extra))
    assert [cut.question for cut in cuts] == ["first", "third"]
