"""The size of sources is counted from manifests and text, once."""

from __future__ import annotations

import gzip
import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from lhotse import CutSet, MonoCut, SupervisionSegment
from lhotse.testing.dummies import dummy_recording
from nemo.collections.common.data.lhotse.cutset import read_cutset_from_config

from nemo_emmett import processes
from nemo_emmett.data.blending import source_stats as sizes
from nemo_emmett.data.blending.source_stats import sizes_of
from nemo_emmett.data.config.sources import parse_source
from nemo_emmett.data.io import sidecar
from nemo_emmett.data.io.sidecar import HIDDEN_FOLDER
from nemo_emmett.data.lengths.counting import Size, TokenCounter
from nemo_emmett.errors import ConfigError, DataError

FILES = ["speech.json.sizes.json"]
"""In the hidden folder next to a manifest that has been counted."""


def size_of(config: dict, tokenizer=None, index_dir=None) -> Size | None:
    (size,) = sizes_of([parse_source(config, "train_ds.input_cfg.0")], tokenizer, index_dir)
    return size


def record(duration: object = 2.0, **fields) -> dict:
    return {"audio_filepath": "nowhere.wav", "duration": duration, "text": "one two", "lang": "en", **fields}


@pytest.fixture
def nemo(write_manifest) -> Callable[..., dict]:
    def make(*records: dict | str, name: str = "speech.json", **keys) -> dict:
        return {"type": "nemo", "manifest_filepath": str(write_manifest(name, records)), "target_lang": "de", **keys}

    return make


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The files that are read to be counted, in that order."""
    files = []
    real = sizes._Part.examples
    monkeypatch.setattr(sizes._Part, "examples", lambda part, *args: files.append(part.files) or real(part, *args))
    return files


class TestSpeech:
    def test_seconds_and_examples(self, nemo) -> None:
        assert size_of(nemo(record(2.0), record(3.5))) == Size(examples=2, seconds=5.5)

    def test_bad_records_are_left_out(self, nemo) -> None:
        bad = [
            "{",
            "[1]",
            "",
            "\x00",
            '"' * 3,
            "[" * 100_000,
            record(float("nan")),
            record(float("inf")),
            record(-1),
            record("2"),
            record(True),
            record(None),
            record(10**400),
            record(1e308),
            record(offset=-1),
            record(offset="a"),
            record(offset=1e308),
            record(sampling_rate=-1),
            record(sample_rate="16000"),
            record(audio_filepath=3),
            record(translations=[1]),
            record(translations={"de": "eins"}, target_lang=5),
            record(_skipme=True),
        ]
        config = nemo(*bad, record(2.0))
        with open(config["manifest_filepath"], "ab") as file:
            file.write(b'\xff\xfe{"audio_filepath"\n')
        assert size_of(config) == Size(examples=1, seconds=2.0)

    @pytest.mark.parametrize(
        ("keys", "examples"),
        [
            ({"target_lang": None}, 2),  # de and es, as the record has them
            ({"target_lang": "de"}, 1),
            ({"target_lang": ["de", "es", "fr"]}, 2),  # there is no fr
            ({"target_lang": ["de", "en"]}, 2),  # en is spoken: transcription
            ({"target_lang": ["de", "en"], "source_lang": "es"}, 1),
            ({"tags": {"target_lang": "es"}}, 1),
            ({"target_lang": ["de", "klingon"]}, 0),
        ],
    )
    def test_a_recording_is_an_example_for_each_target_language(self, nemo, keys, examples) -> None:
        size = size_of(nemo(record(2.0, translations={"de": "eins", "es": "uno", "it": " "}), **keys))
        assert size == Size(examples=examples, seconds=2.0 * examples)

    def test_tags_overrule_the_record_and_the_record_the_source(self, nemo) -> None:
        fields = {"translations": {"de": "eins", "es": "uno"}, "target_lang": ["de"]}
        assert size_of(nemo(record(**fields), target_lang=["de", "es"])).examples == 1
        assert size_of(nemo(record(**fields), tags={"target_lang": ["de", "es"]})).examples == 2

    def test_shards_and_lists_of_manifests(self, nemo, tmp_path: Path) -> None:
        for shard in range(3):
            nemo(*[record(1.0)] * (shard + 1), name=f"manifest_{shard}.json")
        sharded = f"{tmp_path}/manifest__OP_0..2_CL_.json"
        audio = f"{tmp_path}/audio__OP_0..2_CL_.tar"  # which is not there: no audio is read
        expected = Size(examples=6, seconds=6.0)
        tarred = {"type": "nemo_tarred", "tarred_audio_filepaths": audio, "target_lang": "de"}
        assert size_of({**tarred, "manifest_filepath": sharded}) == expected
        single = [f"{tmp_path}/manifest_{shard}.json" for shard in range(3)]
        assert size_of({"type": "nemo", "manifest_filepath": single, "target_lang": "de"}) == expected
        weighted = [[single[0], 0.2], [single[1], 0.3], [single[2], 0.5]]
        tars = [[f"{tmp_path}/audio_{shard}.tar"] for shard in range(3)]
        assert size_of({**tarred, "manifest_filepath": weighted, "tarred_audio_filepaths": tars}) == expected

    def test_lhotse_cuts_and_conversations(self, tmp_path: Path) -> None:
        cuts = [_cut(0, 1.0), _cut(1, 2.5), _cut(2, 1.0).append(_cut(3, 2.0)), _cut(4, 1.0).pad(3.0)]
        for path in (tmp_path / "cuts.jsonl", tmp_path / "cuts.jsonl.gz"):
            CutSet(cuts).to_file(path)
            with (gzip.open if path.suffix == ".gz" else open)(path, "at") as file:
                file.write('{"type": "MonoCut"}\n{"type": "MixedCut", "tracks": [3]}\nnot JSON\n')
            for kind in ("lhotse", "lhotse_as_conversation"):
                size = size_of({"type": kind, "cuts_path": str(path), "target_lang": "de"})
                assert (size.examples, size.seconds) == (4, pytest.approx(1.0 + 2.5 + 3.0 + 3.0))
        inside = {"input_cfg": [{"type": "lhotse", "cuts_path": str(tmp_path / "cuts.jsonl")}]}
        with pytest.raises(DataError, match=r"cuts\.jsonl cannot be read to its end"):  # NeMo reads what is inside
            size_of({"type": "lhotse_as_conversation", **inside})
        CutSet(cuts).to_file(tmp_path / "cuts.jsonl")
        assert size_of({"type": "lhotse_as_conversation", **inside}).examples == 4

    def test_translations_of_cuts(self, tmp_path: Path) -> None:
        cut = _cut(0, 2.0)
        cut.custom = {"translations": {"de": "eins", "es": "uno"}}
        path = str(tmp_path / "cuts.jsonl")
        CutSet([cut, cut.pad(3.0).with_id("padded")]).to_file(path)
        assert size_of({"type": "lhotse", "cuts_path": path}) == Size(examples=4, seconds=2 * 2.0 + 2 * 3.0)
        both = {"type": "lhotse", "cuts_path": path, "target_lang": ["de", "en"]}
        assert size_of(both).examples == 4  # its supervision is in English

    @pytest.mark.parametrize("form", ["folder", "folders", "fields"])
    def test_shar(self, tmp_path: Path, form: str) -> None:
        folder = tmp_path / "shar"
        folder.mkdir()
        CutSet([_cut(i, 1.0 + i) for i in range(5)]).to_shar(folder, fields={}, shard_size=2)
        before = sorted(folder.iterdir())
        path = {
            "folder": str(folder),
            "folders": [[str(folder), 0.7]],
            "fields": {"cuts": f"{folder}/cuts._OP_000000..000002_CL_.jsonl.gz", "recording": "gone.tar"},
        }[form]
        size = size_of({"type": "lhotse_shar", "shar_path": path, "target_lang": "de"})
        assert size == Size(examples=5, seconds=15.0)
        if form != "fields":  # lhotse takes each file in the folder for data
            assert sorted(folder.iterdir()) == before
            assert (tmp_path / HIDDEN_FOLDER / "shar.sizes.json").is_file()

    def test_as_many_seconds_as_nemo_reads(self, speech) -> None:
        path = str(speech(count=5))
        cuts, _ = read_cutset_from_config({"manifest_filepath": path})
        size = size_of({"type": "nemo", "manifest_filepath": path, "target_lang": "de"})
        assert size.seconds == pytest.approx(sum(cut.duration for cut in cuts))


def _cut(number: int, seconds: float) -> MonoCut:
    recording = dummy_recording(number, duration=seconds)
    spoken = SupervisionSegment(f"s{number}", recording.id, 0, seconds, text="one", language="en")
    return MonoCut(f"cut-{number}", 0, seconds, 0, supervisions=[spoken], recording=recording)


class TestText:
    def test_both_sides_of_the_lines_that_have_them(self, write_lines) -> None:
        source = write_lines("a.en", ["one two", "", "three", "four five six"])
        target = write_lines("a.de", ["eins", "zwei", "  ", "vier"])
        with open(source, "ab") as file:
            file.write(b"\xff one\n")
        with open(target, "ab") as file:
            file.write(b"eins\n")
        config = {"type": "txt_pair", "source_paths": str(source), "target_paths": str(target), "target_language": "de"}
        assert size_of(config) == Size(examples=2, tokens=3 + 4)

    def test_tokens_are_those_of_the_tokenizer(self, write_lines, tokenizer) -> None:
        texts = ["one <de> two", "three", "no such words <|audio|>"]
        config = {"type": "txt", "paths": str(write_lines("a.en", texts)), "language": "en"}
        assert size_of(config, tokenizer).tokens == sum(len(tokenizer.text_to_ids(text)) for text in texts)

        class OneByOne:
            """A tokenizer that is not Hugging Face's: letters."""

            vocab = ("a", "b")

            def text_to_ids(self, text: str) -> list[int]:
                return [ord(letter) for letter in text]

        assert size_of(config, OneByOne()).tokens == sum(map(len, texts))

    def test_each_direction_counts(self, write_lines) -> None:
        paths = {
            "en": str(write_lines("a.en", ["one", "one two"])),
            "de": str(write_lines("a.de", ["eins zwei drei", "eins"])),
            "fr": str(write_lines("a.fr", ["", "un deux trois quatre"])),
        }
        config = {"type": "parallel_text", "paths": paths}
        # line 1: en-de both ways, 4 words; line 2: 3, 5 and 6 words, both ways
        assert size_of(config) == Size(examples=2 + 6, tokens=2 * 4 + 2 * (3 + 5 + 6))
        assert size_of({**config, "directions": ["en-de", "fr-en"]}) == Size(examples=3, tokens=4 + 3 + 6)

    def test_tsv(self, write_lines) -> None:
        path = str(
            write_lines("a.tsv", ["english\tnote\tgerman", "one two\tx\teins", "one", "\tx\teins", "one\tx\t\t"])
        )
        config = {"type": "parallel_text", "paths": path, "target_lang": "de"}
        assert size_of({**config, "target_column": 2}) == Size(examples=2, tokens=2 + 3)
        named = {"source_column": "english", "target_column": "german"}
        assert size_of({**config, **named}) == Size(examples=1, tokens=3)  # the header is no record
        with pytest.raises(ConfigError, match="no column 'spanish'; its columns are english, note, german"):
            size_of({**config, "source_column": "spanish"})

    def test_jsonl(self, write_lines) -> None:
        lines = ['{"src": "one two", "tgt": "eins"}', '{"src": "one"}', '{"src": 1, "tgt": "eins"}', "[]", "{"]
        path = str(write_lines("a.jsonl", lines))
        fields = {"source_field": "src", "target_field": "tgt"}
        text = {"type": "parallel_text", "paths": path, "target_lang": "de"}
        assert size_of({**text, **fields}) == Size(examples=1, tokens=3)

    def test_text_that_nemo_reads(self, write_lines) -> None:
        lines = write_lines("a.en", ["one two", "", "three"])
        assert size_of({"type": "txt", "paths": str(lines), "language": "en"}) == Size(
            examples=3, tokens=3
        )  # NeMo skips no line
        lines = ['{"src": "one two"}', '{"other": "one"}', '{"src": "one"}']
        path = str(write_lines("a.jsonl", lines))
        config = {"type": "txt_jsonl", "paths": path, "text_field": "src", "language": "en"}
        assert size_of(config) == Size(examples=2, tokens=3)
        config = {**config, "paths": str(write_lines("b.jsonl", [*lines, "{"]))}
        with pytest.raises(DataError, match=r"input_cfg\.0: .*b\.jsonl.* cannot be read to its end"):
            size_of(config)

    def test_gzip_and_shards(self, tmp_path: Path) -> None:
        for shard in range(2):
            for side, text in (("en", b"one\n"), ("de", b"eins zwei\n")):
                with gzip.open(tmp_path / f"a_{shard}.{side}.gz", "wb") as file:
                    file.write(text * (shard + 1))
        sides = {
            f"{key}_paths": f"{tmp_path}/a__OP_0..1_CL_.{side}.gz" for key, side in (("source", "en"), ("target", "de"))
        }
        assert size_of({"type": "parallel_text", "target_lang": "de", **sides}) == Size(examples=3, tokens=9)

    def test_an_empty_file_holds_nothing(self, write_lines, nemo) -> None:
        assert size_of({"type": "txt", "paths": str(write_lines("a.en", [])), "language": "en"}) == Size()
        assert size_of(nemo()) == Size()


