"""The interface between OOMptimizer and a family of models."""

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
    """The size and the lengths of a real batch of one modality, to find the bucket that it came from.

    Args:
        modality: ``audio`` or ``text``.
        examples: their number; of a packed batch, that of its rows.
        seconds: of speech in the example with the most; 0 for text.
        input_tokens: of the longest context, without the recordings.
        output_tokens: of the longest answer.
    """

    modality: str
    examples: int
    seconds: float
    input_tokens: int
    output_tokens: int


class Adapter(ABC):
    """What OOMptimizer needs of a family of models.

    Args:
        model: the LightningModule.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    @abstractmethod
    def synthetic_batch(self, shape: Shape, size: int, device: torch.device) -> Any:
        """A random valid batch of ``size`` examples of a shape, in the form of the training's batches.

        The examples are all as long as the shape. If attention uses no mask for batches without padding, the first of
        several is a token shorter. The same shape and size give the same batch; no random state is changed.

        Raises:
            ConfigError: if the model takes no examples of that modality.
        """

    pads_together: bool = False
    """Whether :meth:`join` pads the examples of all groups to one width."""

    measures_conversations: bool = False
    """Whether the loader measures conversations, whose prompt is a part of the input, and not cuts."""

    def check_alone(self, modality: str) -> None:  # noqa: B027
        """Check that a step may hold a single modality, as every step without ``sampler_fusion: zip`` does.

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
        """The size and the lengths of a real batch, one entry per modality, in the order ``audio``, ``text``."""

    can_split: bool = True
    """Whether :meth:`split_batch` and :meth:`loss_weight` can be called; guard needs them to redo a step."""

    @abstractmethod
    def split_batch(self, batch: Any, count: int) -> list[Any]:
        """Split a batch into at most ``count`` microbatches of about equal size.

        A batch that cannot be split further is returned as a single microbatch.
        """

    @abstractmethod
    def loss_weight(self, microbatch: Any, whole: Any) -> float:
        """The weight of a microbatch's loss in that of the whole batch: ``loss(whole) = sum of weight * loss``.

        A microbatch of weight 0 has no targets; its loss may be the mean of no tokens, NaN, and must be left out of the
        sum.
        """

    @contextmanager
    def one_step(self, whole: Any) -> Iterator[None]:
        """Around the microbatches of a step: what the model counts or reduces over the ranks per step is done once."""
        yield

    @contextmanager
    def planning(self) -> Iterator[None]:
        """Around steps on fake tensors: replaces what the model's code cannot do without values.

        It is entered inside the ``FakeTensorMode``, and :meth:`synthetic_batch` is called inside both.
        """
        yield
