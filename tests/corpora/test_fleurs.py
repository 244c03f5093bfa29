"""FLEURS, joined with itself and with FLORES by the ids of sentences."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from nemo_emmett.corpora.corpus import Part, Selection
from nemo_emmett.corpora.preparing import prepare_corpus
from nemo_emmett.corpora.readers.fleurs import CORPUS
from nemo_emmett.errors import ConfigError, DataError

from .speech_layouts import NUM_SENTENCES, fleurs_id, make_fleurs, make_flores, sentence, speakers, split_of

TEST_NUMBERS = [number for number in range(NUM_SENTENCES) if split_of(fleurs_id(number)) == "test"]


def read(source: Path, flores: Path | None = None, languages=None, splits=("test",)) -> dict[str, Part]:
    extra_sources = {} if flores is None else {"flores": flores}
    parts = CORPUS.read(source, Selection(languages, splits, extra_sources))
    return {part.name: part for part in parts}


def pairs_of(part: Part) -> list[tuple]:
    return [(s.id, dict(s.texts), s.recording.member) for s in part.sentences()]


def file_of(one) -> str:
    return one.recording.member.split("/")[-1]


@pytest.fixture
def fleurs(tmp_path: Path) -> Path:
    make_fleurs(tmp_path / "fleurs")
    return tmp_path / "fleurs"


@pytest.fixture
def flores(tmp_path: Path) -> Path:
    return make_flores(tmp_path / "flores")


def test_each_recording_has_the_transcript_and_translations_of_its_sentence(tmp_path) -> None:
    numbers = make_fleurs(tmp_path)
    parts = read(tmp_path, splits=None)
    assert list(parts) == [
        f"{split}.{language}" for split in ("train", "dev", "test") for language in ("de", "en", "es")
    ]
    for part in parts.values():
        for one in part.sentences():
            number = numbers[file_of(one)]
            assert one.texts == {language: sentence(language, number) for language in ("en", "de", "es")}


@pytest.mark.parametrize("with_flores", [False, True])
def test_a_shuffled_tsv_gives_the_same_pairs(tmp_path, flores, with_flores) -> None:
    make_fleurs(tmp_path / "as published")
    make_fleurs(tmp_path / "shuffled", shuffled=1)
    published, shuffled = (
        read(tmp_path / name, flores if with_flores else None) for name in ("as published", "shuffled")
    )
    tsv = "data/en_us/test.tsv"
    assert (tmp_path / "as published" / tsv).read_text() != (tmp_path / "shuffled" / tsv).read_text()
    assert {name: pairs_of(part) for name, part in published.items()} == {
        name: pairs_of(part) for name, part in shuffled.items()
    }


def test_every_speaker_of_a_sentence_counts_as_an_item(tmp_path) -> None:
    numbers = make_fleurs(tmp_path)
    items = Counter(numbers[file_of(one)] for one in read(tmp_path)["test.en"].sentences())
    assert items == {number: speakers("en", number) for number in TEST_NUMBERS}
    assert set(items.values()) == {1, 2, 3}


def test_ids_of_recordings_begin_with_that_of_the_sentence_and_are_unique(tmp_path) -> None:
    numbers = make_fleurs(tmp_path)
    sentences = list(read(tmp_path)["test.en"].sentences())
    assert len({one.id for one in sentences}) == len(sentences)
    assert all(int(one.id.split("-")[0]) == fleurs_id(numbers[file_of(one)]) for one in sentences)


def test_flores_gives_translations_to_languages_that_fleurs_lacks_and_to_sentences_nobody_read(
    tmp_path, flores
) -> None:
    unread = TEST_NUMBERS[0]
    numbers = make_fleurs(tmp_path, not_read=[("de", unread)])
    part = read(tmp_path, flores, ("en", "de", "fr"))["test.en"]
    assert part.languages == ("en", "de", "fr")
    for one in part.sentences():
        number = numbers[file_of(one)]
        assert one.texts == {language: sentence(language, number) for language in ("en", "de", "fr")}
    assert unread in {numbers[file_of(one)] for one in part.sentences()}


def test_the_order_of_flores_makes_no_difference(fleurs, tmp_path) -> None:
    first, second = (make_flores(tmp_path / str(order), order=order) for order in (1, 2))
    assert pairs_of(read(fleurs, first)["test.de"]) == pairs_of(read(fleurs, second)["test.de"])


def test_without_english_the_sentence_is_found_by_the_spoken_language(tmp_path, flores) -> None:
    numbers = make_fleurs(tmp_path, ("de",))
    part = read(tmp_path, flores, ("de", "en"))["test.de"]
    assert all(one.texts["en"] == sentence("en", numbers[file_of(one)]) for one in part.sentences())


def test_a_text_that_was_corrected_is_joined_through_english(tmp_path, flores) -> None:
    number = TEST_NUMBERS[3]
    corrected = sentence("de", number).replace(".", " heute!")
    numbers = make_fleurs(tmp_path, spoken_as={("de", number): corrected})
    [one, *_] = [s for s in read(tmp_path, flores)["test.de"].sentences() if numbers[file_of(s)] == number]
    assert (one.texts["de"], one.texts["es"]) == (corrected, sentence("es", number))


def test_a_recording_of_another_sentence_than_its_id_says_is_skipped_and_counted(tmp_path, flores) -> None:
    number = TEST_NUMBERS[1]
    make_fleurs(tmp_path / "fleurs", spoken_as={("de", number): sentence("de", 99)})
    selection = Selection(("de", "en"), ("test",), {"flores": flores})
    summary = prepare_corpus(CORPUS, tmp_path / "fleurs", tmp_path / "out", selection=selection, show_progress=False)
    skipped = {part.name: part.skipped for part in summary.parts}
    assert skipped == {"test.de": {"empty text": speakers("de", number)}, "test.en": {}}


def test_a_sentence_that_the_only_target_language_lacks_is_skipped_not_transcribed(tmp_path) -> None:
    number = TEST_NUMBERS[2]
    make_fleurs(tmp_path / "fleurs", not_read=[("de", number)])
    selection = Selection(("en", "de"), ("test",))
    prepare_corpus(CORPUS, tmp_path / "fleurs", tmp_path / "out", selection=selection, show_progress=False)
    records = [json.loads(line) for line in (tmp_path / "out/speech/test.en.jsonl").read_text().splitlines()]
    assert all(list(record["translations"]) == ["de"] for record in records)
    assert len(records) == sum(speakers("en", n) for n in TEST_NUMBERS if n != number)


def test_flores_with_other_sentences_is_refused(fleurs, tmp_path) -> None:
    flores = make_flores(tmp_path / "flores")
    for path in flores.rglob("*_Latn.*"):
        path.write_text("".join(f"{sentence(path.name, n)}\n" for n in range(path.read_text().count("\n"))))
    with pytest.raises(
        DataError, match=r"FLEURS test in 'de': 14 of 14 sentences are not those of '.*flores'"
    ) as error:
        read(fleurs, flores)
    assert "give FLORES-200 or FLORES+ as published" in str(error.value)


def test_one_language_is_read_as_transcripts(fleurs) -> None:
    part = read(fleurs, languages=("es",))["test.es"]
    assert part.languages == ("es",)
    assert all(list(one.texts) == ["es"] for one in part.sentences())


def test_unpacked_recordings_are_read_in_place(fleurs) -> None:
    audio = fleurs / "data/de_de/audio"
    with tarfile.open(audio / "test.tar.gz") as tar:
        tar.extractall(audio, filter="data")
    (audio / "test.tar.gz").unlink()
    for one in read(fleurs)["test.de"].sentences():
        assert one.recording.member is None
        assert one.recording.path.is_file()


def test_the_data_folder_itself_is_taken_too(fleurs) -> None:
    assert pairs_of(read(fleurs / "data")["test.en"]) == pairs_of(read(fleurs)["test.en"])


@pytest.mark.parametrize("missing", ["data/en_us/test.tsv", "data/de_de/audio/test.tar.gz"])
def test_a_missing_file_is_named_with_where_to_get_it(fleurs, missing) -> None:
    (fleurs / missing).unlink()
    with pytest.raises(DataError, match=f"{missing}' is missing: .* of google/fleurs"):
        read(fleurs)


@pytest.mark.parametrize(("languages", "splits"), [(("en", "fr"), None), (None, ("validation",))])
def test_a_language_or_split_that_is_not_there_is_refused(fleurs, languages, splits) -> None:
    with pytest.raises(ConfigError, match=r"is not among the (languages|splits) of FLEURS that are there"):
        read(fleurs, None, languages, splits)


def test_a_folder_without_fleurs_is_refused(tmp_path) -> None:
    with pytest.raises(DataError, match=r"does not hold the folders of FLEURS' languages"):
        read(tmp_path)
