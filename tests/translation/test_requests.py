"""What is to be translated: arguments, lines, tables, manifests and folders, in their order."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from nemo_emmett.errors import ConfigError, DataError
from nemo_emmett.models.inputs import Segment
from nemo_emmett.translation.requests import Languages, Request, read_requests


def requests_of(
    *inputs: str, lines: str = "", tsv=(), manifests=(), column=None, to="de", source=None
) -> list[Request]:
    stdin = io.StringIO(lines)
    return list(read_requests(inputs, tsv, manifests, stdin=stdin, languages=Languages(source, to), column=column))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Recordings (empty files) in a folder and below it, and a file that is none."""
    for name in ("b.wav", "a.FLAC", "deep/er/c.mp3", "notes.txt"):
        (tmp_path / "audio" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "audio" / name).touch()
    return tmp_path / "audio"


def test_arguments_lines_files_and_folders_keep_their_order(folder: Path) -> None:
    found = requests_of("one text", str(folder), "-", str(folder / "b.wav"), lines="first\n\nsecond.\n")
    paths = [f"{folder}/a.FLAC", f"{folder}/b.wav", f"{folder}/deep/er/c.mp3"]
    assert [one.shown for one in found] == ["one text", *paths, "first", "", "second.", paths[1]]
    assert [one.id for one in found] == ["1", *paths, "5", "6", "7", paths[1]]
    assert not [one for one in found if one.fault]


def test_a_line_may_be_the_path_of_a_recording(folder: Path) -> None:
    found = requests_of("-", lines=f"{folder}/b.wav\ngone.wav\n")
    assert [one.fault for one in found] == ["", "audio file 'gone.wav' does not exist"]


@pytest.mark.parametrize(
    ("name", "said"),
    [("notes.txt", "standard input: <"), ("data.tsv", "give it by --tsv"), ("data.jsonl", "give it by --manifest")],
)
def test_a_file_that_is_no_recording_is_not_translated_as_a_text(folder: Path, name: str, said: str) -> None:
    (folder / name).touch()
    with pytest.raises(DataError, match=said):
        requests_of(str(folder / name))


def test_a_folder_without_recordings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"the folder '{tmp_path}' holds no audio files"):
        requests_of(str(tmp_path))


def test_a_text_longer_than_any_file_name_is_a_text() -> None:
    (one,) = requests_of("word " * 2000)
    assert one.shown.startswith("word word")


class TestTables:
    def test_the_first_known_column_and_the_languages_of_each_row(self, tmp_path: Path) -> None:
        (tmp_path / "t.tsv").write_text(
            '\ufeffid\tsource\ttarget_lang\tsource_lang\n7\topen a.wav\tfr\ten\n\tit\'s "so"\t\t\nx\t \tde\ten\ny\tz\n'
        )
        found = requests_of(tsv=[tmp_path / "t.tsv"], to=None)
        assert [(one.id, one.shown, one.source_lang, one.target_lang) for one in found[:2]] == [
            ("7", "open a.wav", "en", "fr"),
            ("t.tsv:3", 'it\'s "so"', None, None),
        ]
        assert [one.fault.replace(str(tmp_path), "") for one in found] == [
            "",
            "names no target language; give target_lang, or --to for all",
            "'/t.tsv', line 4: the column 'source' is empty",
            "'/t.tsv', line 5: has 2 columns, the first line 4",
        ]

    def test_columns_have_the_names_that_init_knows(self, folder: Path) -> None:
        (folder / "covost.tsv").write_text("client\tpath\tsentence\ttranslation\n1\tb.wav\tb\tB\n")
        assert [one.input for one in requests_of(tsv=[folder / "covost.tsv"])] == [folder / "b.wav"]
        (folder / "text.tsv").write_text("client\tsentence\ttranslation\n1\tb\tB\n")
        assert [one.input for one in requests_of(tsv=[folder / "text.tsv"])] == ["b"]

    def test_recordings_are_relative_to_the_table(self, folder: Path) -> None:
        (folder / "t.tsv").write_text("audio\tsource\nb.wav\tb\nno.wav\tn\n")
        found = requests_of(tsv=[folder / "t.tsv"])
        assert found[0].input == folder / "b.wav"
        assert [one.fault for one in found] == ["", f"audio file '{folder}/no.wav' does not exist"]
        (folder / "parts.tsv").write_text("audio\toffset\tduration\nb.wav\t1.5\t2\nb.wav\t\t9\n\nb.wav\tx\t\n")
        parts = requests_of(tsv=[folder / "parts.tsv"])
        assert [one.input for one in parts[:2]] == [Segment(folder / "b.wav", 1.5, 2.0), folder / "b.wav"]
        assert [one.fault for one in parts[2:]] == [
            f"'{folder}/parts.tsv', line 5: offset 'x' and duration None are no part of a recording"
        ]
        texts = requests_of(tsv=[folder / "t.tsv"], column="source")
        assert [one.input for one in texts] == ["b", "n"]

    @pytest.mark.parametrize(
        ("header", "column", "said"), [("a\tb", None, "'audio', 'path', 'source'"), ("a\tb", "c", "'c'")]
    )
    def test_a_missing_column_is_named(self, tmp_path: Path, header: str, column: str | None, said: str) -> None:
        (tmp_path / "t.tsv").write_text(header + "\n")
        with pytest.raises(DataError, match=rf"has no column {said}.*first line, but a, b;"):
            requests_of(tsv=[tmp_path / "t.tsv"], column=column)


