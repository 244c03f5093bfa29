"""Records by number: the same examples and the same notes as when the source is streamed."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import pickle
import random
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from lhotse import CutSet, NumpyFilesWriter
from lhotse.cut import Cut
from lhotse.shar import SharWriter
from nemo.collections.common.data.lhotse.nemo_adapters import LazyNeMoIterator

from nemo_emmett.data.config.sources import Source, parse_source
from nemo_emmett.data.io import index as index_module
from nemo_emmett.data.io.audio import AudioFault, load_waveform, with_checked_audio
from nemo_emmett.data.io.sidecar import HIDDEN_FOLDER
from nemo_emmett.data.io.skipped_records import SkippedRecords
from nemo_emmett.data.readers.base import Records, build_indexes
from nemo_emmett.data.readers.examples import ExampleKind
from nemo_emmett.data.readers.random_access import open_records
from nemo_emmett.data.readers.registry import open_source
from nemo_emmett.errors import DataError

FORK = multiprocessing.get_context("fork")
ENGLISH_TO_GERMAN = {"source_lang": "en", "target_lang": "de"}


def source_of(config: dict) -> Source:
    return parse_source({"force_finite": True, **config}, "train_ds.input_cfg.0", allow_commands=True)


def opened(config: dict, skipped: SkippedRecords | None = None, **how) -> Records | None:
    return open_records(source_of(config), skipped or SkippedRecords(), ExampleKind.TRANSLATION, **how)


def positions(records: Records) -> list[tuple[int, int]]:
    return [(shard, number) for shard, size in enumerate(records.shard_sizes) for number in range(size)]


def plain(example) -> object:
    """An example in a form that can be compared; of a cut, with its audio's bytes or path."""
    return example.to_dict() if isinstance(example, Cut) else example


def place_of(cut: Cut) -> tuple[str, int]:
    """The manifest of a cut, and the number of its line."""
    return cut.manifest_origin, int(cut.manifest_place.removeprefix("line "))


def faults(skipped: SkippedRecords) -> Counter:
    return Counter((record.source, record.place, record.cause) for record in skipped.drain().skipped)


def compare_with_the_stream(config: dict, in_order: bool = True) -> tuple[list, Counter]:
    """Check that reading by number, in a random order, gives what the stream gives; returns that and its faults."""
    streamed_skipped, skipped = SkippedRecords(), SkippedRecords()
    streamed = list(open_source(source_of(config), streamed_skipped, ExampleKind.TRANSLATION)[0])
    records = opened(config, skipped)
    found = {}
    for position in random.Random(0).sample(positions(records), len(positions(records))):
        found[position] = records.read(*position)
    ours = [example for position in positions(records) for example in found[position]]
    if not in_order:
        ours, streamed = (sorted(examples, key=place_of) for examples in (ours, streamed))
    assert [plain(example) for example in ours] == [plain(example) for example in streamed]
    assert skipped.read_count == streamed_skipped.read_count
    noted = faults(skipped)
    assert noted == faults(streamed_skipped)
    return streamed, noted


# Text

PAIRS = b"one\ntwo\n\nthree\n\xff\nfour\r\n \nno newline", b"eins\n\n\ndrei\nx\nvier\r\ny\nkein Ende"


def aligned(folder: Path) -> dict:
    for language, text in zip(("en", "de"), PAIRS, strict=True):
        for shard in (0, 1):
            (folder / f"a_{shard}.{language}").write_bytes(text)
    paths = {side: f"{folder}/a__OP_0..1_CL_.{e}" for side, e in (("source_paths", "en"), ("target_paths", "de"))}
    return {"type": "parallel_text", **paths, **ENGLISH_TO_GERMAN}


def aligned_pair(folder: Path) -> dict:
    return {**aligned(folder), "type": "txt_pair"}


