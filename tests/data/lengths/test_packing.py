"""Steps of packed rows: never more than a row may hold, nothing lost, and the same however much waits."""

from __future__ import annotations

import numpy as np
import pytest

from nemo_emmett.data.lengths.measures import Measures
from nemo_emmett.data.lengths.packing import Packing
from nemo_emmett.data.sampling.source_order import EXAMPLE
from nemo_emmett.modules.packing import ENCODER_PADDING

TEXT = Packing(rows=4, size=64, answer_size=64, is_joint=True)
ENCODER_DECODER = Packing(rows=4, size=64, answer_size=72, is_joint=False)
SPEECH = Packing(4, 250, 120, is_joint=False, token_equivalent_duration=0.08, seconds=ENCODER_PADDING * 250 * 0.08)
KINDS = {"text": TEXT, "encoder-decoder": ENCODER_DECODER, "speech": SPEECH}


def measures_of(packing: Packing, rng: np.random.Generator, number: int) -> Measures:
    """Examples whose lengths are as unequal as those of sentences, some of which do not fit."""
    words = np.maximum(1, rng.lognormal(2.3, 0.5, number)).astype(int)
    answers = np.maximum(1, words + rng.integers(-3, 4, number))
    if packing is not SPEECH:
        return Measures(np.full(number, np.nan), words, answers, words + answers, np.zeros(number, bool))
    seconds = np.round(words / rng.uniform(2.0, 3.5, number), 3)
    contexts = np.full(number, 4)
    return Measures(seconds, contexts, contexts + answers, answers, np.ones(number, bool))


def examples_of(packing: Packing, rng: np.random.Generator, number: int, first: int = 0) -> np.ndarray:
    measures = measures_of(packing, rng, number)
    kept = packing.fits(measures)
    examples = np.zeros(int(kept.sum()), EXAMPLE)
    examples["position"] = first + np.arange(len(examples))
    examples["positions"], examples["answers"] = packing.positions_and_answers(measures[kept])
    examples["length"] = np.nan_to_num(measures.seconds[kept])
    return examples


def assert_within_the_caps(packing: Packing, step: np.ndarray, rows: np.ndarray) -> None:
    assert np.bincount(rows, step["positions"]).max() <= packing.size
    assert np.bincount(rows, step["answers"]).max() <= packing.answer_size
    assert (np.bincount(rows) * step["length"].max()).max() <= packing.seconds
    assert sorted(set(rows.tolist())) == list(range(rows[-1] + 1)), "ascending, none empty"
    assert (np.diff(rows) >= 0).all()


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_caps_are_kept_in_thousands_of_steps_and_the_oldest_never_waits(kind, ranks):
    packing, rng = KINDS[kind], np.random.default_rng(ranks)
    waiting, seen, steps, used = examples_of(packing, rng, 0), [], 0, 0
    while steps < 10_000 // 6:
        found = packing.next_step(waiting, ranks)
        if found is None:
            waiting = np.concatenate([waiting, examples_of(packing, rng, 500, len(seen) + len(waiting))])
            continue
        numbers, rows = found
        step = waiting[numbers]
        assert_within_the_caps(packing, step, rows)
        assert 0 in numbers
        assert rows[-1] + 1 <= ranks * packing.rows
        seen += step["position"].tolist()
        used += int(step["positions"].sum())
        waiting = np.delete(waiting, numbers)
        steps += 1
    assert len(seen) == len(set(seen)), "none twice"
    least = {"text": 0.98, "encoder-decoder": 0.98, "speech": 0.95}[kind]
    assert used / (steps * ranks * packing.rows * packing.size) > least


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_depends_on_those_that_wait_first_alone(kind):
    packing, rng = KINDS[kind], np.random.default_rng(0)
    waiting = examples_of(packing, rng, 6000)
    for _ in range(20):
        numbers, rows = packing.next_step(waiting, 2)
        fewest = next(n for n in range(1, len(waiting) + 1) if packing.next_step(waiting[:n], 2) is not None)
        for size in (fewest, fewest + 1, (fewest + len(waiting)) // 2):
            of_fewer = packing.next_step(waiting[:size], 2)
            assert (of_fewer[0].tolist(), of_fewer[1].tolist()) == (numbers.tolist(), rows.tolist())
        waiting = np.delete(waiting, numbers)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_at_the_end_every_rank_has_a_row_and_only_fewer_than_the_ranks_are_left(kind, ranks):
    packing, rng = KINDS[kind], np.random.default_rng(ranks)
    for number in (*range(1, 12), 40, 200):
        waiting, seen = examples_of(packing, rng, number), 0
        total = len(waiting)
        while (found := packing.next_step(waiting, ranks, at_end=True)) is not None:
            numbers, rows = found
            assert_within_the_caps(packing, waiting[numbers], rows)
            assert ranks <= rows[-1] + 1 <= ranks * packing.rows
            seen += len(numbers)
            waiting = np.delete(waiting, numbers)
        assert len(waiting) < ranks
        assert seen + len(waiting) == total


def test_positions_of_a_recording_are_never_fewer_than_an_encoder_makes():
    """Of each number of samples: the frames of NeMo's spectrogram, halved three times and rounded up."""
    samples = np.arange(160, 16000 * 3, 37)
    frames = samples // 160 + 1
    for _ in range(3):
        frames = -(-frames // 2)
    seconds = samples / 16000
    of_all = np.ones(len(seconds), int)
    measures = Measures(seconds, 5 * of_all, 9 * of_all, frames, of_all == 1)
    positions, answers = SPEECH.positions_and_answers(measures)
    expected = frames + 4  # the locator of the 5 tokens makes room for the frames
    assert (positions >= expected).all()
    assert (positions - expected).max() <= 1
    assert (answers == 4).all()


def test_where_recordings_have_no_positions_their_seconds_are_the_cap():
    packing = Packing(2, 30, 30, is_joint=True, seconds=20.0)
    measures = Measures(np.array([5.0, 19.0, 21.0]), np.full(3, 4), np.full(3, 9), np.full(3, 5), np.ones(3, bool))
    assert packing.positions_and_answers(measures)[0].tolist() == [9, 9, 9]
    assert packing.fits(measures).tolist() == [True, True, False]
