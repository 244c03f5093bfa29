"""Examples by address: those of the pipeline over a source that is read in order, whatever batch they are in."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import pickle
import random
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from lhotse import CutSet
from lhotse.cut import Cut, MixedCut
from lhotse.shar import SharWriter
from nemo.collections.common.data.lhotse.dataloader import make_structured_with_schema_warnings
from nemo.collections.common.data.lhotse.nemo_adapters import LazyNeMoIterator
from omegaconf import OmegaConf

from nemo_emmett.data.config.dataset_config import parse_dataset
from nemo_emmett.data.config.sources import parse_source
from nemo_emmett.data.io import line_index
from nemo_emmett.data.io.line_index import LineIndex
from nemo_emmett.data.io.sidecar import Sidecar
from nemo_emmett.data.io.skipped_records import SkippedRecords
from nemo_emmett.data.lengths.building import open_length_indexes
from nemo_emmett.data.lengths.measures import Measures, measure
from nemo_emmett.data.lengths.notes import Recorder
from nemo_emmett.data.readers.base import Records
from nemo_emmett.data.readers.examples import ExampleKind, Examples
from nemo_emmett.data.readers.random_access import open_records
from nemo_emmett.data.readers.registry import (
    ReaderContext,
    defaults_of,
    open_source,
    reader_context,
    register_data_types,
)
from nemo_emmett.data.sampling.example_reader import ExampleReader, SourceReader
from nemo_emmett.data.sampling.transforms import TransformPipeline
from nemo_emmett.errors import DataError
from nemo_emmett.prompts.translation import register_prompt_formats

from ..conftest import LOCATOR
from ..corpora import Corpus

FORK = multiprocessing.get_context("fork")
KIND = ExampleKind.TRANSLATION
ENGLISH_TO_GERMAN = {"source_lang": "en", "target_lang": "de"}
NUMBERS = ("one", "two", "three", "four")

# The formats; each function writes data and returns its source.


def lines_of(language: str, count: int) -> bytes:
    return "".join(f"{language} {' '.join(NUMBERS[: 1 + i % 4])}\n" for i in range(count)).encode()


def line_aligned(folder: Path, languages: str, count: int = 30) -> dict:
    for language in languages.split():
        lines = lines_of(language, count).splitlines()
        lines[2] = b"  " + lines[2] + b" \r"
        if language == "de":
            lines[4], lines[9] = b"", b"\xff"
        if language == "fr":
            lines[4], lines[11] = b" ", b" "
        (folder / f"a.{language}").write_bytes(b"\n".join(lines))
    return {"type": "parallel_text", "paths": {code: f"{folder}/a.{code}" for code in languages.split()}}


def two_languages(folder: Path, speech: Callable) -> dict:
    paths = line_aligned(folder, "en de")["paths"]
    return {"type": "parallel_text", "source_paths": paths["en"], "target_paths": paths["de"], **ENGLISH_TO_GERMAN}


def both_directions(folder: Path, speech: Callable) -> dict:
    return line_aligned(folder, "en de")


def four_languages(folder: Path, speech: Callable) -> dict:
    return {**line_aligned(folder, "en de es fr"), "tags": {"domain": "news"}}


def some_directions(folder: Path, speech: Callable) -> dict:
    return {**line_aligned(folder, "en de es fr"), "directions": ["fr-en", "de-es", "en-fr"]}


def gzipped(folder: Path, speech: Callable) -> dict:
    paths = line_aligned(folder, "en de fr")["paths"]
    (folder / "a.fr.gz").write_bytes(gzip.compress(Path(paths["fr"]).read_bytes()))
    return {"type": "parallel_text", "paths": {**paths, "fr": f"{folder}/a.fr.gz"}}


def tsv(folder: Path, speech: Callable) -> dict:
    for shard in (0, 1):
        (folder / f"b_{shard}.tsv").write_bytes(b"one\teins\n\ntwo\n\xff\tx\nthree two\tdrei\r\nfour\tvier zwei")
    return {"type": "parallel_text", "paths": f"{folder}/b__OP_0..1_CL_.tsv", **ENGLISH_TO_GERMAN}


def jsonl(folder: Path, speech: Callable) -> dict:
    records = [{"source": "one " * (1 + i % 3), "target": "eins", "source_lang": "en", "number": i} for i in range(9)]
    lines = [json.dumps(record) for record in records]
    (folder / "c.jsonl").write_text("\n".join([*lines[:3], "{", "", '{"source": 1, "target": "x"}', *lines[3:]]))
    return {"type": "parallel_text", "paths": f"{folder}/c.jsonl", "target_lang": "de"}


def with_bad_lines(manifest: Path) -> Path:
    good = json.loads(manifest.read_text().splitlines()[0])
    wrong = [{**good, "duration": -1}, {**good, "audio_filepath": "gone.wav"}, {**good, "translations": {"de": 3}}]
    half = {**good, "translations": {"de": "", "es": "uno"}}
    with manifest.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in [*wrong, half, good])
    return manifest


def manifest(folder: Path, speech: Callable) -> dict:
    return {**several_target_languages(folder, speech), "target_lang": "de"}


def several_target_languages(folder: Path, speech: Callable) -> dict:
    return {"type": "nemo", "manifest_filepath": str(with_bad_lines(speech(6, sampling_rate=None)))}


def tarred(folder: Path, speech: Callable) -> dict:
    return Corpus(folder, tarred=True).source("speech_de", 14)


def lhotse_manifest(folder: Path, speech: Callable) -> dict:
    CutSet(list(LazyNeMoIterator(str(speech(5))))).to_file(folder / "cuts.jsonl")
    with (folder / "cuts.jsonl").open("a") as file:
        file.write('nothing\n\n{"id": "a", "type": "MonoCut"}\n')
    return {"type": "lhotse", "cuts_path": f"{folder}/cuts.jsonl", "target_lang": ["es", "de"]}


def shar(folder: Path, speech: Callable) -> dict:
    (folder / "shar").mkdir()
    with SharWriter(str(folder / "shar"), fields={"recording": "wav"}, shard_size=3) as writer:
        for number, cut in enumerate(LazyNeMoIterator(str(speech(7)))):
            cut.id = f"cut-{number}"
            writer.write(cut)
    return {"type": "lhotse_shar", "shar_path": str(folder / "shar")}


def alternative_texts(folder: Path, speech: Callable) -> dict:
    fields = {**ENGLISH_TO_GERMAN, "audio_locator_tag": LOCATOR}
    texts = {str(n): {"text": "uno " * n, "lang": "es", **fields, "target_lang": "es"} for n in (1, 2)}
    source = str(speech(5, sampling_rate=None, alt_text=texts, translations=None, **fields))
    return {"type": "nemo", "manifest_filepath": source}


TEXT = (two_languages, both_directions, four_languages, some_directions, gzipped, tsv, jsonl)
SPEECH = (manifest, several_target_languages, tarred, lhotse_manifest, shar, alternative_texts)


# What is compared


class FakeIndex:
    """The length index of a source, by what the pipeline makes of each record alone."""

    def __init__(self, counts: list[list[int]], is_one_to_one: bool, sidecar: Sidecar, records: Records) -> None:
        self.is_one_to_one = is_one_to_one
        self.all_digests = [[lines.digest for lines in of_shard] for of_shard in records.shard_lines]
        self.sidecar = sidecar
        self.places = np.array(
            [
                (s, n, k, count)
                for s, of_shard in enumerate(counts)
                for n, count in enumerate(of_shard)
                for k in range(count)
            ]
        ).reshape(-1, 4)
        self.num_entries = len(self.places)

    def digests(self, shard: int) -> list[int]:
        return self.all_digests[shard]

    def locate(self, entries: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(self.places[entries].T)


class Opened:
    """A source with a reader by address, and what the pipeline makes of the source read in order."""

    def __init__(self, config: dict, tokenizer, **keys) -> None:
        how = {"force_finite": True, "audio_locator_tag": LOCATOR}
        self.source = parse_source({**how, **config}, "input_cfg.0", allow_commands=True)
        structured = {
            "input_cfg": [config],
            "batch_size": 4,
            "shard_seed": 0,
            "prompt_format": "emmett_t5",
            "use_multimodal_sampling": True,
            **keys,
        }
        self.structured = make_structured_with_schema_warnings(OmegaConf.create(structured))
        self.tokenizer = tokenizer
        self.skipped, notes = SkippedRecords(), Recorder()
        records = open_records(self.source, notes, KIND)
        self.pipeline = self.new_pipeline(self.skipped)
        counts, is_one_to_one = self._counts()
        index = FakeIndex(counts, is_one_to_one, Sidecar(records.shard_files[0][0], ".lengths", "lengths"), records)
        source = SourceReader(
            records, notes, index, KIND, defaults_of(self.source), self.skipped, seed=(5, len(self.source.name))
        )
        self.reader = ExampleReader([source], self.pipeline)
        self.size = index.num_entries

    def new_pipeline(self, skipped: SkippedRecords) -> TransformPipeline:
        with reader_context(ReaderContext(skipped, KIND)):
            return TransformPipeline(self.structured.copy(), self.tokenizer, (), skipped)

    def _counts(self) -> tuple[list[list[int]], bool]:
        records, pipeline = open_records(self.source, SkippedRecords(), KIND), self.new_pipeline(SkippedRecords())
        counts, is_one_to_one = [], True
        for shard, size in enumerate(records.shard_sizes):
            counts.append([])
            for number in range(size):
                examples = self._examples(records.read(shard, number))
                made = [pipeline.run([example], [0]) for example in examples]
                counts[-1].append(sum(map(len, made)))
                is_one_to_one &= all(len(of_example) == 1 for of_example in made)
        return counts, is_one_to_one

    def _examples(self, found) -> Examples:
        return Examples(found, KIND, defaults_of(self.source), SkippedRecords())

    def expected(self) -> list:
        """What the pipeline makes of the stream, in the order of the records."""
        cuts, _ = open_source(self.source, SkippedRecords(), KIND)
        made = self.new_pipeline(SkippedRecords()).run(list(self._examples(cuts)), [0])
        # Read in order, tar files come in the order of their members, and Shar's shards are shuffled.
        return sorted(made, key=place_of) if self.source.tarred_audio_filepaths or self.source.shar_path else made

    def read(self, entries, **how) -> list:
        entries = np.array(entries)
        return self.reader.read(np.zeros(len(entries), int), entries, np.zeros(len(entries), int), **how)


def place_of(cut: Cut) -> tuple[str, int]:
    return cut.manifest_origin, int(re.search(r"\d+$", cut.manifest_place)[0])


def facts(example) -> list:
    """An example in a form that can be compared."""
    if not isinstance(example, Cut):
        custom = {key: getattr(value, "tolist", lambda value=value: value)() for key, value in example.custom.items()}
        return [example.source, example.target, example.question, custom]
    carrier = example._first_non_padding_cut if isinstance(example, MixedCut) else example
    custom = {k: getattr(v, "tolist", lambda v=v: v)() for k, v in carrier.custom.items() if k != "shar_epoch"}
    texts = [(s.id, s.text, s.language, s.start, s.duration) for s in example.supervisions]
    recordings = [track.cut.recording_id for track in getattr(example, "tracks", ()) if track.cut.has_recording]
    audio = example.load_audio().tobytes()
    return [example.id, example.duration, example.sampling_rate, texts, custom, recordings, audio]


@pytest.fixture
def opened(tmp_path, speech, tokenizer) -> Callable[..., Opened]:
    register_data_types()
    register_prompt_formats()
    return lambda make, **keys: Opened(make(tmp_path, speech), tokenizer, **keys)


def batches_of(size: int, rng: random.Random) -> list[list[int]]:
    """All entries in a random order and in random batches."""
    entries = rng.sample(range(size), size)
    cuts = sorted({0, size, *(rng.randrange(size) for _ in range(size // 5))})
    return [entries[start:stop] for start, stop in pairwise(cuts)]


@pytest.mark.parametrize("make", [*TEXT, *SPEECH])
def test_entries_in_any_order_are_the_examples_of_the_source_in_order(opened, make) -> None:
    data = opened(make)
    expected = list(map(facts, data.expected()))
    assert len(expected) == data.size > 5
    for seed in range(2):
        for batch in batches_of(data.size, random.Random(seed)):
            assert [facts(example) for example in data.read(batch)] == [expected[entry] for entry in batch]
    assert [facts(*data.read([entry])) for entry in range(data.size)] == expected
    assert data.skipped.count() == 0, "what the index says is counted by the index"
    assert data.skipped.read_count == 0


def with_length_index(data: Opened, **keys) -> tuple[list, np.ndarray]:
    """The examples of all entries of the source's length index, which they fit; and these entries."""
    config = {key: data.structured[key] for key in ("batch_size", "prompt_format", "use_multimodal_sampling")}
    sources = [{**data.structured.input_cfg[0], "audio_locator_tag": LOCATOR}]
    groups = parse_dataset(OmegaConf.create({**config, **keys, "input_cfg": sources}), "data.train_ds").groups
    (index,) = open_length_indexes(groups, data.tokenizer, KIND).values()
    data.reader.readers[0].index = index
    entries, measures = index.read_blocks(np.arange(len(index.block_shards)))
    return data.read(entries, expected=measures), entries