def aligned_gzip(folder: Path) -> dict:
    for name, text in zip(("a.en.gz", "a.de"), PAIRS, strict=True):
        (folder / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    paths = {"source_paths": str(folder / "a.en.gz"), "target_paths": str(folder / "a.de")}
    return {"type": "parallel_text", **paths, **ENGLISH_TO_GERMAN}


def many(folder: Path) -> dict:
    for language, text in {"en": PAIRS[0], "de": PAIRS[1], "fr": PAIRS[1].replace(b"eins", b"un")}.items():
        (folder / f"b.{language}").write_bytes(text)
    return {"type": "parallel_text", "paths": {language: f"{folder}/b.{language}" for language in ("en", "de", "fr")}}


TSV = b"one\teins\n\ntwo\n\xff\tx\n\t\nthree\tdrei\r\n  \nfour\tvier"


def tsv(folder: Path) -> dict:
    (folder / "c.tsv").write_bytes(TSV)
    return {"type": "parallel_text", "paths": f"{folder}/c.tsv", **ENGLISH_TO_GERMAN}


def tsv_with_header(folder: Path) -> dict:
    (folder / "d_0.tsv").write_bytes(b"source\tid\ttarget\none\t1\teins\ntwo\n")
    (folder / "d_1.tsv").write_bytes(b"target\tsource\ndrei\tthree\n")
    columns = {"source_column": "source", "target_column": "target"}
    return {"type": "parallel_text", "paths": f"{folder}/d__OP_0..1_CL_.tsv", **columns, **ENGLISH_TO_GERMAN}


def jsonl(folder: Path) -> dict:
    good = b'{"source": "one", "target": "eins", "more": 1}\n'
    bad = b'{\n[1]\n\n{"source": "one"}\n{"source": 1, "target": "x"}\n{"source": "\xff", "target": "x"}\n'
    deep = b"[" * 200_000 + b"\n"
    (folder / "e.jsonl").write_bytes(good + bad + deep + good.rstrip())
    return {"type": "parallel_text", "paths": f"{folder}/e.jsonl", "tags": {"domain": "news"}, **ENGLISH_TO_GERMAN}


@pytest.mark.parametrize(
    ("make", "count", "bad"),
    [
        (aligned, 2 * 4, 2 * 5),
        (aligned_pair, 2 * 4, 2 * 5),
        (aligned_gzip, 4, 5),
        (many, 4 * 6 + 2 * 2, 2 + 3 + 1 + 1),
        (tsv, 3, 3),
        (tsv_with_header, 2, 1),
        (jsonl, 2, 6),
    ],
)
def test_text_by_number_is_the_text_of_the_stream(tmp_path, make, count, bad) -> None:
    examples, noted = compare_with_the_stream(make(tmp_path))
    assert (len(examples), noted.total()) == (count, bad)


def test_tags_are_attached(tmp_path) -> None:
    for (example,) in [opened(jsonl(tmp_path)).read(0, number) for number in (0, 8)]:
        assert example.custom["domain"] == "news"


def test_parallel_files_of_unequal_length_are_an_error(tmp_path, write_lines) -> None:
    paths = {
        "source_paths": str(write_lines("a.en", ["one", "two"])),
        "target_paths": str(write_lines("a.de", ["eins"])),
    }
    with pytest.raises(DataError, match=r"a\.de ends after 1 lines"):
        _ = opened({"type": "parallel_text", **paths, **ENGLISH_TO_GERMAN}).shard_sizes


def test_an_empty_file_has_no_records(tmp_path) -> None:
    (tmp_path / "a.jsonl").touch()
    assert opened({"type": "parallel_text", "paths": f"{tmp_path}/a.jsonl"}).shard_sizes == [0]


# Speech manifests


def bad_lines(good: dict) -> list:
    changes = [{"duration": -1}, {"duration": None}, {"duration": 10**400}, {"duration": True}, {"offset": "x"}]
    skipped = {**good, "_skipme": True}
    return [*({**good, **change} for change in changes), "", "not json", "[1]", {"duration": 1.0}, skipped]


def nemo(folder: Path, write_manifest: Callable, speech: Callable) -> dict:
    good = json.loads(speech(3, sampling_rate=None).read_text().splitlines()[0])
    write_manifest("m_0.json", [good, *bad_lines(good), {**good, "audio_filepath": "gone.wav"}, good])
    with (folder / "m_0.json").open("ab") as file:
        file.write(b'{"audio_filepath": "\xff"}\n')
    shutil.copy(folder / "speech.json", folder / "m_1.json")
    return {"type": "nemo", "manifest_filepath": f"{folder}/m__OP_0..1_CL_.json", "tags": {"source_lang": "en"}}


def nemo_list(folder: Path, write_manifest: Callable, speech: Callable) -> dict:
    manifests = [str(speech(2, f"{name}.json", lang=name)) for name in "abc"]
    return {"type": "nemo", "manifest_filepath": [manifests[0], [manifests[1]], manifests[2]], "shard_seed": 0}


def lhotse(folder: Path, write_manifest: Callable, speech: Callable) -> dict:
    CutSet(list(LazyNeMoIterator(str(speech(3))))).to_file(folder / "cuts.jsonl")
    with (folder / "cuts.jsonl").open("a") as file:
        file.write('nothing\n\n{"id": "a", "type": "MonoCut"}\n{"id": "b"}')
    return {"type": "lhotse", "cuts_path": f"{folder}/cuts.jsonl"}


def lhotse_gzip(folder: Path, write_manifest: Callable, speech: Callable) -> dict:
    config = lhotse(folder, write_manifest, speech)
    (folder / "cuts.jsonl.gz").write_bytes(gzip.compress((folder / "cuts.jsonl").read_bytes()))
    return {**config, "cuts_path": f"{folder}/cuts.jsonl.gz"}


def speech_tsv(folder: Path, write_manifest: Callable, speech: Callable) -> dict:
    names = [Path(json.loads(line)["audio_filepath"]).name for line in speech(3).read_text().splitlines()]
    rows = [f"{name}\t{name}\teins" for name in names]
    (folder / "s_0.tsv").write_text("\n".join(["id\taudio\ttarget", *rows, "\tgone.wav\teins", "", "a\tb\tc\td"]))
    (folder / "s_1.tsv").write_text(f"target\taudio\nzwei\t{names[1]}\n")  # each file has its own header
    return {"type": "speech_tsv", "paths": f"{folder}/s__OP_0..1_CL_.tsv", "tags": {"source_lang": "en"}}


@pytest.mark.parametrize(
    ("make", "cuts", "bad"),
    [(nemo, 5, 10), (nemo_list, 6, 0), (lhotse, 3, 3), (lhotse_gzip, 3, 3), (speech_tsv, 4, 2)],
)
def test_manifests_by_number_are_those_of_the_stream(tmp_path, write_manifest, speech, make, cuts, bad) -> None:
    config = make(tmp_path, write_manifest, speech)
    examples, noted = compare_with_the_stream(config, in_order=make is not nemo_list)
    assert (len(examples), noted.total()) == (cuts, bad)
    assert opened(config).is_sequential == [make is lhotse_gzip] * len(opened(config).shard_sizes)


# Tarred


def add_to_tar(path: Path, members: dict[str, bytes | Path]) -> None:
    with tarfile.open(path, "a" if path.exists() else "w") as tar:
        for name, content in members.items():
            if isinstance(content, Path):
                tar.add(content, arcname=name)
            else:
                (path.parent / "content").write_bytes(content)
                tar.add(path.parent / "content", arcname=name)


@pytest.fixture
def tarred(tmp_path, write_tone, write_manifest) -> dict:
    """Two tar files with good and bad recordings, whole ones and segments."""
    for shard in (0, 1):
        tones = {
            f"{shard}-{i}.{suffix}": write_tone(f"{shard}-{i}.{suffix}", seconds=1 + i, hertz=200 + 100 * i)
            for i, suffix in enumerate(["wav", "flac", "wav"])
        }
        stereo = {f"{shard}-stereo.wav": write_tone("stereo.wav", channels=2, rate=8000)}
        cut_off = tones[f"{shard}-0.wav"].read_bytes()[:10_000]
        wrong = {f"{shard}-empty.wav": b"", f"{shard}-noise.wav": b"no audio " * 99, f"{shard}-cut.wav": cut_off}
        add_to_tar(tmp_path / f"audio_{shard}.tar", {**stereo, **tones, **wrong})
        good = {"audio_filepath": f"{shard}-0.wav", "duration": 1.0, "text": "one", "lang": "en", "shard_id": shard}
        names = [*stereo, *tones, *wrong, "gone.wav"]
        segments = [
            {**good, "audio_filepath": f"{shard}-2-sub{i}.wav", "offset": i / 2, "duration": 0.5, "text": f"part {i}"}
            for i in (1, 2, 5)
        ]
        behind_the_end = {**segments[0], "audio_filepath": f"{shard}-2-sub6.wav", "offset": 9.0}
        records = [
            *(({**good, "audio_filepath": n, "duration": 2.0 if n == f"{shard}-1.flac" else 1.0}) for n in names),
            {**good, "audio_filepath": f"{shard}-2.wav", "duration": 2.85},
            *segments,
            behind_the_end,
            *(
                {**line, "audio_filepath": f"{shard}-0.wav"} if "_skipme" in line or "text" in line else line
                for line in bad_lines(good)
            ),
            {**good, "audio_filepath": 5},
        ]
        write_manifest(f"manifest_{shard}.json", records)
    manifests, tars = f"{tmp_path}/manifest__OP_0..1_CL_.json", f"{tmp_path}/audio__OP_0..1_CL_.tar"
    return {"type": "nemo_tarred", "manifest_filepath": manifests, "tarred_audio_filepaths": tars}


def test_tarred_speech_by_number_is_that_of_the_stream(tarred) -> None:
    cuts, noted = compare_with_the_stream(tarred, in_order=False)
    assert Counter(cause for *_, cause in noted.elements()) == {
        "empty audio": 2,
        "unreadable audio": 2,
        "truncated audio": 2 + 2,
        "missing audio": 2,
        "invalid duration": 6,
        "no duration": 2,
        "invalid offset": 2,
        "not JSON": 2,
        "not a JSON object": 2,
        "no audio_filepath": 2 + 2,
    }
    assert len(cuts) == 2 * (1 + 3 + 1 + 3)


def test_one_manifest_for_several_tar_files(tarred, tmp_path, write_manifest) -> None:
    lines = [line for i in (0, 1) for line in (tmp_path / f"manifest_{i}.json").read_text().splitlines()]
    strays = [{"audio_filepath": "0-0.wav", "duration": 1.0, "shard_id": shard} for shard in (7, [0], None, "0")]
    config = {**tarred, "manifest_filepath": str(write_manifest("whole.json", [*lines, *strays]))}
    cuts, noted = compare_with_the_stream(config, in_order=False)
    assert len(cuts) == 16
    assert sum(cause == "no such shard_id" for *_, cause in noted.elements()) == 4 + 2, "records without any are strays"


def test_lists_of_tarred_sets_are_shards_of_one(tarred, tmp_path) -> None:
    config = {
        **tarred,
        "manifest_filepath": [[f"{tmp_path}/manifest_{i}.json"] for i in (0, 1)],
        "tarred_audio_filepaths": [[f"{tmp_path}/audio_{i}.tar"] for i in (0, 1)],
        "shard_seed": 0,
    }
    compare_with_the_stream(config, in_order=False)
    weighted = {**config, "manifest_filepath": [[f"{tmp_path}/manifest_{i}.json", 1.0] for i in (0, 1)]}
    assert opened(weighted) is None


def test_a_tar_file_that_breaks_off_is_noted_with_what_is_missing(tarred, tmp_path) -> None:
    path = tmp_path / "audio_0.tar"
    path.write_bytes(path.read_bytes()[:70_000])  # in the middle of the second recording
    skipped = SkippedRecords()
    records = opened(tarred, skipped)
    ids = [cut.id for number in range(records.shard_sizes[0]) for cut in records.read(0, number)]
    assert ids == ["0-stereo.wav", "0-0.wav"]
    assert skipped.counts[str(path), "unreadable tar"] == 1


def test_audio_in_tar_files_is_read_when_it_is_asked_for(tarred, tmp_path) -> None:
    streamed = list(open_source(source_of(tarred), SkippedRecords(), ExampleKind.TRANSLATION)[0])
    records = opened(tarred)
    cuts = [cut for position in positions(records) for cut in records.read(*position)]
    assert len(pickle.dumps(cuts)) < 1500 * len(cuts), "no audio travels with them"
    for ours, theirs in zip(pickle.loads(pickle.dumps(cuts)), sorted(streamed, key=place_of), strict=True):
        with_checked_audio(ours)
        assert np.array_equal(load_waveform(ours), load_waveform(theirs))
        assert np.array_equal(ours.resample(8000).load_audio(), theirs.resample(8000).load_audio())
    moved = cuts[0].move_to_memory(audio_format="wav")
    assert np.array_equal(moved.load_audio(), cuts[0].load_audio())


def test_a_segment_that_cannot_be_decoded_is_unreadable_when_it_is_asked_for(
    tmp_path, write_tone, write_manifest
) -> None:
    audio = bytearray(write_tone("a.flac", seconds=3).read_bytes())
    audio[5000:] = bytes(len(audio) - 5000)
    add_to_tar(tmp_path / "audio_0.tar", {"a.flac": bytes(audio)})
    segment = {"audio_filepath": "a-sub1.flac", "offset": 2.0, "duration": 0.5, "text": "one"}
    manifest = write_manifest("manifest_0.json", [segment])
    config = {"type": "nemo_tarred", "manifest_filepath": str(manifest)}
    (cut,) = opened({**config, "tarred_audio_filepaths": f"{tmp_path}/audio_0.tar"}).read(0, 0)
    with pytest.raises(AudioFault, match="unreadable audio"):
        load_waveform(cut)


def test_a_tar_file_that_vanishes_is_missing_audio(tarred, tmp_path) -> None:
    (cut,) = opened(tarred).read(0, 0)
    index_module._opened.cache_clear()
    (tmp_path / "audio_0.tar").unlink()
    with pytest.raises(AudioFault, match="missing audio"):
        load_waveform(cut)


# Shar


@pytest.fixture
def shar(tmp_path, speech) -> Callable[..., Path]:
    """lhotse Shar in a folder: two shards of three cuts, each with a recording and an array, but for one."""

    def make(suffix: str = "jsonl", name: str = "shar") -> Path:
        cuts = list(CutSet(list(LazyNeMoIterator(str(speech(6, f"{name}.json"))))))
        for i, cut in enumerate(cuts):
            cut.id = f"{name}.{i}"  # a dot, as in file names
            if i != 4:
                with NumpyFilesWriter(tmp_path / "vectors") as arrays:
                    cut.vector = arrays.store_array(cut.id, np.arange(3) + i)
        fields = {"recording": "wav", "vector": "numpy"}
        (tmp_path / name).mkdir()
        with SharWriter(str(tmp_path / name), fields=fields, shard_size=3) as writer:
            for cut in cuts:
                writer.write(cut)
        if suffix == "jsonl":
            for path in (tmp_path / name).glob("cuts.*.gz"):
                path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
                path.unlink()
        return tmp_path / name

    return make


def without_passes(cut: Cut) -> dict:
    cut.custom.pop("shar_epoch", None)
    return cut.to_dict()


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
@pytest.mark.parametrize("as_fields", [False, True])
def test_shar_by_number_is_that_of_the_stream(shar, suffix, as_fields) -> None:
    where = str(shar(suffix))
    if as_fields:
        files = {"cuts": suffix, "recording": "tar", "vector": "tar"}
        where = {field: [f"{where}/{field}.00000{i}.{s}" for i in (0, 1)] for field, s in files.items()}
    config = {"type": "lhotse_shar", "shar_path": where, "tags": {"source_lang": "en"}}
    streamed = sorted(
        open_source(source_of(config), SkippedRecords(), ExampleKind.TRANSLATION)[0], key=lambda cut: cut.id
    )
    skipped = SkippedRecords()
    records = opened(config, skipped)
    assert (records.shard_sizes, records.is_sequential) == ([3, 3], [suffix == "jsonl.gz"] * 2)
    ours = [cut for position in positions(records) for cut in records.read(*position)]
    assert len(pickle.dumps(ours)) < 4000 * len(ours), "no audio travels with them"
    for our, their in zip(ours, streamed, strict=True):
        assert np.array_equal(load_waveform(our), load_waveform(their))
        if our.id != "shar.4":
            assert np.array_equal(our.load_vector(), their.load_vector())
    assert [without_passes(cut) for cut in ours] == [without_passes(cut) for cut in streamed]
    assert (skipped.read_count, skipped.count()) == (6, 0)


def test_indexes_of_shar_do_not_stand_in_its_way(shar) -> None:
    folder = shar()
    config = {"type": "lhotse_shar", "shar_path": str(folder)}
    assert opened(config).shard_sizes == [3, 3]
    assert len(list(open_source(source_of(config), SkippedRecords(), ExampleKind.TRANSLATION)[0])) == 6
    assert len(list((folder.parent / HIDDEN_FOLDER / folder.name).iterdir())) == 6


def test_folders_of_shar_are_shards_of_one(shar) -> None:
    folders = [str(shar(name="a")), str(shar(name="b"))]
    records = opened({"type": "lhotse_shar", "shar_path": folders})
    assert records.shard_sizes == [3] * 4
    assert [cut.id for cut in records.read(3, 2)] == ["b.5"]
    assert opened({"type": "lhotse_shar", "shar_path": [[folder, 2] for folder in folders]}) is None


def test_bad_records_of_shar(shar) -> None:
    folder = shar()
    cuts = folder / "cuts.000000.jsonl"
    lines = cuts.read_text().splitlines()
    cuts.write_text("\n".join(["{", lines[0].replace("shar.0", "other"), "", lines[2], lines[2]]) + "\n")
    path = folder / "recording.000001.tar"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    skipped = SkippedRecords()
    records = opened({"type": "lhotse_shar", "shar_path": str(folder)}, skipped)
    ids = [cut.id for position in positions(records) for cut in records.read(*position)]
    assert ids == ["shar.3"]
    assert skipped.causes() == {
        "not JSON": 1,
        "audio of another cut": 1,
        "missing audio": 2 + 2,
        "unreadable tar": 1,
    }
    assert skipped.shares() == {str(folder): pytest.approx(6 / 7)}


def test_a_folder_that_is_not_shar_is_named(shar, tmp_path) -> None:
    folder = shar()
    (folder / "vector.000001.tar").unlink()
    with pytest.raises(DataError, match=r"shar_path: .*/shar is not lhotse Shar .*\(Expected 2 shards"):
        opened({"type": "lhotse_shar", "shar_path": str(folder)})
    with pytest.raises(DataError, match=r"none is not lhotse Shar .*\(there are no cuts\)"):
        opened({"type": "lhotse_shar", "shar_path": f"{tmp_path}/none"})


# What can only be streamed


def test_the_rest_is_left_to_the_readers_that_stream(tarred, tmp_path, write_lines, shar) -> None:
    speech = {**tarred, "type": "nemo"}
    remote = {**tarred, "tarred_audio_filepaths": "s3://bucket/audio__OP_0..1_CL_.tar"}
    command = {**tarred, "tarred_audio_filepaths": ["pipe:cat audio_0.tar", "pipe:cat audio_1.tar"]}
    text = {"type": "txt_pair", "source_paths": "a.en", "target_paths": "a.de", **ENGLISH_TO_GERMAN}
    cases = [
        {**tarred, "slice_length": 3},
        {**tarred, "metadata_only": True},
        {**speech, "extra_fields": [{"type": "text_iter", "name": "q", "path": "q.txt"}]},
        remote,
        {**command, "manifest_filepath": [f"{tmp_path}/manifest_{i}.json" for i in (0, 1)]},
        {**text, "questions_path": "q.txt"},
        {"type": "txt", "paths": "a.txt"},
        {"type": "lhotse_as_conversation", "cuts_path": "cuts.jsonl"},
        {"type": "lhotse_shar", "shar_path": str(shar()), "slice_length": 2},
    ]
    assert [opened(case) for case in cases] == [None] * len(cases)
    assert open_records(source_of(text), SkippedRecords(), ExampleKind.AS_READ) is None
    (tmp_path / "audio_1.tar").write_bytes(gzip.compress((tmp_path / "audio_1.tar").read_bytes()))
    assert opened(tarred) is None, "compressed, whatever its name says"


def test_batched_reads_from_an_object_store_are_left_to_nemo(tarred, monkeypatch) -> None:
    monkeypatch.setenv("USE_AIS_GET_BATCH", "true")
    assert opened(tarred) is None


# Processes


def test_records_go_to_other_processes_pickled_or_forked(tarred) -> None:
    records = opened(tarred)
    build_indexes([records])
    expected = [cut.to_dict() for position in positions(records) for cut in records.read(*position)]
    copy = pickle.loads(pickle.dumps(records))
    assert [cut.to_dict() for position in positions(copy) for cut in copy.read(*position)] == expected
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(
        target=lambda: sender.send([c.to_dict() for position in positions(records) for c in records.read(*position)])
    )
    process.start()
    assert receiver.poll(20)
    assert receiver.recv() == expected
    process.join()


def test_only_a_few_forward_shards_are_held(tmp_path) -> None:
    paths = [tmp_path / f"{i}.jsonl.gz" for i in range(7)]
    for path in paths:
        path.write_bytes(gzip.compress(b'{"source": "one", "target": "eins"}\n' * 50))
    config = {"type": "parallel_text", "paths": [str(path) for path in paths], **ENGLISH_TO_GERMAN}
    records = opened(config)
    for shard, size in enumerate(records.shard_sizes):
        records.prepare(shard, 10, 20)
        assert records.read(shard, 10)[0].custom["id"] == f"{paths[shard]}:11"
        assert size == 50
    held = [lines for (lines,) in records.shard_lines if lines._lines]
    assert len(held) == 4
    assert [lines.path for lines in held] == [str(path) for path in paths[-4:]]
