"""An index is the same however it was built: by several processes and ranks, after interruptions, from an older one."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import pickle
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from tqdm import tqdm

from nemo_emmett import processes
from nemo_emmett.data.config.dataset_config import parse_dataset
from nemo_emmett.data.io import sidecar
from nemo_emmett.data.io.sidecar import HIDDEN_FOLDER
from nemo_emmett.data.io.skipped_records import SkippedRecords
from nemo_emmett.data.lengths import building, measuring
from nemo_emmett.data.lengths.index import LengthIndex
from nemo_emmett.data.readers.base import Records
from nemo_emmett.data.readers.examples import ExampleKind
from nemo_emmett.errors import ConfigError, DataError
from tests.models.two_ranks import run_on_two_ranks

SIZES = (300, 0, 2, 700, 256, 513, 40)


def write_shard(folder: Path, shard: int, size: int, seed: int = 0) -> None:
    rng = random.Random(f"{seed} {shard}")
    for side in ("en", "de"):
        lines = ["one two three " * rng.randint(0, 9) + "\n" for _ in range(size)]
        (folder / f"a_{shard}.{side}").write_text("".join(lines))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for shard, size in enumerate(SIZES):
        write_shard(folder, shard, size)
    with gzip.open(folder / "b.json.gz", "wt") as file:
        for i in range(900):
            record = {"audio_filepath": "x", "duration": 0.1 + i / 7, "text": "one" if i % 30 else "", "lang": "en"}
            file.write(json.dumps({**record, "target_lang": "de"}) + "\n")
    return folder


def config_of(folder: Path) -> dict:
    paths = {f"{key}_paths": f"{folder}/a__OP_0..6_CL_.{side}" for key, side in (("source", "en"), ("target", "de"))}
    text = {"type": "parallel_text", "source_lang": "en", "target_lang": "de", **paths}
    speech = {"type": "nemo", "manifest_filepath": f"{folder}/b.json.gz"}
    return {"input_cfg": [text, speech], "prompt_format": "emmett_t5", "batch_size": 1}


def opened(folder: Path, tokenizer, **keys) -> list[LengthIndex]:
    groups = parse_dataset(config_of(folder), "data.train_ds").groups
    return list(building.open_length_indexes(groups, tokenizer, ExampleKind.TRANSLATION, **keys).values())


def files_of(folder: Path) -> dict[str, bytes]:
    """The indexes of lengths, without unfinished files of killed processes."""
    found = {}
    for path in sorted((folder / HIDDEN_FOLDER).iterdir()):
        if path.suffix == ".lengths" and not path.name.startswith("."):
            found[path.name] = path.read_bytes()
    return found


@pytest.fixture
def small(monkeypatch) -> None:
    """Small stretches and blocks of reading."""
    monkeypatch.setattr(building, "STRETCH", 256)
    monkeypatch.setattr(measuring, "RECORDS_READ_AHEAD", 100)


def in_fork(function: Callable[[], None]) -> multiprocessing.Process:
    def run() -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
        tqdm.set_lock(threading.RLock())  # the one it has is shared with forked processes, and may die with one
        function()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    os.setpgid(process.pid, process.pid)
    return process


def start_over(folder: Path) -> None:
    for path in (folder / HIDDEN_FOLDER).iterdir():
        if ".lengths" in path.name:
            path.unlink()


def test_stretches_change_nothing(data, tokenizer, monkeypatch) -> None:
    opened(data, tokenizer)
    whole = files_of(data)
    assert len(whole) == 2
    start_over(data)
    monkeypatch.setattr(building, "STRETCH", 512)
    opened(data, tokenizer)
    names = [path.name for path in (data / HIDDEN_FOLDER).iterdir()]
    assert not [name for name in names if name.endswith(".parts")]
    # Sums of seconds depend on the stretches alone; all else is equal.
    assert {n: len(b) for n, b in files_of(data).items()} == {n: len(b) for n, b in whole.items()}
    assert [b for n, b in files_of(data).items() if n.startswith("a_")] == [
        b for n, b in whole.items() if n.startswith("a_")
    ]


def parallel(monkeypatch, workers: int) -> None:
    monkeypatch.setattr(building, "_PARALLEL_FROM", 0)
    monkeypatch.setattr(processes, "available_cores", lambda: workers)


@pytest.mark.parametrize("workers", [1, 4])
def test_a_build_that_is_killed_again_and_again_ends_like_any_other(
    data, tokenizer, small, monkeypatch, workers
) -> None:
    opened(data, tokenizer)
    expected = files_of(data)
    start_over(data)
    parallel(monkeypatch, workers)
    rng, real = random.Random(workers), sidecar.Sidecar.write_file

    def slow(self, *args) -> bool:
        time.sleep(0.005)
        return real(self, *args)

    monkeypatch.setattr(sidecar.Sidecar, "write_file", slow)
    killed = 0
    while killed < 20:
        process = in_fork(lambda: opened(data, tokenizer))
        process.join(rng.uniform(0.02, 0.25))
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)  # with its workers
            killed += 1
        else:  # it was finished
            assert process.exitcode == 0
            start_over(data)
        process.join()
    monkeypatch.setattr(sidecar.Sidecar, "write_file", real)
    opened(data, tokenizer)
    assert files_of(data) == expected


def test_parts_left_by_a_build_killed_at_its_end_are_removed(data, tokenizer, small, monkeypatch) -> None:
    def killed(*args, **keys) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(building.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            opened(data, tokenizer)
    parts = [path for path in (data / HIDDEN_FOLDER).iterdir() if path.suffix == ".parts"]
    (first,) = files_of(data)  # the index of the other source was not written
    assert first in {path.stem for path in parts}
    opened(data, tokenizer)
    assert len(files_of(data)) == 2
    assert not any(path.exists() for path in parts)


def test_a_finished_stretch_is_not_measured_again(data, tokenizer, small, monkeypatch) -> None:
    real, stretches = measuring.SourceMeasurer.measure, []

    def measure(self, pieces, progress):
        stretches.append((self.source.place, *pieces))
        if len(stretches) == 4:
            raise KeyboardInterrupt
        return real(self, pieces, progress)

    monkeypatch.setattr(measuring.SourceMeasurer, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        opened(data, tokenizer)
    interrupted = stretches[:]
    stretches.extend([()] * 100)
    opened(data, tokenizer)
    again = [stretch for stretch in stretches[4:] if stretch]
    assert not set(interrupted[:3]) & set(again)
    assert interrupted[3] in again


class ForkedRanks(building._Ranks):
    """Ranks of forked processes, which exchange values by files: torch's groups do not survive a fork."""

    folder: Path
    number: int

    def __init__(self, world_size: int) -> None:
        self.is_shared, self.size, self.rounds = True, world_size, 0

    def gather(self, value: object) -> list:
        self.rounds += 1
        paths = [self.folder / f"{self.rounds}-{rank}" for rank in range(self.size)]
        paths[self.number].with_suffix(".new").write_bytes(pickle.dumps(value))
        paths[self.number].with_suffix(".new").rename(paths[self.number])
        while not all(path.exists() for path in paths):
            time.sleep(0.002)
        return [pickle.loads(path.read_bytes()) for path in paths]


