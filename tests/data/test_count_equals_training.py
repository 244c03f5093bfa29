"""What is counted of a source is what a training reads of it, for every format and every cause of a skipped record."""

from __future__ import annotations

import ast
import copy
import gzip
import json
import random
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from lhotse import MonoCut
from lhotse.shar import SharWriter
from nemo.collections.speechlm2.data.salm_dataset import SALMDataset

import nemo_emmett.data.readers
from nemo_emmett import audio_file
from nemo_emmett.data import SpeechTextDataset, get_multimodal_dataloader
from nemo_emmett.data.blending.weights import blend_of
from nemo_emmett.data.config.dataset_config import parse_dataset
from nemo_emmett.data.io import channels, files
from nemo_emmett.data.readers.examples import ExampleKind
from tests.data.test_fuzzed_manifests import RATE, SECONDS, SOURCES, cut_record, write_tone

AUDIO = frozenset(
    {
        "RUNS_A_COMMAND",
        "audio far above full scale",
        "audio holds values that are not numbers",
        "empty audio",
        "missing audio",
        "no channel {}",
        "not in the manifest",
        "truncated audio",
        "unreadable audio",
        "unreadable tar",
        # Of the fields that lhotse Shar has in tar files.
        "missing {}",
        "unreadable {}",
        "{} of another cut",
    }
)
"""Causes that only the audio can show, or what lies with it in tar files: counting cannot know them."""

SPOKEN = {"text": "one two", "lang": "en", "target_lang": "de"}
JSON = [(b"{", "not JSON"), (b"[1]", "not a JSON object"), (b'{"a": "\xff"}', "not UTF-8")]
TEXTS = [
    ({"text": " "}, "empty text"),
    ({"text": 3}, "text is not a string"),
    ({"text": "\ud800"}, "text is not Unicode"),
    ({"target_lang": None}, "no target language"),
    ({"target_lang": "klingon"}, "unknown language '{}'"),
    ({"lang": "klingon"}, "unknown language '{}'"),
    ({"target_lang": ["de", "es"]}, "several target languages, but no translations"),
    ({"translations": 3}, "translations is not a mapping"),
    ({"translations": {"es": "uno"}}, "no translation to '{}'"),
    ({"translations": {"de": "eins", "deu": "zwei"}}, "two translations to '{}'"),
]
TIMES = [
    ({"duration": None}, "no duration"),
    ({"duration": -1}, "invalid duration"),
    ({"offset": -1}, "invalid offset"),
    ({"alt_text": 3}, "alt_text is not a mapping of texts"),
    ({"audio_filepath": 3}, "no audio_filepath"),
    ({"speaker_channel": None}, "no field '{}' to select a channel by"),
    ({"speaker_channel": "left"}, "invalid channel"),
]
TRANSLATED = {"target_lang": ["de", "es"], "translations": {"de": "eins", "es": " "}}
"""Fields by which a record makes one example and skips another."""

STREAMED = {"num_workers": 1}
"""The first block of a stream is read when a loader is built, and reported by the worker that reads it again."""

Case = tuple[dict, Counter]
"""The keys of a dataset, and the causes of the records that are skipped."""


def as_lines(good: dict, faults: Sequence[tuple[dict | bytes, str]]) -> tuple[bytes, Counter]:
    """Good records, one of which makes two examples, and bad ones."""
    both = {"target_lang": ["de", "es"], "translations": {"de": "eins", "es": "uno"}}
    records = [
        good,
        {**good, **both},
        {**good, **TRANSLATED},
        *({**good, **f} for f, _ in faults if isinstance(f, dict)),
    ]
    lines = [*(json.dumps(record).encode() for record in records), *(f for f, _ in faults if isinstance(f, bytes))]
    random.Random(0).shuffle(lines)
    return b"\n".join([*lines, b""]), Counter(["empty text", *(cause for _, cause in faults)])


def nemo(folder: Path) -> Case:
    good = {**SPOKEN, "audio_filepath": write_tone(folder / "a.wav"), "duration": SECONDS, "speaker_channel": 0}
    rates = [({"sampling_rate": RATE, **fields}, cause) for fields, cause in [*TEXTS, *TIMES]]
    faults = [*JSON, *TEXTS, *TIMES, *rates, ({"sampling_rate": "16000"}, "invalid sampling_rate")]
    content, causes = as_lines(good, faults)
    content += json.dumps({**good, "_skipme": True}).encode()
    (folder / "m.json").write_bytes(content)
    source = {"type": "nemo", "manifest_filepath": f"{folder}/m.json", "channel_selector": "speaker_channel"}
    return {"input_cfg": [source]}, causes


