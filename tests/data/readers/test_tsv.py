"""TSV files of speech: what their rows become, which rows cost themselves alone, and where columns are."""

from __future__ import annotations

from pathlib import Path

import pytest
from lhotse.cut import Cut

from nemo_emmett.audio_file import read_header
from nemo_emmett.data import SpeechTextDataset, get_multimodal_dataloader
from nemo_emmett.data.config.sources import parse_source
from nemo_emmett.data.io.audio import load_waveform
from nemo_emmett.data.io.skipped_records import SkippedRecords
from nemo_emmett.data.readers import speech_tsv
from nemo_emmett.data.readers.examples import ExampleKind, Examples
from nemo_emmett.data.readers.random_access import open_records
from nemo_emmett.data.readers.registry import defaults_of, open_source
from nemo_emmett.errors import ConfigError, DataError

HEADER = "id\taudio\tsource\ttarget"


def source_of(path: str | Path | list, **keys):
    languages = {"source_lang": "en", "target_lang": "de"}
    paths = [str(one) for one in path] if isinstance(path, list) else str(path)
    return parse_source({"type": "speech_tsv", "paths": paths, **languages, **keys}, "data.train_ds.input_cfg.0")


def read(path: str | Path | list, **keys) -> tuple[list[Cut], SkippedRecords]:
    """The examples of a source, and its skipped records."""
    skipped, source = SkippedRecords(), source_of(path, **keys)
    cuts, _ = open_source(source, skipped, ExampleKind.TRANSLATION)
    return list(Examples(cuts, ExampleKind.TRANSLATION, defaults_of(source), skipped)), skipped


def texts(cut: Cut) -> tuple[str | None, ...]:
    custom = cut.custom
    return custom.get("source_text"), cut.supervisions[0].text, custom["source_lang"], custom["target_lang"]


@pytest.fixture
def two(write_tone, write_lines) -> Path:
    """Two recordings of 1.0 and 1.5 s, by paths relative to their file."""
    write_tone("a.wav", 1.0)
    write_tone("b.wav", 1.5)
    return write_lines("speech.tsv", [HEADER, "first\ta.wav\tone\teins", "second\tb.wav\ttwo\tzwei"])


def test_a_row_is_a_recording_with_a_transcript_and_its_translation(two) -> None:
    cuts, skipped = read(two)
    assert [cut.id for cut in cuts] == ["first", "second"]
    assert [texts(cut) for cut in cuts] == [("one", "eins", "en", "de"), ("two", "zwei", "en", "de")]
    assert [cut.duration for cut in cuts] == [1.0, 1.5]
    assert [len(load_waveform(cut)) for cut in cuts] == [16000, 24000]
    assert (skipped.read_count, skipped.count()) == (2, 0)


def test_paths_are_relative_to_the_file_and_not_to_the_current_folder(two, tmp_path, monkeypatch, write_tone) -> None:
    (tmp_path / "elsewhere").mkdir()
    write_tone("elsewhere/a.wav", 9.0)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert [cut.duration for cut in read("../speech.tsv")[0]] == [1.0, 1.5]


def test_common_voice(write_tone, write_lines, tmp_path) -> None:
    (tmp_path / "clips").mkdir()
    write_tone("clips/c.wav", 1.0)
    path = write_lines("en_de.tsv", ["path\tsentence\ttranslation\tclient_id", 'c.wav\tShe said "one"\t"eins\tx'])
    columns = {"audio_column": "path", "source_column": "sentence", "target_column": "translation"}
    (cut,), _ = read(path, audio_dir=str(tmp_path / "clips"), **columns)
    assert texts(cut) == ('She said "one"', '"eins', "en", "de")  # a quotation mark is text


def test_the_scripts_of_covost_and_fairseq_escape_quotes_and_tabs(write_tone, write_lines) -> None:
    write_tone("a.wav")
    rows = ['1\ta.wav\tsay \\"one\\"\teins', "2\ta.wav\ta\\\ttab\tein\\\tTab", "3\ta.wav\tends in \\\tdrei"]
    cuts, skipped = read(write_lines("s.tsv", [HEADER, *rows]))
    assert [texts(cut)[:2] for cut in cuts] == [
        ('say "one"', "eins"),
        ("a\ttab", "ein\tTab"),
        ("ends in \\", "drei"),  # as Common Voice has it: the columns are those of the header
    ]
    assert skipped.count() == 0


