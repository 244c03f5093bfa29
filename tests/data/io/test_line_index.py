"""Indexes: every line and member is found, by any process, wherever the index is kept."""

from __future__ import annotations

import gzip
import io
import json
import multiprocessing
import os
import pickle
import random
import tarfile
from pathlib import Path

import pytest
import soundfile

from nemo_emmett import processes
from nemo_emmett.data.io import index, line_index, sidecar, tar_index
from nemo_emmett.data.io.files import open_lines
from nemo_emmett.data.io.index import build_indexes
from nemo_emmett.data.io.line_index import LineCount, LineIndex, is_compressed, open_numbered_lines
from nemo_emmett.data.io.sidecar import HIDDEN_FOLDER, hidden_place
from nemo_emmett.data.io.tar_index import TarIndex
from nemo_emmett.errors import ConfigError, DataError

FORK = multiprocessing.get_context("fork")
PAGE = 4096


def random_text(seed: int) -> bytes:
    rng = random.Random(seed)
    lengths = [rng.choice([0, 1, 30, 200, 5000, 20000]) for _ in range(300)]
    return b"\n".join(bytes(rng.choices(b"abc \r\t\xff", k=length)) for length in lengths)


CONTENTS = {
    "empty": b"",
    "one newline": b"\n",
    "blank lines": b"\n\n\n",
    "no newline at the end": b"one\ntwo",
    "carriage returns": b"one\r\ntwo\r\r\nth\rree\r\n",
    "separators of Unicode": "one\u2028one\n\x0btwo\x85\n".encode(),
    "not UTF-8": b"one\n\xff\xfe\ntwo\n",
    "ends with a page": b"x" * (PAGE - 1) + b"\n",
    "a line begins with the second page": b"x" * (PAGE - 1) + b"\ny\n",
    "many lines": b"".join(b"%d\n" % i for i in range(10_000)),
    "a page of newlines": b"\n" * (3 * PAGE) + b"end",
    "random": random_text(0),
    "more than a chunk": random_text(1) * 2,
}


def write(path: Path, content: bytes) -> str:
    (path.write_bytes if path.suffix != ".gz" else lambda data: path.write_bytes(gzip.compress(data)))(content)
    return str(path)


def later(path: str) -> None:
    """Let a file be written a second later than it was, without waiting."""
    status = os.stat(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000_000))


@pytest.fixture
def numbers(tmp_path: Path) -> str:
    """A file of 5,000 lines, each its own number."""
    return write(tmp_path / "numbers.txt", b"".join(b"%d\n" % i for i in range(5000)))


@pytest.fixture
def messages(monkeypatch) -> list[str]:
    """What is logged as information."""
    said = []
    monkeypatch.setattr(sidecar.logging, "info", said.append)
    return said


@pytest.fixture
def read_only_folder(monkeypatch, tmp_path: Path) -> None:
    """Nothing can be written into the folder of the data, as on a read-only disk."""
    atomic_file = sidecar.atomic_file

    def refuse(place: str):
        if tmp_path in (Path(place).parent, Path(place).parents[1]) and "indexes" not in place:
            raise PermissionError(13, "Permission denied", place)
        return atomic_file(place)

    monkeypatch.setattr(sidecar, "atomic_file", refuse)
    monkeypatch.setattr(sidecar, "_in_memory", {})


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS.keys())
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_every_line_is_found_by_its_number(tmp_path, name, content) -> None:
    path = write(tmp_path / name, content)
    lines, expected = open_numbered_lines(path), list(open_lines(path))
    assert len(lines) == len(expected)
    order = list(range(len(expected)))
    assert [lines.read(i) for i in order] == expected
    if not lines.is_sequential:
        random.Random(0).shuffle(order)
        assert [lines.read(i) for i in order] == [expected[i] for i in order]
    for outside in (-1, len(expected)):
        with pytest.raises(IndexError, match="there is none"):
            lines.read(outside)


def test_an_index_is_small_and_is_read_not_built_the_second_time(numbers, monkeypatch) -> None:
    content = b"".join(b"%d: %s\n" % (i, b"word " * 30) for i in range(20_000))
    Path(numbers).write_bytes(content)
    assert len(LineIndex(numbers)) == 20_000
    assert os.path.getsize(hidden_place(numbers, ".emmett-index")) < 0.005 * len(content)
    monkeypatch.setattr(LineIndex, "_find", None)
    again = LineIndex(numbers)
    assert again.read(19_999).startswith(b"19999: ")