def drifted(folder: Path) -> Case:
    """One good line and three bad ones, of which all were counted once."""
    good = {**SPOKEN, "audio_filepath": write_tone(folder / "a.wav"), "duration": SECONDS, "sampling_rate": RATE}
    bad = [{"sampling_rate": -1}, {"text": ""}, {"lang": "klingon"}]
    (folder / "m.json").write_text("\n".join(json.dumps({**good, **fields}) for fields in [{}, *bad]))
    causes = Counter(["invalid sampling_rate", "empty text", "unknown language '{}'"])
    return {"input_cfg": [{"type": "nemo", "manifest_filepath": f"{folder}/m.json"}]}, causes


def nemo_with_other_fields(folder: Path) -> Case:
    """Keys of the dataset and tags of the source overrule the records."""
    good = {"audio_filepath": write_tone(folder / "a.wav"), "duration": SECONDS, "answer": "eins", "target_lang": "xx"}
    (folder / "m.json").write_text("\n".join(json.dumps(r) for r in [good, good, {**good, "answer": ""}]))
    source = {"type": "nemo", "manifest_filepath": f"{folder}/m.json", "tags": {"target_lang": "de"}}
    return {"input_cfg": [source], "text_field": "answer"}, Counter(["empty text"])


def nemo_with_extra_fields(folder: Path) -> Case:
    config, causes = nemo(folder)
    (folder / "q.txt").write_text("question\n" * 100)
    config["input_cfg"][0]["extra_fields"] = [{"type": "text_iter", "name": "question", "path": f"{folder}/q.txt"}]
    return {**config, **STREAMED}, causes


def nemo_in_a_list(folder: Path) -> Case:
    config, causes = nemo(folder)
    path = f"{folder}/m.json"
    config["input_cfg"][0] |= {"manifest_filepath": [[path, 0.2], [path, 0.8]], "max_open_streams": None}
    return {**config, **STREAMED}, causes + causes


def nemo_tarred(folder: Path) -> Case:
    good = {**SPOKEN, "audio_filepath": "a.wav", "duration": SECONDS, "shard_id": 0, "speaker_channel": 0}
    faults = [*JSON, *TEXTS, *TIMES, ({"shard_id": 7}, "no such shard_id"), ({"shard_id": "0"}, "no such shard_id")]
    content, causes = as_lines(good, faults)
    # The headers in the tar files have the sampling rate.
    content += json.dumps({**good, "sampling_rate": "16000"}).encode()
    (folder / "manifest_all.json").write_bytes(content)
    write_tone(folder / "a.wav")
    for shard in (0, 1):
        with tarfile.open(folder / f"audio_{shard}.tar", "w") as tar:
            tar.add(folder / "a.wav", arcname="a.wav")
    source = {"type": "nemo_tarred", "manifest_filepath": f"{folder}/manifest_all.json"}
    tars = {"tarred_audio_filepaths": f"{folder}/audio__OP_0..1_CL_.tar", "channel_selector": "speaker_channel"}
    return {"input_cfg": [{**source, **tars}]}, causes


def nemo_in_compressed_tars(folder: Path) -> Case:
    """These can only be streamed."""
    config, causes = nemo_tarred(folder)
    for shard in (0, 1):
        path = folder / f"audio_{shard}.tar"
        path.write_bytes(gzip.compress(path.read_bytes()))
        path.rename(f"{path}.gz")
    config["input_cfg"][0]["tarred_audio_filepaths"] = f"{folder}/audio__OP_0..1_CL_.tar.gz"
    return {**config, **STREAMED}, causes


CUTS = [
    ({"type": "Shoe"}, "not a lhotse cut"),
    ({"id": 3}, "not a lhotse cut"),
    ({"start": -1.0}, "invalid start"),
    ({"duration": -1.0}, "invalid duration"),
    ({"recording": None}, "not a lhotse cut"),
    ({"recording": ...}, "no audio"),
]