def test_durations_and_offsets_of_columns_are_seconds(write_tone, write_lines) -> None:
    write_tone("talk.wav", 3.0)
    rows = ["talk.wav\teins\t0.5\t1.25", "talk.wav\tzwei\t1.0\t2.0", "talk.wav\tdrei\t\t1.0"]
    cuts, skipped = read(write_lines("s.tsv", ["audio\ttarget\tduration\toffset", *rows]))
    assert [(cut.start, cut.duration) for cut in cuts] == [(1.25, 0.5), (2.0, 1.0)]
    assert [len(load_waveform(cut)) for cut in cuts] == [8000, 16000]
    assert [str(record).rpartition(": ")[2] for record in skipped.first] == ["no duration"]


def test_without_a_duration_a_part_extends_to_the_end_of_its_recording(write_tone, write_lines) -> None:
    write_tone("talk.wav", 3.0)
    path = write_lines("s.tsv", ["audio\ttarget\toffset", "talk.wav\teins\t2.25", "talk.wav\tzwei\t3"])
    cuts, skipped = read(path)
    assert [(cut.start, cut.duration, len(load_waveform(cut))) for cut in cuts] == [(2.25, 0.75, 12000)]
    assert skipped.causes() == {"truncated audio": 1}


def test_languages_by_column_by_key_and_by_tag(write_tone, write_lines) -> None:
    write_tone("a.wav")
    rows = ["a.wav\teins\tde\tes", "a.wav\tuno\t\tfr", "a.wav\tx\txx\tes"]
    path = write_lines("s.tsv", ["audio\ttarget\ttarget_lang\tsource_lang", *rows])
    cuts, skipped = read(path, target_lang="es")
    assert [texts(cut)[2:] for cut in cuts] == [("es", "de"), ("fr", "es")]
    assert skipped.causes() == {"unknown language 'xx'": 1}
    cuts, _ = read(path, tags={"target_lang": "it"})
    assert [cut.custom["target_lang"] for cut in cuts] == ["it", "it", "it"]
    renamed = write_lines("r.tsv", ["audio\ttarget\tlanguage", "a.wav\teins\tfr"])
    (cut,), _ = read(renamed, target_lang_column="language")
    assert cut.custom["target_lang"] == "fr"


def test_columns_by_number_have_no_header(write_tone, write_lines) -> None:
    write_tone("a.wav")
    path = write_lines(
        "fleurs.tsv", ["7\ta.wav\tOne.\teins\t16000", "8\ta.wav\tTwo.", "9\ta.wav\tSix.\tsechs\t1\tmore"]
    )
    cuts, skipped = read(path, id_column=0, audio_column=1, source_column=2, target_column=3)
    assert [(cut.id, *texts(cut)[:2]) for cut in cuts] == [("7", "One.", "eins"), ("9", "Six.", "sechs")]
    assert skipped.causes() == {"missing column": 1}


def test_rows_that_cannot_be_used_cost_themselves_alone(two, tmp_path) -> None:
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.wav").write_bytes(b"not audio at all")
    content = "\ufeff" + two.read_text().replace("\n", "\r\n") + "\r\n"  # BOM, CRLF, an empty line
    bad = [
        b"x\tgone.wav\tone\teins",
        b"x\t\tone\teins",
        b"x\ta.wav\tone\t ",
        b"x\ta.wav\tone",
        b"x\ta.wav\tone\teins\tmore",
        b"x\ta.wav\t\xff\teins",
        b"x\ta.w\0av\tone\teins",
        b"x\tempty.wav\tone\teins",
        b"x\ttext.wav\tone\teins",
        b"\t\t\t",
        b"",
    ]
    two.write_bytes(content.encode() + b"\n".join(bad) + b"\nlast\ta.wav\tthree\tdrei\n")
    cuts, skipped = read(two)
    assert [cut.id for cut in cuts] == ["first", "second", "last"]
    assert [(record.place, record.cause) for record in skipped.first] == [
        ("line 5", "missing audio"),
        ("line 6", "no audio"),
        ("line 7", "empty text"),
        ("line 8", "missing column"),
        ("line 9", "too many columns"),
        ("line 10", "not UTF-8"),
        ("line 11", "missing audio"),
        ("line 12", "empty audio"),
        ("line 13", "unreadable audio"),
        ("line 14", "no audio"),
    ]
    assert skipped.read_count == 3 + 10


