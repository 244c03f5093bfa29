"""Manifests full of faults: nothing crashes, each fault is counted by its cause, and all good records arrive once.

Each kind of source has a list of planted faults, a line and the cause that the report shall give. They are strewn among
good records in an order drawn from a seed, and what a loader must say of them is counted from the list.
"""

from __future__ import annotations

import copy
import gzip
import json
import random
import tarfile
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from lhotse import MonoCut, Recording, SupervisionSegment
from lhotse.shar import SharWriter
from nemo.collections.speechlm2.data.salm_dataset import SALMDataset

from nemo_emmett.data import MultimodalDataLoader, SpeechTextDataset, get_multimodal_dataloader
from nemo_emmett.data.io.skipped_records import SkippedRecords

RATE = 16000
SECONDS = 0.5
GOOD = 6
MEGABYTES = 10
NAN, INFINITY = float("nan"), float("inf")
DEEP = 100_000  # levels of nesting: Python's JSON parser gives up long before

WITHOUT = object()
"""A field's value that means its absence."""


@dataclass
class Fuzzed:
    """A source, the ids of its good records, and what shall be counted of the others."""

    source: dict[str, Any]
    good: list[str]
    causes: Counter[str]


# Audio


def write_tone(path: Path, seconds: float = SECONDS) -> str:
    samples = 0.1 * np.sin(np.arange(round(seconds * RATE)) / 5)
    soundfile.write(path, samples, RATE)
    return str(path)


