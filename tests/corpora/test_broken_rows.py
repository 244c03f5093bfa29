"""Every row of a publisher's file is written or counted with its cause, and costs no other."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_emmett.corpora import Selection, find_corpus, prepare_corpus
from nemo_emmett.errors import DataError
from tests.corpora import layouts
from tests.corpora.speech_layouts import (
    covost_transcript,
    make_covost2,
    make_europarl_st,
    make_fleurs,
    make_must_c,
    sentence,
)

LATIN_1 = "grün".encode("latin-1")


@pytest.fixture
def prepare(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict]:
    """Prepare a part of a corpus; returns what ``corpus.json`` says of it, with the ``texts`` that were written."""

    def run(name: str, source: Path, part: str, languages=("en", "de"), **extra_sources: Path) -> dict:
        out = tmp_path_factory.mktemp("prepared") / "out"
        selection = Selection(languages, None, {key.replace("_", "-"): path for key, path in extra_sources.items()})
        if name not in ("opus", "tatoeba"):
            selection = Selection(languages, (part.split(".")[0],), selection.extra_sources)
        prepare_corpus(find_corpus(name), source, out, selection=selection, num_jobs=1, show_progress=False)
        [found] = [one for one in json.loads((out / "corpus.json").read_text())["parts"] if one["name"] == part]
        if found["spoken"] is None:
            files = [
                (out / "text" / f"{part}.{language}").read_bytes().decode().split("\n") for language in ("en", "de")
            ]
            found["texts"] = list(zip(*(lines[:-1] for lines in files), strict=True))
        else:
            lines = (out / "speech" / f"{part}.jsonl").read_bytes().decode().split("\n")[:-1]
            found["texts"] = [(entry["text"], *entry["translations"].values()) for entry in map(json.loads, lines)]
        assert len(found["texts"]) == found["sentences"]
        return found

    return run


def append(path: Path, *rows: str | bytes) -> None:
    with open(path, "ab") as file:
        for row in rows:
            file.write((row if isinstance(row, bytes) else row.encode()) + b"\n")


# Tables: a tab too many or too few shifts what comes behind it


@pytest.fixture
def covost(tmp_path: Path) -> Path:
    """Clips 0 to 3 are train, 4 and 5 dev, 6 and 7 test; validated.tsv has three more."""
    make_covost2(tmp_path / "covost", tmp_path / "cv", pairs=("en_de",))
    return tmp_path / "covost"


def test_rows_of_covost_whose_columns_are_not_those_of_the_header_are_counted(covost, tmp_path, prepare) -> None:
    clip = "common_voice_en_1.mp3"
    append(
        covost / "covost_v2.en_de.tsv",
        "a.mp3\tein Tab\thier\ttrain",  # too many
        "b.mp3\tein Tab\thier",  # the right number, but shifted
        "c.mp3\tohne Split",  # too few
        "",
        "d.mp3\teins\ttraining",  # no such split
        "\teins\ttrain",
        f"{clip}\tzum zweiten Mal\ttrain",
        "e.mp3\tnicht in validated.tsv\ttrain",
        f"{'x' * 200_000}.mp3\teins\ttrain",
        b"common_voice_en_8.mp3\t" + LATIN_1 + b"\ttrain",
        "common_voice_en_9.mp3\t \ttrain",
        "common_voice_en_10.mp3\tohne Clip\ttrain",
        "f.mp3\tnicht gezählt\tdev",
    )
    found = prepare("covost2", covost, "train.en", common_voice=tmp_path / "cv")
    assert found["skipped"] == {
        "wrong number of columns": 3,
        "unknown split": 2,
        "row without a clip": 1,
        "clip occurs twice": 1,
        "clip without a transcript": 2,
        "not UTF-8": 1,
        "empty text": 1,
        "missing recording": 1,
    }
    assert found["texts"] == [(covost_transcript("en", n), sentence("de", n)) for n in range(4)]


def test_a_transcript_is_whole_or_counted_and_quotes_and_backslashes_eat_nothing(covost, tmp_path, prepare) -> None:
    path = tmp_path / "cv/en/validated.tsv"
    lines = path.read_text().split("\n")
    transcripts = {
        0: 'an "opening quote',
        1: "a tab\there",  # the row has one column more
        2: "ends in backslash \\",
        3: 'C:\\new \\"quoted\\" \\\\ and a\\\ttab\u2028on one\x85line\0',  # escaped as CoVoST's script does
    }
    for number, text in transcripts.items():
        place = next(i for i, line in enumerate(lines) if f"_{number}.mp3" in line)
        lines[place] = f"s\tcommon_voice_en_{number}.mp3\t{text}\t2\t0\t\t\t"
    path.write_text("\n".join(["\ufeff" + lines[0], *lines[1:]]).replace("\n", "\r\n"), newline="")
    found = prepare("covost2", covost, "train.en", common_voice=tmp_path / "cv")
    assert found["skipped"] == {"transcript: wrong number of columns": 1}
    assert [text for text, _ in found["texts"]] == [
        'an "opening quote',
        "ends in backslash \\",
        'C:\\new "quoted" \\ and a\ttab\u2028on one\x85line\0',
    ]


def test_a_transcript_that_is_shifted_within_the_right_number_of_columns_is_counted(covost, tmp_path, prepare) -> None:
    path = tmp_path / "cv/en/validated.tsv"
    path.write_text(path.read_text().replace(f"{sentence('en', 1)}\t2\t0\t\t\t", "half a\tsentence\t2\t0\t\t"))
    found = prepare("covost2", covost, "train.en", common_voice=tmp_path / "cv")
    assert (found["sentences"], found["skipped"]) == (3, {"transcript: wrong number of columns": 1})


def test_rows_of_fleurs_are_whole_or_counted(tmp_path, prepare) -> None:
    make_fleurs(tmp_path / "fleurs", ("en", "de"))
    path = tmp_path / "fleurs/data/en_us/test.tsv"
    first, second, third = path.read_text().split("\n")[:3]
    before = path.read_text().count("\n")
    shifted = first.split("\t")
    append(
        path,
        "17\t123.wav",
        f"{third}\textra",
        "\t".join([*shifted[:2], "half a", "sentence", *shifted[2:5]]),
        "x" + second,
        "9" * 5000 + second.lstrip("0123456789"),
        second,
        b"17\t9.wav\t" + LATIN_1 + b"\tx\tx\t16000\tMALE",
    )
    found = prepare("fleurs", tmp_path / "fleurs", "test.en")
    skipped = {"wrong number of columns": 2, "shifted columns": 3, "id occurs twice": 1, "not UTF-8": 1}
    assert (found["sentences"], found["skipped"]) == (before, skipped)


TATOEBA = [
    "1\tdeu\teins",
    "2\teng\tone",
    "3\teng\thalf a\tsentence",
    "4",
    "5\teng\t",
]


@pytest.mark.parametrize("is_whole", [True, False])
def test_links_of_tatoeba_are_pairs_or_counted(tmp_path, prepare, is_whole) -> None:
    links = ["1\t2", "1\t3", "1\t4", "1\t5", "1", "1\t2\t3", "1\t2"]
    names = ("sentences.csv",) if is_whole else ("deu_sentences.tsv", "eng_sentences.tsv")
    for name in names:
        rows = [row for row in TATOEBA if is_whole or ("deu" in row) == ("deu" in name)]
        append(tmp_path / name, *rows)
    append(tmp_path / ("links.csv" if is_whole else "deu-eng_links.tsv"), *links)
    found = prepare("tatoeba", tmp_path, "train.de-en", ("de", "en"))
    assert found["skipped"] == {"wrong number of columns": 2, "link: wrong number of columns": 2, "empty text": 1}
    assert found["texts"] == [("one", "eins")] * 2


# Parallel files: a line that cannot be used stays a line


def test_lines_of_a_segment_list_that_are_no_times_are_counted(tmp_path, prepare) -> None:
    folder = make_europarl_st(tmp_path, ("en-de",)) / "en/de/dev"
    talk = "en.20080924.2.3-000"
    bad = [talk, "", f"{talk} x 1", f"{talk} nan 1", f"{talk} -1 0.5", f"{talk} 2 1", f"{talk} 1 inf", f"{talk} 0 1 2"]
    good = [f"{talk} 0.00 0.40", f"{talk} 1.10 1.30", f"{talk} 1.40 1.50"]  # the first is there already
    append(folder / "segments.lst", *bad, *good)
    append(folder / "segments.en", *["x"] * len(bad), sentence("en", 200), "a\tb\0\u2028c", LATIN_1)
    append(folder / "segments.de", *["y"] * len(bad), "noch einmal", "d", "e")
    found = prepare("europarl_st", tmp_path, "dev.en")
    assert found["skipped"] == {
        "segment without its times": 6,
        "segment with impossible times": 2,
        "segment occurs twice": 1,
        "not UTF-8": 1,
    }
    assert (found["sentences"], ("a\tb\0\u2028c", "d") in found["texts"]) == (13, True)


@pytest.mark.parametrize("is_yaml", [True, False])
def test_entries_of_a_list_of_talks_are_segments_or_counted(tmp_path, prepare, is_yaml) -> None:
    make_must_c(tmp_path)
    folder = tmp_path / "en-de/data/dev/txt"
    path = folder / "dev.yaml"
    lines = path.read_text().split("\n")[:-1]
    lines[0] = lines[0].replace("offset", "start")
    lines[1] = lines[1].replace("0.510000", ".nan")
    lines[2] = lines[2].replace("1.010000", "-1.0")
    lines[3] = lines[3].replace("duration: 0.400000", "duration: '1'")
    lines[4] = "- null"
    lines[6] = lines[5]
    (folder / "dev.en").write_text("".join(f"{line}\n" for line in ["x"] * 5 + ["same"] * 2 + ["a", "b", "c"]))
    skipped = {"segment without its times": 4, "segment with impossible times": 1, "segment occurs twice": 1}
    if not is_yaml:  # characters that YAML forbids, and brackets that do not match, cost their lines
        lines[7], lines[8] = "- {duration: 1, wav: \x0b}", lines[8].replace("}", "")
        skipped["segment without its times"] += 2
    path.write_text("".join(f"{line}\n" for line in lines))
    found = prepare("must_c", tmp_path, "dev.en-de")
    assert found["skipped"] == skipped
    assert [text for text, _ in found["texts"]] == (["same", "a", "b", "c"] if is_yaml else ["same", "c"])


def test_lines_of_moses_files_end_at_newlines_and_are_utf_8_or_counted(tmp_path, prepare) -> None:
    odd = 'a"b\u2028c\x85d\x0be\0f\tg\\'
    english = ["\ufeffone", odd, "carriage\rreturn\r", b"\xff", "", " \u3000 ", "last"]
    german = ["eins", "zwei", "drei", "vier", "fünf", "sechs", LATIN_1]
    append(tmp_path / "Odd.de-en.en", *english)
    append(tmp_path / "Odd.de-en.de", *german)
    found = prepare("opus", tmp_path, "train.Odd.de-en")
    assert found["texts"] == [("one", "eins"), (odd, "zwei"), ("carriage return", "drei")]
    assert found["skipped"] == {"not UTF-8": 2, "empty text": 2}


def test_captions_that_are_not_utf_8_are_counted(tmp_path, prepare) -> None:
    layouts.multi30k(tmp_path / "source", is_packed=False)
    (tmp_path / "source/train.de").write_bytes(b"eins\n" + LATIN_1 + b"\ndrei\n")
    found = prepare("multi30k", tmp_path / "source", "train")
    assert (len(found["texts"]), found["skipped"]) == (2, {"not UTF-8": 1})


# FLORES


def test_records_of_flores_are_sentences_or_counted(tmp_path, prepare) -> None:
    source = layouts.flores_plus_hub(tmp_path / "flores", "jsonl")
    german, english = (source / "dev" / f"{code}.jsonl" for code in ("deu_Latn", "eng_Latn"))
    lines = german.read_text().split("\n")
    german.write_text("\n".join([lines[0][:-5], *lines[1:]]))  # the record of the last id
    append(english, '{"id": 0, "text": "again"}', '{"id": "x", "text": ""}', "[1]")
    found = prepare("flores", source, "dev")
    assert (found["sentences"], found["texts"][0][0]) == (2, "one red house dev")
    # Of six lines in English two are written, one has lost its translation, and three are none.
    assert found["skipped"] == {
        "not in all languages": 1,
        "id occurs twice": 1,
        "record without an id and a text": 2,
    }


def test_a_file_of_flores_without_a_record_is_refused(tmp_path, prepare) -> None:
    source = layouts.flores_plus_hub(tmp_path / "flores", "jsonl")
    (source / "dev/deu_Latn.jsonl").write_text("{\n[]\n")
    with pytest.raises(DataError, match=r"dev/deu_Latn\.jsonl' is no file of FLORES\+ \(record without"):
        prepare("flores", source, "dev")


# TMX: what XML forbids costs a unit


def unit(german: str | None, english: str = "one") -> str:
    variants = "" if german is None else f'<tuv xml:lang="de"><seg>{german}</seg></tuv>'
    return f'  <tu>\n{variants}<tuv xml:lang="en"><seg>{english}</seg></tuv>\n  </tu>\n'


BROKEN_UNITS = {
    "a control character": (unit("\x0b"), "not well-formed XML"),
    "a forbidden reference": (unit("&#x1;"), "not well-formed XML"),
    "an unknown entity": (unit("&nbsp;"), "not well-formed XML"),
    "a bare ampersand": (unit("A & B"), "not well-formed XML"),
    "a bare bracket": (unit("a < b"), "not well-formed XML"),
    "tags that do not match": (unit("<i>a</b>"), "not well-formed XML"),
    "bytes of another encoding": (unit("\udcfc"), "not UTF-8"),
    "no end": (unit("drei").replace("</tu>", ""), "unit without its end"),
    "one side": (unit(None), "empty text"),
    "nothing": ("<tu/>", "empty text"),
}


@pytest.mark.parametrize("name", BROKEN_UNITS)
def test_a_broken_unit_of_tmx_costs_no_other(tmp_path, prepare, name) -> None:
    broken, cause = BROKEN_UNITS[name]
    comment = f"<!-- {unit('nicht')} -->"
    units = unit("eins") + comment + broken + unit("zwei <hi>&amp;</hi>\u2028&#228;")
    text = f'<?xml version="1.0"?>\n<tmx version="1.4"><header/><body>\n{units}</body></tmx>'
    (tmp_path / "de-en.tmx").write_bytes(text.encode("utf-8", "surrogateescape"))
    found = prepare("opus", tmp_path / "de-en.tmx", f"train.{tmp_path.name}.de-en")
    assert found["skipped"] == {cause: 1}
    assert found["texts"] == [("one", "eins"), ("one", "zwei &\u2028ä")]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "iso-8859-1"])
def test_tmx_in_other_encodings(tmp_path, prepare, encoding) -> None:
    text = f'<?xml version="1.0" encoding="{encoding.removesuffix("-sig")}"?><tmx><body>{unit("ä")}</body></tmx>'
    (tmp_path / "de-en.tmx").write_bytes(text.encode(encoding))
    assert prepare("opus", tmp_path / "de-en.tmx", f"train.{tmp_path.name}.de-en")["texts"] == [("one", "ä")]


def test_tmx_that_breaks_off_costs_its_last_unit(tmp_path, prepare, monkeypatch) -> None:
    monkeypatch.setattr("nemo_emmett.corpora.readers.opus._CHARACTERS", 7)  # tags are cut in two
    path = layouts.opus_tmx(tmp_path / "ECB")
    whole = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(whole[: whole.rindex(b"</tu>") + 2]))
    found = prepare("opus", path, "train.ECB.de-en")
    assert (found["sentences"], found["skipped"]) == (4, {"unit without its end": 1})


def test_an_archive_that_breaks_off_is_refused(tmp_path, prepare) -> None:
    path = layouts.opus_tmx(tmp_path / "ECB")
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(DataError, match=r"de-en\.tmx\.gz' cannot be read .*again"):
        prepare("opus", path, "train.ECB.de-en")
