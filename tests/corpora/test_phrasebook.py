"""The phrasebook: how items are written, split, spoken and laid out in files."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from nemo_emmett.corpora.output_folder import CorpusFolder
from nemo_emmett.corpora.phrasebook import (
    LANGUAGES,
    SPLITS,
    Item,
    PhrasebookConfig,
    SpokenSummary,
    prepare_phrasebook,
    split_phrases,
    write_item,
)
from nemo_emmett.corpora.phrasebook.espeak import Voice, draw_voice
from nemo_emmett.corpora.phrasebook.items import candidate_items
from nemo_emmett.corpora.phrasebook.speaker import Speaker, Utterance
from nemo_emmett.errors import ConfigError, DataError, EmmettError

TINY = PhrasebookConfig(train_items=8, spoken_train_items=4, dev_items=4, test_items=4, renditions=2)
RECORDINGS = {"train": 8, "dev": 4, "test": 4}  # in each language

WRITTEN = {
    "number:0": ("zero", "null", "cero", "zéro"),
    "number:21": ("twenty one", "einundzwanzig", "veintiuno", "vingt et un"),
    "number:80": ("eighty", "achtzig", "ochenta", "quatre vingts"),
    "number:1234": (
        "one thousand two hundred and thirty four",
        "eintausendzweihundertvierunddreißig",
        "mil doscientos treinta y cuatro",
        "mille deux cent trente quatre",
    ),
    "number:21031": (
        "twenty one thousand and thirty one",
        "einundzwanzigtausendeinunddreißig",
        "veintiún mil treinta y uno",
        "vingt et un mille trente et un",
    ),
    "date:1994-03-03": (
        "the third of march nineteen ninety four",
        "der dritte märz neunzehnhundertvierundneunzig",
        "el tres de marzo de mil novecientos noventa y cuatro",
        "le trois mars mille neuf cent quatre vingt quatorze",
    ),
    "date:2005-08-01": (
        "the first of august two thousand and five",
        "der erste august zweitausendfünf",
        "el primero de agosto de dos mil cinco",
        "le premier août deux mille cinq",
    ),
    "date:1907-12-31": (
        "the thirty first of december nineteen oh seven",
        "der einunddreißigste dezember neunzehnhundertsieben",
        "el treinta y uno de diciembre de mil novecientos siete",
        "le trente et un décembre mille neuf cent sept",
    ),
    "time:15:20": (
        "three twenty in the afternoon",
        "fünfzehn uhr zwanzig",
        "las tres y veinte de la tarde",
        "quinze heures vingt",
    ),
    "time:01:01": ("one oh one in the morning", "ein uhr eins", "la una y uno de la madrugada", "une heure une"),
    "time:21:00": ("nine o'clock at night", "einundzwanzig uhr", "las nueve de la noche", "vingt et une heures"),
    "time:12:00": ("twelve noon", "zwölf uhr", "las doce del mediodía", "douze heures"),
    "time:00:00": ("twelve midnight", "null uhr", "las doce de la madrugada", "zéro heure"),
    "time:00:30": (
        "twelve thirty in the morning",
        "null uhr dreißig",
        "las doce y treinta de la madrugada",
        "zéro heure trente",
    ),
    "price:EUR:12.50": (
        "twelve euros and fifty cents",
        "zwölf euro und fünfzig cent",
        "doce euros con cincuenta céntimos",
        "douze euros et cinquante centimes",
    ),
    "price:EUR:1.01": (
        "one euro and one cent",
        "ein euro und ein cent",
        "un euro con un céntimo",
        "un euro et un centime",
    ),
    "price:GBP:21.01": (
        "twenty one british pounds and one penny",
        "einundzwanzig britische pfund und ein penny",
        "veintiuna libras esterlinas con un penique",
        "vingt et une livres sterling et un penny",
    ),
    "price:GBP:201.00": (
        "two hundred and one british pounds",
        "zweihundertein britische pfund",
        "doscientas una libras esterlinas",
        "deux cent une livres sterling",
    ),
    "price:CHF:31.21": (
        "thirty one swiss francs and twenty one centimes",
        "einunddreißig schweizer franken und einundzwanzig rappen",
        "treinta y un francos suizos con veintiún céntimos",
        "trente et un francs suisses et vingt et un centimes",
    ),
    "price:CAD:2.00": (
        "two canadian dollars",
        "zwei kanadische dollar",
        "dos dólares canadienses",
        "deux dollars canadiens",
    ),
    "price:JPY:1": ("one japanese yen", "ein japanischer yen", "un yen japonés", "un yen japonais"),
}


def item_of(name: str) -> Item:
    return Item(*name.split(":", maxsplit=1))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> SpokenSummary:
    return prepare_phrasebook(tmp_path_factory.mktemp("tiny") / "phrasebook", TINY, num_jobs=1, show_progress=False)


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def manifest_of(folder: Path, split: str, language: str) -> list[dict]:
    return [json.loads(line) for line in lines_of(folder / "speech" / f"{split}.{language}.jsonl")]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("name", "texts"), WRITTEN.items(), ids=list(WRITTEN))
def test_items_are_written_out_in_every_language(name, texts):
    assert tuple(write_item(item_of(name), language) for language in LANGUAGES) == texts


def test_texts_are_lower_case_words_on_one_line(tiny):
    for path in (tiny.folder / "text").iterdir():
        for line in lines_of(path):
            assert line == line.lower() == " ".join(line.split())
            assert all(char.isalpha() or char in " '" for char in line), line


def test_splits_share_no_item_and_no_line():
    # Values are written alike in pairs (0 and 1, 2 and 3, ...) in one language only.
    def write(item: Item) -> dict[str, str]:
        return {"en": f"line {int(item.value) // 2}", "de": f"zeile {item.value}"}

    candidates = {"number": [Item("number", str(value)) for value in range(60)]}
    sizes = {"test": {"number": 10}, "dev": {"number": 5}, "train": {"number": 25}}
    splits = split_phrases(candidates, sizes, write, seed=3)
    assert {split: len(phrases) for split, phrases in splits.items()} == {"test": 10, "dev": 5, "train": 25}
    for one, other in (("test", "dev"), ("test", "train"), ("dev", "train")):
        assert not {phrase.item for phrase in splits[one]} & {phrase.item for phrase in splits[other]}
        for language in ("en", "de"):
            lines = {phrase.texts[language] for phrase in splits[one]}
            assert not lines & {phrase.texts[language] for phrase in splits[other]}


def test_types_written_alike_are_kept_apart_as_well():
    candidates = {kind: [Item(kind, str(value)) for value in range(20)] for kind in ("number", "price")}
    sizes = {"test": {"number": 10, "price": 0}, "train": {"number": 10, "price": 10}}
    splits = split_phrases(candidates, sizes, lambda item: {"en": item.value}, seed=0)
    held_out = {phrase.texts["en"] for phrase in splits["test"]}
    assert len(held_out) == 10
    assert held_out.isdisjoint(phrase.texts["en"] for phrase in splits["train"])


def test_no_line_is_inside_of_a_training_line():
    """79 pounds and 52 pence, in words, ends as 9 pounds and 52 pence."""
    config = dataclasses.replace(PhrasebookConfig(), types=("price",), currencies=("GBP",), max_price=99)
    candidates = {"price": list(candidate_items("price", config))}
    sizes = {"test": {"price": 200}, "train": {"price": 2000}}
    splits = split_phrases(candidates, sizes, lambda i: {lang: write_item(i, lang) for lang in ("en", "fr")}, seed=0)
    assert [len(phrases) for phrases in splits.values()] == [200, 2000]
    for language in ("en", "fr"):
        test = {line for phrase in splits["test"] if len((line := phrase.texts[language]).split()) >= 6}
        assert len(test) > 100
        assert not [line for phrase in splits["train"] for line in test if line in phrase.texts[language]]


def test_more_training_items_leave_the_test_items_as_they_are():
    def test_items(train_items: int) -> list[Item]:
        sizes = {"test": {"number": 5}, "train": {"number": train_items}}
        candidates = {"number": [Item("number", str(value)) for value in range(100)]}
        return [phrase.item for phrase in split_phrases(candidates, sizes, lambda i: {"en": i.value}, 0)["test"]]

    assert test_items(10) == test_items(90)


def test_too_few_values_are_refused_by_name(tmp_path):
    config = dataclasses.replace(TINY, types=("number",), max_number=9, train_items=30)
    with pytest.raises(ConfigError, match=r"phrasebook\.train_items: 30 items of type 'number'.*only 2 are left"):
        prepare_phrasebook(tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


def test_files_of_a_split_are_disjoint_from_the_other_splits_files(tiny):
    for language in LANGUAGES:
        splits = [set(lines_of(tiny.folder / "text" / f"{split}.{language}")) for split in SPLITS]
        assert [len(lines) for lines in splits] == [8, 4, 4]
        assert len(set.union(*splits)) == 16


def test_manifests_agree_with_recordings_and_texts(tiny):
    for split in SPLITS:
        texts = {language: lines_of(tiny.folder / "text" / f"{split}.{language}") for language in LANGUAGES}
        aligned = {
            language: dict(zip(texts[language], zip(*texts.values(), strict=True), strict=True))
            for language in LANGUAGES
        }
        for language in LANGUAGES:
            entries = manifest_of(tiny.folder, split, language)
            assert len({entry["id"] for entry in entries}) == len(entries) == RECORDINGS[split]
            assert tiny.recordings[split][language] == RECORDINGS[split]
            for entry in entries:
                samples, rate = soundfile.read(tiny.folder / "speech" / entry["audio_filepath"], dtype="int16")
                assert rate == entry["sampling_rate"] == 16_000
                assert samples.ndim == 1
                assert entry["duration"] == len(samples) / 16_000
                assert np.abs(samples.astype(int)).max() > 1000  # something is heard
                assert entry["lang"] == language
                assert entry["text"] == write_item(item_of(entry["item"]), language)
                said = {language: entry["text"], **entry["translations"]}
                assert tuple(said[other] for other in LANGUAGES) == aligned[language][entry["text"]]
            hours = sum(entry["duration"] for entry in entries) / 3600
            assert tiny.hours[split][language] == pytest.approx(hours, abs=1e-4)


def test_renditions_of_an_item_sound_different(tiny):
    entries = manifest_of(tiny.folder, "train", "en")
    first, second = (tiny.folder / "speech" / entry["audio_filepath"] for entry in entries[:2])
    assert entries[0]["item"] == entries[1]["item"]
    assert first.read_bytes() != second.read_bytes()


def test_the_same_seed_gives_the_same_bytes_on_one_process_and_on_two(tiny, tmp_path):
    prepare_phrasebook(tmp_path / "again", TINY, num_jobs=2, show_progress=False)
    assert bytes_of(tmp_path / "again") == bytes_of(tiny.folder)


def test_breathy_voices_do_not_depend_on_what_was_said_before(tmp_path):
    paths = [tmp_path / f"{name}.wav" for name in ("first", "second")]
    with Speaker() as speaker:
        for path in paths:
            speaker.say([Utterance("two hundred", Voice("en+f2", speed=150, pitch=50), str(path))])
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_another_seed_gives_other_items(tiny, tmp_path):
    config = dataclasses.replace(TINY, seed=1, languages=("en",), types=("number",))
    prepare_phrasebook(tmp_path / "other", config, show_progress=False)
    seed_0 = {entry["item"] for entry in manifest_of(tiny.folder, "test", "en")}
    seed_1 = {entry["item"] for entry in manifest_of(tmp_path / "other", "test", "en")}
    assert seed_0.isdisjoint(seed_1)


def test_voices_vary_within_the_configured_bounds():
    config = PhrasebookConfig(variants=("f1", "m3"), speed=(150, 160), pitch=(40, 42))
    voices = [draw_voice(Item("number", str(n)), "en", 0, config) for n in range(200)]
    assert {voice.name for voice in voices} == {"en-us+f1", "en-us+m3", "en+f1", "en+m3"}
    assert {voice.speed for voice in voices} == set(range(150, 161))
    assert {voice.pitch for voice in voices} == {40, 41, 42}


def test_a_finished_phrasebook_is_left_alone(tiny):
    times = {path: path.stat().st_mtime_ns for path in tiny.folder.rglob("*")}
    again = prepare_phrasebook(tiny.folder, TINY, num_jobs=2, show_progress=False)
    assert tiny.made_now
    assert again == dataclasses.replace(tiny, made_now=False)
    assert {path: path.stat().st_mtime_ns for path in tiny.folder.rglob("*")} == times


def test_an_interrupted_phrasebook_is_completed(tiny, tmp_path, monkeypatch):
    out = tmp_path / "interrupted"
    say, said = Speaker.say, []

    def say_once(self: Speaker, utterances: list[Utterance]) -> None:
        if said:
            raise KeyboardInterrupt
        say(self, utterances)
        said.extend(utterances)

    monkeypatch.setattr(Speaker, "say", say_once)
    with pytest.raises(KeyboardInterrupt):
        prepare_phrasebook(out, TINY, num_jobs=1, show_progress=False)
    assert not (out / "phrasebook.json").exists()
    monkeypatch.undo()

    kept = {Path(utterance.path): Path(utterance.path).stat().st_mtime_ns for utterance in said}
    assert kept
    prepare_phrasebook(out, TINY, num_jobs=1, show_progress=False)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert bytes_of(out) == bytes_of(tiny.folder)


def test_a_phrasebook_of_another_configuration_is_refused(tiny):
    config = dataclasses.replace(TINY, seed=7, renditions=1)
    with pytest.raises(DataError) as refusal:
        prepare_phrasebook(tiny.folder, config)
    assert str(refusal.value) == (
        f"'{tiny.folder}' holds a phrasebook that differs in renditions (2 there, 1 asked), seed (0 there, 7 asked); "
        "give another folder or delete this one."
    )


def test_a_folder_of_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(
        DataError, match="is not empty and holds no phrasebook; give the phrasebook a folder of its own"
    ):
        prepare_phrasebook(tmp_path, TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_phrasebook_that_another_version_has_begun_is_refused(tiny, tmp_path):
    plan = json.loads((tiny.folder / "phrasebook.json").read_text())
    plan["versions"]["num2words"] = "0.1"
    (tmp_path / "phrasebook.started.json").write_text(json.dumps(plan))
    with pytest.raises(DataError, match=r"differs in version of num2words \(0\.1 there, [\d.]+ asked\); give another"):
        prepare_phrasebook(tmp_path, TINY, show_progress=False)


def test_a_phrasebook_that_another_process_is_writing_is_refused(tmp_path):
    out = tmp_path / "out"
    with CorpusFolder(out).staging.locked(), pytest.raises(DataError, match=r"Another process is writing to '.*out'"):
        prepare_phrasebook(out, TINY, show_progress=False)


def test_a_summary_that_is_another_programs_is_refused(tmp_path):
    (tmp_path / "phrasebook.json").write_text("[]")
    with pytest.raises(DataError, match=r"holds another program's phrasebook\.json; give the phrasebook a folder of"):
        prepare_phrasebook(tmp_path, TINY)


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("languages", ["en", "pl"], r"phrasebook\.languages: there is no 'pl' in the phrasebook; choose among en, de"),
        ("types", ["numbr"], r"phrasebook\.types: there is no 'numbr' .* did you mean 'number'\?"),
        ("languages", "en", r"phrasebook\.languages: 'en' cannot be used; give a list, each item a text"),
        ("test_items", 0, r"phrasebook\.test_items: 0 cannot be used; give a whole number from 1"),
        (
            "spoken_train_items",
            1601,
            r"phrasebook\.spoken_train_items: 1601 cannot be used; give a whole number from 0 to 1600",
        ),
        ("speed", (190, 140), r"phrasebook\.speed: 140 cannot be used; give a whole number from 190 to 450"),
    ],
)
def test_impossible_configurations_are_refused(field, value, sentence):
    with pytest.raises(ConfigError, match=sentence):
        PhrasebookConfig(**{field: value})


def test_an_unknown_voice_variant_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"phrasebook\.variants: eSpeak NG has no voice variant 'anika1'; .*'anika'"):
        prepare_phrasebook(tmp_path / "out", dataclasses.replace(TINY, variants=("anika1",)))


def test_no_process_to_speak_with_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"phrasebook\.num_jobs: 0 must be 1 or more"):
        prepare_phrasebook(tmp_path / "out", TINY, num_jobs=0)


def test_a_missing_library_is_named_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(EmmettError, match=r"needs 'espeakng_loader'.*pip install 'nemo_emmett\[synthesis\]'"):
        prepare_phrasebook(tmp_path / "out", TINY)


def test_an_utterance_that_fails_stops_the_run_and_is_named(tmp_path):
    path = tmp_path / "no-such-voice.wav"
    with Speaker() as speaker, pytest.raises(EmmettError, match=r"could not speak '.*no-such-voice\.wav'"):
        speaker.say([Utterance("two", Voice("xx", speed=150, pitch=50), str(path))])
    assert not path.exists()
