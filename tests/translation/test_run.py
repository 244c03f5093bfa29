"""A model on requests: their order, windows, and records that cannot be translated."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from nemo_emmett.errors import ConfigError, DataError
from nemo_emmett.models.inputs import Segment
from nemo_emmett.translation import run
from nemo_emmett.translation.requests import Request
from nemo_emmett.translation.results import as_line, opened
from nemo_emmett.translation.run import Result, translate_requests


class Upper:
    """Translates into upper case, but not what begins with ``bad``, and knows no French."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def translate(self, inputs, source_lang, target_lang, **options):
        self.calls.append((list(inputs), source_lang, target_lang))
        if "fr" in target_lang:
            raise ConfigError("target_lang: the model has no token for 'fr'.")
        if bad := [one for one in inputs if one.startswith("bad")]:
            raise DataError(f"'{bad[0]}' cannot be read.")
        return [one.upper() for one in inputs]


def requests(*texts: str, **languages: str) -> list[Request]:
    return [Request(str(n), text, text, "en", languages.get(text, "de")) for n, text in enumerate(texts)]


def results(model, wanted, window=8, **options) -> list[Result]:
    return [one for window_ in translate_requests(model, wanted, window, {}, **options) for one in window_]


def test_a_window_is_translated_in_one_call_whatever_its_languages() -> None:
    model, texts = Upper(), [f"text {number}" for number in range(7)]
    found = results(model, requests(*texts, **{"text 1": "es", "text 4": "es"}), window=3)
    assert [one.translation for one in found] == [text.upper() for text in texts]
    assert model.calls == [
        (["text 0", "text 1", "text 2"], ["en"] * 3, ["de", "es", "de"]),
        (["text 3", "text 4", "text 5"], ["en"] * 3, ["de", "es", "de"]),
        (["text 6"], ["en"], ["de"]),
    ]


@pytest.mark.parametrize("bad", [[0], [6], [2, 3], list(range(7))])
def test_records_at_fault_do_not_cost_the_others(bad: list[int]) -> None:
    texts = [f"bad {n}" if n in bad else f"good {n}" for n in range(7)]
    found = results(Upper(), requests(*texts))
    assert [one.translation for one in found] == [None if n in bad else f"GOOD {n}" for n in range(7)]
    assert [one.fault for one in found] == [f"'bad {n}' cannot be read" if n in bad else "" for n in range(7)]


def test_a_window_is_read_when_the_one_before_is_done() -> None:
    taken = []
    stream = (taken.append(one.id) or one for one in requests("a", "b", "c", "d"))
    windows = translate_requests(Upper(), stream, 2, {})
    assert [one.translation for one in next(windows)] == ["A", "B"]
    assert taken == ["0", "1"]


def test_empty_lines_are_not_for_the_model() -> None:
    model = Upper()
    assert [one.translation for one in results(model, requests("a", " ", "b"))] == ["A", "", "B"]
    assert model.calls == [(["a", "b"], ["en", "en"], ["de", "de"])]
    assert [one.translation for one in results(model, requests("", " "))] == ["", ""]
    assert len(model.calls) == 1


def test_a_language_that_the_model_lacks_is_a_fault_only_where_records_name_it() -> None:
    wanted = requests("a", "b", b="fr")
    found = results(Upper(), wanted, languages_vary=True)
    assert [(one.translation, one.fault) for one in found] == [
        ("A", ""),
        (None, "target_lang: the model has no token for 'fr'"),
    ]
    with pytest.raises(ConfigError, match="has no token for 'fr'"):
        results(Upper(), wanted)


class Times:
    """Translates a recording into its start, and fails on what begins after ``last`` seconds."""

    def __init__(self, last: float = 100.0) -> None:
        self.last = last
        self.sizes: list[int] = []

    def translate(self, inputs, source_lang, target_lang, **options):
        self.sizes.append(len(inputs))
        if "fr" in target_lang:
            raise ConfigError("target_lang: the model has no token for 'fr'.")
        if any(isinstance(one, Segment) and one.start > self.last for one in inputs):
            raise DataError("it is too long.")
        return [f"{one.start:.0f}" if isinstance(one, Segment) else Path(one).stem for one in inputs]


