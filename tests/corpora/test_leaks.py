"""Test sentences in training data: found however they are written, inside of others, and changed a little."""

from __future__ import annotations

import io
import random
import re
import unicodedata
from pathlib import Path

import pytest
from rich.console import Console

from nemo_emmett.corpora.leaks import (
    LONG,
    WORDS_A_CHANGE,
    HeldOut,
    Leak,
    LeakKind,
    changes_inside,
    find_leaks,
)
from nemo_emmett.corpora.leaks_command import print_leaks
from nemo_emmett.corpora.normalisation import normalise
from nemo_emmett.corpora.sentence_files import PlacedSentence
from nemo_emmett.errors import DataError

TEST = "„Die Brücke am Fluß wurde 1.250 Tage lang gebaut“, sagte der Bürgermeister."
FILE = Path("test.de")


def placed(*texts: str, language: str = "de") -> list[PlacedSentence]:
    return [PlacedSentence({language: text}, FILE, line) for line, text in enumerate(texts, start=1)]


def match(test: str, training: str, near: bool = True) -> Leak | None:
    return HeldOut(placed("Ein anderer Satz.", test), near).match({"de": training})


@pytest.mark.parametrize(
    "written",
    [
        TEST,
        TEST.upper(),
        TEST.lower(),
        unicodedata.normalize("NFD", TEST),
        TEST.replace("„", '"').replace("“", '"'),
        TEST.replace(",", "").rstrip(".") + "!",
        TEST.replace("1.250", "1250"),
        TEST.replace("1.250", "1\u202f250"),
        "  " + TEST.replace(" ", "\u00a0"),
    ],
)
def test_planted_sentence_is_found_however_it_is_written(written: str) -> None:
    leak = match(TEST, written)
    assert (leak.kind, leak.text, leak.test_text, leak.test_place) == (LeakKind.SAME, written, TEST, "test.de:2")
    assert leak.is_certain


def test_planted_sentence_is_found_inside_of_a_longer_one() -> None:
    leak = match(TEST, f"Zur Einweihung kamen viele. {TEST.upper()} Danach gab es Kuchen.")
    assert (leak.kind, leak.changes, leak.is_certain) == (LeakKind.CONTAINED, 0, True)


@pytest.mark.parametrize(
    "changed",
    [
        "Die Brücke am Fluss wurde 1250 Tage lang gebaut, sagte die Bürgermeisterin.",
        "Die alte Brücke am Fluss wurde 1250 Tage lang gebaut, sagte der Bürgermeister.",
        "Die Brücke am Fluss wurde 1250 Tage gebaut, sagte der Bürgermeister.",
        "Gestern: Die Brücke am Bach wurde 1250 Tage lang erbaut, sagte der Bürgermeister zum Schluss.",
    ],
)
def test_planted_sentence_with_a_few_words_changed_is_found_where_asked(changed: str) -> None:
    leak = match(TEST, changed)
    assert (leak.kind, leak.is_certain) == (LeakKind.NEAR, False)
    assert 1 <= leak.changes <= 2
    assert match(TEST, changed, near=False) is None


@pytest.mark.parametrize(
    "other",
    [
        "Die Brücke am Fluss ist schön, sagte der Bürgermeister.",  # shares seven of eleven words
        "Der Bürgermeister sagte, gebaut wurde lang 1250 Tage am Fluss die Brücke.",  # all words, another order
        "Die Brücke am Fluss",  # a part of it
        "",
        "...",
    ],
)
def test_sentence_that_merely_shares_words_is_none(other: str) -> None:
    assert match(TEST, other) is None


def test_same_words_in_another_language_are_none_and_either_side_counts() -> None:
    held_out = HeldOut(placed("Das Hotel in der City hat WLAN."))
    assert held_out.match({"nl": "Das Hotel in der City hat WLAN."}) is None
    assert held_out.match({"en": "The hotel.", "de": "Das Hotel in der City hat WLAN."}).language == "de"
    assert held_out.match({"deu_Latn": "Das Hotel in der City hat WLAN."}).language == "deu_Latn"


def test_short_sentence_is_found_and_marked() -> None:
    held_out = HeldOut(placed("Thank you.", "See you later.", language="en"))
    short, longer = held_out.match({"en": "thank you"}), held_out.match({"en": "see you later!"})
    assert (short.kind, short.words, short.is_short, short.is_certain) == (LeakKind.SAME, 2, True, False)
    assert (longer.words, longer.is_short, longer.is_certain) == (3, False, True)
    # Below six words a sentence is a part of others by chance.
    assert held_out.match({"en": "Thank you, and see you later in the evening."}) is None


def test_worst_leak_of_a_sentence_is_returned() -> None:
    held_out = HeldOut([*placed("Yes, please.", language="en"), *placed(TEST, TEST.replace("Tage", "Monate"))])
    assert held_out.match({"en": "Yes, please.", "de": f"Ja: {TEST}"}).kind is LeakKind.CONTAINED
    assert held_out.match({"de": f"Ja: {TEST}"}).test_place == "test.de:1"


def test_chinese_is_compared_by_characters() -> None:
    test = "她每天早上都在公园里跑步锻炼身体。"
    held_out = HeldOut(placed(test, language="zh"))
    assert held_out.match({"zh": "她每天早上都在公园里跑步锻炼身体"}).kind is LeakKind.SAME
    assert held_out.match({"zh": f"医生说,{test}"}).kind is LeakKind.CONTAINED
    assert held_out.match({"zh": "她每天晚上都在公园里跑步锻炼身体。"}).kind is LeakKind.NEAR
    assert held_out.match({"zh": "她每天早上都在家里看书。"}) is None