@pytest.mark.parametrize("make", [*TEXT, *SPEECH])
def test_every_entry_of_the_length_index_is_an_example_as_long_as_it_says(opened, make) -> None:
    data = opened(make)
    expected = list(map(facts, data.expected()))
    found, entries = with_length_index(data)
    assert data.reader.readers[0].index.is_one_to_one is (make is not alternative_texts)
    assert [facts(example) for example in found] == expected
    gone = len(entries) - len(found)  # the index has not looked for the audio
    assert data.skipped.count() == (gone > 0) == (make in (manifest, several_target_languages))


@pytest.mark.parametrize(
    "keys",
    [
        {"perturb_speed": True},
        {"cut_into_windows_duration": 0.4},
        {"truncate_duration": 0.7, "pad_min_duration": 0.9},
        {"perturb_speed": True, "cut_into_windows_duration": 0.4},
    ],
)
def test_entries_of_changed_recordings_are_as_long_as_the_length_index_says(opened, keys) -> None:
    data = opened(lhotse_manifest, **keys)
    found, entries = with_length_index(data, **keys)
    expected = data.expected()
    assert len(found) == len(entries) == len(expected)
    assert sorted((cut.duration, cut.supervisions[0].text) for cut in found) == sorted(
        (cut.duration, cut.supervisions[0].text) for cut in expected
    )