@pytest.fixture
def talk(tmp_path: Path) -> Request:
    """Twenty seconds in which every other second is silent."""
    samples = np.tile(np.repeat([0.5, 0.0], 100), 10)
    soundfile.write(tmp_path / "talk.wav", samples, 100)
    return Request("t", "talk.wav", tmp_path / "talk.wav", "en", "de")


def test_a_long_recording_has_chunks(talk: Request, monkeypatch) -> None:
    bars = []

    class Bar(run.tqdm):
        def __init__(self, **options) -> None:
            bars.append(self)
            super().__init__(**options | {"disable": False, "file": io.StringIO()})

    monkeypatch.setattr(run, "tqdm", Bar)
    model = Times()
    short = replace(talk, input=Segment(talk.input, 0.0, 4.0))
    first, long = results(model, [short, talk], chunk_seconds=4.5)
    assert (first.translation, first.chunks) == ("0", ())
    ends = [chunk.end for chunk in long.chunks]
    assert [chunk.start for chunk in long.chunks] == [0.0, *ends[:-1]]
    assert ends[-1] == 20.0
    assert max(chunk.end - chunk.start for chunk in long.chunks) <= 4.5
    assert long.translation == " ".join(chunk.translation for chunk in long.chunks)
    assert [chunk.translation for chunk in long.chunks] == [f"{chunk.start:.0f}" for chunk in long.chunks]
    assert [(bar.total, bar.n, bar.unit) for bar in bars] == [(20, pytest.approx(20.0), "s")]
    assert results(model, [replace(talk, target_lang="ja")], chunk_seconds=4.5)[0].translation == "".join(
        chunk.translation for chunk in long.chunks
    )
    record = json.loads(as_line(long, "jsonl"))
    assert record["chunks"][1] == {"start": ends[0], "end": ends[1], "translation": f"{ends[0]:.0f}"}
    assert "chunks" not in json.loads(as_line(first, "jsonl"))


def test_a_few_parts_are_translated_together(talk: Request) -> None:
    model = Times()
    list(translate_requests(model, [talk], 8, {"batch_size": 3}, chunk_seconds=2.5))
    assert set(model.sizes[:-1]) == {3}
    assert sum(model.sizes) >= 8


def test_a_fault_in_a_part_is_the_recordings(talk: Request) -> None:
    others = requests("a", "b")
    found = results(Times(last=7.0), [others[0], talk, others[1]], chunk_seconds=4.5)
    assert [one.translation for one in found] == ["a", None, "b"]
    assert re.fullmatch(r"it is too long \(in the part from [78]\.\d\d s to 1\d\.\d\d s\)", found[1].fault)
    assert found[1].chunks == ()


def test_a_language_that_the_model_lacks_is_a_fault_of_a_long_recording_that_names_it(talk: Request) -> None:
    wanted = [replace(talk, target_lang="fr")]
    (found,) = results(Times(), wanted, languages_vary=True, chunk_seconds=4.5)
    assert found.fault.startswith("target_lang: the model has no token for 'fr' (in the part from 0.00 s to ")
    with pytest.raises(ConfigError, match="has no token for 'fr'"):
        results(Times(), wanted, chunk_seconds=4.5)


def test_lines_and_json() -> None:
    done, failed = Result(*requests("ä b"), "zwei\nZeilen"), Result(*requests("c"), None, "cannot be read")
    assert [as_line(one, "lines") for one in (done, failed)] == ["zwei Zeilen", ""]
    record = {"id": "0", "input": "ä b", "translation": "zwei\nZeilen", "source_lang": "en", "target_lang": "de"}
    assert json.loads(as_line(done, "jsonl")) == record
    assert "ä b" in as_line(done, "jsonl")
    assert json.loads(as_line(failed, "jsonl"))["error"] == "cannot be read"


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"

    def interrupted() -> None:
        with opened(path) as file:
            file.write("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    with opened(path) as file:
        file.write("whole")
        file.flush()
        assert not path.exists()
    assert path.read_text() == "whole"