class TestManifests:
    def test_recordings_parts_of_them_and_texts(self, folder: Path) -> None:
        records = [
            {"id": 3, "audio_filepath": "b.wav", "duration": 2.0, "lang": "en", "target_lang": "fr"},
            {"audio_filepath": "b.wav", "offset": 1.5, "duration": 0.5, "source_lang": "es"},
            {"text": "read a.wav"},
        ]
        (folder / "m.jsonl").write_text("\n".join(map(json.dumps, records)))
        found = requests_of(manifests=[folder / "m.jsonl"], to=None)
        assert [one.input for one in found] == [folder / "b.wav", Segment(folder / "b.wav", 1.5, 0.5), "read a.wav"]
        assert [(one.id, one.source_lang, one.target_lang) for one in found[:2]] == [
            ("3", "en", "fr"),
            ("m.jsonl:2", "es", None),
        ]
        (first, *_) = requests_of(manifests=[folder / "m.jsonl"], to="de")
        assert first.target_lang == "de", "the option comes before the record"

    def test_each_fault_has_its_cause_and_line(self, folder: Path) -> None:
        audio = '{"audio_filepath": "b.wav", '
        lines = [
            "{",
            "3",
            "{}",
            audio + '"offset": -1}',
            audio + '"offset": 0, "duration": "x"}',
            audio + '"lang": "xx"}',
            audio + '"offset": NaN}',
        ]
        (folder / "m.json").write_text("\n".join(lines))
        faults = [one.fault.replace(f"'{folder}/m.json', ", "") for one in requests_of(manifests=[folder / "m.json"])]
        assert faults[0].startswith("line 1: not JSON (")
        assert faults[1:] == [
            "line 2: is no JSON object",
            "line 3: has neither audio_filepath nor text",
            "line 4: offset -1 and duration None are no part of a recording",
            "line 5: offset 0 and duration 'x' are no part of a recording",
            "source_lang: 'xx' is not a known language; did you mean 'xh' (Xhosa)?",
            "line 7: offset nan and duration None are no part of a recording",
        ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"to": "xx"}, "^--to: 'xx' is not a known language"),
        ({"source": "Deutsch"}, "^--from: 'Deutsch' is not a known language"),
        ({"to": None}, "^--to: is missing"),
    ],
)
def test_languages_are_checked_first(arguments: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        requests_of("text", **arguments)


@pytest.mark.parametrize("option", ["tsv", "manifests"])
def test_a_missing_file_is_refused(option: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"there is no file '{tmp_path}/gone'"):
        requests_of(**{option: [tmp_path / "gone"]})