def cut_lines(good: dict) -> tuple[list[bytes], list[str]]:
    """Cuts, good and bad ones; the causes of the latter."""
    faults: list[tuple[dict, str]] = []
    for fields, cause in CUTS:
        faults.append(({key: value for key, value in {**good, **fields}.items() if value is not ...}, cause))
    for fields, cause in [*TEXTS, ({"speaker_channel": "left"}, "invalid channel")]:
        bad = copy.deepcopy(good)
        bad["supervisions"][0]["text"] = fields.get("text", "one")
        bad["custom"] |= {key: value for key, value in fields.items() if key != "text"}
        faults.append((bad, cause))
    rate = copy.deepcopy(good)
    rate["recording"]["sampling_rate"] = "16000"
    without = copy.deepcopy(good)
    del without["custom"]["speaker_channel"]
    faults += [(rate, "invalid sampling_rate"), (without, "no field '{}' to select a channel by")]
    two = copy.deepcopy(good)
    two["custom"] |= TRANSLATED
    lines = [json.dumps(cut).encode() for cut in (good, two, *(bad for bad, _ in faults))]
    return [*lines, *(line for line, _ in JSON)], ["empty text", *(cause for _, cause in [*faults, *JSON])]


def good_cut(folder: Path) -> dict:
    cut = cut_record(write_tone(folder / "a.wav"), "a")
    cut["custom"] = {"lang": "en", "target_lang": "de", "speaker_channel": 0}
    return cut


def lhotse(folder: Path) -> Case:
    lines, causes = cut_lines(good_cut(folder))
    (folder / "c.jsonl").write_bytes(b"\n".join(lines))
    source = {"type": "lhotse", "cuts_path": f"{folder}/c.jsonl", "channel_selector": "speaker_channel"}
    return {"input_cfg": [source]}, Counter(causes)


def lhotse_in_gzip(folder: Path) -> Case:
    config, causes = lhotse(folder)
    (folder / "c.jsonl.gz").write_bytes(gzip.compress((folder / "c.jsonl").read_bytes()))
    config["input_cfg"][0]["cuts_path"] += ".gz"
    return config, causes


def shar(folder: Path) -> Case:
    good = good_cut(folder)
    good_lines, _ = cut_lines(good)
    (folder / "shar").mkdir()
    with SharWriter(str(folder / "shar"), fields={"recording": "wav"}, shard_size=1000) as writer:
        for number in range(len(good_lines)):
            writer.write(MonoCut.from_dict(copy.deepcopy({**good, "id": f"a{number}"})))
    path = folder / "shar" / "cuts.000000.jsonl.gz"
    written = json.loads(gzip.decompress(path.read_bytes()).splitlines()[0])
    # The recording itself is in the tar file, so what a line says of it does not matter.
    lines, causes = cut_lines(written)
    kept = [
        (line, cause) for line, cause in zip(lines, ["", "", *causes[1:]], strict=True) if b'"recording": {' in line
    ]
    kept = [(line, cause) for line, cause in kept if cause != "invalid sampling_rate"]
    kept += [(line, cause) for line, cause in JSON]
    renamed = [line.replace(b'"id": "a0"', b'"id": "a%d"' % number, 1) for number, (line, _) in enumerate(kept)]
    path.write_bytes(gzip.compress(b"\n".join(renamed)))
    source = {"type": "lhotse_shar", "shar_path": f"{folder}/shar", "channel_selector": "speaker_channel"}
    return {"input_cfg": [source]}, Counter(["empty text", *(cause for _, cause in kept if cause)])


def shar_fields(folder: Path) -> Case:
    config, causes = shar(folder)
    names = {"cuts": "cuts.000000.jsonl.gz", "recording": "recording.000000.tar"}
    config["input_cfg"][0]["shar_path"] = {field: [f"{folder}/shar/{name}"] for field, name in names.items()}
    return config, causes


SIDES = {"en": b"one\n\n\xff\ntwo\nthree\n", "de": b"eins\nzwei\ndrei\n \nvier\n", "fr": b"un\ndeux\ntrois\nquatre\n\n"}


def sides(folder: Path) -> dict[str, str]:
    for language, content in SIDES.items():
        (folder / f"a.{language}").write_bytes(content)
    return {language: f"{folder}/a.{language}" for language in SIDES}


def pair(folder: Path) -> Case:
    paths = sides(folder)
    source = {"source_paths": paths["en"], "target_paths": paths["de"], "source_lang": "en", "target_lang": "de"}
    return {"input_cfg": [{"type": "parallel_text", **source}]}, Counter({"empty text": 2, "not UTF-8": 1})


def txt_pair(folder: Path) -> Case:
    config, causes = pair(folder)
    languages = {"source_language": "en", "target_language": "de"}
    files = {key: config["input_cfg"][0][key] for key in ("source_paths", "target_paths")}
    return {"input_cfg": [{"type": "txt_pair", **files, **languages}]}, causes


