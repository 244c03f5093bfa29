"""Parallel text in every layout."""

from __future__ import annotations

import gzip
import json
from collections import Counter

import pytest

from nemo_emmett.data.config.sources import parse_source
from nemo_emmett.data.io.skipped_records import SkippedRecords
from nemo_emmett.data.readers.parallel_text import open_parallel_text
from nemo_emmett.errors import ConfigError, DataError


def read(config: dict) -> tuple[list[tuple], SkippedRecords]:
    """What a source yields, as (source, target, source language, target language), and its skipped records."""
    skipped = SkippedRecords()
    pairs = list(open_parallel_text(parse_source({"type": "parallel_text", **config}, "train_ds"), skipped))
    return [(p.source.text, p.target.text, p.source.language, p.target.language) for p in pairs], skipped


EXPECTED = [("one", "eins", "en", "de"), ("two", "zwei", "en", "de")]
LANGUAGES = {"source_lang": "en", "target_lang": "de"}


def test_line_aligned_files(write_lines) -> None:
    config = {
        "source_paths": str(write_lines("a.en", ["one", " two "])),
        "target_paths": str(write_lines("a.de", ["eins", "zwei"])),
    }
    assert read({**config, **LANGUAGES})[0] == EXPECTED
    assert read({**config, "source_language": "en", "target_language": "de"})[0] == EXPECTED


def test_gzip_by_suffix(tmp_path) -> None:
    for name, lines in {"a.en.gz": b"one\ntwo\n", "a.de.gz": b"eins\nzwei"}.items():
        (tmp_path / name).write_bytes(gzip.compress(lines))
    config = {"source_paths": str(tmp_path / "a.en.gz"), "target_paths": str(tmp_path / "a.de.gz"), **LANGUAGES}
    assert read(config)[0] == EXPECTED


def test_shards(write_lines, tmp_path) -> None:
    for i, (source, target) in enumerate([("one", "eins"), ("two", "zwei")]):
        write_lines(f"a_{i}.en", [source])
        write_lines(f"a_{i}.de", [target])
    sharded = {"source_paths": f"{tmp_path}/a__OP_0..1_CL_.en", "target_paths": f"{tmp_path}/a__OP_0..1_CL_.de"}
    listed = {f"{s}_paths": [f"{tmp_path}/a_{i}.{e}" for i in (0, 1)] for s, e in (("source", "en"), ("target", "de"))}
    assert read({**sharded, **LANGUAGES})[0] == EXPECTED
    assert read({**listed, **LANGUAGES})[0] == EXPECTED


def test_shards_are_reshuffled_at_each_pass(write_lines, tmp_path) -> None:
    for i in range(6):
        write_lines(f"a_{i}.en", [f"one {i}"])
        write_lines(f"a_{i}.de", [f"eins {i}"])
    config = {"source_paths": f"{tmp_path}/a__OP_0..5_CL_.en", "target_paths": f"{tmp_path}/a__OP_0..5_CL_.de"}
    config |= {"type": "parallel_text", **LANGUAGES, "shuffle": True, "shard_seed": 0}
    source = open_parallel_text(parse_source(config, "train_ds"), SkippedRecords())
    first, second = [p.source.text for p in source], [p.source.text for p in source]
    assert sorted(first) == sorted(second) == [f"one {i}" for i in range(6)]
    assert first != second


def test_unicode_line_separators_do_not_shift_the_sides(write_lines) -> None:
    config = {
        "source_paths": str(write_lines("a.en", ["one\u2028one", "two"])),
        "target_paths": str(write_lines("a.de", ["eins", "zwei"])),
    }
    assert [p[:2] for p in read(config)[0]] == [("one\u2028one", "eins"), ("two", "zwei")]


def test_tsv_by_number_and_by_name(write_lines) -> None:
    plain = write_lines("a.tsv", ["one\teins", "two\tzwei"])
    assert read({"paths": str(plain), **LANGUAGES})[0] == EXPECTED
    named = write_lines("b.tsv", ["id\tde\ten", "1\teins\tone", "2\tzwei\ttwo"])
    config = {"paths": str(named), "source_column": "en", "target_column": "de", **LANGUAGES}
    assert read(config)[0] == EXPECTED
    with pytest.raises(ConfigError, match="no column 'fr'; its columns are id, de, en"):
        read({**config, "target_column": "fr"})


