"""The corpora of the experiment's parts: how they are divided, and that no test sentence is in their training data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import soundfile

from .conftest import write_tone

pytestmark = pytest.mark.usefixtures("scripts_importable")


def write_lines(path: Path, lines: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def write_jsonl(path: Path, records: Sequence[dict]) -> None:
    write_lines(path, [json.dumps(one) for one in records])


def texts(folder: Path, split: str, languages: Sequence[str]) -> list[tuple[str, ...]]:
    files = [(folder / "text" / f"{split}.{language}").read_text().splitlines() for language in languages]
    return list(zip(*files, strict=True))


def spoken(folder: Path, language: str, split: str = "train") -> list[dict]:
    return [json.loads(line) for line in (folder / "speech" / f"{split}.{language}.jsonl").read_text().splitlines()]


@pytest.fixture
def captions_source(tmp_path: Path) -> tuple[Path, Path]:
    """Sixty pairs, of which forty are spoken. The first two share a sentence with the validation set, in one language
    each; the last, which is not spoken, shares its French with the third."""
    en = [f"a dog number {n} runs over the wide grass" for n in range(60)]
    fr = [f"le chien numéro {n} court dans l'herbe haute" for n in range(60)]
    val_en = [en[0].upper(), *(f"two cats of age {n} sit there" for n in range(9))]
    val_fr = [*(f"deux chats de {n} ans sont assis" for n in range(9)), fr[1]]
    fr[59] = fr[2]
    source, corpus = tmp_path / "multi30k", tmp_path / "captions"
    for split, pair in {"train": (en, fr), "val": (val_en, val_fr)}.items():
        for language, lines in zip(("en", "fr"), pair, strict=True):
            write_lines(source / f"{split}.{language}", lines)

    def record(split: str, n: int, text: str, translation: str) -> dict:
        audio = {"audio_filepath": f"../audio/{split}/{n}.wav", "duration": 1.0}
        return {
            "id": f"{split}-{n}",
            **audio,
            "text": text,
            "lang": "en",
            "translations": {"fr": translation},
            "line": n,
        }

    write_jsonl(corpus / "speech" / "train.en.jsonl", [record("train", n + 1, en[n], fr[n]) for n in range(40)])
    for split, places in {"dev": range(3), "test": range(3, 10)}.items():
        write_jsonl(
            corpus / "speech" / f"{split}.en.jsonl", [record(split, n + 1, val_en[n], val_fr[n]) for n in places]
        )
        for language, lines in (("en", val_en), ("fr", val_fr)):
            write_lines(corpus / "text" / f"{split}.{language}", [lines[n] for n in places])
    return source, corpus


def test_scarce_corpora_are_nested_and_apart_from_test_and_start(captions_source, tmp_path, monkeypatch):
    import experiment_corpora

    monkeypatch.setattr(experiment_corpora, "SIZES", ("5", "10", "all"))
    source, corpus = captions_source
    out = tmp_path / "scarce"
    summary = experiment_corpora.write_scarce(corpus, source, out, dev=4)
    ids = {size: [one["id"] for one in spoken(out / size, "en")] for size in ("5", "10", "all", "start")}
    assert ids["5"] == ids["10"][:5]
    assert ids["10"] == ids["all"][:10]
    assert ids["all"] == ids["start"]
    assert len(set(ids["all"])) == 34
    lines = [one["line"] for one in spoken(out / "all", "en")]
    assert lines != sorted(lines)  # not the first of the file

    val = {text for pair in texts(corpus, "dev", ("en", "fr")) + texts(corpus, "test", ("en", "fr")) for text in pair}
    held_out = {text.lower() for text in val}
    everything = texts(out / "5", "train", ("en", "fr"))
    # Two pairs share a sentence with the validation set, in one language each; four are moved to the development set.
    assert len(everything) in (53, 54)  # one of those four may be the third, whose French is also that of the last
    moved = [(one["text"], one["translations"]["fr"]) for one in spoken(out / "all", "en", "dev")[3:]]
    assert len(moved) == 4
    for language in (0, 1):
        assert {pair[language] for pair in everything}.isdisjoint({pair[language] for pair in moved})
    assert [one["id"] for one in spoken(out / "all", "en", "dev")][:3] == ["dev-1", "dev-2", "dev-3"]
    assert everything == texts(out / "all", "train", ("en", "fr"))
    assert held_out.isdisjoint(text.lower() for pair in everything for text in pair)

    of_speech = {(one["text"], one["translations"]["fr"]) for one in spoken(out / "all", "en")}
    start = texts(out / "start", "train", ("en", "fr"))
    for language in (0, 1):
        assert {pair[language] for pair in start}.isdisjoint({pair[language] for pair in of_speech})
    assert (source / "train.en").read_text().splitlines()[59] not in {en for en, _ in start}  # its French is spoken
    assert set(start) | of_speech | {everything[-1]} == set(everything)
    assert all(Path(one["audio_filepath"]).is_absolute() for one in spoken(out / "start", "en", "test"))
    assert summary["left_out"] == 60 - 4 - len(everything)
    experiment_corpora.search_leaks(out)
    assert json.loads((out / "leaks.json").read_text()) == {"training_files": 12, "held_out_files": 24, "leaks": 0}
    assert summary["recordings"] == {"5": 5, "10": 10, "all": 34}
    assert (out / "corpus.json").exists()


@pytest.mark.parametrize("planted", ["text/train.en", "speech/train.en.jsonl"])
def test_a_test_sentence_in_the_training_data_of_a_corpus_ends_the_experiment(
    planted, captions_source, tmp_path, monkeypatch
):
    import experiment_corpora

    monkeypatch.setattr(experiment_corpora, "SIZES", ("all",))
    source, corpus = captions_source
    out = tmp_path / "scarce"
    experiment_corpora.write_scarce(corpus, source, out, dev=4)
    tested = spoken(out / "all", "en", "test")[0]
    with (out / "all" / planted).open("a") as file:
        file.write(f"{tested['text'].upper() if planted.startswith('text') else json.dumps(tested)}\n")
    with pytest.raises(SystemExit, match="test sentences are in the training data"):
        experiment_corpora.search_leaks(out)
    assert not (out / "leaks.json").exists()


def test_captions_that_cannot_be_divided_are_refused(captions_source, tmp_path):
    from experiment_corpora import write_scarce

    from nemo_emmett.errors import DataError

    source, corpus = captions_source
    lines = {language: (source / f"train.{language}").read_text().splitlines() for language in ("en", "fr")}
    for language, of_language in lines.items():
        write_lines(source / f"train.{language}", of_language[:40])
    with pytest.raises(DataError, match=r"has a recording of every pair of sentences in"):
        write_scarce(corpus, source, tmp_path / "out", dev=4)
    write_lines(source / "train.en", lines["en"][:40][::-1])
    with pytest.raises(DataError, match=r"was not made from the captions in"):
        write_scarce(corpus, source, tmp_path / "out")


@pytest.mark.parametrize("line", ['{"broken": ', "3", '{"audio_filepath": "a.wav", "text": "a", "line": 1}'])
def test_a_damaged_record_is_named(line, captions_source, tmp_path):
    from experiment_corpora import write_scarce

    from nemo_emmett.errors import DataError

    source, corpus = captions_source
    manifest = corpus / "speech" / "train.en.jsonl"
    lines = manifest.read_text().splitlines()
    write_lines(manifest, [*lines[:4], line, *lines[5:]])
    with pytest.raises(DataError, match=r"train\.en\.jsonl', line 5: not a recording with a French translation"):
        write_scarce(corpus, source, tmp_path / "out", dev=4)


def test_a_folder_without_a_corpus_is_refused(tmp_path):
    from experiment_corpora import search_leaks

    from nemo_emmett.errors import DataError

    with pytest.raises(DataError, match=r"holds no corpus: there is no folder 'text' in it"):
        search_leaks(tmp_path)


def test_mboshi_training_utterances_that_are_tested_are_left_out(tmp_path):
    from experiment_corpora import write_mboshi

    def record(split: str, n: int, text: str, french: str) -> dict:
        audio = str(write_tone(tmp_path / "source" / "audio" / f"{split}{n}.wav", 0.1).relative_to(tmp_path / "source"))
        return {"audio_filepath": audio, "duration": 0.1, "text": text, "lang": "mdw", "translations": {"fr": french}}

    pairs = {
        "train": [("wa áyεε la midí", "il vient"), ("bare ádí", "Il est venu à midi."), ("okobhá", "il  dort")],
        "dev": [("olωngώ", "la savane"), ("okobhá má", "ils dorment")],
        "test": [("wa áyεε", "il est venu à midi"), ("ngá latóngá", "la savane"), ("Wa áyεε la midí", "elle vient")],
    }
    for split, of_split in pairs.items():
        write_jsonl(
            tmp_path / "source" / f"{split}.jsonl", [record(split, n, *pair) for n, pair in enumerate(of_split)]
        )
    out = tmp_path / "mboshi"
    summary = write_mboshi(tmp_path / "source", out)
    assert texts(out, "train", ("mdw", "fr")) == [("okobhá", "il dort")]
    assert texts(out, "dev", ("mdw", "fr")) == [("okobhá má", "ils dorment")]  # the other's French is tested
    assert len(spoken(out, "mdw", "test")) == 3
    assert summary["left_out"] == {"train": 2, "dev": 1, "test": 0}
    (kept,) = spoken(out, "mdw")
    samples, rate = soundfile.read(kept["audio_filepath"], dtype="int16")
    expected, expected_rate = soundfile.read(tmp_path / "source" / "audio" / "train2.wav", dtype="int16")
    assert (samples.tolist(), rate) == (expected.tolist(), expected_rate)