def bad_audio(folder: Path) -> dict[str, str]:
    """Files that are no audio, or not all of it, with the causes that they are to be counted under."""
    whole = Path(write_tone(folder / "whole.wav")).read_bytes()
    contents = {
        "words.wav": (b"This is a text file.\n" * 200, "unreadable audio"),
        "noise.flac": (bytes(range(256)) * 20, "unreadable audio"),
        "empty.wav": (b"", "empty audio"),
        "half.wav": (whole[: len(whole) // 2], "truncated audio"),
    }
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    return {name: cause for name, (_, cause) in contents.items()}


ABSENT = ("absent.wav", "", ".", "nul\0.wav", "\ud800.wav", "long" * 2000)
"""Names of which no file of audio exists, or can exist."""


# Lines of JSON

TEXTS = [
    *((value, "empty text") for value in (WITHOUT, None, "", "  \t ")),
    *((value, "text is not a string") for value in (3, 0.5, True, ["one"], {"de": "eins"})),
    ("one \ud800 two", "text is not Unicode"),
]

TIMES = {
    "duration": [
        (WITHOUT, "no duration"),
        (None, "no duration"),
        *((value, "invalid duration") for value in (NAN, INFINITY, -INFINITY, -1.0, 0, 0.0, "0.5", True, [0.5], {})),
        *((value, "invalid duration") for value in (10**400, 1e308, 10**15)),
        (1e9, "truncated audio"),
    ],
    "offset": [
        *((value, "invalid offset") for value in (NAN, -INFINITY, -0.5, "0", True, False, [], {}, 1e308)),
        (1e9, "truncated audio"),
    ],
}

FIELDS = {
    **TIMES,
    "audio_filepath": [(value, "no audio_filepath") for value in (WITHOUT, None, 3, True, ["a.wav"], {})],
    "sampling_rate": [(value, "invalid sampling_rate") for value in ("16000", 0, -1, NAN, True, [1], {}, 0.5, 1e300)],
    "text": TEXTS,
    "lang": [(value, f"unknown language '{value}'") for value in (3, True, ["en"], {"en": 1}, "klingon")],
    "target_lang": [
        (3, "unknown language '3'"),
        ("klingon", "unknown language 'klingon'"),
        ([["de"]], "unknown language '['de']'"),
        (["de", "fr"], "several target languages, but no translations"),
    ],
    "translations": [
        *((value, "translations is not a mapping") for value in (3, "eins", ["eins"], True)),
        *((value, "no translation to 'de'") for value in ({}, {"fr": "un"}, {"de": None})),
        ({"de": 3}, "text is not a string"),
        ({"de": " "}, "empty text"),
        ({"de": "\ud800"}, "text is not Unicode"),
    ],
    "alt_text": [
        (value, "alt_text is not a mapping of texts") for value in (3, "eins", ["eins"], {"fr": 3}, {"fr": {}})
    ],
}
"""Values that a field of a NeMo manifest must not have, and the cause that each is counted under."""

TOGETHER = [
    ({"target_lang": 3, "translations": {"de": "eins"}}, "unknown language '3'"),
    ({"target_lang": [["de"]], "translations": {"de": "eins"}}, "unknown language '['de']'"),
    ({"text": 3, "translations": {"de": "eins"}}, "text is not a string"),
]
"""Fields that are at fault only with each other."""

HARMLESS = [
    {"_skipme": False},
    {"context": None, "speaker": 3, "id": {"a": []}, "start": "soon", "supervisions": "none"},
    {"manifest_place": 3, "manifest_origin": [], "recording": 1, "features": {}, "channel": "left"},
    {"answer_ids": "no", "context_ids": 3, "tokens": None, "num_tokens": "many", "custom": 3},
    {"comment": "\ud83d\ude00 \u2028 \x7f \\u0000", "nested": [[[[[[{"a": [{}]}]]]]]], "number": 10**300},
    {"long": "x" * (MEGABYTES << 20)},
]
"""What a good record may well hold besides."""


def as_line(record: Any) -> bytes:
    return json.dumps(record).encode()


def broken_json(good: dict, rng: random.Random) -> Iterator[tuple[bytes, str]]:
    """Lines that hold no JSON object."""
    line = as_line(good)
    for end in rng.sample(range(1, len(line)), 3):
        yield line[:end], "not JSON"
    middle = rng.randrange(10, len(line) - 1)
    yield line + line, "not JSON"
    yield b"\0" * 100, "not JSON"
    yield line[:3] + b"\0" + line[3:], "not JSON"
    yield b"[" * DEEP, "not JSON"
    yield b"[" * DEEP + b"]" * DEEP, "not JSON"
    yield b'{"a":' * DEEP + b"1" + b"}" * DEEP, "not JSON"
    yield b'{"number": ' + b"9" * 5000 + b"}", "not JSON"  # more digits than Python converts
    yield b"x" * (MEGABYTES << 20), "not JSON"
    yield b"one two three", "not JSON"
    for value in (b"3", b"null", b"NaN", b'"text"', b"[1, 2]", b"[]", b"true"):
        yield value, "not a JSON object"
    for bad in (b"\xff", b"\xc3", b"\xed\xa0\x80", b"\x80abc"):
        yield line[:middle] + bad + line[middle:], "not UTF-8"
    yield "{}".encode("utf-16"), "not UTF-8"


def with_field(record: dict, name: str, value: Any) -> dict:
    """A copy of a record with another value of one field, which may lie deeper (``recording.sources``)."""
    record = copy.deepcopy(record)
    *outer, last = name.split(".")
    holder = record
    for key in outer:
        holder = holder[int(key)] if isinstance(holder, list) else holder[key]
    if value is WITHOUT:
        del holder[last]
    else:
        holder[last] = value
    return record


def strewn(good: Sequence[bytes], bad: Sequence[bytes], rng: random.Random) -> tuple[bytes, dict[bytes, int]]:
    """A file of good lines with bad ones and blank ones among them, and the number of each good line, from 1.

    The first line is good, so that what precedes it at the beginning of a file is tested as well.
    """
    lines = [*good[1:], *bad, *[b""] * 3]
    rng.shuffle(lines)
    lines.insert(0, good[0])
    return b"".join(line + b"\n" for line in lines), {line: number for number, line in enumerate(lines, start=1)}


# Sources


def nemo(folder: Path, rng: random.Random) -> Fuzzed:
    """A manifest, half of whose records tell the sampling rate of their audio; the others' files are opened.

    Of the former, NeMo takes the path for the id, of the latter the name.
    """
    good = [
        {
            "audio_filepath": write_tone(folder / f"good{i}.wav"),
            "duration": SECONDS,
            "text": "one two",
            "lang": "en",
            **({"sampling_rate": RATE} if i % 2 else {}),
            **(HARMLESS[i] if i < len(HARMLESS) else {}),
        }
        for i in range(2 * GOOD)
    ]
    patterns = [{**good[-1]}, {**good[-2]}]  # one with a sampling rate, and one without
    bad = [(as_line(with_field(p, name, value)), cause) for p in patterns for name, value, cause in _faults(p)]
    for name, cause in {**bad_audio(folder), **dict.fromkeys(ABSENT, "missing audio")}.items():
        bad += [(as_line({**pattern, "audio_filepath": name}), cause) for pattern in patterns]
    bad += [(as_line({**pattern, **fields}), cause) for pattern in patterns for fields, cause in TOGETHER]
    bad += broken_json(good[-1], rng)
    lines = [as_line(record) for record in good]
    # The last of two equal keys counts, and a line may end in the manner of Windows.
    lines[-1] = b'{"duration": "x", "audio_filepath": 3, ' + lines[-1][1:]
    lines[-2] += b"\r"
    content, _ = strewn(lines, [line for line, _ in bad], rng)
    (folder / "speech.json").write_bytes(BOM_UTF8 + content)
    source = {"type": "nemo", "manifest_filepath": str(folder / "speech.json")}
    ids = [r["audio_filepath"] if "sampling_rate" in r else Path(r["audio_filepath"]).stem for r in good]
    return Fuzzed(source, ids, Counter(cause for _, cause in bad))


def _faults(record: dict) -> Iterator[tuple[str, Any, str]]:
    for name, values in FIELDS.items():
        for value, cause in values:
            if value is not WITHOUT or name in record:
                yield name, value, cause


def nemo_tarred(folder: Path, rng: random.Random) -> Fuzzed:
    """One manifest for two tar files, in which audio is missing, unreadable, or named by nobody."""
    record = {"duration": SECONDS, "text": "one two", "lang": "en"}
    tone = write_tone(folder / "tone.wav")
    good, bad, members = [], [], {0: [], 1: []}
    for i in range(GOOD):
        good.append({**record, "audio_filepath": f"good{i}.wav", "shard_id": i % 2, **HARMLESS[i]})
        members[i % 2].append((f"good{i}.wav", tone))
    fields = {name: values for name, values in FIELDS.items() if name not in ("audio_filepath", "sampling_rate")}
    for name, values in fields.items():
        for number, (value, cause) in enumerate(values):
            if value is WITHOUT and name not in record:
                continue
            member, shard = f"{name}{number}.wav", rng.randrange(2)
            pattern = {**record, "audio_filepath": member, "shard_id": shard}
            bad.append((as_line(with_field(pattern, name, value)), cause))
            members[shard].append((member, tone))
    pattern = {**record, "audio_filepath": "absent.wav", "shard_id": 0}
    bad += [(as_line({**pattern, "audio_filepath": name}), "missing audio") for name in ABSENT]
    for value in (99, "0", [0], {}, None, 0.5, WITHOUT):
        bad.append((as_line(with_field(pattern, "shard_id", value)), "no such shard_id"))
    for value, cause in FIELDS["audio_filepath"]:
        bad.append((as_line(with_field(pattern, "audio_filepath", value)), cause))
    for name, cause in bad_audio(folder).items():
        bad.append((as_line({**pattern, "audio_filepath": name}), cause))
        members[0].append((name, folder / name))
    bad += broken_json(pattern, rng)
    content, _ = strewn([as_line(r) for r in good], [line for line, _ in bad], rng)
    (folder / "manifest_all.json").write_bytes(content)
    for shard, named in members.items():
        rng.shuffle(named)
        with tarfile.open(folder / f"audio_{shard}.tar", "w") as tar:
            for name, path in named:
                tar.add(path, arcname=name)
    source = {
        "type": "nemo_tarred",
        "manifest_filepath": str(folder / "manifest_all.json"),
        "tarred_audio_filepaths": f"{folder}/audio__OP_0..1_CL_.tar",
    }
    return Fuzzed(source, [r["audio_filepath"] for r in good], Counter(cause for _, cause in bad))


CUT_FIELDS = {
    "": [({}, "not a lhotse cut"), ({"id": "a"}, "not a lhotse cut"), ({"type": "MonoCut"}, "not a lhotse cut")],
    "type": [
        (value, "not a lhotse cut") for value in (WITHOUT, None, 3, [], "Recording", "SupervisionSegment", "Shoe")
    ],
    "id": [(value, "not a lhotse cut") for value in (WITHOUT, 3, None, [])],
    "start": [(value, "invalid start") for value in (NAN, -1.0, "0", True, [], None)],
    "duration": [(value, "invalid duration") for value in (NAN, INFINITY, -1.0, 0, "0.5", True, [], None, 10**400)],
    "channel": [(value, "not a lhotse cut") for value in (WITHOUT,)],
    "recording": [
        (WITHOUT, "no audio"),
        *((value, "not a lhotse cut") for value in (None, 3, "a.wav", {}, [])),
    ],
    "recording.sources": [(value, "not a lhotse cut") for value in (WITHOUT, None, 3, [3], [{}])],
    "recording.sampling_rate": [(value, "invalid sampling_rate") for value in (0, -1, "16000", NAN, True)],
    "recording.sources.0.source": [
        *((name, "missing audio") for name in ABSENT),
        *((value, "not a lhotse cut") for value in (3, None, [])),
    ],
    "supervisions": [
        ([], "empty text"),
        *((value, "not a lhotse cut") for value in (3, "one", [3], [{}], [{"id": "a"}])),
    ],
    "supervisions.0.text": TEXTS,
    "supervisions.0.duration": [(value, "not a lhotse cut") for value in (WITHOUT,)],
    "custom": [(value, "not a lhotse cut") for value in (3, "fields", [1])],
    "custom.lang": FIELDS["lang"],
    "custom.translations": FIELDS["translations"],
}


def cut_record(audio: str, name: str) -> dict:
    cut = Recording.from_file(audio, recording_id=name).to_cut()
    cut.supervisions = [SupervisionSegment(name, name, 0.0, SECONDS, text="one two", language="en")]
    cut.custom = {"lang": "en"}
    return cut.to_dict()


def lhotse(folder: Path, rng: random.Random) -> Fuzzed:
    good = [cut_record(write_tone(folder / f"good{i}.wav"), f"good{i}") for i in range(GOOD)]
    bad = [(as_line(value), cause) for value, cause in CUT_FIELDS[""]]
    for name, values in CUT_FIELDS.items():
        bad += [(as_line(with_field(good[-1], name, value)), cause) for value, cause in values if name]
    for name, cause in bad_audio(folder).items():
        bad.append((as_line(with_field(good[-1], "recording.sources.0.source", str(folder / name))), cause))
    bad += broken_json(good[-1], rng)
    content, _ = strewn([as_line(r) for r in good], [line for line, _ in bad], rng)
    (folder / "cuts.jsonl").write_bytes(BOM_UTF8 + content)
    source = {"type": "lhotse", "cuts_path": str(folder / "cuts.jsonl")}
    return Fuzzed(source, [r["id"] for r in good], Counter(cause for _, cause in bad))


def lhotse_shar(folder: Path, rng: random.Random) -> Fuzzed:
    """A shard whose list of cuts is damaged; for each line, the tar file still holds the audio of a cut."""
    (folder / "shar").mkdir()
    tone, names = write_tone(folder / "tone.wav"), [f"cut{i}" for i in range(80)]
    with SharWriter(str(folder / "shar"), fields={"recording": "wav"}, shard_size=len(names)) as writer:
        for name in names:
            writer.write(MonoCut.from_dict(cut_record(tone, name)))
    path = folder / "shar" / "cuts.000000.jsonl.gz"
    lines = gzip.decompress(path.read_bytes()).splitlines()
    cut = json.loads(lines[0])
    bad = [(as_line({**cut, "id": "another"}), "audio of another cut"), *broken_json(cut, rng)]
    for name in ("type", "duration", "supervisions.0.text"):
        bad += [(as_line(with_field(cut, name, value)), cause) for value, cause in CUT_FIELDS[name]]
    damaged_numbers = rng.sample(range(len(names)), len(bad))
    for number, (line, _) in zip(damaged_numbers, bad, strict=True):
        lines[number] = line.replace(b"cut0", names[number].encode())  # else it is the audio that is another's
    path.write_bytes(gzip.compress(b"\n".join(lines), compresslevel=1))
    good = [name for number, name in enumerate(names) if number not in damaged_numbers]
    source = {"type": "lhotse_shar", "shar_path": str(folder / "shar")}
    return Fuzzed(source, good, Counter(cause for _, cause in bad))


GOOD_SENTENCES = [b"one two", b"one\0two", "\u2028one \x85 two\ufeff".encode(), b"x" * 100_000, b" one ", b"one\r"]
BAD_SENTENCES = [
    (b"", "empty text"),
    (b" \t ", "empty text"),
    ("\u00a0\u2003".encode(), "empty text"),
    (b"\r", "empty text"),
    (b"one \xff two", "not UTF-8"),
    (b"one \xed\xa0\x80", "not UTF-8"),
    (b"\xff" * (MEGABYTES << 20), "not UTF-8"),
    (b"\xc3", "not UTF-8"),
]


def aligned_sides(folder: Path, rng: random.Random) -> tuple[dict[str, str], list[str], Counter[str]]:
    """Two line-aligned files, the numbers of their good lines, and the causes of the others."""
    lines = [(good, b"eins", []) for good in GOOD_SENTENCES]
    lines += [(bad, b"eins", [cause]) for bad, cause in BAD_SENTENCES]
    lines += [(b"one", bad, [cause]) for bad, cause in BAD_SENTENCES]
    lines += [(bad, other, [cause, of_other]) for bad, cause in BAD_SENTENCES for other, of_other in BAD_SENTENCES[-1:]]
    rng.shuffle(lines)
    lines.append((b"one", b"eins", []))  # it has no line end, and must not be an empty one
    paths = {language: str(folder / f"text.{language}") for language in ("en", "de")}
    for side, path in enumerate(paths.values()):
        Path(path).write_bytes(b"\n".join(line[side] for line in lines))
    good = [f"{paths['en']}:{number}" for number, line in enumerate(lines, start=1) if not line[2]]
    return paths, good, Counter(cause for line in lines for cause in line[2])


def parallel_text(folder: Path, rng: random.Random) -> Fuzzed:
    paths, good, causes = aligned_sides(folder, rng)
    files = {"source_paths": paths["en"], "target_paths": paths["de"], "source_lang": "en", "target_lang": "de"}
    return Fuzzed({"type": "parallel_text", **files}, good, causes)


def txt_pair(folder: Path, rng: random.Random) -> Fuzzed:
    paths, good, causes = aligned_sides(folder, rng)
    files = {"source_paths": paths["en"], "target_paths": paths["de"]}
    return Fuzzed({"type": "txt_pair", **files, "source_language": "en", "target_language": "de"}, good, causes)


def parallel_text_in_both_directions(folder: Path, rng: random.Random) -> Fuzzed:
    paths, good, causes = aligned_sides(folder, rng)
    numbers = [i.rpartition(":")[2] for i in good]
    ids = [f"{paths[a]}:{number}:{a}-{b}" for number in numbers for a, b in (("en", "de"), ("de", "en"))]
    return Fuzzed({"type": "parallel_text", "paths": paths}, ids, causes)


def parallel_tsv(folder: Path, rng: random.Random) -> Fuzzed:
    """A table whose columns are named in its first line, behind a byte order mark."""
    good = [b"\t".join((sentence, b"other", b"eins")) for sentence in GOOD_SENTENCES]
    good.append(b"one\t" + b"x" * (MEGABYTES << 20) + b"\teins")
    of_tab = [(s, "too many columns" if b"\t" in s else cause) for s, cause in BAD_SENTENCES]
    bad = [(b"\tother\t".join(p), cause) for s, cause in of_tab for p in ((s, b"eins"), (b"one", s))]
    bad += [(b"one", "missing column"), (b"one\tother", "missing column"), (b"\t\t", "empty text")]
    bad += [(b"\xff", "not UTF-8"), (b"\0" * 50, "missing column")]
    content, numbers = strewn(good, [line for line, _ in bad], rng)
    path = folder / "text.tsv"
    path.write_bytes(BOM_UTF8 + b"english\tdomain\tgerman\r\n" + content)
    keys = {"source_column": "english", "target_column": "german", "source_lang": "en", "target_lang": "de"}
    source = {"type": "parallel_text", "paths": str(path), **keys}
    return Fuzzed(source, [f"{path}:{numbers[line] + 1}" for line in good], Counter(cause for _, cause in bad))


def speech_tsv(folder: Path, rng: random.Random) -> Fuzzed:
    """A table of speech without durations, so that its files are opened when it is read."""
    tone = Path(write_tone(folder / "a.wav")).name
    ids = [f"good {number}".encode() for number in range(len(GOOD_SENTENCES))]
    good = [b"\t".join((name, tone.encode(), b"one", s)) for name, s in zip(ids, GOOD_SENTENCES, strict=True)]
    targets = [(s, "too many columns" if b"\t" in s else cause) for s, cause in BAD_SENTENCES]
    bad = [(b"\t".join((b"", tone.encode(), b"one", s)), cause) for s, cause in targets]
    names = {name: "missing audio" if name else "no audio" for name in ABSENT if name.isascii()} | bad_audio(folder)
    bad += [(b"\t".join((b"", name.encode(), b"one", b"eins")), cause) for name, cause in names.items()]
    bad += [(b"one", "missing column"), (b"\t\t\t", "no audio"), (b"\xff", "not UTF-8"), (b"\0" * 50, "missing column")]
    path = folder / "speech.tsv"
    path.write_bytes(BOM_UTF8 + b"id\taudio\tsource\ttarget\r\n" + strewn(good, [line for line, _ in bad], rng)[0])
    causes = Counter(cause for _, cause in bad)
    return Fuzzed({"type": "speech_tsv", "paths": str(path)}, [name.decode() for name in ids], causes)


TEXT_FIELDS = {
    "source": [
        (WITHOUT, "no field 'source'"),
        *((value, "text is not a string") for value in (None, 3, ["one"], {}, True)),
        *((value, "empty text") for value in ("", " \u00a0")),
        ("\ud800", "text is not Unicode"),
    ],
    "target": [
        (WITHOUT, "no field 'target'"),
        *((value, "text is not a string") for value in (None, 3, ["eins"], {}, False)),
        ("", "empty text"),
        ("eins \udfff", "text is not Unicode"),
    ],
    "source_lang": [(value, f"unknown language '{value}'") for value in (3, ["en"], "klingon", {"a": 1})],
    "target_lang": [(value, f"unknown language '{value}'") for value in (3, ["de"], "klingon", True)],
}


def parallel_jsonl(folder: Path, rng: random.Random) -> Fuzzed:
    pair = {"source": "one two", "target": "eins zwei"}
    good = [as_line({**pair, **more, "number": i}) for i, more in enumerate(HARMLESS)]
    good.append(b'{"source": 3, "source": "one", "target": "eins"}\r')
    bad = [
        (as_line(with_field(pair, name, value)), cause)
        for name, values in TEXT_FIELDS.items()
        for value, cause in values
    ]
    bad += broken_json(pair, rng)
    content, numbers = strewn(good, [line for line, _ in bad], rng)
    path = folder / "text.jsonl"
    path.write_bytes(BOM_UTF8 + content)
    source = {"type": "parallel_text", "paths": str(path), "source_lang": "en", "target_lang": "de"}
    return Fuzzed(source, [f"{path}:{numbers[line]}" for line in good], Counter(cause for _, cause in bad))


SOURCES: dict[str, Callable[[Path, random.Random], Fuzzed]] = {
    "nemo": nemo,
    "nemo_tarred": nemo_tarred,
    "lhotse": lhotse,
    "parallel_text": parallel_text,
    "parallel_text in both directions": parallel_text_in_both_directions,
    "parallel_text tsv": parallel_tsv,
    "parallel_text jsonl": parallel_jsonl,
    "speech_tsv": speech_tsv,
    "txt_pair": txt_pair,
    "lhotse_shar": lhotse_shar,
}

CASES = [(name, sampling) for name in SOURCES for sampling in ("nemo", "emmett")]
CASES.remove(("lhotse_shar", "nemo"))  # lhotse's own reader, on which NeMo's samplers rely there, stops at a fault


# Loading them


def build(
    source: dict, tokenizer: Any, dataset: Any, sampling: str, workers: int, prompt_format: str = "emmett_t5"
) -> MultimodalDataLoader:
    is_text = source["type"] in ("parallel_text", "txt_pair")
    config = {
        "input_cfg": [{"target_lang": "de", **source}],
        "prompt_format": prompt_format,
        "audio_locator_tag": "<|audio|>",
        "token_equivalent_duration": 0.08,
        "use_multimodal_sampling": is_text,
        "batch_size": 4,
        "shuffle": True,
        "shuffle_buffer_size": 16,
        "seed": 0,
        "shard_seed": 0,
        "force_finite": True,
        "force_map_dataset": sampling == "nemo",  # otherwise each of NeMo's workers reads all of the data
        "num_workers": workers,
        "sampling": sampling,
        "max_bad_records": None,
    }
    return get_multimodal_dataloader(config, 0, 1, dataset, tokenizer)


def load(source: dict, tokenizer: Any, sampling: str, workers: int) -> tuple[list[str], SkippedRecords]:
    """The ids of all examples of one pass, and the loader's skipped records."""
    loader = build(source, tokenizer, SpeechTextDataset(tokenizer), sampling, workers)
    ids = [example["id"] for batch in loader for part in batch.values() for example in part["examples"]]
    return ids, loader.skipped_records


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("name", "sampling"), CASES)
def test_every_fault_is_counted_and_every_good_record_arrives(tmp_path, tokenizer, name, sampling, workers) -> None:
    fuzzed = SOURCES[name](tmp_path, random.Random(f"{name} {workers}"))
    ids, skipped_records = load(fuzzed.source, tokenizer, sampling, workers)
    assert skipped_records.causes() == fuzzed.causes
    assert sorted(ids) == sorted(fuzzed.good)


def record(kind: str, folder: Path, name: str) -> dict:
    """A good record of a kind of source, its audio in a file of that name."""
    if kind == "parallel_text":
        return {"source": "one two", "target": "eins zwei", "number": name}
    tone = write_tone(folder / f"{name}.wav")
    if kind == "nemo":
        return {"audio_filepath": tone, "duration": SECONDS, "text": "one two", "lang": "en", "sampling_rate": RATE}
    return cut_record(tone, name)


@pytest.mark.parametrize("sampling", ["nemo", "emmett"])
def test_instructions_that_are_no_words_cost_their_record_alone(tmp_path, tokenizer, sampling) -> None:
    """NeMo's SALM finds its instructions in the records."""
    good = record("nemo", tmp_path, "good")
    values = (3, ["one"], {"en": "one"}, "\ud800")
    bad = [{**good, field: value} for field in ("context", "system_prompt") for value in values]
    lines = [as_line(fields) for fields in [{**good, "context": "one"}, *bad, {**good, "context": None}]]
    (tmp_path / "speech.json").write_bytes(b"\n".join(lines))
    source = {"type": "nemo", "manifest_filepath": str(tmp_path / "speech.json")}
    loader = build(source, tokenizer, SALMDataset(tokenizer), sampling, workers=0, prompt_format="plain")
    assert sum(len(batch["conversations"]) for batch in loader) == 2
    assert loader.skipped_records.causes() == {"context is not a string": 4, "system_prompt is not a string": 4}


# Damage drawn at random


def damaged(line: bytes, rng: random.Random) -> bytes:
    """A line in which some bytes were changed, lost, doubled or exchanged, but which is still one line."""
    content = bytearray(line)
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(len(content))
        stop = rng.randint(start, min(start + 12, len(content)))
        change = rng.randrange(4)
        if change == 0:
            content[start] = rng.randrange(256)
        elif change == 1 and stop - start < len(content):
            del content[start:stop]
        elif change == 2:
            content[start:start] = content[start:stop]
        else:
            content[start:start] = rng.choice(
                [b'"', b"\\", b"}", b"-", b"0", b"null", b"[", b"\\ud800", b"\xf0", b"e9"]
            )
    return bytes(content).replace(b"\n", b" ").strip() or b"?"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sampling", ["nemo", "emmett"])
@pytest.mark.parametrize("kind", ["nemo", "lhotse", "parallel_text"])
def test_damage_costs_no_record_but_the_damaged_ones(tmp_path, tokenizer, kind, sampling, seed) -> None:
    rng = random.Random(f"{kind} {seed}")
    good = [as_line(record(kind, tmp_path, f"good{i}")) for i in range(GOOD)]
    other = as_line(record(kind, tmp_path, "other"))
    content, numbers = strewn(good, [damaged(other, rng) for _ in range(80)], rng)
    path = tmp_path / "lines.jsonl"
    path.write_bytes(content)
    key = {"nemo": "manifest_filepath", "lhotse": "cuts_path", "parallel_text": "paths"}[kind]
    ids, skipped_records = load({"type": kind, key: str(path)}, tokenizer, sampling, workers=0)
    wanted = [f"{path}:{numbers[line]}" if kind == "parallel_text" else f"good{i}" for i, line in enumerate(good)]
    counts = Counter(i if kind == "parallel_text" else Path(i).stem for i in ids)
    assert [counts[i] for i in wanted] == [1] * GOOD
    assert skipped_records.read_count == GOOD + 80
    assert len(ids) + skipped_records.count() == GOOD + 80
