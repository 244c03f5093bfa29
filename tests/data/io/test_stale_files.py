"""A sidecar is used as long as it is whole and the data is what it was made of."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from nemo_emmett.data.blending import source_stats as sizes
from nemo_emmett.data.blending.source_stats import sizes_of
from nemo_emmett.data.config.sources import parse_source
from nemo_emmett.data.io import sidecar
from nemo_emmett.data.io.files import FileState, count_lines
from nemo_emmett.data.io.index import FileChanged
from nemo_emmett.data.io.line_index import LineCount, LineIndex, open_numbered_lines
from nemo_emmett.data.io.sidecar import HIDDEN_FOLDER, hidden_place
from nemo_emmett.data.io.skipped_records import SkippedRecords
from nemo_emmett.data.io.tar_index import TarIndex
from nemo_emmett.data.readers.examples import ExampleKind
from nemo_emmett.data.readers.random_access import open_records
from nemo_emmett.data.readers.tar_audio import AudioInTar
from nemo_emmett.errors import DataError


def rewrite(path: str | Path, content: bytes) -> None:
    """Change a file in place, and give it back its old time."""
    before = os.stat(path)
    assert len(content) == before.st_size
    with open(path, "r+b") as file:
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture
def messages(monkeypatch) -> list[str]:
    """What is logged as information."""
    said = []
    monkeypatch.setattr(sidecar.logging, "info", said.append)
    return said


@pytest.fixture(params=[True, False], ids=["", "without change times"])
def change_times(request, monkeypatch) -> bool:
    """Whether the file system has change times; without them only the content shows a change."""
    if not request.param:
        of = FileState.of.__func__
        monkeypatch.setattr(FileState, "of", classmethod(lambda cls, path: of(cls, path)._replace(ctime_ns=0)))
    return request.param


# Lines

LINES = [b"%05d %s" % (i, b"x" * (i * 7 % 150)) for i in range(5000)]
"""Some 400 kB, 50 pages: more than what is sampled."""


def text(lines: list[bytes]) -> bytes:
    return b"".join(line + b"\n" for line in lines)


CHANGES = {
    "rotated": LINES[1:] + LINES[:1],
    "reversed": LINES[::-1],
    "two lines swapped": [*LINES[:2500], LINES[2550], *LINES[2501:2550], LINES[2500], *LINES[2551:]],
    "two lines made one, one made two": [
        *LINES[:1000],
        LINES[1000] + b" " + LINES[1001],
        *LINES[1002:4000],
        LINES[4000][:2],
        LINES[4000][3:],
        *LINES[4001:],
    ],
    "one letter": [*LINES[:3333], LINES[3333].replace(b"0", b"1", 1), *LINES[3334:]],
}


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_rewritten_file_of_the_same_size_and_time_is_read_again_at_the_next_start(tmp_path, change, name) -> None:
    path = tmp_path / name
    pack = (lambda data: gzip.compress(data, 0, mtime=0)) if name.endswith(".gz") else bytes
    path.write_bytes(pack(text(LINES)))
    assert len(open_numbered_lines(str(path))) == count_lines(str(path)) == len(LINES)
    rewrite(path, pack(text(CHANGES[change])))
    lines = open_numbered_lines(str(path))
    assert [lines.read(i) for i in range(len(lines))] == CHANGES[change]
    assert count_lines(str(path)) == len(CHANGES[change])


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_is_rewritten_while_it_is_read_gives_its_old_lines_or_an_error(
    tmp_path, change, change_times
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(text(LINES))
    lines = LineIndex(str(path))
    assert lines.read(4999) == LINES[4999]
    numbers = random.Random(1).sample(range(len(LINES)), len(LINES))
    rewrite(path, text(CHANGES[change]))

    def read_all() -> None:
        for number in numbers:
            assert lines.read(number) == LINES[number]

    with pytest.raises(DataError, match=r"a\.txt: has changed since it was indexed; start again"):
        read_all()
    assert not os.path.exists(hidden_place(str(path), ".emmett-index")), "the next start does not believe it"
    fresh = LineIndex(str(path))
    assert [fresh.read(number) for number in range(len(fresh))] == CHANGES[change]


def test_an_index_found_stale_by_content_alone_is_built_again(tmp_path, change_times) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(text(LINES[:200]))
    assert len(LineIndex(str(path))) == 200
    rewrite(path, text(LINES[199::-1]))
    lines = LineIndex(str(path))
    assert [lines.read(i) for i in range(200)] == LINES[199::-1]


def test_permissions_and_names_may_change_while_a_file_is_read(tmp_path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(text(LINES))
    lines = LineIndex(str(path))
    assert lines.read(0) == LINES[0]
    path.chmod(0o600)
    os.link(path, tmp_path / "backup")
    assert lines.read(4000) == LINES[4000]
    new = tmp_path / "new"
    new.write_bytes(text(LINES[::-1]))
    new.rename(path)
    (tmp_path / "backup").unlink()
    assert lines.read(2000) == LINES[2000], "the file that was opened is still read"


def test_a_compressed_file_that_is_rewritten_while_it_is_read_is_an_error(tmp_path) -> None:
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(text(LINES), 0, mtime=0))
    lines = LineCount(str(path))
    lines.prepare(0, 10)
    rewrite(path, gzip.compress(text(CHANGES["rotated"]), 0, mtime=0))
    with pytest.raises(DataError, match=r"a\.gz: (has changed since|cannot be read to its end)"):
        lines.prepare(4000, 4010)


def test_pairs_stay_pairs_when_one_side_is_rewritten(tmp_path) -> None:
    numbers = [str(i).zfill(3 if i % 10 else 5) for i in range(200)]
    for language, lines in (("en", numbers), ("de", numbers)):
        (tmp_path / f"a.{language}").write_text("".join(f"{line}\n" for line in lines))
    config = {"type": "parallel_text", "source_lang": "en", "target_lang": "de"}
    config |= {"source_paths": f"{tmp_path}/a.en", "target_paths": f"{tmp_path}/a.de"}

    def pairs() -> list[tuple[str, str]]:
        records = open_records(parse_source(config, "train_ds"), SkippedRecords(), ExampleKind.TRANSLATION)
        (size,) = records.shard_sizes
        return [(p.source.text, p.target.text) for i in range(size) for p in records.read(0, i)]

    assert pairs() == list(zip(numbers, numbers, strict=True))
    rewrite(tmp_path / "a.de", "".join(f"{line}\n" for line in numbers[::-1]).encode())
    assert pairs() == list(zip(numbers, numbers[::-1], strict=True))


# Tar files


def write_tar(path: Path, members: list[tuple[str, bytes]], layout: int = tarfile.PAX_FORMAT) -> None:
    with tarfile.open(path, "w", format=layout) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def members(order: list[int], long: bool) -> list[tuple[str, bytes]]:
    return [(f"{'long' * 30 * long}ä{i}.wav", bytes([i]) * 20_000) for i in order]


@pytest.mark.parametrize("layout", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("long", [False, True])
def test_members_that_change_places_are_found_at_the_next_start_and_refused_before(tmp_path, long, layout) -> None:
    path, again = tmp_path / "a.tar", tmp_path / "b.tar"
    write_tar(path, members([0, 1, 2, 3], long), layout)
    write_tar(again, members([0, 2, 1, 3], long), layout)
    before = TarIndex(str(path))
    found = {name: before.find(name) for name, _ in members([0, 1, 2, 3], long)}
    assert all(found[name].read() == content for name, content in members([0, 1, 2, 3], long))
    rewrite(path, again.read_bytes())
    for name, content in members([1, 2], long):
        for read in (found[name].read, found[name].open, lambda m=found[name]: AudioInTar(m, [0]).source):
            with pytest.raises(FileChanged, match=r"a\.tar: has changed since it was indexed"):
                read()
        assert TarIndex(str(path)).find(name).read() == content
    name, content = members([3], long)[0]
    assert found[name].read() == content, "a member that is where it was"


# Damaged sidecars


def header_of(index: bytes) -> tuple[dict, bytes]:
    line, _, rest = index.partition(b"\n")
    return json.loads(line), rest


def with_header(**changes) -> Callable[[bytes], bytes]:
    def change(index: bytes) -> bytes:
        header, rest = header_of(index)
        line = json.dumps({**header, **changes}).encode()
        return line.ljust(-(-(len(line) + 1) // 64) * 64 - 1) + b"\n" + rest

    return change


def patched(offset: int, value: bytes) -> Callable[[bytes], bytes]:
    """Bytes of the arrays replaced, counted from their beginning or end."""

    def change(index: bytes) -> bytes:
        line, _, rest = index.partition(b"\n")
        body = bytearray(rest)
        start = offset if offset >= 0 else len(body) + offset
        body[start : start + len(value)] = value
        return line + b"\n" + bytes(body)

    return change


FAR = struct.pack("<q", 1 << 60)
DAMAGES = {
    "empty": lambda index: b"",
    "garbage": lambda index: os.urandom(500),
    "one long line": lambda index: b"[" * 200_000,
    "a list": lambda index: b"[]\n",
    "no keys": lambda index: b"{}\n",
    "cut in the header": lambda index: index[:40],
    "cut in the arrays": lambda index: index[:-9],
    "an array cut off": lambda index: index[: index.index(b"\n") + 1],
    "a pickle": lambda index: b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.",
    "version 1": with_header(version=1),
    "another kind": with_header(kind="other"),
    "other facts": with_header(facts={"lines": 7, "damage": None}),
    "no facts": with_header(facts=None),
    "no arrays": with_header(arrays=[]),
    "arrays that are none": with_header(arrays=[1, 2]),
    "objects": with_header(arrays=[["offsets", "|O", 1]]),
    "a huge array": with_header(arrays=[["offsets", "<i8", 10**15]]),
    "a negative array": with_header(arrays=[["offsets", "<i8", -1]]),
    "no number": with_header(arrays=[["offsets", "<i8", "many"]]),
    "an offset beyond the end": patched(8, FAR),
    "a negative offset": patched(8, struct.pack("<q", -1)),
    "numbers out of order": patched(16, struct.pack("<q", 3)),
    "another checksum at the end": patched(-4, b"\xff\xff\xff\xff"),
}


@pytest.mark.parametrize("kind", ["lines", "count", "tar"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_index_is_built_again(tmp_path, messages, damage, kind) -> None:
    path = tmp_path / {"lines": "a.txt", "count": "a.gz", "tar": "a.tar"}[kind]
    if kind == "tar":
        write_tar(path, members([0, 1, 2], long=False))
    else:
        path.write_bytes(gzip.compress(text(LINES[:400])) if kind == "count" else text(LINES[:400]))

    def contents() -> list:
        index = TarIndex(str(path)) if kind == "tar" else open_numbered_lines(str(path))
        if kind == "tar":
            return [(index.name(i), index.find(index.name(i)).read()) for i in range(len(index))]
        return [index.read(i) for i in range(len(index))]

    expected = contents()
    kept = Path(hidden_place(str(path), ".emmett-index"))
    good = kept.read_bytes()
    kept.write_bytes(DAMAGES[damage](good))
    is_changed = kept.read_bytes() != good  # a count has no arrays to damage
    messages.clear()
    assert contents() == expected
    assert len(messages) == is_changed
    assert kept.read_bytes() == good, "and kept for the next start"


@pytest.mark.parametrize("what", ["folder", "pipe", "broken link", "unreadable"])
def test_something_else_in_the_place_of_an_index_is_no_index(tmp_path, messages, monkeypatch, what) -> None:
    path, place = tmp_path / "a.txt", tmp_path / HIDDEN_FOLDER / "a.txt.emmett-index"
    place.parent.mkdir()
    path.write_bytes(text(LINES[:400]))
    make = {
        "folder": place.mkdir,
        "pipe": lambda: os.mkfifo(place),
        "broken link": lambda: place.symlink_to("x"),
        "unreadable": lambda: len(LineIndex(str(path))),
    }
    make[what]()
    if what == "unreadable":  # permissions would not hold back a root user
        maps = iter([refuse, torch.from_file])
        monkeypatch.setattr(sidecar.torch, "from_file", lambda *args, **keys: next(maps)(*args, **keys))
    lines = LineIndex(str(path))
    assert [lines.read(i) for i in range(400)] == LINES[:400]
    assert sum("does not fit" in message for message in messages) == (what != "broken link")


def refuse(*_, **__):
    raise PermissionError(13, "Permission denied")


# Counts


def speech(path: Path, durations: list[float]) -> dict:
    lines = [json.dumps({"audio_filepath": "a.wav", "duration": d, "text": "x"}) for d in durations]
    path.write_text("".join(f"{line}\n" for line in lines))
    return {"type": "nemo", "manifest_filepath": str(path), "target_lang": "de"}


def seconds_of(config: dict) -> float:
    return sizes_of([parse_source(config, "train_ds")])[0].seconds


def test_counts_of_a_file_rewritten_with_its_size_and_time_are_made_again(tmp_path) -> None:
    config = speech(tmp_path / "a.json", [1.0, 2.0] * 2000)
    assert seconds_of(config) == 6000
    content = (tmp_path / "a.json").read_bytes()
    rewrite(tmp_path / "a.json", content.replace(b"1.0", b"5.0"))
    assert seconds_of(config) == 14000
    middle = len(content) // 2
    now = content.replace(b"1.0", b"5.0")
    rewrite(tmp_path / "a.json", now[:middle] + now[middle:].replace(b"2.0", b"3.0", 1))
    assert seconds_of(config) == 14001


def test_counts_are_kept_when_a_file_is_copied_or_touched(tmp_path, monkeypatch) -> None:
    config = speech(tmp_path / "a.json", [1.0, 2.0])
    assert seconds_of(config) == 3
    monkeypatch.setattr(sizes._Part, "examples", None)
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / HIDDEN_FOLDER).mkdir()
    for name in ("a.json", f"{HIDDEN_FOLDER}/a.json.sizes.json"):
        (tmp_path / "copy" / name).write_bytes((tmp_path / name).read_bytes())
    copied = {**config, "manifest_filepath": f"{tmp_path}/copy/a.json"}
    assert seconds_of(copied) == 3
    monkeypatch.setattr(sizes, "content_checksum", None)
    monkeypatch.setattr(sidecar, "content_checksum", None)
    assert seconds_of(copied) == 3, "once it was compared in full, its times are known"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text.replace('"seconds": 3.0', '"seconds": 9e9'),
        lambda text: text.replace('"examples": 2', '"examples": "2"'),
        lambda text: text.replace('"examples"', '"things"'),
        lambda text: text.replace('"size": {', '"size": {"more": 1,'),
        lambda text: text.replace('"stamps": [', '"stamps": [null,'),
        lambda text: text.replace('"version": 3', '"version": 1'),
        lambda text: text.replace('"counts": 4', '"counts": 3'),
        lambda text: text.rstrip()[:-20],
        lambda text: "[" * 100_000,
        lambda text: json.dumps({"version": 2, "counts": {}, "checksum": 0}, indent=1),  # of the version before
    ],
)
def test_damaged_counts_are_made_again(tmp_path, messages, spoil) -> None:
    config = speech(tmp_path / "a.json", [1.0, 2.0])
    assert seconds_of(config) == 3
    kept = tmp_path / HIDDEN_FOLDER / "a.json.sizes.json"
    good = kept.read_text()
    kept.write_text(spoil(good))
    assert kept.read_text() != good
    messages.clear()
    assert seconds_of(config) == 3
    assert "is damaged, or does not fit the data" in messages[0]
    assert kept.read_text() == good


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_something_else_in_the_place_of_counts_is_none(tmp_path, make) -> None:
    (tmp_path / HIDDEN_FOLDER).mkdir()
    make(tmp_path / HIDDEN_FOLDER / "a.json.sizes.json")
    assert seconds_of(speech(tmp_path / "a.json", [1.0, 2.0])) == 3


def test_a_checksum_covers_facts_names_and_arrays() -> None:
    contents = sidecar.Contents({"a": np.arange(3), "b": np.arange(2)}, {"lines": 3})
    others = [
        sidecar.Contents({"a": np.arange(3), "b": np.arange(2)}, {"lines": 4}),
        sidecar.Contents({"b": np.arange(3), "a": np.arange(2)}, {"lines": 3}),
        sidecar.Contents({"a": np.arange(3), "b": np.arange(2)[::-1]}, {"lines": 3}),
    ]
    assert contents.checksum() not in [other.checksum() for other in others]