def test_examples_of_several_sources_come_in_the_order_of_the_addresses(opened, tmp_path, speech, tokenizer) -> None:
    sources = [opened(make) for make in (four_languages, tsv, several_target_languages)]
    expected = [list(map(facts, data.expected())) for data in sources]
    reader = ExampleReader([data.reader.readers[0] for data in sources], sources[0].pipeline)
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, 3, 40)
    entries = np.array([rng.integers(0, sources[number].size) for number in numbers])
    found = [facts(example) for example in reader.read(numbers, entries, np.zeros(40, int))]
    assert found == [expected[number][entry] for number, entry in zip(numbers, entries, strict=True)]


def test_a_direction_of_a_complete_line_reads_the_two_files_that_it_needs(opened, monkeypatch) -> None:
    data = opened(four_languages)
    read = []
    original = LineIndex.read

    def read_line(lines: LineIndex, number: int) -> bytes:
        read.append((lines.path[-2:], number))
        return original(lines, number)

    monkeypatch.setattr(LineIndex, "read", read_line)
    places = data.reader.readers[0].index.places
    (pair,) = data.read([int(np.flatnonzero((places[:, 1] == 3) & (places[:, 2] == 7))[0])])
    assert read == [(pair.source.language, 3), (pair.target.language, 3)] == [("es", 3), ("de", 3)]
    read.clear()
    data.read([int(np.flatnonzero(places[:, 1] == 9)[0])])  # a line without German
    assert len(read) == 4


