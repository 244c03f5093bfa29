"""Long recordings in chunks: where they are cut, and how the translations of the chunks are joined.

A recording is cut at its quietest places. It is read once in windows for the power of its frames of 20 ms, which is all
that is kept of it: 4 MB for three hours.

Shapes: N samples, F frames.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np

from nemo_emmett.errors import ConfigError

DEFAULT_CHUNK_SECONDS = 30.0
"""Longest chunk where nothing is known of the recordings that a model was trained on."""

LEAST_CHUNK_SECONDS = 1.0
"""Smallest limit on the length of chunks; less is no sentence."""

CUT_COST = 0.1
"""What a cut costs besides the power around it, as a fraction of the recording's mean power: another cut has to be
worth it, since a chunk is translated without its context."""

_FRAMES_PER_SECOND = 50
_PAUSE_FRAMES = 5
"""Frames on each side of a cut, 0.1 s, over which the power is averaged: dips within words are shorter than 0.2 s."""

_SHORTEST = 4
"""A chunk is at least this part of the longest one: a quarter."""

_WITHOUT_SPACES = frozenset({"zh", "yue", "wuu", "lzh", "ja", "th", "lo", "km", "my", "bo", "dz", "shn"})
"""Languages that write no space between sentences or between words."""


def cut_into_chunks(samples: np.ndarray, sampling_rate: int, max_seconds: float) -> list[tuple[int, int]]:
    """Cut a recording at its quietest places into chunks that are not too long.

    Of all ways to cut it into chunks between a quarter of ``max_seconds`` and ``max_seconds``, the one of the least
    sum, over the cuts, of the mean power within 0.1 s of the cut, and of :data:`CUT_COST` times the recording's mean.

    Args:
        samples: (N,) of one channel.
        sampling_rate: samples per second.
        max_seconds: of the longest chunk.

    Returns:
        Start and end of each chunk in samples: the first starts at 0, each other where the one before ends, and the
        last one ends at N. A recording that is not longer than ``max_seconds`` is one chunk, an empty one none.

    Raises:
        ConfigError: if ``max_seconds`` is below :data:`LEAST_CHUNK_SECONDS`.

    Example:
        >>> tone = np.sin(np.arange(3 * 16000))
        >>> tone[20000:24000] = 0
        >>> cut_into_chunks(tone, 16000, max_seconds=2.0)
        [(0, 22400), (22400, 48000)]
    """
    return cut_windows([samples], sampling_rate, max_seconds)


def cut_windows(windows: Iterable[np.ndarray], sampling_rate: int, max_seconds: float) -> list[tuple[int, int]]:
    """As :func:`cut_into_chunks`, of a recording that is given in consecutive windows, which are not kept.

    Args:
        windows: (N,) samples each, of any lengths.
        sampling_rate: samples per second.
        max_seconds: of the longest chunk.
    """
    check_chunk_seconds(max_seconds, "max_seconds")
    hop = max(sampling_rate // _FRAMES_PER_SECOND, 1)
    energies, num_samples = _frame_energies(windows, hop)
    if num_samples <= max_seconds * sampling_rate:
        return [(0, num_samples)] if num_samples else []
    longest = int(max_seconds * sampling_rate) // hop
    cuts = [frame * hop for frame in _cheapest_cuts(_cut_costs(energies, hop), longest // _SHORTEST, longest)]
    return list(zip([0, *cuts], [*cuts, num_samples], strict=True))


def check_chunk_seconds(seconds: float, key: str) -> None:
    """Refuse a longest duration of chunks that is too short.

    Raises:
        ConfigError: naming the key.
    """
    if not seconds >= LEAST_CHUNK_SECONDS:
        raise ConfigError(f"{key}: {seconds:g} is too short for a chunk; give {LEAST_CHUNK_SECONDS:g} second or more.")


def join_translations(translations: Sequence[str], target_lang: str) -> str:
    """The translations of a recording's chunks as one text, with spaces between them if the language is written so.

    Example:
        >>> join_translations(["Guten Tag.", "", "Wie geht es?"], "de"), join_translations(["你好。", "再见。"], "zh")
        ('Guten Tag. Wie geht es?', '你好。再见。')
    """
    space = "" if target_lang.replace("_", "-").split("-")[0].lower() in _WITHOUT_SPACES else " "
    return space.join(text for text in translations if text)


def _frame_energies(windows: Iterable[np.ndarray], hop: int) -> tuple[np.ndarray, int]:
    """The energy of each frame of ``hop`` samples, (F,), the last one of what remains; and the number of samples."""
    energies, rest, num_samples = [np.zeros(0)], np.zeros(0), 0
    for window in windows:
        num_samples += len(window)
        rest = np.concatenate([rest, np.asarray(window, np.float64)])
        whole = len(rest) // hop * hop
        energies.append(np.square(rest[:whole]).reshape(-1, hop).sum(1))
        rest = rest[whole:]
    if len(rest):
        energies.append(np.square(rest).sum(keepdims=True))
    return np.concatenate(energies), num_samples


def _cut_costs(energies_F: np.ndarray, hop: int) -> np.ndarray:
    """What a cut before each frame costs, (F,)."""
    sums = np.concatenate([[0.0], energies_F.cumsum()])
    frames = np.arange(len(energies_F))
    first, last = np.maximum(frames - _PAUSE_FRAMES, 0), np.minimum(frames + _PAUSE_FRAMES, len(frames))
    powers: np.ndarray = (sums[last] - sums[first]) / ((last - first) * hop)
    mean = sums[-1] / (len(frames) * hop)
    return (powers / mean if mean > 0 else powers) + CUT_COST


def _cheapest_cuts(costs_F: np.ndarray, shortest: int, longest: int) -> list[int]:
    """The frames before which to cut into chunks of ``shortest`` to ``longest`` frames, of the least sum of costs.

    Dynamic programming over the last cut, with the minimum over its range kept in a deque, so that time and memory are
    linear in F.
    """
    F = len(costs_F)
    totals, previous = np.full(F + 1, np.inf), np.zeros(F + 1, np.int64)
    totals[0] = 0.0
    costs = [*costs_F.tolist(), 0.0]  # the end of the recording is no cut
    candidates: deque[int] = deque()  # of rising totals
    for frame in range(shortest, F + 1):
        entering = frame - shortest
        if totals[entering] < np.inf:
            while candidates and totals[candidates[-1]] >= totals[entering]:
                candidates.pop()
            candidates.append(entering)
        while candidates and candidates[0] < frame - longest:
            candidates.popleft()
        if candidates:
            previous[frame] = candidates[0]
            totals[frame] = totals[candidates[0]] + costs[frame]
    cuts, frame = [], int(previous[F])
    while frame > 0:
        cuts.append(frame)
        frame = int(previous[frame])
    return cuts[::-1]
