"""Tarred NeMo manifests: the cuts are NeMo's, and one bad record costs one record."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence

import numpy as np
import pytest
from nemo.collections.common.data.lhotse.nemo_adapters import LazyNeMoTarredIterator

from nemo_emmett.data.io.skipped_records import SkippedRecords
from nemo_emmett.data.readers.nemo_tarred import NeMoTarredManifest
from nemo_emmett.errors import ConfigError

from .comparing import comparable


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
    skipped = SkippedRecords()
    cuts = NeMoTarredManifest(str(manifest), f"{tmp_path}/audio__OP_0..1_CL_.tar", skipped)
    assert [c.id for c in cuts] == ["a.wav", "b.wav", "c.wav"]
    assert skipped.causes() == {"not JSON": 1, "no such shard_id": 1}


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
    skipped = SkippedRecords()
    cuts = NeMoTarredManifest(str(tmp_path / "manifest_0.json"), str(tmp_path / "audio_0.tar"), skipped)
    assert [c.id for c in cuts] == ["a.wav", "b.wav"]
    assert {(r.place, r.cause) for r in skipped.first} == {
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
    skipped = SkippedRecords()
    paths = str(manifest), str(tmp_path / "audio_0.tar")
    cuts = NeMoTarredManifest(*paths, skipped, skip_missing_manifest_entries=True)
    assert [c.id for c in cuts] == ["a.wav"]
    assert skipped.count() == 0


def test_a_tar_file_that_breaks_off_keeps_what_came_before(tar, tmp_path) -> None:
    tar(0, ["a.wav", "b.wav"])
    path = tmp_path / "audio_0.tar"
    path.write_bytes(path.read_bytes()[:40000])  # a.wav takes 32044 bytes and a header
    skipped = SkippedRecords()
    assert [c.id for c in NeMoTarredManifest(str(tmp_path / "manifest_0.json"), str(path), skipped)] == ["a.wav"]
    assert skipped.causes() == {"unreadable tar": 1, "missing audio": 1}


def test_shards_that_do_not_match_are_named(tar, tmp_path) -> None:
    tar(0, ["a.wav"])
    tar(1, ["b.wav"])
    with pytest.raises(ConfigError, match=r"shards \[0, 1\], tarred_audio_filepaths \[0\]"):
        NeMoTarredManifest(f"{tmp_path}/manifest__OP_0..1_CL_.json", f"{tmp_path}/audio_0.tar", SkippedRecords())
