"""What OOMptimizer must know of a family of models beyond its ``oomptimizer_schema``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from nemo_emmett.oomptimizer.buckets import Shape


@dataclass(frozen=True)
class Extent:
    """What a real batch of one modality holds, to find the bucket that it came from.

    Args:
        modality: ``audio`` or ``text``.
        examples: their number.
        seconds: of speech in the example that has most of it; 0 for text.
        input_tokens: of the longest context, without the recordings.
        output_tokens: of the longest answer.
    """

    modality: str
    examples: int
    seconds: float
    input_tokens: int
    output_tokens: int


class Adapter(ABC):
    """A family of models, as OOMptimizer sees it.

    Args:
        model: the LightningModule.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    @abstractmethod
    def synthetic_batch(self, shape: Shape, size: int, device: torch.device) -> Any:
        """A batch of ``size`` examples of a shape, random but legal, as the training's own batches are.

        The examples are all as long as the shape says. Where attention does without a mask if nothing is padded, the
        first of several is a token shorter. The same shape and size give the same batch; no random state is touched.

        Raises:
            ConfigError: if the model takes no examples of that modality.
        """

    pads_together: bool = False
    """Whether :meth:`join` pads the examples of all groups to one width."""

    measures_conversations: bool = False
    """Whether the examples that the loader measures are conversations, whose prompt counts as a part of the input."""

    def check_alone(self, modality: str) -> None:  # noqa: B027
        """Check that a step may hold a modality and nothing else, as every step does that is not of a ``zip``.

        Raises:
            ConfigError: if the model cannot train on it.
        """

    @abstractmethod
    def join(self, batches: Sequence[Any]) -> Any:
        """One step's batch from one batch of each group, as ``sampler_fusion: zip`` joins them.

        Raises:
            ConfigError: if the model cannot train on them together.
        """

    @abstractmethod
    def extents(self, batch: Any) -> list[Extent]:
        """What a real batch holds, one entry per modality, in the order of ``audio``, ``text``."""

    can_split: bool = True
    """Whether :meth:`split_batch` and :meth:`loss_weight` are there; without them guard cannot redo a step."""

    @abstractmethod
    def split_batch(self, batch: Any, pieces: int) -> list[Any]:
        """Cut a batch into at most so many smaller ones, of about equal size, together the same examples.

        What cannot be cut further is returned as one piece.
        """

    @abstractmethod
    def loss_weight(self, piece: Any, whole: Any) -> float:
        """What the loss of a piece counts in the loss of the whole batch: ``loss(whole) = sum of weight * loss``.

        A piece of weight 0 has nothing to be learned from; its loss may be the mean of no tokens, not a number, and
        must be left out of the sum.
        """

    @contextmanager
    def one_step(self, whole: Any) -> Iterator[None]:
        """Around the pieces of one step: what the model counts per step or agrees on with other ranks is done once."""
        yield

    @contextmanager
    def planning(self) -> Iterator[None]:
        """Around steps on fake tensors: stands in for what the model's code cannot do without values.

        It is entered inside the ``FakeTensorMode``, and :meth:`synthetic_batch` is called inside both.
        """
        yield