class TestMistakes:
    def test_unknown_types_cannot_be_counted(self) -> None:
        assert size_of({"type": "share_gpt", "manifest_filepath": "a.json"}) is None

    def test_missing_file(self) -> None:
        with pytest.raises(DataError, match=r"gone\.json: cannot be read \(No such file"):
            size_of({"type": "nemo", "manifest_filepath": "gone.json"})

    def test_missing_key(self, write_lines) -> None:
        with pytest.raises(ConfigError, match=r"train_ds\.input_cfg\.0\.manifest_filepath: missing"):
            size_of({"type": "nemo"})
        with pytest.raises(ConfigError, match=r"train_ds\.input_cfg\.0\.target_paths: missing"):
            size_of({"type": "parallel_text", "source_paths": str(write_lines("a.en", ["one"]))})

    def test_parallel_files_of_unequal_length(self, write_lines) -> None:
        paths = {"source_paths": str(write_lines("a.en", ["one"] * 2)), "target_paths": str(write_lines("a.de", ["x"]))}
        with pytest.raises(DataError, match=r"a\.de ends after 1 lines"):
            size_of({"type": "parallel_text", **paths})

    def test_a_truncated_gzip_file(self, tmp_path: Path) -> None:
        path = tmp_path / "a.json.gz"
        path.write_bytes(gzip.compress(os.urandom(10_000))[:-100])
        with pytest.raises(DataError, match=r"a\.json\.gz cannot be read to its end"):
            size_of({"type": "nemo", "manifest_filepath": str(path)})