def many(folder: Path) -> Case:
    source = {"type": "parallel_text", "paths": sides(folder)}
    return {"input_cfg": [source]}, Counter({"empty text": 3, "not UTF-8": 1})


def directions(folder: Path) -> Case:
    config, causes = many(folder)
    config["input_cfg"][0]["directions"] = ["en-de", "fr-en"]
    return config, causes


TSV = [(b"one", "missing column"), (b"\teins", "empty text"), (b"one\t\xff", "not UTF-8")]


def tsv(folder: Path) -> Case:
    (folder / "a.tsv").write_bytes(b"\n".join([b"one\teins", b"", b"two\tzwei", *(line for line, _ in TSV)]))
    source = {"type": "parallel_text", "paths": f"{folder}/a.tsv", "source_lang": "en", "target_lang": "de"}
    return {"input_cfg": [source]}, Counter(cause for _, cause in TSV)


def tsv_with_header(folder: Path) -> Case:
    config, causes = tsv(folder)
    (folder / "a.tsv").write_bytes(b"english\tgerman\n" + (folder / "a.tsv").read_bytes() + b"\none\teins\tmore")
    config["input_cfg"][0] |= {"source_column": "english", "target_column": "german"}
    return config, causes + Counter(["too many columns"])


SPEECH_TSV = [
    (b"a.wav\tone\teins\tde\t\t0.1", "no duration"),
    (b"a.wav\tone\teins\tde\tlong\t", "invalid duration"),
    (b"a.wav\tone\teins\tde\t0.1\tnan", "invalid offset"),
    (b"a.wav\tone\teins\tde\t0.1", "missing column"),
    (b"a.wav\tone\teins\tde\t0.1\t\tmore", "too many columns"),
    (b"\tone\teins\tde\t0.1\t", "no audio"),
    (b"a.wav\tone\t \tde\t0.1\t", "empty text"),
    (b"a.wav\tone\teins\tklingon\t0.1\t", "unknown language '{}'"),
    (b"a.wav\tone\teins\t\t0.1\t", "no target language"),
    (b"\0" * 50, "missing column"),
    (b"a.wav\tone\t\xff\tde\t0.1\t", "not UTF-8"),
]


def speech_tsv(folder: Path) -> Case:
    write_tone(folder / "a.wav")
    good = b"a.wav\tone\teins\tde\t%s\t" % str(SECONDS).encode()
    rows = [b"audio\tsource\ttarget\ttarget_lang\tduration\toffset", good, *(row for row, _ in SPEECH_TSV), b"", good]
    (folder / "s.tsv").write_bytes(b"\n".join(rows))
    return {"input_cfg": [{"type": "speech_tsv", "paths": f"{folder}/s.tsv"}]}, Counter(c for _, c in SPEECH_TSV)


def speech_tsv_without_durations(folder: Path) -> Case:
    """The files are opened when they are measured, so what is missing is not counted."""
    write_tone(folder / "a.wav")
    (folder / "b.wav").write_bytes(b"")
    rows = ["a.wav\teins", "gone.wav\tzwei", "b.wav\tdrei", "a.wav\tvier", "s3://b/a.wav\tsechs"]
    (folder / "s.tsv").write_text("\n".join(["audio\ttarget", *rows]))
    source = {"type": "speech_tsv", "paths": f"{folder}/s.tsv", "target_lang": "de"}
    return {"input_cfg": [source]}, Counter(["no duration"])


JSONL = [
    ({"source": ...}, "no field '{}'"),
    ({"target": 3}, "text is not a string"),
    ({"target": ""}, "empty text"),
    ({"source": "\ud800"}, "text is not Unicode"),
    ({"source_lang": "klingon"}, "unknown language '{}'"),
    ({"target_lang": None}, "no target language"),
]


def jsonl(folder: Path) -> Case:
    good = {"source": "one", "target": "eins", "target_lang": "de"}
    records = [good, good, *({k: v for k, v in {**good, **fields}.items() if v is not ...} for fields, _ in JSONL)]
    lines = [*(json.dumps(record).encode() for record in records), *(line for line, _ in JSON)]
    (folder / "a.jsonl").write_bytes(b"\n".join(lines))
    source = {"type": "parallel_text", "paths": f"{folder}/a.jsonl", "source_lang": "en"}
    return {"input_cfg": [source]}, Counter(cause for _, cause in [*JSONL, *JSON])