def test_filters_on_lengths_leave_nothing_out_and_other_filters_do(opened, speech, tmp_path) -> None:
    limits = {"max_duration": 1.2, "max_tokens": 4, "max_tps": 1.0, "max_tpt": 0.1}
    buckets = {"bucket_duration_bins": [[0.5, 1]], "bucket_batch_size": [2], "use_bucketing": True}
    data = opened(several_target_languages)
    names = [facts(example)[0] for example in data.read(range(data.size))]
    with_limits = Opened(data.structured.input_cfg[0], data.tokenizer, **limits, **buckets)
    with_limits.reader.readers[0].index = data.reader.readers[0].index
    assert with_limits.expected() == []
    assert [facts(example)[0] for example in with_limits.read(range(data.size))] == names

    def judged(folder: Path, speech: Callable) -> dict:
        return {"type": "nemo", "manifest_filepath": str(speech(3, "judged.json", validation_status="fail"))}

    kept = opened(judged, keep="fail")
    assert len(kept.read(range(6))) == 6
    kept.reader.pipeline = opened(judged).pipeline
    assert kept.read(range(6)) == []


# Random stages


def noisy(**keys) -> Callable:
    def make(opened: Callable, speech: Callable) -> Opened:
        return opened(several_target_languages, noise_path=str(speech(4, "noise.json")), noise_mix_prob=0.7, **keys)

    return make