class TestIndex:
    def test_what_has_been_counted_is_looked_up(self, nemo, counted) -> None:
        config = nemo(record(2.0))
        assert size_of(config) == size_of(config) == Size(examples=1, seconds=2.0)
        assert counted == [(config["manifest_filepath"],)]

    def test_it_is_next_to_the_data(self, nemo, tmp_path: Path) -> None:
        size_of(nemo(record(2.0)), index_dir=str(tmp_path / "unused"))
        assert sorted(os.listdir(tmp_path / HIDDEN_FOLDER)) == FILES
        assert sorted(os.listdir(tmp_path)) == [HIDDEN_FOLDER, "speech.json"]

    def test_a_file_of_another_size_is_counted_again(self, nemo, counted) -> None:
        path = nemo(record(2.0))["manifest_filepath"]
        os.utime(path, (1, 1))
        assert size_of({"type": "nemo", "manifest_filepath": path, "target_lang": "de"}).seconds == 2.0
        config = nemo(record(2.0), record(3.0))
        os.utime(path, (1, 1))
        assert size_of(config).seconds == 5.0
        assert len(counted) == 2

    def test_a_file_of_another_time_is_counted_again(self, nemo, counted) -> None:
        path = nemo(record(2.0))["manifest_filepath"]
        size_of(nemo(record(2.0)))
        path = nemo(record(7.0))["manifest_filepath"]  # as long as before
        os.utime(path, (1, 1))
        assert size_of({"type": "nemo", "manifest_filepath": path, "target_lang": "de"}).seconds == 7.0
        assert len(counted) == 2

    def test_either_side_of_a_text(self, write_lines, counted) -> None:
        config = {"type": "parallel_text", "source_paths": str(write_lines("a.en", ["one"])), "target_lang": "de"}
        config["target_paths"] = str(write_lines("a.de", ["eins"]))
        assert size_of(config).tokens == 2
        write_lines("a.de", ["eins zwei"])
        assert size_of(config).tokens == 3
        assert len(counted) == 2

    def test_counts_of_changed_files_do_not_pile_up(self, nemo) -> None:
        def kept() -> list[float]:
            entries = sizes._Counts(config["manifest_filepath"], None).entries
            return [entry["size"]["seconds"] for entry in entries.values()]

        config = nemo(record(2.0))
        for target in ("de", "es", "fr"):
            size_of({**config, "target_lang": target})
        assert kept() == [2.0, 2.0, 2.0]
        size_of({**nemo(record(33.0)), "target_lang": "de"})
        assert kept() == [33.0]

    def test_an_index_is_replaced_at_once_or_not_at_all(self, nemo, tmp_path: Path, monkeypatch) -> None:
        size_of(nemo(record(2.0)))
        before = (tmp_path / HIDDEN_FOLDER / "speech.json.sizes.json").read_bytes()

        def fail(*_) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", fail)
        monkeypatch.setattr(sidecar, "_in_memory", {})
        assert size_of(nemo(record(33.0))).seconds == 33.0
        assert (tmp_path / HIDDEN_FOLDER / "speech.json.sizes.json").read_bytes() == before
        assert sorted(os.listdir(tmp_path / HIDDEN_FOLDER)) == FILES
        assert sorted(os.listdir(tmp_path)) == [HIDDEN_FOLDER, "speech.json"]

    def test_tokens_hold_for_their_tokenizer(self, write_lines, tokenizer, counted) -> None:
        class Letters:
            vocab = ("a", "b")

            def text_to_ids(self, text: str) -> list[int]:
                return [ord(letter) for letter in text]

        config = {"type": "txt", "paths": str(write_lines("a.en", ["one two"])), "language": "en"}
        for _ in range(2):
            assert [size_of(config, t).tokens for t in (None, tokenizer, Letters())] == [2, 2, 7]
        assert len(counted) == 3

    def test_fingerprints(self, tokenizer, tmp_path: Path) -> None:
        class Letters:
            vocab = ("a", "b")

            def __init__(self, first: int = 0, vocab: tuple = ("a", "b")) -> None:
                self.first, self.vocab = first, vocab

            def text_to_ids(self, text: str) -> list[int]:
                return [self.first + ord(letter) for letter in text]

        def fingerprint(tokenizer: object) -> str:
            return TokenCounter(tokenizer).fingerprint

        assert fingerprint(Letters()) == fingerprint(Letters())
        different = [None, Letters(), Letters(first=1), Letters(vocab=("a", "c")), tokenizer]
        assert len(set(map(fingerprint, different))) == len(different)
        tokenizer.tokenizer.save_pretrained(tmp_path)
        more = type(tokenizer)(str(tmp_path))
        more.add_special_tokens({"additional_special_tokens": ["<new>"]})
        assert fingerprint(more) == fingerprint(tokenizer)  # text does not contain what a model adds

    def test_moving_the_folder_keeps_it(self, nemo, tmp_path: Path, counted) -> None:
        config = nemo(record(2.0))
        size_of(config)
        moved = tmp_path / "moved"
        (moved / HIDDEN_FOLDER).mkdir(parents=True)
        for name in ("speech.json", f"{HIDDEN_FOLDER}/speech.json.sizes.json"):
            (tmp_path / name).rename(moved / name)
        assert size_of({**config, "manifest_filepath": str(moved / "speech.json")}).seconds == 2.0
        assert len(counted) == 1

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"version": 0, "counts": {}}', b"\xff", b"{}"])
    def test_a_broken_index_is_replaced(self, nemo, content, counted) -> None:
        config = nemo(record(2.0))
        index = Path(sidecar.hidden_place(config["manifest_filepath"], ".sizes.json"))
        index.parent.mkdir()
        index.write_bytes(content)
        for _ in range(2):
            assert size_of(config).seconds == 2.0
        assert len(counted) == 1

    def test_a_source_named_twice_is_read_once(self, nemo, counted) -> None:
        source = parse_source(nemo(record(2.0)), "train_ds")
        assert sizes_of([source, source]) == [Size(1, 2.0)] * 2
        assert len(counted) == 1