CASES: dict[str, Callable[[Path], Case]] = {
    function.__name__: function
    for function in (
        nemo,
        drifted,
        nemo_with_other_fields,
        nemo_with_extra_fields,
        nemo_in_a_list,
        nemo_tarred,
        nemo_in_compressed_tars,
        lhotse,
        lhotse_in_gzip,
        shar,
        shar_fields,
        pair,
        txt_pair,
        many,
        directions,
        tsv,
        tsv_with_header,
        speech_tsv,
        speech_tsv_without_durations,
        jsonl,
    )
}

COMMON = {
    "batch_size": 4,
    "shuffle": True,
    "seed": 0,
    "shard_seed": 0,
    "force_finite": True,
    "num_workers": 0,
    "sampling": "emmett",
    "max_bad_records": None,
    "audio_locator_tag": "<|audio|>",
    "token_equivalent_duration": 0.08,
}


def as_pattern(cause: str) -> str:
    """A cause without the values in it."""
    for pattern in sorted(CAUSES, key=lambda p: p.count("{}")):
        if re.fullmatch(re.escape(pattern).replace(r"\{\}", ".*"), cause):
            return pattern
    return cause


def trained(config: dict, tokenizer, dataset) -> tuple[int, float, Counter]:
    """The examples and seconds of one pass of a training, and the causes of its skipped records."""
    is_text = config["input_cfg"][0]["type"] in ("parallel_text", "txt_pair")
    loader = get_multimodal_dataloader(
        {**COMMON, "use_multimodal_sampling": is_text, **config}, 0, 1, dataset, tokenizer
    )
    examples, samples = 0, 0
    for batch in loader:
        parts = batch.values() if isinstance(dataset, SpeechTextDataset) else [batch]
        for part in parts:
            examples += len(part["conversations"] if "conversations" in part else part["examples"])
            samples += int(part["audio_lens"].sum()) if part.get("audio_lens") is not None else 0
    skipped: Counter = Counter()
    for (_, cause), count in loader.skipped_records.counts.items():
        skipped[as_pattern(cause)] += count
    return examples, samples / RATE, skipped


def counted(config: dict, tokenizer, kind: ExampleKind = ExampleKind.TRANSLATION) -> tuple[int, float]:
    (group,) = parse_dataset(config, "data.train_ds").groups
    size = blend_of(group, tokenizer=tokenizer, count_all=True, kind=kind).size
    return size.examples, size.seconds


def causes_in_code() -> set[str]:
    """All causes in the code of readers, with ``{}`` for the values in them."""
    modules = [channels.__file__, files.__file__, audio_file.__file__]
    found = set()
    for path in [*Path(nemo_emmett.data.readers.__file__).parent.glob("*.py"), *map(Path, modules)]:
        for call in ast.walk(ast.parse(path.read_text())):
            name = getattr(call.func, "attr", getattr(call.func, "id", "")) if isinstance(call, ast.Call) else ""
            if name in ("InvalidRecord", "AudioFault", "note"):
                found.update(map(written, call.args[:1]))
            if name in ("add", "_note", "note_example"):
                found.update(written(argument) for argument in call.args[1:] if is_words(argument))
    return {cause for cause in found if cause is not None}


