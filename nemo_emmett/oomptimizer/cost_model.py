"""Models of memory and time that predict all buckets from a few readings.

Memory is affine in the batch size, and smooth in the lengths. Above a floor a step's peak is ``intercept + slope *
examples`` (bytes). The slope grows with the lengths x of the input and y of the output as the model's activations do:
linearly where each position is computed alone, with x^2, x*y and y^2 where positions attend to each other. With
coefficients that are not negative the fit cannot fall with the lengths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import nnls

from nemo_emmett.oomptimizer.buckets import Bucket, Shape
from nemo_emmett.oomptimizer.profile import TimeLine


@dataclass(frozen=True)
class Sample:
    """One reading: a step of ``examples`` examples of a shape took ``peak`` bytes."""

    shape: Shape
    examples: int
    peak: float


def features(shape: Shape) -> np.ndarray:
    """(6,) terms that the memory of one example may grow with: 1, x, y, x^2, x*y, y^2."""
    return quadratic_terms(*lengths(shape))


def quadratic_terms(x: ArrayLike, y: ArrayLike) -> np.ndarray:
    """(..., 6) of 1, x, y, x^2, x*y, y^2; x and y broadcast."""
    x, y = np.broadcast_arrays(np.asarray(x, dtype=float), np.asarray(y, dtype=float))
    return np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=-1)


def lengths(shape: Shape) -> tuple[float, float]:
    """Input length (seconds of speech, or tokens of text) and output length (tokens) of a shape."""
    return (shape.seconds if shape.modality == "audio" else float(shape.input_tokens)), float(shape.output_tokens)


@dataclass(frozen=True)
class MemoryModel:
    """The peaks of all buckets of a group: ``intercept + examples * (coefficients . features(shape))``."""

    intercept: float
    coefficients: np.ndarray

    @classmethod
    def fit(cls, samples: Sequence[Sample]) -> MemoryModel:
        """Least squares of the relative errors, with coefficients that are not negative.

        Args:
            samples: readings above the floor; a few of different shapes and sizes.
        """
        rows = np.array([np.concatenate([[1.0], s.examples * features(s.shape)]) for s in samples])
        intercept, *coefficients = relative_nnls(rows, np.array([s.peak for s in samples]))
        return cls(float(intercept), np.array(coefficients))

    def slope(self, shape: Shape) -> float:
        """Bytes of one more example."""
        return float(self.coefficients @ features(shape))

    def peak(self, shape: Shape, examples: int) -> float:
        """Peak of a step in bytes, without the floor."""
        return self.intercept + examples * self.slope(shape)


@dataclass(frozen=True)
class TimedStep:
    """A step with so many examples of a bucket of each of some groups took ``seconds``."""

    sizes: Mapping[Bucket, int]
    seconds: float


def fit_times(steps: Sequence[TimedStep]) -> dict[Bucket, TimeLine]:
    """The time of each bucket's steps: one overhead for all, and an example's own time, smooth in its lengths.

    Args:
        steps: of several buckets and sizes; those of several groups contribute to each.
    """
    groups = sorted({bucket.group for step in steps for bucket in step.sizes})
    rows = []
    for step in steps:
        of_group = {group: np.zeros(6) for group in groups}
        for bucket, size in step.sizes.items():
            of_group[bucket.group] += size * features(bucket.shape)
        rows.append(np.concatenate([[1.0], *of_group.values()]))
    overhead, *each = relative_nnls(np.array(rows), np.array([step.seconds for step in steps]))
    coefficients = dict(zip(groups, np.reshape(each, (len(groups), 6)), strict=True))
    buckets = {bucket for step in steps for bucket in step.sizes}
    return {b: TimeLine(float(overhead), float(coefficients[b.group] @ features(b.shape))) for b in buckets}


def relative_nnls(rows: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Least squares of the relative errors: the coefficients, none negative, with which rows give values."""
    rows = rows / values[:, None]
    # Scaled to columns of equal norm: bytes of all weights and an example's quadratic term differ by many orders.
    scale = np.maximum(np.linalg.norm(rows, axis=0), np.finfo(float).tiny)
    solution, _ = nnls(rows / scale, np.ones(len(values)), maxiter=1000)
    return solution / scale
