"""Where long recordings are cut, against a search through all ways to cut them."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from nemo_emmett.audio_chunks import CUT_COST, cut_into_chunks, cut_windows, join_translations
from nemo_emmett.errors import ConfigError

RATE = 100  # frames of 2 samples


def power_at(samples: np.ndarray, cut: int) -> float:
    """Mean power of 0.1 s on each side."""
    around = samples[max(cut - RATE // 10, 0) : cut + RATE // 10]
    return float(np.mean(around**2))


def cost(samples: np.ndarray, cuts: tuple[int, ...]) -> float:
    mean = float(np.mean(samples**2))
    return sum((power_at(samples, cut) / mean if mean else 0.0) + CUT_COST for cut in cuts)


def least_cost(samples: np.ndarray, longest: int, most_cuts: int) -> float:
    """Over all ways to cut at multiples of 20 ms."""
    places, shortest = range(2, len(samples), 2), longest // 4 - longest // 4 % 2
    return min(
        cost(samples, cuts)
        for number in range(most_cuts + 1)
        for cuts in combinations(places, number)
        if all(shortest <= end - start <= longest for start, end in zip((0, *cuts), (*cuts, len(samples)), strict=True))
    )


def check(chunks: list[tuple[int, int]], num_samples: int, longest: int) -> None:
    assert [start for start, _ in chunks] == [0, *(end for _, end in chunks[:-1])]
    assert chunks[-1][1] == num_samples
    assert all(longest // 4 - 2 <= end - start <= longest for start, end in chunks)


@pytest.mark.parametrize("seed", range(12))
def test_no_way_to_cut_is_quieter(seed: int) -> None:
    random = np.random.default_rng(seed)
    samples = random.normal(size=int(random.integers(101, 180))).astype(np.float32)
    for start in random.integers(0, len(samples), size=seed % 4):
        samples[start : start + 12] *= random.choice([0.0, 0.01, 0.3])
    seconds = float(random.choice([1.0, 1.21]))
    chunks = cut_into_chunks(samples, RATE, seconds)
    longest = int(seconds * RATE)
    if len(samples) <= longest:
        assert chunks == [(0, len(samples))]
        return
    check(chunks, len(samples), longest)
    padded = np.pad(samples.astype(np.float64), (0, len(samples) % 2))  # frames are whole
    found = cost(padded, tuple(end for _, end in chunks[:-1]))
    assert found == pytest.approx(least_cost(padded, longest // 2 * 2, most_cuts=3))


def test_speech_is_cut_in_its_pauses() -> None:
    random, rate = np.random.default_rng(0), 16000
    samples = random.normal(size=95 * rate).astype(np.float32)
    pauses = [4, 17, 28, 41, 55, 63.5, 70, 88]
    for pause in pauses:
        samples[int(pause * rate) : int((pause + 0.3) * rate)] *= 0.001
    chunks = cut_into_chunks(samples, rate, 30.0)
    check(chunks, len(samples), 30 * rate)
    assert len(chunks) == 4
    for _, end in chunks[:-1]:
        assert any(pause + 0.1 <= end / rate <= pause + 0.2 for pause in pauses)


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_what_has_no_pauses_is_cut_into_as_few_chunks_as_possible(level: float) -> None:
    samples = np.full(10_000, level, np.float32)
    chunks = cut_into_chunks(samples, RATE, 30.0)
    check(chunks, 10_000, 3000)
    assert len(chunks) == 4


def test_short_recordings_stay_whole() -> None:
    assert cut_into_chunks(np.zeros(0), RATE, 30.0) == []
    assert cut_into_chunks(np.ones(1), RATE, 30.0) == [(0, 1)]
    assert cut_into_chunks(np.ones(3000), RATE, 30.0) == [(0, 3000)]
    check(cut_into_chunks(np.ones(3001), RATE, 30.0), 3001, 3000)


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 44100])
def test_no_chunk_is_too_long_at_any_rate(rate: int) -> None:
    samples = np.random.default_rng(0).normal(size=5 * rate + 7).astype(np.float32)
    check(cut_into_chunks(samples, rate, 1.5), len(samples), int(1.5 * rate))


@pytest.mark.parametrize("lengths", [[1], [7, 1, 300], [4000]])
def test_windows_are_cut_as_the_whole(lengths: list[int]) -> None:
    samples = np.random.default_rng(1).normal(size=7_777).astype(np.float32)
    ends = np.cumsum(np.resize(lengths, 8000))
    windows = np.split(samples, ends[ends < len(samples)])
    assert cut_windows(iter(windows), RATE, 10.0) == cut_into_chunks(samples, RATE, 10.0)


@pytest.mark.parametrize("seconds", [0.0, -3.0, 0.9, float("nan")])
def test_a_limit_below_a_second_is_refused(seconds: float) -> None:
    with pytest.raises(ConfigError, match=r"max_seconds: .* give 1 second or more"):
        cut_into_chunks(np.ones(1000), RATE, seconds)


def test_translations_are_joined_as_the_language_is_written() -> None:
    assert join_translations(["a", "b"], "de") == "a b"
    assert join_translations(["", "a", "", "b"], "ko") == "a b"
    for language in ("zh", "zh-Hant", "zh_CN", "ja", "th", "yue"):
        assert join_translations(["a", "b"], language) == "ab"