def test_a_line_of_ten_megabytes(tmp_path) -> None:
    long = b"x" * 10_000_000
    lines = LineIndex(write(tmp_path / "a.txt", b"one\n" + long + b"\ntwo\n"))
    line_index._cached_block.cache_clear()
    assert (lines.read(0), lines.read(1), lines.read(2)) == (b"one", long, b"two")
    assert line_index._cached_block.cache_info().currsize == 2, "the long line is not kept"


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_file_that_changed_is_indexed_again(tmp_path, messages, name) -> None:
    path = write(tmp_path / name, b"one\ntwo\n")
    assert len(open_numbered_lines(path)) == 2
    write(tmp_path / name, b"1\n2\n3\nx\n")
    later(path)
    changed = open_numbered_lines(path)
    assert [changed.read(i) for i in range(len(changed))] == [b"1", b"2", b"3", b"x"]
    assert len(messages) == 1
    assert "does not fit" in messages[0]


def test_a_change_of_the_same_size_is_seen_by_its_time(numbers) -> None:
    assert LineIndex(numbers).read(1) == b"1"
    Path(numbers).write_bytes(b"x\n" * (os.path.getsize(numbers) // 2))
    later(numbers)
    assert len(LineIndex(numbers)) == os.path.getsize(numbers) // 2


@pytest.mark.parametrize(
    "spoil", [lambda data: data[:-8], lambda data: b"junk", lambda data: b"", lambda data: b"[]\n"]
)
def test_a_spoilt_index_is_built_again(numbers, spoil) -> None:
    assert len(LineIndex(numbers)) == 5000
    kept = Path(hidden_place(numbers, ".emmett-index"))
    kept.write_bytes(spoil(kept.read_bytes()))
    assert LineIndex(numbers).read(4321) == b"4321"
    assert LineIndex(numbers).load()


def test_data_that_changes_during_a_run_stops_it(numbers) -> None:
    lines = LineIndex(numbers)
    assert len(lines) == 5000
    Path(numbers).write_bytes(b"other\n")
    with pytest.raises(DataError, match=r"numbers\.txt: has changed since it was indexed"):
        lines.read(0)


# Where indexes are kept


def test_index_dir_is_used_where_the_data_is_read_only(numbers, tmp_path, read_only_folder, monkeypatch) -> None:
    folder = tmp_path / "indexes"
    assert LineIndex(numbers, index_dir=str(folder)).read(7) == b"7"
    assert not Path(hidden_place(numbers, ".emmett-index")).exists()
    (kept,) = folder.iterdir()
    assert kept.name.startswith("numbers.txt-")
    monkeypatch.setattr(LineIndex, "_find", None)
    monkeypatch.chdir(tmp_path)
    for same in (numbers, "numbers.txt"):
        assert LineIndex(same, index_dir=str(folder)).read(8) == b"8"


def test_files_of_the_same_name_have_different_indexes(tmp_path, read_only_folder) -> None:
    folder = str(tmp_path / "indexes")
    for language in ("de", "en"):
        (tmp_path / language).mkdir()
        path = write(tmp_path / language / "train.txt", language.encode() + b"\n")
        lines = LineIndex(path, index_dir=folder, place=str(tmp_path / "refused"))
        assert lines.read(0) == language.encode()
    assert len(os.listdir(folder)) == 2


def test_without_any_place_the_index_is_kept_in_memory_and_pickled(numbers, messages, read_only_folder) -> None:
    lines = LineIndex(numbers)
    assert lines.read(7) == b"7"
    assert len(messages) == 1
    assert "index_dir" in messages[0]
    copy = pickle.loads(pickle.dumps(lines))
    assert copy.is_loaded
    assert copy.read(8) == b"8"


def test_an_index_that_cannot_be_put_in_place_leaves_nothing_behind(numbers, messages, monkeypatch) -> None:
    def refuse(draft: str, place: str) -> None:
        assert Path(draft).stat().st_size > 0
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    assert LineIndex(numbers).read(4999) == b"4999"
    assert sorted(os.listdir(os.path.dirname(numbers))) == [HIDDEN_FOLDER, "numbers.txt"]
    assert not os.listdir(os.path.join(os.path.dirname(numbers), HIDDEN_FOLDER))
    assert len(messages) == 1


def test_an_index_dir_that_cannot_be_written_is_an_error(numbers, tmp_path, read_only_folder) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"index_dir: cannot write to '.*file' \("):
        len(LineIndex(numbers, index_dir=str(tmp_path / "file")))


def test_a_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(DataError, match=r"none\.txt: cannot be read \(No such file"):
        len(LineIndex(str(tmp_path / "none.txt")))


def test_what_can_only_be_read_forward_is_known_by_its_name_and_its_content(tmp_path) -> None:
    kinds = {path: open_numbered_lines(path).is_sequential for path in ("a.txt", "a.gz", "s3://b/a.txt", "pipe:cat a")}
    assert kinds == {"a.txt": False, "a.gz": True, "s3://b/a.txt": True, "pipe:cat a": True}
    assert is_compressed(write(tmp_path / "a.gz", b"one"))
    assert not is_compressed(write(tmp_path / "a.txt", b"one"))


# Processes


def test_a_pickled_index_is_mapped_by_the_process_that_gets_it(numbers) -> None:
    lines = LineIndex(numbers)
    assert len(lines) == 5000
    copy = pickle.loads(pickle.dumps(lines))
    assert not copy.is_loaded, "the arrays do not travel"
    assert copy.read(4999) == b"4999"


def in_a_fork(function, *args):
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=lambda: sender.send(function(*args)))
    process.start()
    assert receiver.poll(20), "the forked process died"
    result = receiver.recv()
    process.join()
    return result


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_forked_worker_does_not_disturb_its_parent(tmp_path, name) -> None:
    lines = open_numbered_lines(write(tmp_path / name, b"".join(b"%d\n" % i for i in range(200_000))))
    lines.prepare(1000, 2000)
    assert lines.read(1500) == b"1500"
    assert in_a_fork(lambda: [lines.read(i) for i in (150_000, 199_999)]) == [b"150000", b"199999"]
    assert [lines.read(i) for i in (1999, 2000, 150_000)] == [b"1999", b"2000", b"150000"]