def test_jsonl_with_languages_of_its_own(write_lines) -> None:
    records = [
        {"src": "one", "tgt": "eins", "source_lang": "en", "target_lang": "de"},
        {"src": "two", "tgt": "dos"},
    ]
    path = write_lines("a.jsonl", [json.dumps(r) for r in records])
    config = {
        "paths": str(path),
        "source_field": "src",
        "target_field": "tgt",
        "source_lang": "en",
        "target_lang": "es",
    }
    assert read(config)[0] == [EXPECTED[0], ("two", "dos", "en", "es")]


def test_many_languages_give_each_ordered_pair(write_lines) -> None:
    paths = {
        "en": str(write_lines("a.en", ["one", "two"])),
        "de": str(write_lines("a.de", ["eins", ""])),
        "pt-BR": str(write_lines("a.pt", ["um", "dois"])),
    }
    examples, skipped = read({"paths": paths})
    directions = Counter((p[2], p[3]) for p in examples)
    # The second line has no German: four of its six directions fall away, for one bad record.
    assert directions == {
        ("en", "de"): 1,
        ("de", "en"): 1,
        ("en", "pt-BR"): 2,
        ("pt-BR", "en"): 2,
        ("de", "pt-BR"): 1,
        ("pt-BR", "de"): 1,
    }
    assert skipped.count() == 1
    assert skipped.read_count == 2
    assert {p[2:] for p in read({"paths": paths, "directions": ["de-en", "en-pt-BR"]})[0]} == {
        ("de", "en"),
        ("en", "pt-BR"),
    }
    with pytest.raises(ConfigError, match="'en-fr' is not a pair"):
        read({"paths": paths, "directions": ["en-fr"]})


def test_bad_records_cost_one_record_each(tmp_path) -> None:
    lines = [
        b'{"source": "one", "target": "eins"}',
        b"not json",
        b'{"source": "one"}',
        b'["one", "eins"]',
        b'{"source": "\xff", "target": "eins"}',
        b'{"source": " ", "target": "eins"}',
        b'{"source": 1, "target": "eins"}',
        b'{"source": "one", "target": "x", "target_lang": "xx"}',
        b'{"source": "two", "target": "zwei"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    examples, skipped = read({"paths": str(tmp_path / "a.jsonl"), **LANGUAGES})
    assert examples == EXPECTED
    assert skipped.read_count == 9
    assert [(r.place, r.cause) for r in skipped.first] == [
        ("line 2", "not JSON"),
        ("line 3", "no field 'target'"),
        ("line 4", "not a JSON object"),
        ("line 5", "not UTF-8"),
        ("line 6", "empty text"),
        ("line 7", "text is not a string"),
        ("line 8", "unknown language 'xx'"),
    ]


def test_a_jsonl_record_without_any_target_language_is_bad(write_lines) -> None:
    path = write_lines("a.jsonl", ['{"source": "one", "target": "eins"}'])
    assert read({"paths": str(path)})[1].causes() == {"no target language": 1}


def test_empty_sides_of_aligned_and_tab_separated_text(write_lines) -> None:
    aligned = {
        "source_paths": str(write_lines("a.en", ["one", "", "two"])),
        "target_paths": str(write_lines("a.de", ["eins", "x", "zwei"])),
    }
    examples, skipped = read({**aligned, **LANGUAGES})
    assert examples == EXPECTED
    assert [str(r) for r in skipped.first] == [f"{aligned['source_paths']}, line 2: empty text"]
    tsv = write_lines("a.tsv", ["one\teins", "two", "two\t", "two\tzwei"])
    examples, skipped = read({"paths": str(tsv), **LANGUAGES})
    assert examples == EXPECTED
    assert skipped.causes() == {"missing column": 1, "empty text": 1}


def test_a_file_that_ends_early_is_an_error_not_a_short_corpus(write_lines) -> None:
    config = {
        "source_paths": str(write_lines("a.en", ["one", "two"])),
        "target_paths": str(write_lines("a.de", ["eins"])),
    }
    with pytest.raises(DataError, match=r"a\.de ends after 1 lines"):
        read({**config, **LANGUAGES})


@pytest.mark.parametrize(("name", "line"), [("a.tsv", "one\teins"), ("a.jsonl", '{"source": "one", "target": "eins"}')])
def test_languages_may_stand_in_the_tags(write_lines, name, line) -> None:
    config = {"paths": str(write_lines(name, [line])), "source_lang": "en", "tags": {"target_lang": "de"}}
    assert read(config)[0] == EXPECTED[:1]
    assert read({**config, "target_lang": "fr"})[0] == EXPECTED[:1], "tags overrule keys, as in speech"


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("a.tsv", ["", "one\teins", "  ", "two\tzwei", ""]),
        ("a.jsonl", ['{"source": "one", "target": "eins"}', "", '{"source": "two", "target": "zwei"}', " ", ""]),
    ],
)
def test_blank_lines_of_one_file_text_are_no_records(write_lines, name, lines) -> None:
    examples, skipped = read({"paths": str(write_lines(name, lines)), **LANGUAGES})
    assert examples == EXPECTED
    assert (skipped.read_count, skipped.count()) == (2, 0)
    skipped.check(0, at_end=True)