def edit_distance(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    """By its definition, over all ways to begin."""
    if not a or not b:
        return len(a) + len(b)
    if a[0] == b[0]:
        return edit_distance(a[1:], b[1:])
    return 1 + min(edit_distance(a[1:], b), edit_distance(a, b[1:]), edit_distance(a[1:], b[1:]))


def test_changes_inside_equals_the_least_distance_to_any_stretch() -> None:
    rng = random.Random(0)
    for _ in range(150):
        part = tuple(rng.choices("abc", k=rng.randint(1, 5)))
        whole = tuple(rng.choices("abc", k=rng.randint(0, 6)))
        stretches = {whole[i:j] for i in range(len(whole) + 1) for j in range(i, len(whole) + 1)}
        assert changes_inside(part, whole) == min(edit_distance(part, stretch) for stretch in stretches)


def brute_force(test: list[str], training: str) -> tuple[LeakKind, int] | None:
    """Compares with every test sentence in full."""
    line = training.split()
    if any(sentence.split() == line for sentence in test):
        return LeakKind.SAME, 0
    changes = [
        least
        for sentence in test
        if len(words := sentence.split()) >= LONG
        and (least := changes_inside(words, line)) <= len(words) // WORDS_A_CHANGE
    ]
    if not changes:
        return None
    return (LeakKind.NEAR if min(changes) else LeakKind.CONTAINED), min(changes)


def mutated(words: list[str], rng: random.Random, vocabulary: list[str]) -> list[str]:
    words = list(words)
    for _ in range(rng.randint(0, 4)):
        place = rng.randrange(len(words))
        words[place : place + rng.randint(0, 1)] = rng.choices(vocabulary, k=rng.randint(0, 1))
        words = words or ["x"]
    return rng.choices(vocabulary, k=rng.randint(0, 3)) + words + rng.choices(vocabulary, k=rng.randint(0, 3))


@pytest.mark.parametrize("size", [3, 40])
def test_index_finds_what_comparing_everything_finds(size: int) -> None:
    rng = random.Random(size)
    vocabulary = [f"w{number}" for number in range(size)]
    test = [" ".join(rng.choices(vocabulary, k=rng.randint(1, 22))) for _ in range(60)]
    held_out = HeldOut(placed(*test))
    found = []
    for _ in range(300):
        training = " ".join(mutated(rng.choice(test).split(), rng, vocabulary))
        leak = held_out.match({"de": training})
        found.append(leak and (leak.kind, leak.changes))
        assert found[-1] == brute_force(test, training)
    assert {leak and leak[0] for leak in found} >= {LeakKind.NEAR, LeakKind.CONTAINED}


def test_leaks_are_found_with_their_places() -> None:
    training = [PlacedSentence({"de": text}, Path("train.de"), line) for line, text in enumerate(["Ja.", TEST], 1)]
    (leak,) = find_leaks(training, HeldOut(placed(TEST)))
    assert (leak.file, leak.line, leak.test_place) == (Path("train.de"), 2, "test.de:1")


def test_data_without_a_common_language_is_refused() -> None:
    with pytest.raises(DataError, match=r"training data is in fr, the held-out data in de;"):
        list(find_leaks(placed("Bonjour.", language="fr"), HeldOut(placed(TEST))))


def print_to_string(*args: object, **options: object) -> tuple[bool, str]:
    page = io.StringIO()
    return print_leaks(*args, **options, console=Console(width=200, file=page)), page.getvalue()


def test_command_counts_leaks_and_short_sentences_separately(tmp_path: Path) -> None:
    test, train = tmp_path / "test.de", tmp_path / "train.de"
    test.write_text(f"{TEST}\nVielen Dank.\n", encoding="utf-8")
    train.write_text("Guten Morgen.\nVIELEN DANK!\n" * 20, encoding="utf-8")
    found, page = print_to_string([train], [test])
    assert not found
    assert re.search(r"^the same, fewer than 3 words +20 +1$", page, re.MULTILINE)
    assert page.count(f"{train}:") == 10  # examples
    assert "40 training sentences, 2 test sentences: no leak." in page

    train.write_text(f"Guten Morgen.\n{TEST.upper()}\n", encoding="utf-8")
    found, page = print_to_string([train], [test])
    assert found
    assert f"{train}:2  {TEST.upper()}" in page
    assert f"{test}:1  {TEST}" in page
    assert "2 training sentences, 2 test sentences: 1 leak." in page


def test_command_says_that_nothing_was_found(tmp_path: Path) -> None:
    (tmp_path / "test.de").write_text(TEST, encoding="utf-8")
    (tmp_path / "train.de").write_text("[bold]Guten Tag.\n", encoding="utf-8")
    found, page = print_to_string([tmp_path / "train.de"], [tmp_path / "test.de"])
    assert not found
    assert page == ("1 training sentence, 1 test sentence: no test sentence is in the training data.\n")


def test_training_data_without_a_sentence_is_refused() -> None:
    with pytest.raises(DataError, match="the training data holds no sentence"):
        list(find_leaks([], HeldOut(placed(TEST))))


def test_empty_test_set_is_refused(tmp_path: Path) -> None:
    (tmp_path / "test.de").write_text("...\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"test\.de': no sentence to hold out"):
        HeldOut.read([tmp_path / "test.de"])


def test_normal_form_of_the_planted_sentence() -> None:
    assert normalise(TEST) == "die brücke am fluss wurde 1250 tage lang gebaut sagte der bürgermeister"