def build_after(barrier, path: str) -> list[bytes]:
    lines = LineIndex(path)
    barrier.wait(20)
    return [lines.read(i) for i in (0, 4999)]


def test_processes_that_build_the_same_index_do_not_disturb_one_another(numbers) -> None:
    barrier, results = FORK.Barrier(2), FORK.Queue()
    processes = [FORK.Process(target=lambda: results.put(build_after(barrier, numbers))) for _ in range(2)]
    for process in processes:
        process.start()
    assert [results.get(timeout=20) for _ in processes] == [[b"0", b"4999"]] * 2
    for process in processes:
        process.join()
    assert sorted(os.listdir(os.path.dirname(numbers))) == [HIDDEN_FOLDER, "numbers.txt"]
    assert os.listdir(os.path.join(os.path.dirname(numbers), HIDDEN_FOLDER)) == ["numbers.txt.emmett-index"]
    assert LineIndex(numbers).load()


@pytest.mark.parametrize("is_written", [True, False])
def test_many_files_are_indexed_in_several_processes(tmp_path, monkeypatch, request, is_written) -> None:
    if not is_written:
        request.getfixturevalue("read_only_folder")
    monkeypatch.setattr(index, "_PARALLEL_FROM", 0)
    monkeypatch.setattr(processes, "available_cores", lambda: 2)
    paths = [write(tmp_path / f"{i}.txt{'.gz' * (i % 2)}", b"%d\n" % i * (i + 1)) for i in range(5)]
    indexes = [open_numbered_lines(path) for path in [*paths, paths[0]]]
    here = os.getpid()
    for kind in (LineIndex, LineCount):
        find = kind._find
        monkeypatch.setattr(kind, "_find", lambda *args, find=find: (os.getpid() != here or None) and find(*args))
    build_indexes(indexes)
    assert [len(lines) for lines in indexes] == [1, 2, 3, 4, 5, 1]
    assert [lines.read(0) for lines in indexes] == [b"0", b"1", b"2", b"3", b"4", b"0"]
    assert [lines.contents.is_mapped for lines in indexes] == [is_written] * 6


def test_the_bar_counts_the_bytes_of_the_files(tmp_path, monkeypatch) -> None:
    counted = []

    def record_progress(function, indexes, workers, bar):
        for one in indexes:
            before = bar.n
            yield function(one, bar.update)
            counted.append(bar.n - before)

    monkeypatch.setattr(index, "map_in_processes", record_progress)
    paths = [
        write(tmp_path / "a.txt", random_text(2)),
        write(tmp_path / "b.txt.gz", random_text(3)),
        write_tar(tmp_path / "c.tar", {"a": b"x" * 5000}),
    ]
    build_indexes([LineIndex(paths[0]), LineCount(paths[1]), TarIndex(paths[2])])
    sizes = [os.path.getsize(path) for path in paths]
    assert counted[:2] == sizes[:2]
    assert counted[2] == 512 + 5120, "a tar file's padding at its end is not read"


# Read forward