@pytest.mark.parametrize(
    ("header", "keys", "sentence"),
    [
        (
            HEADER,
            {"target_column": "translation"},
            "target_column: {} has no column 'translation'; its columns are id, ",
        ),
        (HEADER, {"duration_column": "seconds"}, "duration_column: {} has no column 'seconds'; its columns are id, "),
        (
            HEADER,
            {"target_column": 7},
            "target_column: {} has no column '7'; its columns are id, audio, source, target.",
        ),
        (
            "id\tpath\tsource\ttarget",
            {},
            "audio_column: {} has no column 'audio'; its columns are id, path, source, ta",
        ),
        (f"{HEADER}\ttarget", {}, "target_column: {} has several columns 'target'; rename all but one."),
        ("", {}, "{}: has no first line with the names of its columns; add it, or give numbers of columns."),
        ("i\0d\0", {}, "{}: its first line is not UTF-8 text; convert the file to UTF-8."),
    ],
)
def test_mistakes_in_columns_are_one_sentence(write_lines, header, keys, sentence) -> None:
    path = write_lines("s.tsv", [header, "1\ta.wav\tone\teins"])
    with pytest.raises((ConfigError, DataError)) as error:
        read(path, **keys)
    assert str(error.value).startswith(sentence.format(path))
    records = open_records(source_of(path, **keys), SkippedRecords(), ExampleKind.TRANSLATION)
    with pytest.raises((ConfigError, DataError)):
        records.read(0, 1)  # of which the header was not read before


def test_awkward_names_and_shards(write_tone, write_lines, tmp_path) -> None:
    folder = "my corpus (v1) ü"
    (tmp_path / folder).mkdir()
    for number in (0, 1):
        write_tone(f"{folder}/clip [{number}] é.wav", 1.0 + number)
        write_lines(f"{folder}/part_{number}.tsv", ["target\taudio", f"wort {number}\tclip [{number}] é.wav"])
    whole = tmp_path / folder / "part_{0..1}.tsv"
    listed = [tmp_path / folder / f"part_{number}.tsv" for number in (0, 1)]
    for paths in (whole, listed):
        cuts, _ = read(paths)
        assert [(cut.supervisions[0].text, cut.duration) for cut in cuts] == [("wort 0", 1.0), ("wort 1", 2.0)]
    records = open_records(source_of(whole), SkippedRecords(), ExampleKind.TRANSLATION)
    assert records.shard_sizes == [2, 2]


def test_text_has_its_languages_in_columns_too(write_lines) -> None:
    path = write_lines("t.tsv", ["en\tde\tto", "one\teins\tde", "two\tdos\tes", "three\tdrei", "four\tvier\tde\tx"])
    keys = {"type": "parallel_text", "paths": str(path), "source_column": "en", "target_column": "de"}
    source = parse_source({**keys, "source_lang": "en", "target_lang_column": "to", "force_finite": True}, "x")
    skipped = SkippedRecords()
    pairs, _ = open_source(source, skipped, ExampleKind.TRANSLATION)
    assert [(pair.target.text, pair.target.language) for pair in pairs] == [("eins", "de"), ("dos", "es")]
    assert skipped.causes() == {"missing column": 1, "too many columns": 1}


def loader_of(path: Path, tokenizer):
    source = {"type": "speech_tsv", "paths": str(path), "source_lang": "en", "target_lang": "de"}
    config = {"input_cfg": [source], "batch_size": 2, "force_finite": True, "num_workers": 0, "max_bad_records": None}
    config |= {"audio_locator_tag": "<|audio|>", "token_equivalent_duration": 0.08, "prompt_format": "emmett_t5"}
    return get_multimodal_dataloader(config, 0, 1, SpeechTextDataset(tokenizer), tokenizer)


def trained(path: Path, tokenizer) -> tuple[list[str], dict[str, int]]:
    """The ids of the examples of a pass, and what was skipped."""
    loader = loader_of(path, tokenizer)
    ids = [example["id"] for batch in loader for example in batch["audio"]["examples"]]
    return sorted(ids), loader.skipped_records.causes()


def test_headers_are_read_once_and_again_only_of_what_was_at_fault(
    two, tokenizer, monkeypatch, write_tone, tmp_path
) -> None:
    with two.open("a") as file:
        file.write("third\tgone.wav\tthree\tdrei\nfourth\tbroken.wav\tfour\tvier\n")
    (tmp_path / "broken.wav").write_bytes(b"not audio at all")
    opened: list[str] = []

    def count(path: str):
        opened.append(Path(path).name)
        return read_header(path)

    monkeypatch.setattr(speech_tsv, "read_header", count)
    loader_of(two, tokenizer)
    assert sorted(opened) == ["a.wav", "b.wav", "broken.wav", "gone.wav"]
    opened.clear()
    loader_of(two, tokenizer)
    assert sorted(opened) == ["broken.wav", "gone.wav"]  # those that could not be used
    assert trained(two, tokenizer) == (["first", "second"], {"missing audio": 1, "unreadable audio": 1})
    write_tone("gone.wav", 1.25)
    assert trained(two, tokenizer) == (["first", "second", "third"], {"unreadable audio": 1})
    opened.clear()
    loader_of(two, tokenizer)
    assert opened == ["broken.wav"]
