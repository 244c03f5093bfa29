"""Speech manifests: the cuts are NeMo's, and one bad record costs one record."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from lhotse import CutSet
from nemo.collections.common.data.lhotse.nemo_adapters import LazyNeMoIterator, LazyNeMoTarredIterator

from nemo_emmett.data.io.skipped_records import SkippedRecords
from nemo_emmett.data.readers.lhotse_manifest import LhotseManifest
from nemo_emmett.data.readers.nemo_manifest import NeMoManifest
from nemo_emmett.data.readers.nemo_tarred import NeMoTarredManifest
from nemo_emmett.errors import ConfigError

ORIGIN = ("manifest_origin", "manifest_place")


def comparable(cut) -> dict:
    """A cut as a dict, without what only our readers attach."""
    data = cut.to_dict()
    data["custom"] = {k: v for k, v in data["custom"].items() if k not in (*ORIGIN, "tar_origin")}
    return data


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
    ledger = SkippedRecords()
    assert len(list(NeMoManifest(str(manifest), ledger))) == 2
    assert ledger.read_count == 10  # the blank line is none
    assert [(r.place, r.cause) for r in ledger.first] == [
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
    ledger = SkippedRecords()
    assert [Path(c.id).name for c in NeMoManifest(str(manifest), ledger)] == ["good"]
    assert [(r.place, r.cause) for r in ledger.first] == [
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


# Tarred


@pytest.fixture
def tar(write_tone, write_manifest, tmp_path):
    """Write shard ``number`` of a tarred dataset with these members; the manifest names them, and ``extra`` records."""

    def write(number: int, members: Sequence[str], extra: Sequence = (), folder: str = ".") -> None:
        (tmp_path / folder).mkdir(exist_ok=True)
        with tarfile.open(tmp_path / folder / f"audio_{number}.tar", "w") as archive:
            for i, name in enumerate(members):
                path = tmp_path / name
                if not path.exists():
                    write_tone(name, seconds=1.0 + 0.25 * i, hertz=100 * (i + 2))
                archive.add(path, arcname=name)
        records = [
            {"audio_filepath": name, "duration": 1.0 + 0.25 * i, "text": name, "shard_id": number}
            for i, name in enumerate(members)
        ]
        write_manifest(f"{folder}/manifest_{number}.json", [*records, *extra])

    return write


def test_tarred_cuts_equal_those_of_nemo(tar, tmp_path) -> None:
    tar(0, ["a.wav", "b.wav"])
    tar(1, ["c.wav"])
    paths = f"{tmp_path}/manifest__OP_0..1_CL_.json", f"{tmp_path}/audio__OP_0..1_CL_.tar"
    ours, nemos = list(NeMoTarredManifest(*paths, SkippedRecords())), list(LazyNeMoTarredIterator(*paths))
    assert [comparable(c) for c in ours] == [comparable(c) for c in nemos]
    assert [c.id for c in ours] == ["a.wav", "b.wav", "c.wav"]
    assert np.array_equal(ours[1].load_audio(), nemos[1].load_audio())


def test_one_manifest_for_several_tar_files(tar, tmp_path, write_manifest) -> None:
    tar(0, ["a.wav", "b.wav"])
    tar(1, ["c.wav"])
    lines = [line for i in (0, 1) for line in (tmp_path / f"manifest_{i}.json").read_text().splitlines()]
    stray = json.dumps({"audio_filepath": "d.wav", "duration": 1.0, "shard_id": 7})
    manifest = write_manifest("whole.json", ["broken", *lines, stray])
    ledger = SkippedRecords()
    cuts = NeMoTarredManifest(str(manifest), f"{tmp_path}/audio__OP_0..1_CL_.tar", ledger)
    assert [c.id for c in cuts] == ["a.wav", "b.wav", "c.wav"]
    assert ledger.causes() == {"not JSON": 1, "no such shard_id": 1}


def test_segments_in_tar_files_equal_those_of_nemo(tar, tmp_path) -> None:
    segments = [
        {"audio_filepath": "long-sub1.wav", "offset": 0.0, "duration": 0.5, "text": "x"},
        {"audio_filepath": "long-sub2.wav", "offset": 0.5, "duration": 0.5, "text": "y"},
    ]
    tar(0, ["a.wav"])
    with tarfile.open(tmp_path / "audio_0.tar", "w") as archive:
        archive.add(tmp_path / "a.wav", arcname="long.wav")
    manifest = tmp_path / "manifest_0.json"
    manifest.write_text("".join(json.dumps({**s, "shard_id": 0}) + "\n" for s in segments))
    paths = str(manifest), str(tmp_path / "audio_0.tar")
    ours, nemos = list(NeMoTarredManifest(*paths, SkippedRecords())), list(LazyNeMoTarredIterator(*paths))
    assert [c.supervisions[0].text for c in ours] == ["x", "y"]
    assert all(np.array_equal(a.load_audio(), b.load_audio()) for a, b in zip(ours, nemos, strict=True))


def test_bad_records_in_tar_files(tar, tmp_path) -> None:
    (tmp_path / "empty.wav").touch()
    (tmp_path / "noise.wav").write_bytes(b"no audio at all " * 100)
    extra = ["{not json", {"audio_filepath": "gone.wav", "duration": 1.0}]
    tar(0, ["a.wav", "empty.wav", "noise.wav", "b.wav"], extra)
    with tarfile.open(tmp_path / "audio_0.tar", "a") as archive:
        archive.add(tmp_path / "a.wav", arcname="unnamed.wav")
    ledger = SkippedRecords()
    cuts = NeMoTarredManifest(str(tmp_path / "manifest_0.json"), str(tmp_path / "audio_0.tar"), ledger)
    assert [c.id for c in cuts] == ["a.wav", "b.wav"]
    assert {(r.place, r.cause) for r in ledger.first} == {
        ("line 2", "empty audio"),
        ("line 3", "unreadable audio"),
        ("line 5", "not JSON"),
        ("line 6", "missing audio"),
        ("unnamed.wav", "not in the manifest"),
    }


def test_a_subset_manifest_is_no_fault_when_said_so(tar, tmp_path) -> None:
    tar(0, ["a.wav", "b.wav"])
    manifest = tmp_path / "manifest_0.json"
    manifest.write_text(manifest.read_text().splitlines()[0] + "\n")
    ledger = SkippedRecords()
    paths = str(manifest), str(tmp_path / "audio_0.tar")
    cuts = NeMoTarredManifest(*paths, ledger, skip_missing_manifest_entries=True)
    assert [c.id for c in cuts] == ["a.wav"]
    assert ledger.count() == 0


def test_a_tar_file_that_breaks_off_keeps_what_came_before(tar, tmp_path) -> None:
    tar(0, ["a.wav", "b.wav"])
    path = tmp_path / "audio_0.tar"
    path.write_bytes(path.read_bytes()[:40000])  # a.wav takes 32044 bytes and a header
    ledger = SkippedRecords()
    assert [c.id for c in NeMoTarredManifest(str(tmp_path / "manifest_0.json"), str(path), ledger)] == ["a.wav"]
    assert ledger.causes() == {"unreadable tar": 1, "missing audio": 1}


def test_shards_that_do_not_match_are_named(tar, tmp_path) -> None:
    tar(0, ["a.wav"])
    tar(1, ["b.wav"])
    with pytest.raises(ConfigError, match=r"shards \[0, 1\], tarred_audio_filepaths \[0\]"):
        NeMoTarredManifest(f"{tmp_path}/manifest__OP_0..1_CL_.json", f"{tmp_path}/audio_0.tar", SkippedRecords())


# lhotse


def test_lhotse_cuts_and_bad_lines(speech, tmp_path) -> None:
    cuts = CutSet(list(LazyNeMoIterator(str(speech(3)))))
    path = tmp_path / "cuts.jsonl.gz"
    cuts.to_file(path)
    assert [comparable(c) for c in LhotseManifest(str(path), SkippedRecords())] == [comparable(c) for c in cuts]

    plain = tmp_path / "cuts.jsonl"
    cuts.to_file(plain)
    with plain.open("a") as file:
        file.write('nothing\n{"id": "a", "type": "MonoCut"}\n{"id": "b"}\n')
    ledger = SkippedRecords()
    assert len(list(LhotseManifest(str(plain), ledger))) == 3
    assert ledger.causes() == {"not JSON": 1, "not a lhotse cut": 2}