def two_ranks(folder: Path, work: Callable[[], None]) -> list[multiprocessing.Process]:
    folder.mkdir()

    def run(rank: int) -> None:
        building._Ranks = type("Rank", (ForkedRanks,), {"folder": folder, "number": rank})
        work()

    return [in_fork(lambda rank=rank: run(rank)) for rank in (0, 1)]


def ended(ranks: list[multiprocessing.Process]) -> list[int | None]:
    for rank in ranks:
        rank.join(60)
    return [rank.exitcode for rank in ranks]


@pytest.mark.parametrize("is_killed", [False, True])
def test_two_ranks_share_the_work(data, tokenizer, small, tmp_path, monkeypatch, is_killed) -> None:
    opened(data, tokenizer)
    expected = files_of(data)
    start_over(data)
    log, real = tmp_path / "log", measuring.SourceMeasurer.measure

    def measure(self, pieces, progress):
        with open(log, "a") as file:
            file.write(f"{self.source.place} {pieces[0]}\n")
        if is_killed:
            time.sleep(0.02)
        return real(self, pieces, progress)

    monkeypatch.setattr(measuring.SourceMeasurer, "measure", measure)

    def work() -> None:
        (first, *_) = opened(data, tokenizer, world_size=2)
        assert first.num_entries > 1000

    for number in range(20 if is_killed else 0):
        ranks = two_ranks(tmp_path / f"killed{number}", work)
        time.sleep(random.Random(number).uniform(0.05, 0.3))
        for rank in ranks:
            rank.kill()
            rank.join()
    assert ended(two_ranks(tmp_path / "last", work)) == [0, 0]
    # A process that is killed while it writes leaves the unfinished file, under a hidden name that nothing reads.
    finished = {name: content for name, content in files_of(data).items() if not name.startswith(".")}
    assert (finished if is_killed else files_of(data)) == expected
    measured = log.read_text().splitlines()
    assert is_killed or len(measured) == len(set(measured)), "no rank repeats another's"


