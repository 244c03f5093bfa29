"""The queue in front of a model: what is put together, what is not computed, and whose fault is whose."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait

import numpy as np
import pytest

from nemo_emmett.errors import DataError
from nemo_emmett.models.inputs import PlainText, Waveform
from nemo_emmett.serving.batching import Batcher

from .serving import RATE, StubModel


@pytest.fixture
def model() -> StubModel:
    return StubModel()


@pytest.fixture
def batcher(model) -> Iterator[Batcher]:
    made = Batcher(model, wait=0.0, batch_tokens=60)
    yield made
    model.go.set()
    made.close()


def text(batcher: Batcher, words: str, target: str = "de"):
    return batcher.submit(PlainText(words), "en", target)


def speech(batcher: Batcher, samples: int):
    return batcher.submit(Waveform(np.zeros(samples, np.float32), RATE), "en", "de")


@pytest.fixture
def while_busy(model, batcher) -> Callable:
    """Submit inputs while the model computes something else, so that they wait together."""

    def submit(*submissions: Callable) -> list:
        model.go.clear()
        model.busy.clear()
        first = text(batcher, "first")
        assert model.busy.wait(5)
        futures = [submission() for submission in submissions]
        model.go.set()
        first.result(5)
        wait([future for future in futures if not future.cancelled()], 5)
        return futures

    return submit


def test_what_waits_is_translated_together_by_modality_and_similar_length(model, batcher, while_busy) -> None:
    futures = while_busy(
        lambda: text(batcher, "a" * 10),
        lambda: speech(batcher, 1500),
        lambda: text(batcher, "b" * 30, "fr"),
        lambda: text(batcher, "c" * 15, "fr"),
        lambda: speech(batcher, 2000),
        lambda: text(batcher, "d" * 5),
    )
    # The first of those that wait decides: 10 goes with 5 and 15, in other words at most twice and at least half.
    assert model.batches == [
        ["first"],
        ["a" * 10, "c" * 15, "d" * 5],
        [1500, 2000],
        ["b" * 30],
    ]
    answers = [future.result().translation for future in futures]
    assert answers == [
        f"de:{'A' * 10}",
        "de:1500 samples",
        f"fr:{'B' * 30}",
        f"fr:{'C' * 15}",
        "de:2000 samples",
        f"de:{'D' * 5}",
    ]


def test_a_batch_holds_what_its_tokens_allow(model, batcher, while_busy) -> None:
    while_busy(*(lambda size=size: text(batcher, "x" * size) for size in (20, 14, 14, 14, 20, 14)))
    sizes = [[len(item) for item in batch] for batch in model.batches[1:]]
    assert all(len(batch) * max(batch) <= 60 for batch in sizes)
    assert sorted(size for batch in sizes for size in batch) == [14] * 4 + [20] * 2


def test_none_waits_for_ever(model, batcher) -> None:
    """The input that came first is in the next batch, however many others come that would fit together better."""
    model.go.clear()
    text(batcher, "first")
    assert model.busy.wait(5)
    long = text(batcher, "l" * 50)
    short = [text(batcher, "s") for _ in range(200)]
    model.go.set()
    wait([long, *short], 5)
    assert model.batches[1] == ["l" * 50]
    assert sum(map(len, model.batches)) == 202


def test_the_first_waits_for_others_if_the_model_is_idle(model) -> None:
    batcher = Batcher(model, wait=0.25, batch_tokens=60)
    started = time.monotonic()
    futures = [text(batcher, word) for word in ("one", "two")]
    time.sleep(0.05)
    futures.append(text(batcher, "three"))
    wait(futures, 5)
    assert time.monotonic() - started >= 0.25
    batcher.close()
    assert model.batches == [["one", "two", "three"]]


def test_what_is_cancelled_is_not_computed(model, batcher, while_busy) -> None:
    def leave() -> object:
        future = text(batcher, "gone")
        assert future.cancel()
        return future

    kept, left, also_kept = while_busy(lambda: text(batcher, "stay"), leave, lambda: text(batcher, "too"))
    assert (kept.result().translation, also_kept.result().translation) == ("de:STAY", "de:TOO")
    assert left.cancelled()
    assert "gone" not in [item for batch in model.batches for item in batch]


@pytest.mark.parametrize("place", range(5))
def test_a_fault_is_its_own_inputs_alone(model, batcher, while_busy, place: int) -> None:
    words = ["good0", "good1", "good2", "good3", "good4"]
    words[place] = "bad55"
    futures = while_busy(*(lambda word=word: text(batcher, word) for word in words))
    for number, (word, future) in enumerate(zip(words, futures, strict=True)):
        if number == place:
            with pytest.raises(DataError, match="'bad55' cannot be translated"):
                future.result()
        else:
            assert future.result().translation == f"de:{word.upper()}"


def test_an_input_that_cannot_be_measured_fails_alone(model, batcher, while_busy, monkeypatch) -> None:
    lengths = model.input_lengths

    def input_lengths(inputs, *languages) -> list[int]:
        if "odd" in inputs:
            raise DataError("'odd' has no prompt.")
        return lengths(inputs, *languages)

    monkeypatch.setattr(model, "input_lengths", input_lengths)
    good, odd, other = while_busy(*(lambda word=word: text(batcher, word) for word in ("one", "odd", "two")))
    assert (good.result().translation, other.result().translation) == ("de:ONE", "de:TWO")
    with pytest.raises(DataError, match="has no prompt"):
        odd.result()
    assert model.batches[1:] == [["one", "two"]]


def test_a_bug_does_not_end_the_thread(model, batcher) -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        text(batcher, "crash").result(5)
    assert batcher.is_alive
    assert text(batcher, "six").result(5).translation == "de:SIX"


def test_closing_finishes_the_batch_under_way_and_nobody_waits_for_the_rest(model, batcher) -> None:
    model.go.clear()
    computed = text(batcher, "first")
    assert model.busy.wait(5)
    waiting = text(batcher, "l" * 50)
    closing = threading.Thread(target=batcher.close)
    closing.start()
    while batcher.is_alive:
        time.sleep(0.001)
    late = text(batcher, "third")
    model.go.set()
    closing.join(5)
    assert computed.result(5).translation == "de:FIRST"
    for future in (waiting, late):
        with pytest.raises(RuntimeError, match="the thread of the model has ended"):
            future.result(5)
    assert model.batches == [["first"]]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_ends_leaves_nobody_waiting(model, batcher, monkeypatch) -> None:
    def die(*_, **__):
        raise SystemExit

    monkeypatch.setattr(model, "answer_inputs", die)
    future = text(batcher, "six")
    with pytest.raises(RuntimeError, match="the thread of the model has ended"):
        future.result(5)
    batcher._thread.join(5)
    assert not batcher.is_alive


def test_a_batch_is_counted_before_its_answers_are_given_out(model) -> None:
    counted, futures, done = [], [], []

    def observe(modality: str, inputs: int, seconds: float) -> None:
        counted.append((modality, inputs))
        done.extend(future.done() for future in futures)

    batcher = Batcher(model, wait=0.2, batch_tokens=60, observe=observe)
    try:
        futures += [text(batcher, "good"), text(batcher, "bad")]
        wait(futures, 5)
    finally:
        batcher.close()
    assert counted == [("text", 2)]
    assert done == [False, False]
    assert futures[0].result().translation == "de:GOOD"
    assert isinstance(futures[1].exception(), DataError)