def test_a_line_that_is_empty_on_both_sides_is_one_bad_record(write_lines) -> None:
    config = {
        "source_paths": str(write_lines("a.en", ["one", "", "two"])),
        "target_paths": str(write_lines("a.de", ["eins", "", ""])),
    }
    examples, skipped = read({**config, **LANGUAGES})
    assert examples == EXPECTED[:1]
    assert (skipped.read_count, skipped.count()) == (3, 2)
    assert skipped.shares() == {config["source_paths"]: pytest.approx(2 / 3)}
    assert [str(record).removeprefix(str(config["source_paths"])[:-4]) for record in skipped.first] == [
        "a.en, line 2: empty text",
        "a.de, line 2: empty text",
        "a.de, line 3: empty text",
    ]


def test_directions_and_files_name_languages_by_any_of_their_codes(write_lines) -> None:
    files = {
        lang: str(write_lines(f"a.{lang}", [text])) for lang, text in (("en", "one"), ("de", "eins"), ("zh", "一"))
    }
    paths = {"eng_Latn": files["en"], "deu": files["de"], "zho_Hant": files["zh"]}
    expected = [("one", "eins", "en", "de"), ("一", "one", "zh-Hant", "en"), ("eins", "一", "de", "zh-Hant")]
    for directions in (["en-de", "zh-Hant-en", "de-zh-Hant"], ["eng-ger", "zho_Hant-eng_Latn", "deu_Latn-cmn-Hant"]):
        assert read({"paths": paths, "directions": directions})[0] == expected
    with pytest.raises(ConfigError, match=r"directions: 'eng-fra' is not a pair .* files \(en, de, zh-Hant\)"):
        read({"paths": paths, "directions": ["eng-fra"]})
    with pytest.raises(ConfigError, match=r"train_ds.paths: 'de' and 'deu' are one language; list all its files under"):
        read({"paths": {"de": files["de"], "en": files["en"], "deu": files["zh"]}})


def test_columns_and_fields_name_languages_by_any_of_their_codes(write_lines) -> None:
    rows = write_lines("a.tsv", ["one\teins\teng\tger", "one\tdeux\ten_XX\tfra_Latn"])
    columns = {"source_lang_column": 2, "target_lang_column": 3}
    expected = [("one", "eins", "en", "de"), ("one", "deux", "en", "fr")]
    assert read({"paths": str(rows), **columns})[0] == expected
    records = [
        {"source": "one", "target": "eins", "source_lang": "eng", "target_lang": "ger"},
        {"source": "one", "target": "deux", "target_lang": "fra"},
    ]
    lines = write_lines("a.jsonl", [json.dumps(record) for record in records])
    assert read({"paths": str(lines), "source_lang": "eng"})[0] == expected
