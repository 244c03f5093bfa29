"""The interface of training objectives: what a step's loss holds besides the modalities' own cross-entropies.

An objective is a frozen dataclass of its keys under ``model.objectives.<name>``. A step's loss is a sum over terms,
first the modalities, then the objectives that are active in the step::

    loss = number of ranks * sum over terms of weight(step) * S / N

S is the sum of the term's losses on this rank, N the number of its units on all ranks (modules/loss.py). N is counted
in the batch before the forward pass (:meth:`Objective.units`), so that microbatches, DDP and FSDP2 give the gradient of
one process on the whole batch. An objective of weight 0 in a step is not computed at all.

There are two kinds: those of answer tokens (:class:`TokenObjective`), which the language model's output layer computes
together with the cross-entropy, and those of encoded recordings (:class:`SpeechObjective`).

Shapes: B examples, T tokens, R recordings, F frames, H hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from nemo_emmett.errors import ConfigError, DataError
from nemo_emmett.typed_config import Count, NonNegative, PositiveWhole


@dataclass(frozen=True)
class Objective(ABC):
    """The keys that all objectives have, and what a training step asks of one.

    Steps are those of the optimizer (``trainer.global_step``), so a resumed training goes on with the same weights.
    """

    name: ClassVar[str]
    modality: ClassVar[str]  # whose batches it reads, and to whose loss it belongs
    needs_transcripts: ClassVar[bool] = False  # `train_ds.transcripts` is then true by default
    batch_keys: ClassVar[tuple[str, ...]] = ()  # of a one-modality batch, besides those that every batch has

    weight: NonNegative = 1.0  # of its mean loss in the step's loss
    start_step: Count = 0  # not computed before this step
    warmup_steps: Count = 0  # its weight rises linearly over so many steps, from start_step on
    end_step: PositiveWhole | None = None  # not computed from this step on

    def __post_init__(self) -> None:
        if self.end_step is not None and self.end_step <= self.start_step:
            raise ConfigError(
                f"{self.place}.end_step: {self.end_step} is not after start_step ({self.start_step}); give a later "
                "step, or leave the objective out."
            )

    @property
    def place(self) -> str:
        """Its place in the recipe, for messages."""
        return f"model.objectives.{self.name}"

    def weight_at(self, step: int) -> float:
        """The weight in an optimizer step: 0 outside of [``start_step``, ``end_step``), and with ``warmup_steps`` of n
        a share of 1/(n+1), 2/(n+1), ... in the first steps, so that step ``start_step + n`` has the whole."""
        if step < self.start_step or (self.end_step is not None and step >= self.end_step):
            return 0.0
        return self.weight * min(1.0, (step - self.start_step + 1) / (self.warmup_steps + 1))

    @property
    def has_schedule(self) -> bool:
        """Whether its weight changes."""
        return self.start_step > 0 or self.warmup_steps > 0 or self.end_step is not None

    def check_batch(self, part: Mapping) -> None:
        """Check that a one-modality batch of its modality has what it reads.

        Raises:
            DataError: naming the key of the dataset that provides it.
        """
        if missing := [key for key in self.batch_keys if part.get(key) is None]:
            raise DataError(
                f"{self.place}: a batch of {self.modality} has no `{missing[0]}`; set data.train_ds.transcripts: true "
                "with the dataset SpeechTextDataset, or leave the objective out."
            )

    @abstractmethod
    def units(self, part: Mapping) -> Tensor:
        """The number of its units in a one-modality batch, a scalar of int64; nothing is read from the device."""


@dataclass(frozen=True)
class TokenObjective(Objective):
    """An objective of answer tokens; it applies to all tokens of an example or to none."""

    @abstractmethod
    def examples(self, part: Mapping) -> Tensor:
        """(B,) bool, the examples of a one-modality batch that it applies to."""

    def units(self, part: Mapping) -> Tensor:
        """Target tokens of these examples."""
        return (target_tokens(part) * self.examples(part)).sum()


@dataclass(frozen=True)
class CrossEntropyObjective(TokenObjective):
    """The cross-entropy of some examples in a term of its own; they no longer count in their modality's."""


@dataclass(frozen=True)
class EncodedSpeech:
    """The recordings of a one-modality batch as the step's own forward pass has encoded them.

    Args:
        frames_RFH: (R, F, H), with the gradient of the speech encoder.
        lens_R: (R,) int64, frames.
        recordings_B: (B,) int64, recordings of each example; the batch has them in the order of its examples.
        embed: (B, T) int64 token ids to (B, T, H) embeddings of the language model.
    """

    frames_RFH: Tensor
    lens_R: Tensor
    recordings_B: Tensor
    embed: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class SpeechObjective(Objective):
    """An objective of encoded recordings."""

    modality: ClassVar[str] = "audio"

    @abstractmethod
    def loss_sum(self, part: Mapping, speech: EncodedSpeech) -> Tensor:
        """The sum of the losses of its units in a one-modality batch, a float32 scalar with a gradient, also where the
        batch has no unit. It enters the same modules in any batch (FSDP2)."""


def target_tokens(part: Mapping) -> Tensor:
    """(B,) int64 target tokens of a one-modality batch: of the answers, and of answers of earlier turns."""
    tokens_B = part["answer_lens"]
    if (earlier_BT := part.get("context_targets")) is not None:
        tokens_B = tokens_B + earlier_BT.sum(1)
    return tokens_B