def at_three_speeds(opened: Callable, speech: Callable) -> Opened:
    return opened(manifest, perturb_speed=True)


def truncated(opened: Callable, speech: Callable) -> Opened:
    return opened(manifest, truncate_duration=0.7, truncate_offset_type="random", pad_min_duration=0.9)


def in_windows(opened: Callable, speech: Callable) -> Opened:
    return opened(manifest, cut_into_windows_duration=0.4)


@pytest.mark.parametrize("make", [noisy(), noisy(perturb_speed=True), at_three_speeds, truncated, in_windows])
def test_a_random_stage_gives_the_same_example_in_any_batch_and_process(opened, speech, make) -> None:
    data = make(opened, speech)
    alone = [facts(*data.read([entry])) for entry in range(data.size)]
    for batch in batches_of(data.size, random.Random(3)):
        assert [facts(example) for example in data.read(batch)] == [alone[entry] for entry in batch]
    data.reader = pickle.loads(pickle.dumps(data.reader))
    with FORK.Pool(1) as pool:
        found = pool.apply_async(all_facts, (data.reader, data.size)).get(60)
    assert found == alone


def all_facts(reader: ExampleReader, size: int) -> list:
    return [facts(example) for example in reader.read(np.zeros(size, int), np.arange(size), np.zeros(size, int))]


def test_what_random_stages_draw_depends_on_entry_pass_and_seed_of_the_source(opened, speech) -> None:
    data = noisy()(opened, speech)

    def drawn(number_of_pass: int) -> list:
        passes = np.full(data.size, number_of_pass)
        cuts = data.reader.read(np.zeros(data.size, int), np.arange(data.size), passes)
        return [[(t.cut.recording_id, t.snr) for t in cut.tracks[1:]] if hasattr(cut, "tracks") else [] for cut in cuts]

    first = drawn(0)
    assert drawn(0) == first
    assert drawn(1) != first
    assert len({str(noise) for noise in first if noise}) > data.size // 3, "entries draw independently"
    data.reader.readers[0].seed = (6,)
    assert drawn(0) != first


def test_each_recording_has_an_entry_at_each_of_three_speeds(opened, speech) -> None:
    data = at_three_speeds(opened, speech)
    found = [cut.id for cut in data.read(range(data.size))]
    assert sorted(found) == sorted(cut.id for cut in data.expected())
    assert {cut.removesuffix("_sp0.9").removesuffix("_sp1.1") for cut in found[:3]} == {found[0].split("_sp")[0]}


# Faults