def test_ranks_that_see_no_files_of_one_another_measure_all(data, tokenizer, small, tmp_path, monkeypatch) -> None:
    """As on nodes without a common disk, or where nothing can be written."""
    monkeypatch.setattr(sidecar.Sidecar, "write_file", lambda *_: False)

    def work() -> None:
        sidecar._in_memory.clear()
        assert [index.num_entries for index in opened(data, tokenizer, world_size=2)] == entries

    entries = [index.num_entries for index in opened(data, tokenizer)]
    assert ended(two_ranks(tmp_path / "ranks", work)) == [0, 0]


def test_a_fault_on_one_rank_ends_all(data, tokenizer, small, tmp_path, monkeypatch) -> None:
    def measure(self, pieces, progress):
        raise DataError("a fault.")

    def work() -> None:
        if building._Ranks.number == 1:
            measuring.SourceMeasurer.measure = measure
        with pytest.raises(DataError, match=r"a fault\."):
            opened(data, tokenizer, world_size=2)

    assert ended(two_ranks(tmp_path / "ranks", work)) == [0, 0]


def _gloo_rank(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", rank=rank, world_size=2)
    indexes = opened(folder, None, world_size=2)
    assert [index.num_entries > 500 for index in indexes] == [True, True]
    (folder / f"measured{rank}").write_text(str(sum(index.measured[0] for index in indexes)))


def test_ranks_of_torch(data) -> None:
    run_on_two_ranks(_gloo_rank, data, data)
    measured = [int((data / f"measured{rank}").read_text()) for rank in (0, 1)]
    assert sum(measured) == sum(SIZES) + 900
    built = files_of(data)
    start_over(data)
    opened(data, None)
    assert files_of(data) == built


@pytest.fixture
def reads(monkeypatch) -> list[tuple[int, int]]:
    read, real = [], Records.read
    monkeypatch.setattr(Records, "read", lambda self, *place: read.append(place) or real(self, *place))
    return read


@pytest.mark.parametrize("changed", [[0], [3], [4, 5], [6], [0, 3, 6], [1], list(range(7))])
def test_only_changed_shards_are_measured_again(data, tokenizer, small, reads, changed) -> None:
    opened(data, tokenizer)
    for shard in changed:
        write_shard(data, shard, SIZES[shard] + 3, seed=1)
    reads.clear()
    opened(data, tokenizer)
    assert len(reads) == sum(SIZES[shard] + 3 for shard in changed)
    assert {shard for shard, _ in reads} == set(changed)
    updated = files_of(data)
    start_over(data)
    opened(data, tokenizer)
    assert files_of(data) == updated


def test_times_alone_cost_no_measuring(data, tokenizer, reads) -> None:
    opened(data, tokenizer)
    before = files_of(data)
    reads.clear()
    for path in data.glob("*.*"):
        os.utime(path, (1, 1))
    (index, _) = opened(data, tokenizer)
    assert reads == []
    assert files_of(data) != before, "the new times are written"
    assert index.read_blocks(np.arange(len(index.block_shards)))[0].tolist() == list(range(index.num_entries))
    after = files_of(data)
    opened(data, tokenizer)
    assert files_of(data) == after


def test_a_file_rewritten_with_its_size_and_time_is_measured_again(data, tokenizer, reads) -> None:
    opened(data, tokenizer)
    path = data / "a_3.en"
    status, content = path.stat(), path.read_bytes()
    path.write_bytes(content.replace(b"one two", b"onetwo ", 1))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    reads.clear()
    opened(data, tokenizer)
    assert {shard for shard, _ in reads} == {3}


def test_parts_of_other_content_are_not_used(data, tokenizer, small, monkeypatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(building._Build, "assemble", lambda self: None)
        with pytest.raises(AttributeError):  # there is no index
            opened(data, tokenizer)
    assert list((data / HIDDEN_FOLDER).glob("*.parts/*"))
    write_shard(data, 3, SIZES[3], seed=1)
    opened(data, tokenizer)
    resumed = files_of(data)
    start_over(data)
    opened(data, tokenizer)
    assert files_of(data) == resumed


@pytest.fixture
def read_only(data, monkeypatch) -> None:
    real = sidecar.atomic_file

    def refuse(place: str):
        if str(place).startswith(str(data)):
            raise PermissionError(13, "Permission denied", place)
        return real(place)

    monkeypatch.setattr(sidecar, "atomic_file", refuse)
    monkeypatch.setattr(sidecar, "_in_memory", {})


def test_index_dir_holds_it_where_the_data_is_read_only(data, tokenizer, small, read_only, tmp_path, reads) -> None:
    folder = tmp_path / "index"
    opened(data, tokenizer, index_dir=str(folder))
    assert len(list(folder.glob("*.lengths"))) == 2
    assert not list(folder.glob("*.parts"))
    count = len(reads)
    opened(data, tokenizer, index_dir=str(folder))
    assert len(reads) == count


@pytest.mark.parametrize("workers", [1, 2])
def test_without_a_folder_it_is_in_memory(
    data, tokenizer, small, read_only, monkeypatch, reads, messages, workers
) -> None:
    parallel(monkeypatch, workers)
    first = opened(data, tokenizer)
    assert first[0].num_entries == opened(data, tokenizer)[0].num_entries > 1000
    assert len(reads) == (sum(SIZES) + 900 if workers == 1 else 0)
    assert sum("length indexes of" in message for message in messages) == 1


@pytest.fixture
def messages(monkeypatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(sidecar.logging, "info", said.append)
    return said


def test_an_index_dir_that_cannot_be_written_is_an_error(data, tokenizer, read_only, tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"index_dir: cannot write to"):
        opened(data, tokenizer, index_dir=str(tmp_path / "file"))


def test_mistakes_in_the_data(data, tokenizer) -> None:
    (data / "a_3.en").write_text("one\n")
    with pytest.raises(DataError, match=r"a_3\.en ends after 1 lines"):
        opened(data, tokenizer)
    (data / "a_3.en").unlink()
    with pytest.raises(DataError, match=r"a_3\.en: cannot be read \(No such file"):
        opened(data, tokenizer)


def test_a_source_named_twice_is_read_once(data, tokenizer, reads) -> None:
    config = config_of(data)
    twice = {**config, "input_cfg": [config["input_cfg"][1]] * 2}
    groups = parse_dataset(twice, "data.train_ds").groups
    one, other = building.open_length_indexes(groups, tokenizer, ExampleKind.TRANSLATION).values()
    assert one is other
    assert len(reads) == 900


# Damage


def everything(indexes: list[LengthIndex]) -> list:
    found = []
    for index in indexes:
        entries, m = index.read_blocks(np.arange(len(index.block_shards)))
        skipped = SkippedRecords()
        index.report(skipped)
        located = [part.tolist() for part in index.locate(entries)]
        arrays = [entries, m.inputs, m.outputs, m.totals, m.is_cut, np.nan_to_num(m.seconds, nan=-1)]
        found.append([*(a.tolist() for a in arrays), located, skipped.counts, index.size, index.filtered])
    return found


def flipped(rng: random.Random, content: bytes) -> bytes:
    place = rng.choice([rng.randrange(len(content)), rng.randrange(min(3000, len(content)))])
    return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]


def truncated(rng: random.Random, content: bytes) -> bytes:
    return content[: rng.randrange(len(content))]


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def pickled(rng: random.Random, content: bytes) -> bytes:
    return rng.choice([pickle.dumps(Evil()), content[:100] + pickle.dumps(Evil()), content + pickle.dumps(Evil())])


def with_header(rng: random.Random, content: bytes) -> bytes:
    line, _, rest = content.partition(b"\n")
    header = json.loads(line)
    changes = [
        {"version": 2},
        {"lengths": 0},
        {"identity": "0" * 64},
        {"kind": "lines"},
        {"facts": {**header["facts"], "one_to_one": not header["facts"]["one_to_one"]}},
        {"facts": {**header["facts"], "constants": {}}},
        {"facts": None},
        {"arrays": [["inputs", "|O", 3]]},
        {"arrays": header["arrays"][::-1]},
        {"large": -1},
        {"large": 10**9},
        {"checksum": 0},
    ]
    line = json.dumps({**header, **rng.choice(changes)}).encode()
    return line.ljust(-(-(len(line) + 1) // 64) * 64 - 1) + b"\n" + rest


@pytest.mark.parametrize("damage", [flipped, truncated, pickled, with_header])
def test_a_damaged_index_is_built_again_or_refused(data, tokenizer, damage, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    expected = everything(opened(data, tokenizer))
    good, rng, refused = files_of(data), random.Random(0), 0
    for _ in range(25):
        name = rng.choice(list(good))
        path = data / HIDDEN_FOLDER / name
        path.write_bytes(damage(rng, good[name]))
        found = refusal = None
        try:
            found = everything(opened(data, tokenizer))
        except DataError as error:
            refusal = str(error)
        if refusal is not None:
            refused += 1
            assert "its length index is damaged; delete it (" in refusal
            assert name in refusal
            assert not path.exists()
            found = everything(opened(data, tokenizer))
        assert found == expected
        assert files_of(data) == good
    assert (refused > 0) == (damage is flipped)
    assert not (tmp_path / "executed").exists()


def test_an_index_of_other_data_is_not_used(data, tokenizer) -> None:
    expected = everything(opened(data, tokenizer))
    good = files_of(data)
    one, other = (data / HIDDEN_FOLDER / name for name in good)
    one.write_bytes(good[other.name])
    assert everything(opened(data, tokenizer)) == expected
    assert files_of(data) == good


def test_a_damaged_block_is_not_copied_when_another_shard_changes(data, tokenizer, small) -> None:
    index = opened(data, tokenizer)[0]
    path = Path(index.sidecar.places[0])
    content = path.read_bytes()
    skips = len(index.contents.large["skips"])
    path.write_bytes(content[: -skips - 1] + bytes([content[-skips - 1] ^ 1]) + content[len(content) - skips :])
    write_shard(data, 0, 10, seed=1)
    with pytest.raises(DataError, match="damaged"):
        opened(data, tokenizer)
    opened(data, tokenizer)
