"""Several examples in a row of a language model's input, one after another, and no example attends to another.

Only rows know of packing: what is counted by example, such as targets, weights and objectives, stays so. The rows of a
batch are chosen where it is made; where an example begins in its row follows from the lengths, on the device.

Shapes: B examples, R rows, S positions of a row, Q and K positions that attend and are attended to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from nemo_emmett.errors import DataError, ModelError

ENCODER_PADDING = 1.25
"""How many seconds the recordings of a row may have for the speech encoder, which pads them to the longest of the
batch, for each second that the row's positions are; where a recipe does not say it (``batch_duration``)."""


class Rows(NamedTuple):
    """The rows into which the examples of a batch are packed.

    Args:
        row_B: (B,) int64, the row of each example, ascending from 0; no row is empty.
        number: R.
        size: most positions of a row.
        answer_size: target tokens of the row with most of them, where these are a sequence of their own
            (encoder-decoders).
    """

    row_B: Tensor
    number: int
    size: int
    answer_size: int

    @classmethod
    def of_batch(cls, batch: Mapping) -> Rows | None:
        """The rows of a one-modality batch; None if each example is a row of its own."""
        if batch.get("packed_rows") is None:
            return None
        return cls(batch["packed_rows"], *batch["packed_sizes"])

    def used(self, lens_B: Tensor) -> Tensor:
        """(R,) int64 positions that are used of each row by examples of these lengths."""
        return lens_B.new_zeros(self.number).index_add(0, self.row_B, lens_B)

    def check(self, longest: int) -> None:
        """Check that rows hold no more than they may.

        Raises:
            DataError: if the fullest row has more positions.
        """
        if longest > self.size:
            raise DataError(
                f"a packed row has {longest} positions, but row_tokens allows {self.size}: recordings have "
                "more positions than token_equivalent_duration says; make that the seconds of a position of the "
                "language model."
            )

    def layout(self, lens_B: Tensor, width: int) -> Layout:
        """Where examples of these lengths are, in rows of a width."""
        ends_B = lens_B.cumsum(0)
        before_B = ends_B - lens_B
        of_row_R = before_B.new_full((self.number,), 2**62).scatter_reduce(0, self.row_B, before_B, "amin")
        return Layout(self.row_B, before_B - of_row_R[self.row_B], lens_B, self.number, width)

    def answer_layout(self, lens_B: Tensor) -> Layout:
        """Where answers of these lengths are, in rows of ``answer_size``: their lengths are known when a batch is made,
        so the host need not read them from the device."""
        return self.layout(lens_B, self.answer_size)


class Layout(NamedTuple):
    """Where the examples of a batch are in rows of S positions.

    Args:
        row_B: (B,) int64, ascending.
        start_B: (B,) int64, the position in its row at which each begins.
        lens_B: (B,) int64.
        number: R.
        width: S.
    """

    row_B: Tensor
    start_B: Tensor
    lens_B: Tensor
    number: int
    width: int

    @property
    def first_B1(self) -> Tensor:
        """(B, 1) int64, the place of each example's first position among all R * S."""
        return (self.row_B * self.width + self.start_B)[:, None]

    def examples_and_positions(self) -> tuple[Tensor, Tensor]:
        """(R, S) int64 numbers of the examples, -1 where there is none; and (R, S) int64 positions in them; what
        follows the last example of a row is counted from 0, too."""
        place_P = torch.arange(self.number * self.width, device=self.row_B.device)
        first_B = self.first_B1.flatten()
        example_P = torch.searchsorted(first_B, place_P, right=True) - 1
        position_P = place_P - first_B[example_P]
        beyond_P = position_P - self.lens_B[example_P]
        is_there_P = beyond_P < 0
        shape = self.number, self.width
        example_RS = torch.where(is_there_P, example_P, -1).view(shape)
        return example_RS, torch.where(is_there_P, position_P, beyond_P).view(shape)

    def positions(self, width: int) -> Tensor:
        """(B, width) int64 positions in its row of each example's first ones; beyond its last, of the row's last."""
        positions_BT = self.start_B[:, None] + torch.arange(width, device=self.row_B.device)
        return positions_BT.clamp(max=self.width - 1)

    def pack(self, values_BT: Tensor, fill: float) -> Tensor:
        """(R, S, ...) the first ``lens_B`` values of each example, (B, T, ...), at their places; ``fill`` elsewhere."""
        column_T = torch.arange(values_BT.shape[1], device=values_BT.device)
        places = self.number * self.width
        # What is dropped goes to one place more, which is cut off.
        place_BT = torch.where(column_T < self.lens_B[:, None], self.first_B1 + column_T, places)
        packed = values_BT.new_full((places + 1, *values_BT.shape[2:]), fill)
        packed = packed.index_copy(0, place_BT.flatten(), values_BT.flatten(0, 1))
        return packed[:places].unflatten(0, (self.number, self.width))


def attention_mask(
    config: PretrainedConfig, queries_RQ: Tensor, keys_RK: Tensor, dtype: torch.dtype, is_causal: bool = False
) -> Any:
    """The mask with which positions attend to those of their own example, for a Hugging Face model.

    Args:
        config: of the model; its attention's implementation decides the mask's form.
        queries_RQ: (R, Q) int64, the example of each position that attends; -1: none. It may attend to anything, since
            nothing is read from it.
        keys_RK: (R, K) int64, of those that are attended to.
        dtype: of the model.
        is_causal: whether positions attend to none after them; Q and K are the same then.

    Returns:
        As the implementation takes it: (R, 1, Q, K) bool or float.

    Raises:
        ModelError: if it takes no mask of that kind.
    """

    def attends(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        example = queries_RQ[batch, query]
        allowed = example == keys_RK[batch, key]
        return allowed & (key <= query) if is_causal else allowed | (example < 0)

    implementation = config._attn_implementation
    if implementation not in ("eager", "sdpa"):  # FlexAttention fails with T5's biases, on a CPU at least
        raise ModelError(
            f"packing: attention by '{implementation}' takes no mask by example in an encoder-decoder; write "
            "model.attn_implementation: sdpa or eager, or leave packing out."
        )
    return ALL_MASK_ATTENTION_FUNCTIONS[implementation](
        batch_size=len(queries_RQ),
        q_length=queries_RQ.shape[1],
        kv_length=keys_RK.shape[1],
        mask_function=attends,
        attention_mask=None,
        allow_is_causal_skip=False,
        dtype=dtype,
        config=config,
        device=queries_RQ.device,
    )