def test_a_stretch_is_held_and_the_earlier_one_forgotten(tmp_path, monkeypatch) -> None:
    lines = LineCount(write(tmp_path / "a.gz", b"".join(b"%d\n" % i for i in range(1000))))
    opened = []
    monkeypatch.setattr(line_index, "open_lines", lambda path: opened.append(path) or open_lines(path))
    lines.prepare(0, 100)
    lines.prepare(50, 150)
    lines.prepare(150, 250)
    assert [lines.read(i) for i in (150, 249, 200)] == [b"150", b"249", b"200"]
    assert len(lines._lines) == 100
    lines.prepare(900, 2000)
    assert len(lines._lines) == 100
    assert len(opened) == 1, "going forward goes on where it was"
    assert lines.read(3) == b"3"
    assert len(opened) == 2, "going back starts over"


def test_a_damaged_gzip_file_is_named(tmp_path) -> None:
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(random_text(4))[:-2000])
    with pytest.raises(DataError, match=r"a\.gz: cannot be read to its end"):
        len(LineCount(str(path)))


def test_the_output_of_a_command_is_counted_and_read(numbers, tmp_path) -> None:
    command = f"pipe:cat {numbers}"
    lines = open_numbered_lines(command, index_dir=str(tmp_path / "indexes"))
    lines.prepare(100, 110)
    assert (len(lines), lines.read(105)) == (5000, b"105")
    write(tmp_path / "numbers.txt", b"0\n1\n")
    with pytest.raises(DataError, match=r"no longer has 5000 lines, as its index says; delete its index \(.*indexes"):
        open_numbered_lines(command, index_dir=str(tmp_path / "indexes")).read(105)


# Tar files


def write_tar(path: Path, members: dict[str, bytes], layout: int = tarfile.PAX_FORMAT) -> str:
    with tarfile.open(path, "w", format=layout) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return str(path)


MEMBERS = {"b.wav": b"b" * 700, "a.wav": b"a", "folder/ä b.wav": b"", "a" * 150 + ".wav": b"long", "a.wav.json": b"{}"}


@pytest.mark.parametrize("layout", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_every_member_is_found_by_name_and_by_number(tmp_path, layout) -> None:
    tar = pickle.loads(pickle.dumps(TarIndex(write_tar(tmp_path / "a.tar", MEMBERS, layout))))
    assert {name: tar.find(name).read() for name in MEMBERS} == MEMBERS
    assert [(tar.name(i), tar.member(i).read()) for i in range(len(tar))] == list(MEMBERS.items())
    assert tar.find("c.wav") is tar.find("") is tar.find("a.wa") is None
    assert tar.damage is None


def test_folders_are_no_members(tmp_path) -> None:
    (tmp_path / "folder").mkdir()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "folder", arcname="folder")
    assert len(TarIndex(str(tmp_path / "a.tar"))) == 0


@pytest.mark.parametrize(
    ("cut_at", "names", "damage"),
    [
        (0, [], "its start"),
        (100, [], "its start"),
        (512 + 300, [], "b.wav"),  # in the first data
        (512 + 1024, ["b.wav"], None),  # before the second header: as if it ended here
        (512 + 1024 + 512, ["b.wav"], "a.wav"),  # before the second data
    ],
)
def test_a_tar_file_that_breaks_off_keeps_what_came_before(tmp_path, cut_at, names, damage) -> None:
    path = tmp_path / "a.tar"
    write_tar(path, {"b.wav": b"b" * 700, "a.wav": b"a"}, tarfile.USTAR_FORMAT)
    path.write_bytes(path.read_bytes()[:cut_at])
    for tar in (TarIndex(str(path)), TarIndex(str(path))):  # built, and loaded
        assert [tar.name(i) for i in range(len(tar))] == names
        assert tar.damage == damage


@pytest.mark.parametrize(("suffix", "most"), [("wav", 10_000), ("flac", 20_000), ("ogg", 200_000)])
def test_a_header_is_read_without_the_audio_behind_it(tmp_path, write_tone, monkeypatch, suffix, most) -> None:
    audio = write_tone(f"tone.{suffix}", seconds=30)
    member = TarIndex(write_tar(tmp_path / "a.tar", {"x": b"x", "tone": audio.read_bytes()})).find("tone")
    read, read_at = [], tar_index.read_at
    monkeypatch.setattr(tar_index, "read_at", lambda *args: read.append(args[2]) or read_at(*args))
    header = soundfile.info(member.open())
    assert (header.frames, header.samplerate, header.channels) == (480_000, 16_000, 1)
    assert sum(read) < most, audio.stat().st_size


def test_the_header_of_an_index_can_be_read_by_people(numbers) -> None:
    assert len(LineIndex(numbers)) == 5000
    line = Path(hidden_place(numbers, ".emmett-index")).read_bytes().split(b"\n")[0]
    header = json.loads(line)
    assert header["size"] == os.path.getsize(numbers)
    assert header["facts"] == {"lines": 5000}
    assert (len(line) + 1) % 64 == 0, "so that the numbers behind it are aligned"