class TestWhereNothingCanBeWritten:
    @pytest.fixture(autouse=True)
    def read_only(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The folder of the data, and all in it but ``index``; permissions would not hold back a root user."""
        real = sidecar.atomic_file

        def refuse(place: str):
            if Path(place).parent == tmp_path / HIDDEN_FOLDER and ".sizes.json" in place:
                raise PermissionError(13, "Permission denied", place)
            return real(place)

        monkeypatch.setattr(sidecar, "atomic_file", refuse)
        monkeypatch.setattr(sidecar, "_in_memory", {})

    def test_it_lies_in_index_dir(self, nemo, tmp_path: Path, counted) -> None:
        config, folder = nemo(record(2.0)), str(tmp_path / "index")
        for _ in range(2):
            assert size_of(config, index_dir=folder).seconds == 2.0
        assert len(counted) == 1
        assert len(os.listdir(folder)) == 1

    def test_files_of_one_name_do_not_meet(self, nemo, tmp_path: Path, write_manifest) -> None:
        for language in ("en", "de"):
            (tmp_path / language).mkdir()
        paths = [write_manifest(f"{lang}/a.json", [record(s)]) for lang, s in (("en", 2.0), ("de", 3.0))]
        folder = str(tmp_path / "index")
        places = [sizes._Counts(str(path), folder).sidecar.places[-1] for path in paths]
        assert places[0] != places[1]

    def test_an_index_dir_that_cannot_be_written_is_an_error(self, nemo, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(ConfigError, match=r"index_dir: cannot write to '.*file' \("):
            size_of(nemo(record(2.0)), index_dir=str(tmp_path / "file"))

    def test_without_one_it_is_kept_in_memory_and_says_so_once(self, nemo, counted, monkeypatch) -> None:
        said = []
        monkeypatch.setattr(sidecar.logging, "info", said.append)
        configs = [nemo(record(2.0), name=name) for name in ("a.json", "b.json", "c.json")]
        sources = [parse_source(config, "train_ds") for config in configs]
        for _ in range(2):
            assert [size.seconds for size in sizes_of(sources)] == [2.0] * 3
        assert len(counted) == 3
        (line,) = said
        assert "a.json and 2 more files cannot be written next to the data" in line
        assert "set index_dir" in line


class TestProcesses:
    def test_what_takes_long_shows_a_bar(self, nemo, monkeypatch) -> None:
        bars = []
        real = sizes.tqdm

        def bar(*examples, **kwargs):
            bars.append(real(*examples, **kwargs, file=open(os.devnull, "w")))  # noqa: SIM115
            return bars[-1]

        monkeypatch.setattr(sizes, "tqdm", bar)
        size_of(nemo(record(2.0), record(3.0)))
        (shown,) = bars
        assert (shown.n, shown.delay) == (2, 5.0)

    def test_several_at_once_leave_a_whole_index(self, nemo, monkeypatch) -> None:
        """Ranks that start together: each counts or looks up, and none finds half a file."""
        config = nemo(*[record(1.0)] * 50)
        start = threading.Barrier(8)

        def rank(number: int) -> Size:
            own = {**config, "target_lang": ("de", "en")[number % 2]}
            start.wait()
            return [size_of(own) for _ in range(5)][-1]

        with ThreadPoolExecutor(8) as ranks:
            assert set(ranks.map(rank, range(8))) == {Size(50, 50.0)}
        folder = Path(config["manifest_filepath"]).parent
        assert sorted(os.listdir(folder / HIDDEN_FOLDER)) == FILES
        json.loads((folder / HIDDEN_FOLDER / "speech.json.sizes.json").read_text())

    def test_ranks_of_a_machine_share_its_cores(self, monkeypatch) -> None:
        monkeypatch.setattr(processes, "available_cores", lambda: 16)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
        assert [processes.workers_for(tasks) for tasks in (0, 1, 100)] == [1, 1, 2]
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
        assert processes.workers_for(100) == 1

    def test_a_daemon_counts_alone(self, monkeypatch) -> None:
        monkeypatch.setattr(processes, "available_cores", lambda: 16)
        monkeypatch.setattr(processes.multiprocessing, "current_process", lambda: SimpleNamespace(daemon=True))
        assert processes.workers_for(100) == 1