@pytest.mark.parametrize("make", [manifest, several_target_languages, alternative_texts])
def test_missing_audio_is_counted_once_and_leaves_the_others_as_they_are(opened, tmp_path, make) -> None:
    data = opened(make)
    expected = list(map(facts, data.expected()))
    (tmp_path / "speech.json-2.wav").unlink()
    gone = set(np.flatnonzero(data.reader.readers[0].index.places[:, 1] == 2).tolist())
    kept = [fact for entry, fact in enumerate(expected) if entry not in gone]
    assert 0 < len(kept) < len(expected)
    assert [facts(example) for example in data.read(range(data.size))] == kept
    delta = data.skipped.drain()
    assert {str(record) for record in delta.skipped} == {f"{tmp_path}/speech.json, line 3: missing audio"}
    counted = SkippedRecords()
    counted.merge(delta)
    assert (counted.count(), counted.end_epoch().count("missing audio")) == (1, 1)
    assert counted.shares() == {f"{tmp_path}/speech.json": 1.0}
    assert counted._total.skipped.total() == 1, "one record in one pass, however many of its entries are read"


def test_an_example_that_cannot_be_prompted_leaves_the_others_as_they_are(opened, monkeypatch) -> None:
    data = opened(four_languages)
    expected = list(map(facts, data.expected()))
    find = type(data.reader.readers[0].records).read_one

    def without_language(self, shard, number, k):
        pair = find(self, shard, number, k)
        if (number, k) == (6, 2):
            pair.source.text = 5
        return pair

    monkeypatch.setattr(type(data.reader.readers[0].records), "read_one", without_language)
    (bad,) = np.flatnonzero((data.reader.readers[0].index.places[:, :3] == (0, 6, 2)).all(1)).tolist()
    del expected[bad]
    assert [facts(example) for example in data.read(range(data.size))] == expected
    assert data.skipped.count() == 1


def test_examples_as_long_as_their_entries_pass(opened) -> None:
    for make in (four_languages, several_target_languages):
        data = opened(make)
        measures = measure(data.expected())
        seconds = measures.seconds * 1.005 + 0.09
        near = Measures(seconds, measures.inputs, measures.outputs, measures.totals, measures.is_cut)
        order = random.Random(1).sample(range(data.size), data.size)
        assert len(data.read(order, expected=near[np.array(order)])) == data.size


@pytest.mark.parametrize(
    ("make", "name", "change"),
    [(four_languages, name, 1) for name in ("inputs", "outputs", "totals")]
    + [(several_target_languages, "outputs", -1), (several_target_languages, "seconds", 0.2), (jsonl, "is_cut", True)]
    + [(jsonl, "seconds", 1.0)],
)
def test_an_example_of_another_length_than_its_entry_is_an_error(opened, make, name, change) -> None:
    data = opened(make)
    measures = measure(data.expected())
    values = getattr(measures, name)
    values[3] = change if name == "is_cut" or np.isnan(values[3]) else values[3] + change
    places = data.reader.readers[0].index.places
    with pytest.raises(DataError) as error:
        data.read([5, 3, 4], expected=measures[np.array([5, 3, 4])])
    file, sidecar = data.reader.readers[0].records.shard_files[0][0], data.reader.readers[0].index.sidecar.places[0]
    where = f"{file}: line {places[3][1] + 1} is not as long as its entry in the length index says ("
    assert str(error.value).startswith(where)
    assert str(error.value).endswith(f"); the file has changed: delete {sidecar} and start again.")
    assert len(data.read([5, 4], expected=measures[np.array([5, 4])])) == 2


def test_a_file_that_is_rewritten_is_an_error(opened, tmp_path) -> None:
    data = opened(four_languages)
    assert len(data.read(range(data.size))) == data.size
    text = (tmp_path / "a.es").read_bytes()
    (tmp_path / "a.es").write_bytes(text.replace(b"one", b"uno"))
    line_index._cached_block.cache_clear()  # as in a worker that has not read this part yet
    with pytest.raises(DataError, match=r"a\.es: has changed since it was indexed"):
        data.read(range(data.size))


def test_it_can_be_pickled_and_used_after_a_fork(opened, monkeypatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # as in workers
    data = opened(several_target_languages)
    expected = [facts(example) for example in data.read(range(data.size))]
    with FORK.Pool(2) as pool:
        assert pool.starmap(all_facts, [(data.reader, data.size)] * 2) == [expected] * 2
    assert all_facts(pickle.loads(pickle.dumps(data.reader)), data.size) == expected
