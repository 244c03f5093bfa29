"""Sentences with their place, from text files, manifests and prepared corpora."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from nemo_emmett.corpora.sentence_files import find_sentence_files, read_sentences
from nemo_emmett.errors import DataError


def texts_in(source: str | Path) -> list[tuple[str, int, dict[str, str]]]:
    files = find_sentence_files(source)
    return [(s.file.name, s.line, dict(s.texts)) for file in files for s in read_sentences(file)]


def write(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content.encode()))
    else:
        path.write_text(content, encoding="utf-8")
    return path


def json_lines(*records: dict[str, Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.mark.parametrize("name", ["test.de", "test.en-de.de.gz", "dev.deu_Latn"])
def test_text_file_is_in_the_language_of_its_suffix(tmp_path: Path, name: str) -> None:
    # A line separator of Unicode ends no line, and an empty line is one.
    path = write(tmp_path / name, "\ufeffEins.\r\n\nZwei\u2028drei.")
    assert texts_in(path) == [(name, 1, {"de": "Eins."}), (name, 3, {"de": "Zwei\u2028drei."})]


def test_language_of_a_text_file_may_be_given(tmp_path: Path) -> None:
    path = write(tmp_path / "deu_Latn.devtest", "Eins.\n")
    assert texts_in(f"de={path}") == [(path.name, 1, {"de": "Eins."})]


MANIFEST_LINES = [
    ({"text": "hello", "lang": "en", "translations": {"de": "hallo"}}, {"en": "hello", "de": "hallo"}),
    ({"text": "hello", "source_lang": "en", "translations": {"de": "hallo"}}, {"en": "hello", "de": "hallo"}),
    ({"text": "hallo", "source_lang": "en", "target_lang": "de"}, {"de": "hallo"}),  # as in Canary's manifests
    ({"text": "hello", "lang": "en"}, {"en": "hello"}),
    (
        {"supervisions": [{"text": "hello", "language": "en"}], "custom": {"lang": "en", "translations": {"de": "hi"}}},
        {"en": "hello", "de": "hi"},
    ),
]


@pytest.mark.parametrize(("record", "texts"), MANIFEST_LINES)
@pytest.mark.parametrize("name", ["m.json", "m.jsonl", "m.jsonl.gz"])
def test_manifest_says_its_languages(tmp_path: Path, name: str, record: dict[str, Any], texts: dict[str, str]) -> None:
    assert texts_in(write(tmp_path / name, json_lines(record))) == [(name, 1, texts)]


def test_prepared_corpus_is_read_whole_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "text" / "train.de", "Eins.\n")
    write(tmp_path / "text" / "train.en", "One.\n")
    write(tmp_path / "text" / "train.ids", "1\n")
    write(tmp_path / "text" / "train.de.sizes.json", "{}\n")
    write(tmp_path / "speech" / "train.en.jsonl", json_lines({"text": "Two.", "lang": "en"}))
    write(tmp_path / "speech" / "train.en.jsonl.sizes.json", "{}\n")
    write(tmp_path / "speech" / "dev.en" / "manifest_0.json", json_lines({"text": "Three.", "lang": "en"}))
    write(tmp_path / "corpus.json", "{}\n")
    assert {tuple(texts.items()) for _, _, texts in texts_in(tmp_path)} == {
        (("de", "Eins."),),
        (("en", "One."),),
        (("en", "Two."),),
        (("en", "Three."),),
    }


def test_what_cannot_be_read_is_reported_in_one_sentence(tmp_path: Path) -> None:
    cut_off = write(tmp_path / "cut.de.gz", "Ein langer Satz.\n" * 1000)
    cut_off.write_bytes(cut_off.read_bytes()[:-20])
    latin = tmp_path / "latin.de"
    latin.write_bytes("Fünf\n".encode("latin-1"))
    write(tmp_path / "begun" / "text" / "dev.de", "Eins.\n")
    faults = {
        tmp_path / "missing.de": "does not exist",
        write(tmp_path / "test.txt", "Eins.\n"): "does not end in a language",
        f"xx={write(tmp_path / 'a.txt', 'Eins.')}": "'xx' is not a known language",
        cut_off: "cannot be read to its end",
        latin: "is not UTF-8",
        write(tmp_path / "plain.de.gz.txt", "x").rename(tmp_path / "plain.de.gz"): "cannot be read to its end",
        write(tmp_path / "broken.json", '{"text": "a", "lang": "en"}\n{"text": \n'): "broken.json', line 2: not JSON",
        write(tmp_path / "nameless.json", json_lines({"text": "a"})): "line 1: needs a 'text' and its language",
        write(tmp_path / "number.json", json_lines({"text": 3, "lang": "en"})): "line 1: needs a 'text'",
        write(tmp_path / "list.json", "[1]\n"): "line 1: needs a 'text'",
        write(tmp_path / "empty" / "corpus.json", "{}").parent: "has no sentences in text/ or speech/",
        write(tmp_path / "begun" / "corpus.started.json", "{}").parent: "holds a corpus that is not finished",
    }
    for source, fault in faults.items():
        with pytest.raises(DataError) as error:
            texts_in(source)
        assert fault in str(error.value)
        assert "\n" not in str(error.value)