def is_words(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and not node.value.startswith("line ")


def written(node: ast.AST) -> str | None:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return node.id if isinstance(node, ast.Name) and node.id.isupper() else None


CAUSES = causes_in_code()
ELSEWHERE = {"text holds a control token", "{} is not a string", "no member of the tar file is in the manifest"}
"""Causes with a test of their own below; the last is no record's."""

TRANSCRIBED = {"no transcript", "no source language"}
"""Causes of records that are read twice (test_transcription.py)."""


def test_every_cause_is_planted_somewhere(tmp_path) -> None:
    planted: set[str] = set()
    for name, make in CASES.items():
        (tmp_path / name).mkdir()
        planted |= set(make(tmp_path / name)[1])
    assert planted | AUDIO | ELSEWHERE | TRANSCRIBED == CAUSES, "a new cause of a skipped record needs a case here"


@pytest.mark.parametrize("name", CASES)
def test_counted_is_what_is_trained_on(tmp_path, tokenizer, name) -> None:
    config, causes = CASES[name](tmp_path)
    config["prompt_format"] = "emmett_t5"
    examples, seconds, skipped = trained(config, tokenizer, SpeechTextDataset(tokenizer))
    assert set(skipped) - AUDIO == set(causes), "each planted fault was met"
    assert examples > 0
    assert counted(config, tokenizer) == (examples, pytest.approx(seconds, abs=1e-3))


def test_counted_of_the_drifted_case(tmp_path, tokenizer) -> None:
    assert counted(drifted(tmp_path)[0], tokenizer) == (1, 0.5)


@pytest.mark.parametrize("name", SOURCES)
def test_counted_of_fuzzed_records(tmp_path, tokenizer, name) -> None:
    """The examples of the good records, and those whose audio is at fault, unless it is opened for its length."""
    fuzzed = SOURCES[name](tmp_path, random.Random(name))
    unheard = sum(count for cause, count in fuzzed.causes.items() if as_pattern(cause) in AUDIO)
    unheard = 0 if name == "speech_tsv" else unheard
    config = {"input_cfg": [{"target_lang": "de", **fuzzed.source}], "prompt_format": "emmett_t5"}
    assert counted(config, tokenizer)[0] == len(fuzzed.good) + unheard


def instructed(folder: Path) -> Case:
    good = {"audio_filepath": write_tone(folder / "a.wav"), "duration": SECONDS, "text": "one", "lang": "en"}
    faults = [
        ({"context": 3}, "{} is not a string"),
        ({"system_prompt": ["one"], "context": "one"}, "{} is not a string"),
        ({"text": "one </s> two", "context": "one"}, "text holds a control token"),
        ({"context": "one </s>"}, "text holds a control token"),
        ({}, "no target language"),
    ]
    records = [{"context": "one"}, {"target_lang": "de"}, *(fields for fields, _ in faults)]
    (folder / "m.json").write_text("\n".join(json.dumps({**good, **fields}) for fields in records))
    source = {"type": "nemo", "manifest_filepath": f"{folder}/m.json"}
    return {"input_cfg": [source], "prompt_format": "plain"}, Counter(cause for _, cause in faults)


def test_counted_for_a_conversation_dataset(tmp_path, tokenizer) -> None:
    config, causes = instructed(tmp_path)
    examples, _, skipped = trained(config, tokenizer, SALMDataset(tokenizer))
    assert skipped == causes
    assert examples == 2
    assert counted(config, tokenizer, ExampleKind.CONVERSATION) == (2, pytest.approx(2 * SECONDS))


@pytest.mark.parametrize("make", [nemo, lhotse])
def test_counted_of_manifests_as_conversations(tmp_path, tokenizer, make) -> None:
    config, _ = make(tmp_path)
    source = config["input_cfg"][0] | {"type": "lhotse_as_conversation", "tags": {"context": "translate"}}
    config = {"input_cfg": [source], "prompt_format": "plain", "audio_locator_tag": "<|audio|>"}
    examples, seconds, _ = trained(config, tokenizer, SALMDataset(tokenizer))
    assert examples > 0
    assert counted(config, tokenizer, ExampleKind.CONVERSATION) == (examples, pytest.approx(seconds, abs=1e-3))


def test_the_blend_of_a_config_alone_counts_for_the_dataset_that_it_suggests(tmp_path, tokenizer) -> None:
    config, _ = instructed(tmp_path)
    sources = {"input_cfg": config["input_cfg"]}

    def examples(**keys) -> int:
        (group,) = parse_dataset({**sources, **keys}, "data.train_ds").groups
        return blend_of(group, tokenizer=tokenizer, count_all=True).size.examples

    assert examples() == 7, "nothing names a language: the records as NeMo reads them"
    assert examples(prompt_format="emmett_t5") == 1, "translations need a target language"
    assert examples(prompt_format="emmett_t5", target_lang="de") == 7
    assert examples(prompt_format="plain") == 2, "instructions may replace it"


@pytest.mark.parametrize("fault", ["a cause that is ignored", "a language that is ignored"])
def test_a_reader_that_judges_otherwise_is_noticed(tmp_path, tokenizer, monkeypatch, fault) -> None:
    """Planted faults: counting that overlooks a cause gives another number."""
    config, _ = drifted(tmp_path)
    config["prompt_format"] = "emmett_t5"
    examples, _, _ = trained(config, tokenizer, SpeechTextDataset(tokenizer))
    if fault == "a language that is ignored":
        monkeypatch.setattr("nemo_emmett.data.readers.examples.is_known_language", lambda _: True)
    else:
        monkeypatch.setattr("nemo_emmett.data.readers.nemo_manifest.check_sampling_rate", lambda _: None)
        monkeypatch.setattr("nemo_emmett.data.readers.nemo_manifest.sampling_rate_of", lambda _: RATE)
    assert counted(config, tokenizer)[0] == examples + 1
